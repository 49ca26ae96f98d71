"""The bill against what is really allocated."""

import tracemalloc

import numpy as np
import pytest

from minift.data.batches import Batch
from minift.models import llama
from minift.nn.weight import trainable
from minift.optim.adamw8bit import AdamW8bit
from minift.optim.paged import LARGEST_PAGE, PagedAdamW
from minift.optim.pager import Pager
from minift.quant.sixteen import store
from minift.train import memory, sft
from minift.train.methods import prepare

WIDE = llama.Config(512, 64, 176, 6, 4, 2, 16)
DEEP = llama.Config(512, 64, 96, 8, 4, 4, 16)
TIED = llama.Config(2048, 128, 352, 4, 4, 2, 32, tie_word_embeddings=True)


def bytes_of(items):
    return {item.name: item.nbytes for item in items}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [WIDE, DEEP, TIED])
def test_activations_are_billed_to_a_tenth(config, recompute):
    """The highest point of a training step, without the gradients that it ends with. (Nearly all of them are there at
    the highest point: it lies in the pullback of the first block.)"""
    rng = np.random.default_rng(0)
    params = llama.initialize(config, rng)
    tokens = rng.integers(0, config.vocab_size, (4, 96)).astype(np.int32)
    batch = Batch(tokens, tokens, np.full(4, 96, np.int32))
    tracemalloc.start()
    _, vjp = sft.loss(params, batch, config, recompute=recompute)
    gradients = vjp(1.0)
    peak = tracemalloc.get_traced_memory()[1] - sum(g.nbytes for g in gradients.values())
    tracemalloc.stop()
    billed = bytes_of(memory.bill(config, "full", batch_size=4, seq_len=96, recompute=recompute))["activations"]
    assert 9 / 10 < peak / billed < 11 / 10


@pytest.mark.parametrize("method", ["full", "head", "lora", "qlora"])
def test_weights_adapters_and_gradients_are_billed_exactly(method):
    rng = np.random.default_rng(0)
    params, config = prepare(
        method, llama.initialize(WIDE, rng), WIDE, rng=rng, r=3, target_modules=["q_proj", "up_proj"]
    )
    billed = bytes_of(memory.bill(WIDE, method, r=3, target_modules=["q_proj", "up_proj"], seq_len=4))
    y, vjp = llama.forward(params, np.zeros((1, 4), np.int32), config)
    gradients = vjp(rng.standard_normal(y.shape, np.float32))
    assert billed["gradients"] == sum(g.nbytes for g in gradients.values())
    assert billed["optimizer state"] == 2 * billed["gradients"]
    if method in ("lora", "qlora"):
        assert billed["adapters"] == billed["gradients"]
    held = sum(w.nbytes for w in params.values()) - billed.get("adapters", 0)
    kinds = ("weights", "weights in 4 bits", "quantization constants", "other weights")
    if method == "qlora":  # each tensor also has an offset and a last nested block that is not full
        assert 0 < held - sum(billed.get(kind, 0) for kind in kinds) < 8 * 7 * WIDE.num_hidden_layers
    else:
        assert billed["weights"] == held


@pytest.mark.parametrize("method", ["full", "head", "lora"])
def test_moments_in_8_bits_are_billed_exactly(method):
    """Of arrays with 4,096 numbers or more; in pages, no more than the budget."""
    rng, options = np.random.default_rng(0), {"r": 24, "target_modules": ["k_proj", "up_proj"]}
    params, _ = prepare(method, llama.initialize(WIDE, rng), WIDE, rng=rng, **options)
    optimizer, learned = AdamW8bit(), trainable(params)
    assert len({array.size < 4096 for array in learned.values()}) == (1 if method == "head" else 2)
    optimizer.update({n: a.copy() for n, a in learned.items()}, learned, 0.1)
    state = {
        (kind, budget): bytes_of(memory.bill(WIDE, method, optimizer=kind, page_budget=budget, **options))[
            "optimizer state"
        ]
        for kind in ("adamw8bit", "paged-adamw8bit")
        for budget in (40_000, 10**9)
    }
    assert state["adamw8bit", 40_000] == state["paged-adamw8bit", 10**9] == optimizer.nbytes
    assert state["paged-adamw8bit", 40_000] == 40_000


def test_the_largest_page_is_that_of_a_long_parameter():
    pager = Pager(10**6)
    PagedAdamW(AdamW8bit(), pager).update({"w": np.ones(20_000)}, {"w": np.ones(20_000)}, 0.1)
    PagedAdamW(AdamW8bit(), small := Pager(10**6)).update({"w": np.ones(4095, "f")}, {"w": np.ones(4095, "f")}, 0.1)
    assert pager.peek(0).size == LARGEST_PAGE > small.nbytes


def test_sixteen_bits_halve_what_is_not_quantized():
    full, half = (bytes_of(memory.bill(WIDE, "lora", weight_bits=bits)) for bits in (32, 16))
    assert half["weights"] == full["weights"] / 2
    assert half["activations"] == full["activations"] / 2
    assert half["adapters"] == full["adapters"]
    assert half["optimizer state"] == full["optimizer state"]


@pytest.mark.parametrize("config", [WIDE, TIED])
@pytest.mark.parametrize("method", ["full", "head", "lora", "qlora"])
def test_mixed_precision(method, config):
    """Frozen weights in 16 bits, the rest in 32: what `store` makes of the model weighs what the bill says."""
    rng = np.random.default_rng(0)
    params = llama.initialize(config, rng)
    if method != "full":
        params = store(params, "bfloat16")
    params, _ = prepare(method, params, config, rng=rng, r=3)
    mixed, full = (bytes_of(memory.bill(config, method, r=3, compute_bits=32, weight_bits=bits)) for bits in (16, 32))
    kinds = ("frozen weights", "weights that learn", "adapters", "weights in 4 bits", "quantization constants")
    held, billed = sum(w.nbytes for w in params.values()), sum(mixed.get(k, 0) for k in (*kinds, "other weights"))
    assert 0 <= held - billed < (8 * 7 * config.num_hidden_layers if method == "qlora" else 1)
    for name in ("activations", "gradients", "optimizer state"):
        assert mixed[name] == full[name]
