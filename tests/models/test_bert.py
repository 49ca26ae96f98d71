"""The encoder: against transformers and torch's autograd, with all gradients, and every weight that may learn.

Float64 results of one network by two orders of summation differ by its condition times 2⁻⁵³, which is measured on the
spot as in test_llama.py: how far float32 moves the same result, times 2⁻²⁹ (the ratio of the roundoffs), times 16.
"""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
import wrong_bert
from model_checks import defaults, dropout_keys, watch_blocks

from minift.conformance.gradients import check_gradients
from minift.models import bert
from minift.nn.dropout import fold_in
from minift.nn.weight import dense, freeze, replace, thaw, trainable
from minift.peft import lora, qlora

CONFIG = bert.Config(31, 12, 20, 2, 3, 18, 3, layer_norm_eps=3e-3)  # ε can be seen
TOKENS = np.arange(27).reshape(3, 9) * 11 % 31
LENGTHS = np.array([9, 5, 1])
TYPES = np.arange(27).reshape(3, 9) // 4 % 3
REAL = np.arange(9) < LENGTHS[:, None]


def model(seed=0, dtype=np.float64):
    """Random parameters far from their initial values; gains are not one, biases not zero."""
    rng = np.random.default_rng([seed, 5])
    return {n: (0.5 * rng.standard_normal(s)).astype(dtype) for n, s in bert.shapes(CONFIG).items()}


def theirs(params):
    """BertModel with these parameters, in float64; sdpa, since its eager form clips the mask to a finite number."""
    sizes = dataclasses.asdict(CONFIG) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes |= {"pad_token_id": None}  # else token 0 gets no gradient, wherever it stands
    network = transformers.BertModel(transformers.BertConfig(**sizes, attn_implementation="sdpa")).double().eval()
    network.load_state_dict({n: torch.tensor(w) for n, w in params.items()})
    return network


def their_outputs(network):
    found = network(torch.tensor(TOKENS), attention_mask=torch.tensor(REAL), token_type_ids=torch.tensor(TYPES))
    mask = torch.tensor(REAL, dtype=torch.float64)[..., None]
    mean = (found.last_hidden_state * mask).sum(1) / mask.sum(1)
    return {
        "hidden": found.last_hidden_state,
        "pooled": found.pooler_output,
        "embedding": torch.nn.functional.normalize(mean, dim=-1),
    }


def our_outputs(params, dtype=np.float64):
    """{what: (value, vjp)} of the three things that an encoder is asked for."""
    params = {n: w.astype(dtype) for n, w in params.items()}
    hidden, hidden_vjp = bert.backbone(params, TOKENS, CONFIG, lengths=LENGTHS, token_types=TYPES)
    pooled, pool_vjp = bert.pool(params, hidden)
    mean, mean_vjp = bert.mean_pool(hidden, LENGTHS)
    embedding, unit_vjp = bert.unit_length(mean)

    def pooled_vjp(dy):
        dhidden, above = pool_vjp(dy)
        return hidden_vjp(dhidden) | above

    return {
        "hidden": (hidden, hidden_vjp),
        "pooled": (pooled, pooled_vjp),
        "embedding": (embedding, lambda dy: hidden_vjp(mean_vjp(unit_vjp(dy)))),
    }


def cotangent(what, shape):
    """Random, and zero where there is only padding: there nothing is promised."""
    dy = np.random.default_rng(len(what)).standard_normal(shape)
    return dy * REAL[..., None] if what == "hidden" else dy


def agree(found, expected, low, what):
    assert found.shape == expected.shape and low.dtype == np.float32, what
    allowed = 16 * 2.0**-29 * np.abs(found - low.astype(float)).max(initial=1e-12)
    error = np.abs(found - expected).max(initial=0)
    assert error <= allowed, f"{what}: off by {error:.3g} where {allowed:.3g} is allowed"


# --- properties of the module `bert` as it stands, or with something in it replaced -----------------------------------


def values_are_transformers(what):
    def holds(params):
        expected = their_outputs(theirs(params))[what].detach().numpy()
        (found, _), (low, _) = our_outputs(params)[what], our_outputs(params, np.float32)[what]
        seen = REAL if what == "hidden" else slice(None)
        agree(found[seen], expected[seen], low[seen], what)

    holds.__name__ = f"{what}_is_transformers"
    return holds


def gradients_are_autograds(what):
    def holds(params):
        network = theirs(params)
        value = their_outputs(network)[what]
        dy = cotangent(what, value.shape)
        value.backward(torch.tensor(dy))
        ours, low = our_outputs(params)[what][1](dy), our_outputs(params, np.float32)[what][1](dy.astype(np.float32))
        expected = {n: p.grad.numpy() for n, p in network.named_parameters() if p.grad is not None}
        if what != "pooled":
            expected = {n: g for n, g in expected.items() if not n.startswith("pooler")}
        assert ours.keys() == expected.keys() == low.keys()
        for name, gradient in ours.items():
            agree(gradient, expected[name], low[name], f"{what}: {name}")

    holds.__name__ = f"gradients_of_{what}_are_autograds"
    return holds


WHAT = ("hidden", "pooled", "embedding")
PROPERTIES = [f(what) for what in WHAT for f in (values_are_transformers, gradients_are_autograds)]


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda p: p.__name__)
def test_transformers_agrees(holds):
    holds(model())


def test_wrong_versions_are_rejected(monkeypatch):
    idle, survivors = {p.__name__ for p in PROPERTIES}, []
    for name, replaced in wrong_bert.VERSIONS.items():
        by = []
        with monkeypatch.context() as patch, np.errstate(all="ignore"):
            for attribute, wrong in replaced.items():
                patch.setattr(bert, attribute, wrong)
            for holds in PROPERTIES:
                try:
                    holds(model())
                except (AssertionError, ValueError, IndexError):
                    by.append(holds.__name__)
        print(f"{name:32s} {len(by)}: {', '.join(by)}")
        idle -= set(by)
        survivors += [name] * (not by)
    assert not survivors and not idle


# --- what learns ------------------------------------------------------------------------------------------------------


def embed(params, **options):
    return bert.embed(params, TOKENS, CONFIG, LENGTHS, **options)


def frozen_below(params):
    """Only what stands in the last block learns, and of that not everything."""
    return freeze(params) | {n: w for n, w in params.items() if n.startswith("encoder.layer.1.output.")}


def with_lora(params):
    rng = np.random.default_rng(1)
    carried = lora.attach(params, ["query", "dense"], r=3, rng=rng, modules_to_save=["layer.1.output.LayerNorm"])
    learned = {n: a + 0.1 * rng.standard_normal(a.shape) for n, a in trainable(carried).items()}
    return replace(carried, learned)


def with_qlora(params):
    return with_lora(qlora.quantize(params))


@pytest.mark.parametrize("kind", [dict, frozen_below, with_lora, with_qlora], ids=lambda k: k.__name__)
def test_what_learns_gets_its_gradient_and_nothing_else_does(kind, rng):
    params = kind(model(2))
    expected = {n for n in trainable(params) if not n.startswith("pooler")}
    check_gradients(embed, params, rng=rng, expected=expected)


def test_one_parameter_alone_gets_the_gradient_that_it_has_among_all(rng):
    params, dy = model(2), rng.standard_normal((3, 12))
    full = embed(params)[1](dy)
    for name in full:
        found = embed(freeze(params) | {name: params[name]})[1](dy)
        assert found.keys() == {name} and np.array_equal(found[name], full[name]), name


def test_what_a_pass_keeps_and_which_parts_are_run_backward(monkeypatch, rng):
    """−1 are the embeddings."""
    params, dhidden = model(2), rng.standard_normal((3, 9, 12))
    below = {n: w for n, w in params.items() if n.startswith("encoder.layer.0.")}
    top = {n: w for n, w in params.items() if n.startswith("encoder.layer.1.")}
    embeddings = bert._embeddings
    for learned, parts in ((params, [-1, 0, 1]), (below, [0, 1]), (top, [1]), ({}, [])):
        for options in ({}, {"recompute": True}):
            with monkeypatch.context() as patch:
                kept, run_backward = watch_blocks(bert, patch)

                def watched(*args, run_backward=run_backward):
                    x, vjp = embeddings(*args)
                    return x, lambda dy: run_backward.append(-1) or vjp(dy)

                patch.setattr(bert, "_embeddings", watched)
                _, vjp = bert.backbone(freeze(params) | learned, TOKENS, CONFIG, **options)
                assert kept() == ([] if options else [part for part in parts if part >= 0])
                vjp(dhidden)
                assert run_backward == parts[::-1]


@pytest.mark.parametrize("kind", [with_lora, with_qlora], ids=lambda k: k.__name__)
def test_an_adapter_is_what_it_merges_into(kind):
    params = kind(model(3))
    merged = {n: dense(w).astype(np.float64) for n, w in lora.merge(params).items()}
    low = {n: w.astype(np.float32) for n, w in merged.items()}
    agree(embed(params)[0], embed(merged)[0], embed(low)[0], "embedding")


def test_all_linear_means_every_matrix_that_multiplies():
    learned = trainable(lora.attach(model(), "all-linear", r=2, rng=np.random.default_rng(0)))
    assert len(learned) == 2 * (2 * 6 + 1)  # six a block, and the pooler's
    assert not any("embeddings" in name for name in learned)


@pytest.mark.parametrize("kind", [dict, with_lora], ids=lambda k: k.__name__)
def test_recomputing_changes_no_bit(kind, rng):
    params, dy = kind(model(4)), rng.standard_normal((3, 12))
    (y, vjp), (again, again_vjp) = embed(params), embed(params, recompute=True)
    assert np.array_equal(y, again)
    found, expected = again_vjp(dy), vjp(dy)
    assert found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


# --- who sees whom ----------------------------------------------------------------------------------------------------


def test_padding_is_looked_at_by_nobody():
    """Other tokens there, and more of them, change no bit of what is real; a text alone gives the same."""
    params = model(5)
    y, _ = embed(params)
    other = np.where(REAL, TOKENS, 30 - TOKENS)
    wider = np.pad(other, ((0, 0), (0, 4)), constant_values=7)
    low, _ = embed({n: w.astype(np.float32) for n, w in params.items()})
    assert np.array_equal(embed_of(params, other)[0], y)
    agree(embed_of(params, wider)[0], y, low, "a wider batch")
    for row, n in enumerate(LENGTHS):
        alone, _ = bert.embed(params, TOKENS[row : row + 1, :n], CONFIG, LENGTHS[row : row + 1])
        agree(alone, y[row : row + 1], low[row : row + 1], f"text {row} alone")


def embed_of(params, tokens):
    return bert.embed(params, tokens, CONFIG, LENGTHS)


def test_every_token_sees_every_other_one(rng):
    """The gradient of one token's hidden state reaches the embeddings of all, left and right."""
    params, tokens = model(6), np.arange(7)[None]
    dhidden = np.zeros((1, 7, 12))
    dhidden[0, 3] = rng.standard_normal(12)
    gradient = bert.backbone(params, tokens, CONFIG)[1](dhidden)[bert.WORDS]
    assert (np.abs(gradient[:7]).max(axis=1) > 1e-4).all() and not gradient[7:].any()


def test_dropout_of_adapters_depends_on_the_key():
    params = lora.attach(model(7), "all-linear", r=2, lora_dropout=0.5, rng=np.random.default_rng(0))
    learned = replace(params, {n: np.ones_like(a) for n, a in trainable(params).items()})
    plain, one, same, other = (embed(learned, dropout_key=key)[0] for key in (None, 1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other) and not np.array_equal(one, plain)


def test_dropout_keys_come_from_the_layer_and_the_module(monkeypatch):
    """Six streams a block, which no other code may shift: a run that is resumed draws the same masks."""
    keys = dropout_keys(bert, monkeypatch)
    bert.backbone(model(), TOKENS, CONFIG, dropout_key=11)
    assert keys == [fold_in(fold_in(11, layer), module) for layer in range(2) for module in range(6)]


def test_defaults():
    assert defaults(bert.Config) == {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    assert defaults(bert.initialize) == {"std": 0.02}
    passing = {"dropout_key": None, "recompute": False}
    assert defaults(bert.embed) == passing
    assert defaults(bert.backbone) == {"lengths": None, "token_types": None} | passing
    assert len({CONFIG, dataclasses.replace(CONFIG), dataclasses.replace(CONFIG, vocab_size=3)}) == 2  # a value


def test_initial_parameters():
    """Gains one, biases zero, and numbers of the deviation asked for: within four standard errors, σ/√(2n) and σ/√n."""
    drawn = [w for w in bert.initialize(CONFIG, np.random.default_rng(0), std=0.3).values() if w.ndim == 2]
    numbers = np.concatenate([w.ravel() for w in drawn])
    assert numbers.dtype == np.float32 and abs(numbers.mean()) <= 4 * 0.3 / numbers.size**0.5
    assert abs(numbers.std() - 0.3) <= 4 * 0.3 / (2 * numbers.size) ** 0.5
    params = bert.initialize(CONFIG, np.random.default_rng(0))
    assert {n: w.shape for n, w in params.items()} == bert.shapes(CONFIG)
    assert all((w == n.endswith("LayerNorm.weight")).all() for n, w in params.items() if w.ndim == 1)
    assert thaw(freeze(params)).keys() == params.keys()


def test_what_does_not_fit_is_refused():
    params = model()
    with pytest.raises(ValueError, match=r"shape \(1, 19\), needed \(batch, tokens\) with 1 to 18 tokens"):
        bert.backbone(params, np.zeros((1, 19), int), CONFIG)
    assert bert.backbone(params, np.zeros((1, 18), int), CONFIG)[0].shape == (1, 18, 12)
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        bert.backbone(params, np.zeros((2, 0), int), CONFIG)
    with pytest.raises(IndexError, match=r"token ids span 0\.\.31"):
        bert.backbone(params, np.array([[0, 31]]), CONFIG)
    with pytest.raises(IndexError, match=r"the vocabulary is 0\.\.2"):
        bert.backbone(params, np.array([[0, 1]]), CONFIG, token_types=np.array([[0, 3]]))
    with pytest.raises(ValueError, match="hidden_size is 12, needed a multiple of num_attention_heads, which is 5"):
        dataclasses.replace(CONFIG, num_attention_heads=5)
