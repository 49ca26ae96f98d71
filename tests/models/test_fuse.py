"""Fused parameters: the same model with its weights stacked, in which nothing learns.

The products are those of the unfused model, so results differ by the order of sums only: `allowed` of test_llama."""

import dataclasses

import numpy as np
import pytest
from test_llama import CONFIG, agree, allowed, model, new_cache, random_prefix

from minift.models import llama
from minift.nn.weight import dense, freeze, replace, trainable
from minift.peft import lora
from minift.quant import nf4
from nn import checks

TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
KINDS = ("arrays", "frozen", "adapters", "four bits", "adapters on four bits")


def parameters(kind, rng, config=CONFIG):
    params = model(11, config)
    if "four bits" in kind:
        params |= {n: nf4.quantize(w.astype(np.float32)) for n, w in params.items() if n.endswith("_proj.weight")}
    if "adapters" in kind:  # on some of the modules that are stacked, not on all
        params = lora.attach(params, ["q_proj", "v_proj", "up_proj", "down_proj"], r=2, lora_alpha=3, rng=rng)
        params = replace(params, {n: 0.3 * rng.standard_normal(a.shape) for n, a in trainable(params).items()})
    return freeze(params) if kind == "frozen" else params


def in_float32(params):
    return {n: dense(w).astype(np.float32) for n, w in params.items()}


def ways_to_run(rng, tokens):
    return {
        "plain": {},
        "segments": {"segments": np.array([[0, 0, 1, 1, 1, 2, 2]] * 3)},
        "prefix": {"prefix": random_prefix(rng)},
        "recomputed": {"recompute": True},
    }


@pytest.mark.parametrize(("kind", "config"), [*((kind, CONFIG) for kind in KINDS), ("arrays", TIED)])
def test_the_same_logits_and_nothing_learns(kind, config, rng):
    params, tokens = parameters(kind, rng, config), rng.integers(0, 29, (3, 7))
    before = {n: (w, dense(w).tobytes()) for n, w in params.items()}
    fused = llama.fuse(params)
    assert trainable(fused) == {}
    assert len(fused) == len(params) - 3 * config.num_hidden_layers  # seven products a block have become four
    for what, options in ways_to_run(rng, tokens).items():
        expected, _ = llama.forward(params, tokens, config, **options)
        low, _ = llama.forward(in_float32(params), tokens, config, **options)
        found, vjp = llama.forward(fused, tokens, config, **options)
        agree(found, expected, allowed(expected, low), f"{kind}, {what}")
        assert vjp(rng.standard_normal(found.shape)) == {}
    cache, at = new_cache(3, 7), 0
    expected, _ = llama.forward(params, tokens, config)
    low, _ = llama.forward(in_float32(params), tokens, config)
    for n in (4, 1, 2):
        y, _ = llama.forward(fused, tokens[:, at : at + n], config, cache=cache)
        agree(y, expected[:, at : at + n], allowed(expected, low), f"{kind}, cache at {at}")
        at += n
    assert list(params) == list(before)
    assert all(params[n] is w and dense(w).tobytes() == b for n, (w, b) in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text(kind, rng):
    params, tokens = parameters(kind, rng), rng.integers(0, 29, (3, 4))
    options = {"lengths": np.array([4, 2, 3]), "prefix": random_prefix(rng)}
    texts = [llama.generate(p, tokens, CONFIG, 6, **options) for p in (params, llama.fuse(params))]
    assert np.array_equal(*texts)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cotangents_of_a_soft_prompt_and_a_prefix(kind, recompute, rng):
    """What the frozen model hands down: of embeddings that come in, and of keys and values before the text."""
    params = parameters(kind, rng)
    x, prefix, dy = rng.standard_normal((2, 5, 12)), random_prefix(rng), rng.standard_normal((2, 5, 12))

    def cotangents(params, dtype=np.float64):
        given = x.astype(dtype), CONFIG
        _, vjp = llama.backbone(params, *given, prefix=prefix.astype(dtype), recompute=recompute)
        return vjp(dy.astype(dtype))

    found = cotangents(llama.fuse(params))
    assert found[2] == {}
    pairs = zip(("dx", "dprefix"), found, cotangents(params), cotangents(in_float32(params), np.float32), strict=False)
    for what, fused, expected, low in pairs:
        agree(fused, expected, allowed(expected, low), what)


def test_each_part_stands_in_its_place(rng):
    """Order of the stack, and which names are left."""
    params = parameters("arrays", rng)
    fused = llama.fuse(params)
    for layer in range(CONFIG.num_hidden_layers):
        for module, stacked, parts in (
            ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
        ):
            path = f"model.layers.{layer}.{module}."
            whole = np.concatenate([params[f"{path}{part}.weight"] for part in parts])
            checks.same_bits(fused[f"{path}{stacked}.weight"].array, whole, path)
            assert not any(f"{path}{part}.weight" in fused for part in parts)
    again = llama.fuse(fused)
    assert again.keys() == fused.keys()
    assert all(again[n].array is w.array for n, w in fused.items())


@pytest.mark.parametrize("wrong", ["order", "widths", "gate and up", "adapter left out"])
def test_a_wrong_stack_is_seen(wrong, rng, monkeypatch):
    params, tokens = parameters("adapters", rng), rng.integers(0, 29, (3, 7))
    expected, low = (llama.forward(p, tokens, CONFIG)[0] for p in (params, in_float32(params)))
    fused = llama.fuse(params)
    if wrong == "order":
        monkeypatch.setitem(llama.FUSED, "qkv_proj", ("q_proj", "v_proj", "k_proj"))
        fused = llama.fuse(params)
    if wrong == "gate and up":
        monkeypatch.setitem(llama.FUSED, "gate_up_proj", ("up_proj", "gate_proj"))
        fused = llama.fuse(params)
    if wrong == "adapter left out":
        fused = llama.fuse(lora.detach(params)[0])
    if wrong == "widths":
        name = "model.layers.0.mlp.gate_up_proj.weight"
        fused[name] = type(fused[name])(np.roll(fused[name].array, 1, axis=0))
    with pytest.raises(AssertionError, match="off by"):
        agree(llama.forward(fused, tokens, CONFIG)[0], expected, allowed(expected, low))
