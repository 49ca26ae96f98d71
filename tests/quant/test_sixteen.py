"""Weights in 16 bits: what rounding may cost, products, and models that are frozen in them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minift.conformance.ball import Ball
from minift.io import load_model, save_model
from minift.models import llama
from minift.nn.weight import Frozen, trainable
from minift.peft import lora, qlora
from minift.quant import sixteen
from minift.quant.nf4 import NF4Tensor
from minift.quant.sixteen import SixteenBitTensor, from_bfloat16, round_to, store, to_bfloat16
from nn.checks import kill_matrix
from quant.quant_checks import refused

f32 = np.float32
KINDS = ("bfloat16", "float16")
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIG = llama.Config(40, 16, 24, 2, 4, 2, 4, tie_word_embeddings=True)
finite = st.floats(-65504, 65504, width=32)


# --- rounding: each property holds `to16(x, dtype) -> float32 numbers` against something else ------------------------


def within_the_bound(to16, x):
    """Equation (1), which `Ball.stored` knows as well."""
    for dtype in KINDS:
        ball = Ball(x, f32).stored(dtype)
        found = to16(x, dtype).astype(np.float64)
        assert (np.abs(found - x) <= ball.radius).all(), dtype


def as_torch(to16, x):
    """Bit for bit, ties, subnormal numbers and the sign of zero included."""
    for dtype in KINDS:
        wanted = torch.from_numpy(x).to(TORCH[dtype]).float().numpy()
        assert to16(x, dtype).tobytes() == wanted.tobytes(), dtype


def nothing_is_nearer(to16, x):
    """No neighbor in 16 bits is nearer; of two that are as near it is the even one."""
    for dtype in KINDS:
        kept = to16(x, dtype)
        bits = to_bfloat16(kept) if dtype == "bfloat16" else kept.astype(np.float16).view(np.uint16)
        wide = from_bfloat16 if dtype == "bfloat16" else (lambda b: b.view(np.float16).astype(f32))
        error = np.abs(kept.astype(np.float64) - x)
        for step in (1, -1):
            magnitude = (bits & 0x7FFF).astype(int) + step
            there = (magnitude >= 0) & (magnitude <= (0x7F7F if dtype == "bfloat16" else 0x7BFF))
            neighbor = np.where(there, magnitude, 0).astype(np.uint16) | (bits & 0x8000)
            other = np.abs(wide(neighbor).astype(np.float64) - x)
            worse = there & ((other < error) | ((other == error) & (bits & 1 == 1)))
            assert not worse.any(), f"{dtype}: {x[worse][0]!r} became {kept[worse][0]!r}"


def ours(x, dtype):
    return round_to(x, dtype).dense()


def truncated(x, dtype):
    return (x.view(np.uint32) & 0xFFFF0000).view(f32) if dtype == "bfloat16" else ours(x, dtype)


def ties_away(x, dtype):
    return ((x.view(np.uint32) + 0x8000) & 0xFFFF0000).view(f32) if dtype == "bfloat16" else ours(x, dtype)


def types_swapped(x, dtype):
    return ours(x, KINDS[dtype == "bfloat16"])


def subnormals_flushed(x, dtype):
    kept = ours(x, dtype)
    return np.where(np.abs(kept) < 2.0**-14, f32(0), kept) if dtype == "float16" else kept


def through_the_other(x, dtype):
    return ours(ours(x, "float16"), dtype)


def numbers():
    """Normal ones, ties of either type and what is next to them, the edges of float16's range, subnormal numbers, zeros
    of both signs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(500).astype(f32)
    ties = (1 + np.arange(-7, 8)[:, None] * 2.0 ** -np.arange(7, 13)).ravel().astype(f32)
    beside = [np.nextafter(ties, f32(end)) for end in (-np.inf, np.inf)]
    edges = f32([65504, 65519, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 2.0**-133, 2.0**-134, 3e-39, 1e-45, 0])
    return np.concatenate([x, ties, *beside, edges, -edges, x * f32(2.0**-15), x * f32(1e-38)])


PROPERTIES = (within_the_bound, as_torch, nothing_is_nearer)
WRONG = (truncated, ties_away, types_swapped, subnormals_flushed, through_the_other)


@pytest.mark.parametrize("prop", PROPERTIES)
def test_rounding(prop):
    prop(ours, numbers())


@given(arrays(f32, 20, elements=finite))
def test_rounding_of_drawn_numbers(x):
    for prop in PROPERTIES:
        prop(ours, x)


def test_wrong_rounding_is_rejected():
    kill_matrix(PROPERTIES, WRONG, [numbers()])


def test_nan_and_infinity_in_bfloat16():
    """A NaN stays one, quiet, with its sign and the upper bits of its fraction: also where only its lower bits are set,
    and where adding half a unit would carry into the sign."""
    x = np.array([0x7F800001, 0x7FFFFFFF, 0xFF810000, 0xFFA2FFFF, 0x7F800000, 0xFF800000], np.uint32).view(f32)
    assert to_bfloat16(x).tolist() == [0x7FC0, 0x7FFF, 0xFFC1, 0xFFE2, 0x7F80, 0xFF80]


def test_what_does_not_fit_is_refused():
    w = f32([[1, 2], [65520, 1e5]])
    refused(lambda: round_to(w, "float16"), "65520.0 at index (1, 0) is not finite in float16: keep this weight in")
    assert round_to(w, "bfloat16").dense()[1, 0] == 65536
    refused(lambda: round_to(f32([3.4e38]), "bfloat16"), "at index (0,) is not finite in bfloat16")
    refused(lambda: round_to(f32([np.nan]), "bfloat16"), "nan at index (0,)")
    refused(lambda: round_to(w, "float32"), "dtype: 'float32', needed 'bfloat16' or 'float16'\n")
    refused(lambda: store({"a": w}, "int8"), "dtype: 'int8', needed one of 'float32', 'bfloat16', 'float16'\n")
    refused(lambda: store({"a": w}, "float16"), "a: 65520.0 at index (1, 0)")
    refused(lambda: SixteenBitTensor(w), "bits: float32, needed float16, or uint16 that holds bfloat16\n")


def test_frozen_and_compared_by_identity():
    w, same = (round_to(np.ones((3, 4), f32), "bfloat16") for _ in range(2))
    assert w == w and w != same and len({w, same}) == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        w.bits = same.bits


# --- the weight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("arithmetic", [np.float32, np.float64])
def test_products_are_those_of_the_rounded_weight(dtype, arithmetic, rng):
    """y = x Ŵᵀ and dx = dy Ŵ in the type of x; against x Wᵀ the error is that of storing W, and of the sum."""
    w, x, dy = (rng.standard_normal(s).astype(f32) for s in ((6, 9), (2, 3, 9), (2, 3, 6)))
    x, dy = x.astype(arithmetic), dy.astype(arithmetic)
    kept = round_to(w, dtype)
    y, vjp = kept.linear(x)
    dx, dweight = vjp(dy)
    exact = Ball(kept.dense(np.float64), arithmetic)
    (Ball(x, arithmetic) @ exact.T).check(y, "y")
    (Ball(dy, arithmetic) @ exact).check(dx, "dx")
    assert dweight is None and y.dtype == dx.dtype == arithmetic
    stored = Ball(w, f32).stored(dtype)
    (Ball(x, arithmetic) @ Ball(stored.value, arithmetic, stored.radius).T).check(y, "y against W")
    assert kept.nbytes == 2 * w.size and kept.dtype == dtype and kept.arrays() == {} and kept.shape == w.shape
    assert repr(kept) == f"SixteenBitTensor({dtype} (6, 9), 108 bytes)"
    assert kept.with_arrays({}) is kept and kept.dense(np.float16).dtype == np.float16


def test_store(rng):
    params = llama.initialize(CONFIG, rng)
    kept = store(params | {"model.norm.weight": Frozen(params["model.norm.weight"])}, "bfloat16")
    assert all(isinstance(w, SixteenBitTensor) for w in kept.values()) and not trainable(kept)
    assert 2 * sum(w.nbytes for w in kept.values()) == sum(w.nbytes for w in params.values())
    assert store(params, "float32") == params
    four = store(qlora.quantize(params), "float16")
    assert sum(isinstance(w, NF4Tensor) for w in four.values()) == 14
    over = store(lora.attach(params, r=2, rng=rng), "float16")
    name = "model.layers.0.mlp.up_proj.weight"
    assert over[name].base.dtype == "float16" and over[name].A.dtype == np.float32


@pytest.mark.parametrize("dtype", KINDS)
def test_lora_over_a_sixteen_bit_model(dtype, rng):
    """The model, its adapter's gradients, generation, merging and QLoRA are those of the rounded weights in float32."""
    kept = store(llama.initialize(CONFIG, rng), dtype)
    rounded = {name: w.dense() for name, w in kept.items()}
    tokens = rng.integers(0, 40, (2, 7))
    found, wanted = (lora.attach(p, r=2, rng=np.random.default_rng(1)) for p in (kept, rounded))
    for p in (found, wanted):
        for w in p.values():
            if isinstance(w, lora.LoRA):
                w.B[:] = 0.1
    assert isinstance(found["model.layers.0.mlp.up_proj.weight"].base, SixteenBitTensor)
    (y, vjp), (y2, vjp2) = (llama.forward(p, tokens, CONFIG) for p in (found, wanted))
    assert y.dtype == np.float32 and y.tobytes() == y2.tobytes()
    gradients, gradients2 = vjp(y), vjp2(y)
    assert gradients.keys() == gradients2.keys() == trainable(found).keys()
    assert all(g.tobytes() == gradients2[name].tobytes() for name, g in gradients.items())
    one, other = (llama.generate(llama.fuse(p), tokens, CONFIG, 3) for p in (found, wanted))
    assert one.tobytes() == other.tobytes()
    for a, b in zip(qlora.quantize(kept).values(), qlora.quantize(rounded).values(), strict=True):
        assert (a.dense() if isinstance(a, NF4Tensor | SixteenBitTensor) else a).tobytes() == (
            b.dense() if isinstance(b, NF4Tensor) else b
        ).tobytes()


@pytest.mark.parametrize("dtype", KINDS)
def test_files_of_sixteen_bits(dtype, tmp_path, rng):
    """Written in 16 bits and read into 16 bits is nothing lost; what is read so is written again as it was."""
    params = llama.initialize(CONFIG, rng)
    save_model(tmp_path / "a", CONFIG, params, dtype=dtype)
    _, kept = load_model(tmp_path / "a", dtype=dtype)
    for name, w in store(params, dtype).items():
        assert kept[name].dtype == dtype and kept[name].bits.tobytes() == w.bits.tobytes()
    save_model(tmp_path / "b", CONFIG, kept, dtype=dtype)
    one, other = (tmp_path / folder / "model.safetensors" for folder in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_a_small_step_needs_more_than_sixteen_bits():
    """Why what learns is float32: steps of 1e-3 at 1 are rounded away by bfloat16, and add up in float32."""
    w = f32(1)
    for _ in range(10):
        w = from_bfloat16(to_bfloat16(np.array(w + f32(1e-3))))
    assert w == 1 and 1e-3 < sixteen.from_bfloat16(np.array(0x3F81, np.uint16)) - 1 < 1e-2
