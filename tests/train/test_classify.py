"""Classification: the head on both trunks, what each method lets learn, and the peers that count words.

That transformers and PEFT compute the same logits is tested in tests/io/test_encoder.py."""

import math
from collections import Counter

import numpy as np
import pytest
import wrong_classify

from minift.conformance.gradients import check_gradients, check_vjp
from minift.data.labeled import pad_labeled
from minift.models import bert, classifier, llama
from minift.nn.losses import log_softmax
from minift.nn.weight import trainable
from minift.train import classify, naive_bayes
from minift.train.loop import Settings, fit
from models.model_checks import defaults
from nn import checks

BERT = bert.Config(23, 12, 16, 2, 3, 9, layer_norm_eps=1e-3)
LLAMA = llama.Config(23, 12, 16, 2, 3, 3, 4)
TRUNKS = {"bert": (BERT, bert), "llama": (LLAMA, llama)}
TOKENS = np.arange(18).reshape(3, 6) * 5 % 23
LENGTHS = np.array([6, 4, 2])


def trunk(name, seed=0):
    config, module = TRUNKS[name]
    rng = np.random.default_rng([seed, 3])
    return config, {n: 0.5 * rng.standard_normal(shape) for n, shape in module.shapes(config).items()}


def headed(name, classes=4, seed=0):
    """Trunk and head, all far from their initial values."""
    config, params = trunk(name, seed)
    rng = np.random.default_rng([seed, 4])
    params = classifier.with_head(params, config, classes, rng)
    return config, {n: w + 0.1 * rng.standard_normal(w.shape) for n, w in params.items()}


# --- properties: op(params, tokens, lengths, config) ------------------------------------------------------------------


def reads_what_it_says(op, name):
    config, params = headed(name)
    for row, n in enumerate(LENGTHS):
        found = op(params, TOKENS, LENGTHS, config)[0][row]
        alone = TOKENS[row : row + 1, :n]
        if name == "llama":
            expected = params[classifier.SCORE] @ llama.backbone(params, alone, config)[0][0, -1]
        else:
            inner = {key.removeprefix("bert."): w for key, w in params.items()}
            first = bert.backbone(inner, alone, config)[0][0, 0]
            pooled = np.tanh(inner["pooler.dense.weight"] @ first + inner["pooler.dense.bias"])
            expected = params[classifier.WEIGHT] @ pooled + params[classifier.BIAS]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def gradients(op, name):
    config, params = headed(name)
    expected = {n for n in params if n != llama.HEAD}
    rng = np.random.default_rng(1)
    check_gradients(lambda params: op(params, TOKENS, LENGTHS, config), params, rng=rng, expected=expected)


PROPERTIES = [reads_what_it_says, gradients]


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda p: p.__name__)
def test_logits(holds, name):
    holds(classifier.logits, name)


@pytest.mark.parametrize(("name", "wrong"), [("bert", wrong_classify.BERT), ("llama", wrong_classify.LLAMA)])
def test_logits_kill_matrix(name, wrong):
    checks.kill_matrix(PROPERTIES, wrong, [name])


@pytest.mark.parametrize("name", TRUNKS)
def test_features_are_of_the_frozen_trunk(name):
    config, params = trunk(name)
    found = classifier.features(params, TOKENS, LENGTHS, config)
    if name == "bert":
        expected = bert.embed(params, TOKENS, config, LENGTHS)[0]
    else:
        expected = llama.backbone(params, TOKENS, config)[0][np.arange(3), LENGTHS - 1]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("classes", [1, 4])
def test_fresh_heads(name, classes):
    """Deviations of 1/50 and 1/√13 for d = 12, in the trunk's type, up to the roundings of two products: the seed
    says the rest."""
    config, params = trunk(name)
    params = {n: w.astype(np.float32) for n, w in params.items()}
    found = classifier.with_head(params, config, classes, np.random.default_rng(5))
    drawn = np.random.default_rng(5).standard_normal((classes, 12)) / (50 if name == "bert" else math.sqrt(13))
    weight = found[classifier.WEIGHT if name == "bert" else classifier.SCORE]
    assert weight.dtype == np.float32 and np.abs(weight - drawn).max() <= 2 * 2.0**-24 * np.abs(drawn).max()
    if name == "bert":
        bias = found[classifier.BIAS]
        assert bias.dtype == np.float32 and bias.shape == (classes,) and not bias.any()


def test_without_asking_nothing_is_dropped_and_everything_kept():
    assert defaults(classifier.logits) == {"dropout_key": None, "recompute": False}


def test_there_is_no_class_without_a_row():
    config, params = trunk("bert")
    with pytest.raises(ValueError, match="classes is 0, needed at least 1"):
        classifier.with_head(params, config, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="row 1 has 0 tokens"):
        classifier.logits(headed("llama")[1], TOKENS, np.array([2, 0, 1]), LLAMA)


# --- the methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRUNKS)
def test_what_each_method_lets_learn(name, rng):
    config, params = trunk(name)
    head = {"bert": {"classifier.weight", "classifier.bias"}, "llama": {"score.weight"}}[name]
    found = {m: set(trainable(classify.prepare(m, params, config, 4, rng=rng, r=2))) for m in ("head", "lora", "full")}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if name == "bert" else set()
    assert found["head"] == head | pooler
    assert head < found["lora"] and all("lora_" in n for n in found["lora"] - head)
    assert len(found["lora"] - head) == 2 * (2 * 6 + 1 if name == "bert" else 2 * 7)
    assert found["full"] == set(classifier.with_head(params, config, 4, rng))
    with pytest.raises(ValueError, match=r"method is 'features', needed one of \('head', 'lora', 'full'\)"):
        classify.prepare("features", params, config, 4, rng=rng)


@pytest.mark.parametrize("name", TRUNKS)
def test_loss_is_the_mean_surprise_and_parts_add_up(name):
    config, params = headed(name)
    texts = pad_labeled([row[:n] for row, n in zip(TOKENS, LENGTHS, strict=True)], [3, 0, 3])
    value, vjp = classify.loss(params, texts, config)
    surprise = -log_softmax(classifier.logits(params, TOKENS, LENGTHS, config)[0])[np.arange(3), [3, 0, 3]]
    assert math.isclose(value, surprise.mean(), rel_tol=1e-12)
    parts = [texts.take(np.array(rows)) for rows in ([0, 2], [1])]
    found = [classify.loss(params, part.cut(int(part.lengths.max())), config, 3.0) for part in parts]
    assert math.isclose(value, sum(v for v, _ in found), rel_tol=1e-12)
    whole, split = vjp(2.0), [part_vjp(2.0) for _, part_vjp in found]
    for key, gradient in whole.items():
        np.testing.assert_allclose(sum(part[key] for part in split), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["head", "lora", "full"])
@pytest.mark.parametrize("name", TRUNKS)
def test_every_method_learns_by_heart(name, method, rng):
    """Ten texts of random words, labels at random: what learns enough can know them all."""
    config, module = TRUNKS[name]
    params = module.initialize(config, rng, std=0.3)
    texts = [rng.integers(0, 23, n).astype(np.int32) for n in rng.integers(2, 7, 10)]
    data = pad_labeled(texts, rng.integers(0, 3, 10))
    prepared = classify.prepare(method, params, config, 3, rng=rng, r=4)

    def loss(params, batch, normalizer, key):
        return classify.loss(params, batch, config, normalizer)

    settings = Settings(steps=60, learning_rate=0.03, warmup_steps=5)
    result = fit(prepared, loss, lambda step: [data], settings)
    before, after = (classify.loss(p, data, config)[0] for p in (prepared, result.params))
    assert after < (0.8 if method == "head" else 0.2) * before
    start = trainable(prepared)
    assert not [n for n, a in trainable(result.params).items() if np.array_equal(a, start[n])]


def test_features_learn_at_any_scale(rng):
    """Features a million times larger than others, divided by `scale_of`; of them as they are it is W / scale."""
    size = 10.0 ** rng.integers(-3, 4, 6)
    x = (rng.standard_normal((40, 6)) * size).astype(np.float32)
    labels = np.argmax((x / size) @ rng.standard_normal((6, 3)), axis=1)
    scale = classify.scale_of(x)
    np.testing.assert_allclose(np.sqrt(np.mean((x / scale) ** 2, axis=0)), 1, rtol=1e-5)
    assert np.array_equal(classify.scale_of(np.zeros((4, 2), np.float32)), np.ones(2))
    data = classify.FeatureSet(x / scale, labels)

    def loss(params, batch, normalizer, key):
        return classify.feature_loss(params, batch, normalizer)

    settings = Settings(steps=300, learning_rate=0.1, weight_decay=0)
    result = fit(classify.on_features(6, 3), loss, lambda step: [data], settings)
    as_they_are = {"classifier.weight": result.params["classifier.weight"] / scale} | {
        "classifier.bias": result.params["classifier.bias"]
    }
    logits = classify.feature_logits(as_they_are, x)[0]
    np.testing.assert_allclose(logits, classify.feature_logits(result.params, x / scale)[0], rtol=1e-3, atol=1e-3)
    assert classify.accuracy(logits, labels) > 0.9


def test_feature_gradients(rng):
    labels = np.array([0, 2, 2, 1])
    x, w, b = rng.standard_normal((4, 5)), rng.standard_normal((3, 5)), rng.standard_normal(3)

    def loss(w, b):
        params = {"classifier.weight": w, "classifier.bias": b}
        value, vjp = classify.feature_loss(params, classify.FeatureSet(x, labels))
        return value, lambda dloss: tuple(vjp(dloss).values())

    check_vjp(loss, w, b, rng=rng)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_over_texts_keeps_the_order(batch_size, rng):
    texts = [rng.integers(1, 9, n).astype(np.int32) for n in (5, 1, 3, 3, 7)]
    seen = []

    def count(batch):
        seen.append(len(batch))
        return np.stack([batch.lengths, batch.batch.tokens.sum(axis=1)], axis=1)

    found = classify.over_texts(count, texts, batch_size)
    assert found.tolist() == [[len(t), t.sum()] for t in texts]
    assert max(seen) <= batch_size and sum(seen) == 5
    with pytest.raises(ValueError, match="no texts"):
        classify.over_texts(count, [])


def test_accuracy_and_confusion():
    predicted, labels = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 2, 2, 1])
    assert classify.accuracy(np.eye(3)[predicted], labels) == 3 / 5
    assert classify.confusion(predicted, labels, 3).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


# --- counting words ---------------------------------------------------------------------------------------------------


def test_naive_bayes_is_its_equation(rng):
    """Against a loop over texts, classes and words, with a word that was never seen."""
    words = np.array(["a", "b", "c", "dd", "e5"])
    texts = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 6, 20)]
    labels = np.r_[np.arange(3), rng.integers(0, 3, 17)]
    asked = ["a, B! c", "unseen", "dd dd dd e5", ""]
    vocabulary = {w for t in texts for w in t.split()}
    expected = []
    for text in ["a b c", "", "dd dd dd e5", ""]:
        scores = []
        for c in range(3):
            seen = Counter(w for t, label in zip(texts, labels, strict=True) if label == c for w in t.split())
            score = math.log(np.mean(labels == c))
            score += sum(math.log((seen[w] + 1) / (seen.total() + len(vocabulary))) for w in text.split())
            scores.append(score)
        expected.append(int(np.argmax(scores)))
    assert naive_bayes.fit(texts, labels, 3).predict(asked).tolist() == expected
    with pytest.raises(ValueError, match="class 3 has no text"):
        naive_bayes.fit(texts, labels, 4)
