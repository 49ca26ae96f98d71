"""GPT-2 in torch: the reference's logits, gradients, texts and losses, whatever learns; wrong versions."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from twin_models import Expected, agree, cast, kinds, survivors, tensor

from minift.data.batches import pack
from minift.models import gpt2 as reference
from minift.train import sft
from minift_kernels.models import gpt2
from minift_kernels.params import from_numpy
from minift_kernels.train import sft as torch_sft
from wrong_kernels import wrong_models

CONFIG = reference.Config(31, 12, 20, 2, 3, 9, layer_norm_epsilon=3e-3)  # the MLP is not 4 d wide; ε can be seen
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)
TOKENS = np.arange(14).reshape(2, 7) * 11 % 31
KINDS = kinds(["c_attn", "c_fc", "c_proj"], "h.1.ln_2", "transformer.h.1.mlp.")
OPTIONS = {
    "plain": {},
    "packed": {"segments": np.array([[0, 0, 1, 1, 1, 2, -1], [0, 0, 0, 0, 1, 1, 1]]), "dropout_key": 3},
    "dropout": {"dropout_key": 12345},
    "recomputed": {"dropout_key": 7, "recompute": True},
}


def model(kind="full", config=CONFIG):
    """Random parameters far from their initial values; gains are not one, biases not zero."""
    rng = np.random.default_rng(7)
    return KINDS[kind]({n: 0.5 * rng.standard_normal(s) for n, s in reference.shapes(config).items()})


@functools.cache
def logits(kind, name, config):
    return Expected(lambda p: reference.forward(p, TOKENS, config, **OPTIONS[name]), model(kind, config))


def logits_are_the_references(kind, name, config=CONFIG):
    given = {key: tensor(x) if isinstance(x, np.ndarray) else x for key, x in OPTIONS[name].items()}
    logits(kind, name, config)(lambda p: gpt2.forward(p, tensor(TOKENS), config, **given))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_references(kind, options):
    logits_are_the_references(kind, options)


@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_a_head_of_its_own(kind):
    logits_are_the_references(kind, "plain", UNTIED)


def test_wrong_versions_are_rejected(monkeypatch):
    properties = [
        functools.partial(logits_are_the_references, *case) for case in (("full", "plain"), ("lora", "packed"))
    ]
    assert not survivors(gpt2, wrong_models.GPT2, properties, monkeypatch)


def test_from_embeddings(rng):
    params, x = model(), rng.standard_normal((2, 5, 12))
    (value, vjp), (low, low_vjp) = (
        reference.backbone(cast(params, t), x.astype(t), CONFIG) for t in (np.float64, np.float32)
    )
    given = tensor(x).requires_grad_()
    found = gpt2.backbone(from_numpy(params), given, CONFIG)
    agree(found, value, low, "hidden")
    dy = rng.standard_normal(value.shape).astype(np.float32)
    found.backward(tensor(dy).double())
    agree(given.grad, vjp(dy.astype(float))[0], low_vjp(dy)[0], "dembeddings")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_the_same_text(kind, fused, rng):
    """Greedy and sampled, prompts of different lengths, until the table of positions ends; a stop token."""
    params, tokens, lengths = model(kind), rng.integers(0, 31, (3, 5)), np.array([5, 1, 3])
    there = from_numpy(params, dtype=torch.float64)
    there = gpt2.fuse(there) if fused else there
    for options in ({}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "lengths": lengths}, {"stop_tokens": range(15)}):
        one, two = np.random.default_rng(3), np.random.default_rng(3)
        wanted = reference.generate(params, tokens, CONFIG, max_new_tokens=5, rng=one, **options)
        given = options | {"lengths": tensor(lengths)} if "lengths" in options else options
        found = gpt2.generate(there, tensor(tokens), CONFIG, max_new_tokens=5, rng=two, **given)
        assert np.array_equal(found.numpy(), wanted)


def test_every_kernel_together():
    """In the interpreter: float32, no further from float64 than four times the reference's own float32."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    adapted = kinds(["c_attn"], "h.0.ln_2", "")["qlora"](model(config=config))
    tokens, segments = TOKENS[:1, :6], np.array([[0, 0, 1, 1, 1, 2]])
    expected = Expected(lambda p: reference.forward(p, tokens, config, segments=segments, dropout_key=5), adapted)
    options = {"segments": tensor(segments), "dropout_key": 5, "backend": "interpreter"}
    expected(lambda p: gpt2.forward(p, tensor(tokens), config, **options), np.float32, of=4)


@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_the_loss_of_a_packed_batch_and_its_gradient(kind, rng):
    """Rows are wider than the table of positions, texts are not."""
    texts = [rng.integers(0, 31, n) for n in (9, 4, 7, 3, 8)]
    batch = pack([(text, text) for text in texts], 18)
    assert batch.tokens.shape[1] > CONFIG.max_position_embeddings
    params = model(kind)
    (value, vjp), (low, low_vjp) = (
        sft.loss(cast(params, t), batch, CONFIG, 17.0, dropout_key=3) for t in (np.float64, np.float32)
    )
    found, pullback = torch_sft.loss(from_numpy(params, dtype=torch.float64), batch, CONFIG, 17.0, dropout_key=3)
    agree(found, np.asarray(value), np.asarray(low), "loss")
    gradients, expected, of_float32 = pullback(0.7), vjp(0.7), low_vjp(np.float32(0.7))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        agree(gradient, expected[name], of_float32[name], name)


def test_what_is_refused():
    params, tokens = from_numpy(model()), torch.zeros(1, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match="a text of 10 tokens, and the model has learned 9 positions"):
        gpt2.forward(params, tokens, CONFIG)
    with pytest.raises(ValueError, match="a text of 11 tokens"):
        gpt2.generate(params, tokens[:, :8], CONFIG, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"shape \(10,\), needed \(batch, tokens\) with at least one token"):
        gpt2.forward(params, tokens[0], CONFIG)
    with pytest.raises(IndexError, match="31"):
        gpt2.forward(params, tokens[:, :2] + 31, CONFIG)
    gpt2.forward(params, tokens, CONFIG, segments=torch.arange(10)[None] // 5)  # two texts of 5 fit
