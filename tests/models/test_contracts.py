"""The contracts on a model of two blocks: every way of training it, through one generic gradient check, in float64.

If the shape of `y, vjp`, of a weight, or of the trunk were wrong for one method, it would show here.
"""

import dataclasses
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from minift.conformance.gradients import assert_derivative, check_gradients
from minift.models import llama
from minift.nn.attention import KVCache
from minift.nn.embedding import embedding
from minift.nn.linear import linear
from minift.nn.losses import IGNORE_INDEX, cross_entropy
from minift.nn.weight import Frozen, freeze, replace, trainable
from minift.peft import lora, qlora

CONFIG = llama.Config(
    vocab_size=29,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,  # not hidden_size / heads: W_q is 24 × 12
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)


@pytest.fixture
def tokens(rng):
    return rng.integers(0, CONFIG.vocab_size, (3, 5))


def double(params):
    return {name: w.astype(np.float64) for name, w in params.items()}


def model(rng, config=CONFIG):
    """Random float64 parameters, far from their initial values: gains are not one."""
    return {name: 0.5 * rng.standard_normal(shape) for name, shape in llama.shapes(config).items()}


def away_from_zero(params, rng):
    """An adapter in the middle of training: B is not zero; everything that learns is float64."""
    return replace(params, {name: 0.3 * rng.standard_normal(a.shape) for name, a in trainable(params).items()})


def test_full(rng, tokens):
    check_gradients(lambda p: llama.forward(p, tokens, CONFIG), model(rng), rng=rng)


def test_tied_embeddings_get_the_sum_of_both_uses(rng, tokens):
    params = model(rng, TIED)
    check_gradients(lambda p: llama.forward(p, tokens, TIED), params, rng=rng)
    y, vjp = llama.forward(params, tokens, TIED)
    dy = rng.standard_normal(y.shape)
    untied = params | {llama.HEAD: params[llama.EMBEDDING]}
    apart = llama.forward(untied, tokens, CONFIG)[1](dy)
    together = vjp(dy)[llama.EMBEDDING]
    np.testing.assert_allclose(together, apart[llama.EMBEDDING] + apart[llama.HEAD], rtol=1e-12)


def test_head_only(rng, tokens):
    params = freeze(model(rng))
    params[llama.HEAD] = params[llama.HEAD].array
    check_gradients(lambda p: llama.forward(p, tokens, CONFIG), params, rng=rng, expected={llama.HEAD})


def test_only_the_last_block_learns(rng, tokens):
    """The blocks below keep nothing and take no part in the backward pass; the gradients are those of full training."""
    everything = model(rng)
    params = freeze(everything) | {n: w for n, w in everything.items() if n.startswith("model.layers.1.")}
    check_gradients(lambda p: llama.forward(p, tokens, CONFIG), params, rng=rng)
    y, vjp = llama.forward(params, tokens, CONFIG)
    y_full, vjp_full = llama.forward(everything, tokens, CONFIG)
    assert np.array_equal(y, y_full)
    dy = rng.standard_normal(y.shape)
    full = vjp_full(dy)
    for name, gradient in vjp(dy).items():
        assert np.array_equal(gradient, full[name]), name


@pytest.mark.parametrize("use_double_quant", [False, True])
def test_lora_over_nf4(rng, tokens, use_double_quant):
    params = qlora.attach(
        model(rng), ["q_proj", "down_proj"], r=3, lora_alpha=7, rng=rng, use_double_quant=use_double_quant
    )
    params = away_from_zero(params, rng)
    assert len(trainable(params)) == 2 * 2 * 2  # layers × modules × (A, B), and nothing else
    check_gradients(lambda p: llama.forward(p, tokens, CONFIG), params, rng=rng)


def test_soft_prompt_fed_as_embeddings(rng, tokens):
    """A learned prompt in front of embedded tokens; its gradient comes out of the trunk as `dembeddings`."""
    params = freeze(model(rng))
    params["prompt"] = rng.standard_normal((2, CONFIG.hidden_size))

    def function(p):
        table = p[llama.EMBEDDING]
        text, _ = embedding(tokens, table)
        inputs = np.concatenate([np.broadcast_to(p["prompt"], (len(tokens), 2, CONFIG.hidden_size)), text], axis=1)
        hidden, backbone_vjp = llama.backbone(p, inputs, CONFIG)
        logits, head_vjp = linear(hidden, p[llama.HEAD])

        def vjp(dlogits):
            dinputs, _, gradients = backbone_vjp(head_vjp(dlogits)[0])
            assert gradients == {}
            return {"prompt": dinputs[:, :2].sum(axis=0)}

        return logits, vjp

    check_gradients(function, params, rng=rng)


def test_soft_prompt_copied_from_token_embeddings_is_those_tokens(rng, tokens):
    params = model(rng)
    typed, _ = llama.forward(params, tokens, CONFIG)
    embedded, _ = llama.forward(params, params[llama.EMBEDDING][tokens], CONFIG)
    assert np.array_equal(typed, embedded)


def test_prefix(rng, tokens):
    params = freeze(model(rng))
    shape = (CONFIG.num_hidden_layers, 2, CONFIG.num_key_value_heads, 3, CONFIG.head_dim)
    params["prefix"] = rng.standard_normal(shape)

    def function(p):
        hidden, backbone_vjp = llama.backbone(p, tokens, CONFIG, prefix=p["prefix"])

        def vjp(dhidden):
            dembeddings, dprefix, gradients = backbone_vjp(dhidden)
            assert dembeddings is None
            assert gradients == {}
            return {"prefix": dprefix}

        return hidden, vjp

    check_gradients(function, params, rng=rng)


def test_scalar_head_on_the_last_real_token(rng, tokens):
    """A reward model is the trunk and a scalar head; padding has no say."""
    params = lora.attach(model(rng), ["v_proj"], r=2, lora_alpha=5, rng=rng) | {
        "score.weight": rng.standard_normal((1, 12))
    }
    params = away_from_zero(params, rng)
    lengths = np.array([5, 2, 4])
    last = np.arange(3), lengths - 1

    def function(p, tokens=tokens):
        hidden, backbone_vjp = llama.backbone(p, tokens, CONFIG, lengths=lengths)
        reward, head_vjp = linear(hidden[last], p["score.weight"])

        def vjp(dreward):
            drow, dscore, _ = head_vjp(dreward)
            dhidden = np.zeros_like(hidden)
            dhidden[last] = drow
            return backbone_vjp(dhidden)[2] | {"score.weight": dscore}

        return reward, vjp

    check_gradients(function, params, rng=rng)
    other_padding = np.where(np.arange(5) < lengths[:, None], tokens, 0)
    assert np.array_equal(function(params)[0], function(params, other_padding)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_with_and_without_recomputation(rng, tokens, recompute):
    """A recomputed block must see the mask that it was run with: the gradients are equal, bit for bit."""
    params = lora.attach(model(rng), r=2, lora_alpha=3, lora_dropout=0.4, rng=rng)
    params = away_from_zero(params, rng)

    def function(p, recompute=recompute):
        return llama.forward(p, tokens, CONFIG, dropout_key=11, recompute=recompute)

    check_gradients(function, params, rng=rng)
    (y, vjp), (y_kept, vjp_kept) = function(params), function(params, recompute=False)
    assert np.array_equal(y, y_kept)
    dy = rng.standard_normal(y.shape)
    kept = vjp_kept(dy)
    for name, gradient in vjp(dy).items():
        assert np.array_equal(gradient, kept[name]), name
    assert not np.array_equal(y, llama.forward(params, tokens, CONFIG)[0])  # dropout is off without a key
    assert not np.array_equal(y, llama.forward(params, tokens, CONFIG, dropout_key=12)[0])


def test_gradient_accumulation_is_the_large_batch(rng, tokens):
    """Micro-batches with very different numbers of labels, each normalized by the number in the whole batch."""
    params = model(rng)
    labels = rng.integers(0, CONFIG.vocab_size, tokens.shape)
    labels[0, :4] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    total = float((labels != IGNORE_INDEX).sum())

    def gradient(rows):
        logits, vjp = llama.forward(params, tokens[rows], CONFIG)
        loss, loss_vjp = cross_entropy(logits, labels[rows], total)
        return loss, vjp(loss_vjp(1.0))

    loss, whole = gradient(slice(None))
    parts = [gradient(slice(row, row + 1)) for row in range(3)]
    assert np.isclose(sum(part for part, _ in parts), loss, rtol=1e-13)
    for name, g in whole.items():
        np.testing.assert_allclose(sum(part[name] for _, part in parts), g, rtol=1e-10, atol=1e-14, err_msg=name)
    mean_of_means = np.mean(
        [cross_entropy(llama.forward(params, tokens[[r]], CONFIG)[0], labels[[r]])[0] for r in range(3)]
    )
    assert abs(mean_of_means - loss) > 0.01  # the famous bug is visible on this batch


def test_loss_gradient_end_to_end(rng, tokens):
    """The scalar loss along one direction in all parameters at once."""
    params, labels = model(rng), rng.integers(0, CONFIG.vocab_size, tokens.shape)
    direction = {name: rng.standard_normal(w.shape) for name, w in params.items()}

    def along(h):
        moved = {name: w + h * direction[name] for name, w in params.items()}
        return float(cross_entropy(llama.forward(moved, tokens, CONFIG)[0], labels)[0])

    logits, vjp = llama.forward(params, tokens, CONFIG)
    gradients = vjp(cross_entropy(logits, labels)[1](1.0))
    assert_derivative(along, sum(float(np.vdot(gradients[n], direction[n])) for n in params), "loss")


def test_generation_keeps_no_activations(rng):
    """The peak of memory is the same whether the weights could learn or not, and far below that of a training pass."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=12)
    params, tokens = model(rng, config), rng.integers(0, CONFIG.vocab_size, (1, 60))

    def peak(function):
        tracemalloc.start()
        function()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    learning = peak(lambda: llama.generate(params, tokens, config, 2))
    frozen = peak(lambda: llama.generate(freeze(params), tokens, config, 2))
    training = peak(lambda: llama.forward(params, tokens, config))
    evaluation = peak(lambda: llama.forward(params, tokens, config, recompute=True))
    assert learning < 1.1 * frozen
    assert evaluation < training / 4
    with pytest.raises(ValueError, match="has no pullback"):
        cache = KVCache(12, 1, 2, 60, 6, np.float64)
        llama.backbone(params, tokens, config, cache=cache)[1](np.zeros((1, 60, 12)))


def test_a_prefix_belongs_into_the_cache(rng, tokens):
    prefix = rng.standard_normal((2, 2, 2, 3, 6))
    with pytest.raises(ValueError, match="put the prefix into the cache"):
        llama.backbone(model(rng), tokens, CONFIG, prefix=prefix, cache=KVCache(2, 3, 2, 9, 6, np.float64))


def test_the_frozen_model_has_no_gradient_and_its_bytes_do_not_change(rng, tokens):
    params = freeze(model(rng))
    before = {name: w.array.tobytes() for name, w in params.items()}
    y, vjp = llama.forward(params, tokens, CONFIG)
    assert vjp(rng.standard_normal(y.shape)) == {}
    assert all(isinstance(w, Frozen) and w.array.tobytes() == before[name] for name, w in params.items())


SHAPES = """
import numpy as np
from minift.io import load_model
from minift.models import llama
config, params = load_model("tiny")
for shape in ((5,), (0,), (2, 0), (1, 2, 3)):
    try:
        llama.forward(params, np.zeros(shape, np.int64), config)
    except ValueError as error:
        print(error)
try:
    llama.forward(params, np.zeros((1, 3)), config)
except ValueError as error:
    print(error)
"""


def test_inputs_of_another_shape_are_refused():
    """As a user calls it: without the checker of signatures, which would refuse most of them here."""
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True)
    shapes = ["(5,)", "(0,)", "(2, 0)", "(1, 2, 3)"]
    needed = [f"the input has shape {shape}, needed (batch, tokens) with at least one token" for shape in shapes]
    needed += ["the input has shape (1, 3), needed (batch, tokens, hidden_size) with at least one token"]
    assert done.stdout.splitlines() == needed, done


@pytest.mark.parametrize("token", [-1, CONFIG.vocab_size, 2**40])
def test_tokens_outside_the_vocabulary_are_refused(rng, token):
    """NumPy would wrap the first around."""
    with pytest.raises(IndexError, match=rf"span .*{token}.*, the vocabulary is 0\.\.{CONFIG.vocab_size - 1}"):
        llama.forward(model(rng), np.array([[1, token]]), CONFIG)
