"""NF4: bit for bit bitsandbytes', by the properties of minift.conformance, and as a weight of a model."""

import hashlib

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from minift.conformance import check
from minift.conformance.common import same_bits
from minift.conformance.gradients import check_vjp
from minift.conformance.operations.nf4 import OPERATIONS, TABLE, THRESHOLDS
from minift.conformance.strategies import Numbers, battery
from minift.nn.linear import linear
from minift.nn.weight import Weight, trainable
from minift.quant import blockwise, nf4
from quant.quant_checks import peak_memory, refused

f32 = np.float32
CASES = battery(THRESHOLDS)


def test_table_is_derived_bit_for_bit():
    digest = hashlib.sha256(nf4.normal_quantiles().astype("<f4").tobytes()).hexdigest()
    assert digest == "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    assert nf4.CODE.tobytes() == TABLE.tobytes()
    assert nf4.MIDPOINTS.tobytes() == THRESHOLDS.tobytes()
    assert nf4.CODE[nf4.ZERO] == 0
    assert not nf4.CODE.flags.writeable and not nf4.MIDPOINTS.flags.writeable


def test_offset_is_the_mean_of_two_probabilities():
    assert round(((1 - 1 / 30) + (1 - 1 / 32)) / 2, 7) == nf4.OFFSET


@pytest.mark.parametrize("prop", OPERATIONS[0].properties, ids=lambda p: p.__name__)
@pytest.mark.parametrize(("name", "x", "block_size"), CASES, ids=[name for name, *_ in CASES])
def test_battery(prop, name, x, block_size):
    prop(nf4.quantize, Numbers.of(x, block_size))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_drawn(operation):
    check(operation.name, operation.reference, examples=60, dtypes=("float32", "float64", "float16"))


def test_what_is_not_finite_is_refused_by_its_place():
    for bad in (np.nan, np.inf, -np.inf):
        for at in ((0, 0), (1, 30), (4, 39)):
            x = np.ones((5, 40), f32)
            x[at] = bad
            refused(lambda x=x: nf4.quantize(x, 64), f"cannot quantize {bad} at index {at} (1 of 200 elements")
    too_large = np.array([0, 1, 2, 1e300, 4, 5, -np.inf])
    refused(lambda: nf4.quantize(too_large, 64), "cannot quantize 1e+300 at index (3,) (2 of 7 elements")


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bitsandbytes_gives_the_same_bytes(block_size, dtype, rng):
    x = (rng.standard_normal((12, block_size)) * rng.lognormal(0, 2, (12, 1))).astype(dtype)
    x[5:9] = 0
    packed, state = bnb.quantize_4bit(torch.from_numpy(x), blocksize=block_size, quant_type="nf4")
    q = nf4.quantize(x, block_size)
    same_bits(q.codes, packed.numpy().ravel(), "codes")
    same_bits(q.absmax, state.absmax.numpy(), "absmax")
    decoded = bnb.dequantize_4bit(packed, state).numpy()
    same_bits(nf4.dequantize(q, dtype), decoded, "decoded")


def test_bitsandbytes_at_every_threshold():
    _, x, _ = next(case for case in CASES if case[0] == "all kinds, 64")
    packed, state = bnb.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type="nf4")
    q = nf4.quantize(x)
    same_bits(q.codes, packed.numpy().ravel(), "codes")
    same_bits(q.absmax, state.absmax.numpy(), "absmax")


@pytest.mark.parametrize("block_size", [64, 4096])
def test_many_chunks(block_size, rng):
    """Large tensors are worked on a piece at a time: the same as each piece by itself, and as bitsandbytes."""
    x = rng.standard_normal(3 * blockwise.CHUNK + 99).astype(f32)
    q = nf4.quantize(x, block_size)
    pieces = [nf4.quantize(x[i : i + 8192], block_size) for i in range(0, x.size, 8192)]
    same_bits(q.codes, np.concatenate([p.codes for p in pieces]), "codes")
    same_bits(q.absmax, np.concatenate([p.absmax for p in pieces]), "absmax")
    same_bits(nf4.dequantize(q), np.concatenate([p.dense() for p in pieces]), "decoded")
    packed, state = bnb.quantize_4bit(torch.from_numpy(x), blocksize=block_size, quant_type="nf4")
    same_bits(q.codes, packed.numpy().ravel(), "codes of bitsandbytes")
    same_bits(nf4.dequantize(q), bnb.dequantize_4bit(packed, state).numpy().ravel(), "bitsandbytes")


def test_worked_example():
    """STYLE.md 4b: one block of eight, by hand."""
    w = np.array([0.12, -0.34, 0.56, -1.20, 0.90, 0.00, -0.05, 0.31], f32)
    q = nf4.quantize(w)
    assert q.codes.tobytes() == bytes.fromhex("84c0e77a")
    assert q.absmax.tolist() == [f32(1.2)]
    assert np.round(nf4.dequantize(q), 4).tolist() == [
        f32(v) for v in (0.0955, -0.3413, 0.5289, -1.2, 0.8675, 0, 0, 0.2953)
    ]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 64])
def test_pack_and_unpack_are_inverse(n, rng):
    codes = rng.integers(0, 16, n).astype(np.uint8)
    packed = nf4.pack(codes)
    assert packed.tolist() == [int(16 * a + b) for a, b in zip(codes[::2], [*codes[1::2], *[7] * (n % 2)], strict=True)]
    assert nf4.unpack(packed, n).tolist() == codes.tolist()
    assert nf4.unpack(packed, n).dtype == np.uint8


def test_default_block_is_64():
    q = nf4.quantize(np.ones(640, f32))
    assert q.block_size == 64 and q.absmax.shape == (10,)
    assert nf4.NF4Tensor(q.codes, q.absmax, (640,)).block_size == 64


@pytest.mark.parametrize("block_size", [0, 16, 31, 48, 8192, -64, True, 64.0, "64"])
def test_other_block_sizes_are_refused(block_size):
    message = r"block_size: .*, needed one of 32, 64, 128, 256, 512, 1024, 2048, 4096$"
    with pytest.raises(ValueError, match=message):
        nf4.check_block_size(block_size)
    if type(block_size) is int:
        with pytest.raises(ValueError, match=message):
            nf4.quantize(np.ones(8, f32), block_size)
        with pytest.raises(ValueError, match=message):
            nf4.NF4Tensor(np.zeros(4, np.uint8), np.ones(1, f32), (8,), block_size)


def test_parts_that_do_not_fit_are_refused():
    codes, absmax = np.full(33, 0x77, np.uint8), np.ones(2, f32)
    nf4.NF4Tensor(codes, absmax, (65,), 64)
    for args, message in [
        ((codes[:-1], absmax, (65,), 64), r"codes: uint8 \(32,\), needed uint8 \(33,\), two of the 65 elements"),
        ((codes.astype(np.int8), absmax, (65,), 64), r"codes: int8 \(33,\), needed uint8"),
        ((codes[:, None], absmax, (65,), 64), r"codes: uint8 \(33, 1\), needed uint8 \(33,\)"),
        ((codes, absmax[:1], (65,), 64), r"absmax: float32 \(1,\), needed float32 \(2,\), one for each block of 64"),
        ((codes, absmax.astype(np.float64), (65,), 64), r"absmax: float64 \(2,\), needed float32"),
        ((codes, absmax, (5, -13), 64), r"shape: \(5, -13\), needed a tuple of integers >= 0"),
        ((np.full(33, 0x70, np.uint8), absmax, (65,), 64), r"codes: odd size 65, .* is 0, not 7"),
        ((np.full(33, 0x7F, np.uint8), absmax, (65,), 64), r"codes: odd size 65, .* is 15, not 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            nf4.NF4Tensor(*args)


# NF4Tensor as a weight.


@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
def test_linear_gradient(rows, rng):
    q = nf4.quantize(rng.standard_normal((7, 10)), 32)
    check_vjp(lambda x, w: q.linear(x), rng.standard_normal((*rows, 10)), rng.standard_normal(1), rng=rng, frozen=[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_linear_is_the_decoded_matrix(dtype, rng):
    """In the type of x: float64 for proofs, one rounding from the float32 product otherwise."""
    q = nf4.quantize(rng.standard_normal((6, 11)).astype(f32))
    x, dy = rng.standard_normal((2, 3, 11)).astype(dtype), rng.standard_normal((2, 3, 6)).astype(dtype)
    w = nf4.dequantize(q).astype(dtype)
    y, vjp = linear(x, q)
    same_bits(y, x @ w.T, "y")
    dx, dweight, dbias = vjp(dy)
    same_bits(dx, dy @ w, "dx")
    assert dweight is None and dbias is None


def test_closure_does_not_keep_the_matrix(rng):
    q = nf4.quantize(rng.standard_normal((64, 64)))
    _, vjp = q.linear(rng.standard_normal((2, 64)))
    kept = [cell.cell_contents for cell in vjp.__closure__]
    assert all(not isinstance(item, np.ndarray) for item in kept)


def test_linear_needs_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(64,\), needed \(out, in\)"):
        nf4.quantize(np.ones(64, f32)).linear(np.ones(64, f32))


def test_nothing_learns(rng):
    q = nf4.quantize(rng.standard_normal((4, 4)))
    assert isinstance(q, Weight)
    assert q.arrays() == {} and q.with_arrays({}) is q
    assert trainable({"w.weight": q}) == {}
    same_bits(q.dense(), nf4.dequantize(q), "dense")
    same_bits(q.dense(np.float64), nf4.dequantize(q).astype(np.float64), "dense")


def test_frozen_and_compared_by_identity():
    """Comparing field by field would ask whether arrays are true."""
    q, same = nf4.quantize(np.ones(64, f32)), nf4.quantize(np.ones(64, f32))
    assert q == q and q != same and len({q, same}) == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        q.block_size = 32


def test_bytes_and_repr():
    q = nf4.quantize(np.ones((4096, 100), f32))
    assert q.nbytes == 4096 * 100 // 2 + 4 * 6400
    assert q.bits_per_parameter == 4.5
    assert repr(q) == "NF4Tensor((4096, 100), 4.500 bits per parameter, 230,400 bytes)"
    assert nf4.quantize(np.zeros((0, 3), f32)).bits_per_parameter == 0
    assert q.scales() is q.absmax


def test_temporaries_stay_small(rng):
    """Beside the result only a few chunks, a tenth of the matrix here."""
    x = rng.standard_normal((1024, 2048)).astype(f32)
    q, peak = peak_memory(lambda: nf4.quantize(x))
    assert peak < q.nbytes + 16 * blockwise.CHUNK
    w, peak = peak_memory(lambda: nf4.dequantize(q))
    assert peak < w.nbytes + 16 * blockwise.CHUNK
