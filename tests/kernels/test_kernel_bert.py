"""The encoder in torch: the reference's hidden states, vectors and gradients, whatever learns; wrong versions."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from twin_models import Expected, cast, kinds, survivors, tensor

from minift.models import bert as reference
from minift_kernels.models import bert
from minift_kernels.params import from_numpy
from wrong_kernels import wrong_models

CONFIG = reference.Config(31, 12, 20, 2, 3, 18, 3, layer_norm_eps=3e-3)  # ε can be seen
TOKENS = np.arange(27).reshape(3, 9) * 11 % 31
LENGTHS = np.array([9, 5, 1])
TYPES = np.arange(27).reshape(3, 9) // 4 % 3
REAL = np.arange(9) < LENGTHS[:, None]
KINDS = kinds(["query", "dense"], "layer.1.output.LayerNorm", "encoder.layer.1.output.")
OPTIONS = {
    "plain": {},
    "ragged": {"lengths": LENGTHS, "token_types": TYPES},
    "dropout": {"lengths": LENGTHS, "dropout_key": 12345},
    "recomputed": {"lengths": LENGTHS, "dropout_key": 7, "recompute": True},
}


def model(kind="full", config=CONFIG):
    """Random parameters far from their initial values; gains are not one, biases not zero."""
    rng = np.random.default_rng(5)
    return KINDS[kind]({n: 0.5 * rng.standard_normal(s) for n, s in reference.shapes(config).items()})


@functools.cache
def hidden_states(kind, name):
    real = REAL if "lengths" in OPTIONS[name] else None
    return Expected(lambda p: reference.backbone(p, TOKENS, CONFIG, **OPTIONS[name]), model(kind), real)


def hidden_states_are_the_references(kind, name):
    given = {key: tensor(x) if isinstance(x, np.ndarray) else x for key, x in OPTIONS[name].items()}
    hidden_states(kind, name)(lambda p: bert.backbone(p, tensor(TOKENS), CONFIG, **given))


@functools.cache
def pooled(kind):
    def ours(params):
        hidden, hidden_vjp = reference.backbone(params, TOKENS, CONFIG, lengths=LENGTHS)
        y, pool_vjp = reference.pool(params, hidden)

        def vjp(dy):
            dhidden, above = pool_vjp(dy)
            return hidden_vjp(dhidden) | above

        return y, vjp

    return Expected(ours, model(kind))


def pooled_is_the_references(kind):
    def theirs(params):
        return bert.pool(params, bert.backbone(params, tensor(TOKENS), CONFIG, lengths=tensor(LENGTHS)))

    pooled(kind)(theirs)


@functools.cache
def embeddings(kind):
    return Expected(lambda p: reference.embed(p, TOKENS, CONFIG, LENGTHS, dropout_key=3), model(kind))


def embeddings_are_the_references(kind, recompute=False):
    options = {"dropout_key": 3, "recompute": recompute}
    embeddings(kind)(lambda p: bert.embed(p, tensor(TOKENS), CONFIG, tensor(LENGTHS), **options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_gradients_are_the_references(kind, options):
    hidden_states_are_the_references(kind, options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_of_hidden_states(kind):
    pooled_is_the_references(kind)
    embeddings_are_the_references(kind, recompute=True)


def test_wrong_versions_are_rejected(monkeypatch):
    properties = [functools.partial(hidden_states_are_the_references, "lora", name) for name in ("ragged", "dropout")]
    properties += [functools.partial(f, "full") for f in (pooled_is_the_references, embeddings_are_the_references)]
    assert not survivors(bert, wrong_models.BERT, properties, monkeypatch)


def test_padding_is_looked_at_by_nobody():
    """Other tokens there change no bit of what is real."""
    params = from_numpy(model(), dtype=torch.float64)
    one, two = (
        bert.embed(params, tensor(tokens), CONFIG, tensor(LENGTHS)) for tokens in (TOKENS, np.where(REAL, TOKENS, 3))
    )
    assert torch.equal(one, two)


def test_every_kernel_together():
    """In the interpreter: float32, no further from float64 than four times the reference's own float32."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    adapted = kinds(["query"], "layer.0.output.LayerNorm", "")["qlora"]
    tokens, lengths = TOKENS[:2, :5], LENGTHS[1:]
    expected = Expected(
        lambda p: reference.embed(p, tokens, config, lengths, dropout_key=5), adapted(model(config=config))
    )
    options = {"dropout_key": 5, "backend": "interpreter"}
    expected(lambda p: bert.embed(p, tensor(tokens), config, tensor(lengths), **options), np.float32, of=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_activations_of_16_bits(dtype):
    """Weights that learn in float32 multiply in 16 bits: within what weights changed by √K u of 16 bits do, four times
    (values and gradients of a layer are rounded in several places), and gradients are float32."""
    params, rng = cast(model(), np.float32), np.random.default_rng(0)
    size = np.sqrt(20) * torch.finfo(dtype).eps / 2
    shaken = {n: (w * (1 + size * rng.choice([-1, 1], w.shape))).astype(np.float32) for n, w in params.items()}
    exact, _ = reference.embed(params, TOKENS, CONFIG, LENGTHS)
    moved, _ = reference.embed(shaken, TOKENS, CONFIG, LENGTHS)
    there = from_numpy(params)
    found = bert.embed(there, tensor(TOKENS), CONFIG, tensor(LENGTHS), dtype=dtype)
    assert found.dtype == dtype
    assert np.abs(found.detach().float().numpy() - exact).max() <= 4 * np.abs(moved - exact).max()
    found.backward(torch.randn_like(found))  # a vector of length 1: its sum of squares has no gradient
    assert there[bert.WORDS].grad.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    params = from_numpy(model())
    with pytest.raises(ValueError, match=r"shape \(1, 19\), needed \(batch, tokens\) with 1 to 18 tokens"):
        bert.backbone(params, torch.zeros(1, 19, dtype=torch.int64), CONFIG)
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        bert.backbone(params, torch.zeros(2, 0, dtype=torch.int64), CONFIG)
    with pytest.raises(IndexError, match=r"token ids span 0\.\.31"):
        bert.backbone(params, torch.tensor([[0, 31]]), CONFIG)
    with pytest.raises(IndexError, match=r"the vocabulary is 0\.\.2"):
        bert.backbone(params, torch.tensor([[0, 1]]), CONFIG, token_types=torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match="row 1 has 0 tokens, needed 1 to 2"):
        bert.embed(params, torch.zeros(2, 2, dtype=torch.int64), CONFIG, torch.tensor([2, 0]))
