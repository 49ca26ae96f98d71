"""Block-wise quantization with any codebook, and where the codebooks come from."""

import hashlib

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from minift.conformance import check, strategies
from minift.conformance.common import same_bits
from minift.conformance.operations.blockwise import OPERATIONS
from minift.conformance.quantizers import quantizer, thresholds_of
from minift.conformance.strategies import Numbers, battery, neighbors
from minift.quant import blockwise, codebooks, nf4
from quant.quant_checks import peak_memory, refused

f32 = np.float32
CODEBOOKS = {
    "int4": codebooks.INT4,
    "int8": codebooks.INT8,
    "fp4": codebooks.FP4,
    "nf4": nf4.CODE,
    "dynamic": codebooks.DYNAMIC,
    "no zero": np.array([-1, -0.25, 0.5, 1], f32),
    "two": np.array([-1, 1], f32),
    "crowded": np.array([-1, 0, 0.5, 0.5 + 2.0**-24, 0.5 + 2.0**-23, 1], f32),
}
TINY_GAPS = np.array([-1, -3e-41, 1e-41, 1], f32)  # a threshold among the subnormal numbers


# Codebooks.


def test_dynamic_maps_bit_for_bit():
    signed, unsigned = codebooks.dynamic(), codebooks.dynamic(signed=False)
    for code, digest in (
        (signed, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (unsigned, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ):
        assert code.shape == (256,) and hashlib.sha256(code.astype("<f4").tobytes()).hexdigest() == digest
    assert signed[127] == 0 and signed[255] == 1 and signed[0] == f32(-0.992968738)
    assert unsigned[0] == 0 and unsigned[255] == 1
    assert (signed == codebooks.DYNAMIC).all() and (unsigned == codebooks.DYNAMIC_UNSIGNED).all()


def test_dynamic_map_needs_the_fused_multiply_add():
    """Without it some entries are one ulp off: that they are rebuilt exactly is no accident."""
    from unittest.mock import patch

    plain = codebooks.torch_linspace
    with patch.object(codebooks, "torch_linspace", lambda a, b, n, fused: plain(a, b, n)):
        assert np.count_nonzero(codebooks.dynamic() != codebooks.DYNAMIC) == 42


def test_linear_codebooks_are_symmetric():
    assert codebooks.INT4.tolist() == [f32(i / 7) for i in range(-7, 8)]
    assert codebooks.INT8.tolist() == [f32(i / 127) for i in range(-127, 128)]
    assert codebooks.linear(2).tolist() == [-1, 0, 1]


def test_fp4_is_bitsandbytes():
    table = bnb.get_4bit_type("fp4", device="cpu").numpy()
    assert codebooks.FP4_BY_CODE.tolist() == table.tolist()
    assert codebooks.FP4.tolist() == sorted(set(table.tolist()))
    codes = codebooks.fp4_codes(np.arange(15, dtype=np.uint8))
    assert codes.dtype == np.uint8 and 8 not in codes
    assert codebooks.FP4_BY_CODE[codes].tolist() == codebooks.FP4.tolist()


def test_fp4_codes_of_bitsandbytes_away_from_zero_and_ties(rng):
    """bitsandbytes gives numbers that become zero the code 0 or 8 by their sign; otherwise the codes are equal."""
    x = rng.standard_normal((64, 64)).astype(f32)
    packed, state = bnb.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type="fp4")
    theirs = nf4.unpack(packed.numpy().ravel(), x.size)
    q = blockwise.quantize(x, codebooks.FP4, 64)
    ours = codebooks.fp4_codes(q.codes)
    zero = ours == 0
    assert set(theirs[zero].tolist()) <= {0, 8} and 0 < zero.mean() < 0.01
    assert (ours[~zero] == theirs[~zero]).all()
    same_bits(q.absmax, state.absmax.numpy(), "absmax")


@pytest.mark.parametrize("name", ["INT4", "INT8", "FP4", "FP4_BY_CODE", "DYNAMIC", "DYNAMIC_UNSIGNED"])
def test_codebooks_cannot_be_changed(name):
    code = getattr(codebooks, name)
    assert code.dtype == f32
    with pytest.raises(ValueError, match="read-only"):
        code[0] = 0
    assert (code == 0).any() and np.abs(code).max() == 1


# The rule.


def properties_of(code):
    """For a codebook that is none of those that the suite holds others against."""
    found = quantizer(lambda f, x, case: f(x, code, case.block_size), lambda case: code, packed=False)
    apart = np.diff(code).min() > 2.0**-20  # entries that rounding cannot take for each other
    return [prop for prop in found if apart or prop.__name__ != "quantizing_again_changes_nothing"]


@pytest.mark.parametrize("name", CODEBOOKS)
def test_battery(name):
    code = CODEBOOKS[name]
    for _, x, block_size in battery(blockwise.midpoints(code), (32, 96)):
        for prop in properties_of(code):
            prop(blockwise.quantize, Numbers.of(x, block_size))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_drawn(operation):
    check(operation.name, operation.reference, examples=60, dtypes=("float32", "float64", "float16"))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_any_block_size(name):
    code = CODEBOOKS[name]

    @settings(max_examples=30)
    @given(strategies.numbers(thresholds_of(code.tobytes()), (1, 2, 7, 32, 300), ("float32", "float64")))
    def hold(case):
        for prop in properties_of(code):
            prop(blockwise.quantize, case)

    hold()


@pytest.mark.parametrize("block_size", [1000, 70_000])
def test_many_chunks(block_size, rng):
    """Large tensors are worked on a piece at a time: the same as each piece by itself."""
    x = rng.standard_normal(3 * blockwise.CHUNK + 99).astype(f32)
    q = blockwise.quantize(x, codebooks.DYNAMIC, block_size)
    pieces = [blockwise.quantize(x[i : i + block_size], q.code, block_size) for i in range(0, x.size, block_size)]
    same_bits(q.codes, np.concatenate([p.codes for p in pieces]), "codes")
    same_bits(q.absmax, np.concatenate([p.absmax for p in pieces]), "absmax")
    decoded = np.concatenate([blockwise.dequantize(p) for p in pieces])
    same_bits(blockwise.dequantize(q), decoded, "decoded")


def test_temporaries_stay_small(rng):
    x = rng.standard_normal((1024, 2048)).astype(f32)
    q, peak = peak_memory(lambda: blockwise.quantize(x, codebooks.DYNAMIC))
    assert peak < q.nbytes + 24 * blockwise.CHUNK
    w, peak = peak_memory(lambda: blockwise.dequantize(q))
    assert peak < w.nbytes + 16 * blockwise.CHUNK


def test_unsigned_map_for_what_is_not_negative(rng):
    x = (rng.standard_normal((5, 300)) ** 2).astype(f32)
    x[2, :9] = 0
    for prop in properties_of(codebooks.DYNAMIC_UNSIGNED):
        prop(blockwise.quantize, Numbers.of(x, 256))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_three_ways_to_count(name, rng):
    """Naive, by passes and by table, at every threshold, its neighbors, and the ends of all 65,536 intervals."""
    thresholds = blockwise.midpoints(CODEBOOKS[name])
    near = neighbors(np.concatenate([thresholds, f32([0.0, -0.0, 1, -1, 1e-45, -1e-45])]))
    scaled = np.concatenate([near, np.linspace(-1, 1, 999, dtype=f32), rng.standard_normal(999).astype(f32)])
    expected = blockwise.count_below_1(scaled, thresholds)
    same_bits(blockwise.count_below_2(scaled, thresholds), expected, "passes")
    same_bits(blockwise.count_below(scaled, thresholds), expected, "the fastest")
    if name == "crowded":
        with pytest.raises(ValueError, match=r"^two thresholds share their upper 16 bits: use count_below_2$"):
            blockwise.count_below_3(scaled, thresholds)
    else:
        same_bits(blockwise.count_below_3(scaled, thresholds), expected, "table")


@pytest.mark.parametrize("count", [blockwise.count_below_1, blockwise.count_below_2, blockwise.count_below_3])
def test_counting_in_three_axes(count, rng):
    scaled = rng.uniform(-1, 1, (3, 5, 7)).astype(f32)
    found = count(scaled, nf4.MIDPOINTS)
    same_bits(found, np.searchsorted(nf4.MIDPOINTS, scaled).astype(np.uint8), "codes")


def test_many_crowded_thresholds():
    """More than a few thresholds, two of them in one interval of the table: counted by passes."""
    thresholds = np.unique(np.append(codebooks.DYNAMIC[::2], 0.5 + 2.0 ** -np.arange(16, 20))).astype(f32)
    refused(lambda: blockwise.count_below_3(thresholds, thresholds), "share their upper 16 bits")
    scaled = neighbors(thresholds)
    expected = np.searchsorted(thresholds, scaled).astype(np.uint8)
    same_bits(blockwise.count_below(scaled, thresholds), expected, "codes")


def test_when_thresholds_share_an_interval():
    """[0.5, 0.5 + 2⁻⁸) is one interval: both halves of it are the same, the next is another."""
    scaled = neighbors(0.5 + 2.0**-10 * np.arange(9, dtype=f32))
    halves, next_to = 0.5 + f32([2.0**-10, 2.0**-9 + 2.0**-10]), 0.5 + f32([2.0**-10, 2.0**-8 + 2.0**-10])
    refused(lambda: blockwise.count_below_3(scaled, halves), "share their upper 16 bits")
    expected = np.searchsorted(next_to, scaled).astype(np.uint8)
    same_bits(blockwise.count_below_3(scaled, next_to), expected, "codes")


def test_table_at_the_ends_of_its_intervals():
    """Every interval's smallest and largest finite number, of both signs."""
    ends = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array([0, 1, 0xFFFF], np.uint32)).view(f32).ravel()
    ends = ends[np.isfinite(ends)]
    at_the_ends = np.array([0xBF00FFFF, 0xBE000000, 0x3E00FFFF, 0x3F000000], np.uint32).view(f32)
    beyond_one = f32([2, 6.0005])
    codes = codebooks.DYNAMIC, codebooks.INT8, TINY_GAPS
    for thresholds in (*map(blockwise.midpoints, codes), at_the_ends, beyond_one):
        expected = np.searchsorted(thresholds, ends).astype(np.uint8)
        same_bits(blockwise.count_below_3(ends, thresholds), expected, "table")


def test_chunks_cover_every_element_once():
    for n, block_size in [(0, 64), (1, 64), (64, 64), (65, 64), (200_000, 64), (200_001, 4096), (300_000, 100_000)]:
        parts = list(blockwise.chunks(n, block_size))
        assert [i for e, _, _ in parts for i in (e.start, e.stop)][1:-1:2] == [e.start for e, _, _ in parts][1:]
        assert (parts[0][0].start, parts[-1][0].stop) == (0, n) if n else parts == []
        for elements, blocks, width in parts:
            assert width == min(block_size, n - elements.start)
            assert (blocks.start, blocks.stop) == (elements.start // block_size, -(-elements.stop // block_size))
            assert elements.stop - elements.start <= max(blockwise.CHUNK, block_size)


def test_eight_bits_against_bitsandbytes(rng):
    """Equal except where bitsandbytes' table of 65,536 numbers is not the nearest entry: counted, and shown."""
    x = rng.standard_normal((64, 4096)).astype(f32)
    theirs, state = bnb.quantize_blockwise(torch.from_numpy(x), blocksize=256)
    q = blockwise.quantize(x, codebooks.DYNAMIC, 256)
    same_bits(q.absmax, state.absmax.numpy(), "absmax")
    theirs = theirs.numpy().ravel()
    differ = q.codes != theirs
    assert 0 < differ.mean() < 0.003, f"{differ.mean():.4%}"
    scaled = (x.reshape(-1, 256) / q.absmax[:, None].astype(np.float64)).ravel()[differ]
    distance = [np.abs(codebooks.DYNAMIC[c[differ]].astype(np.float64) - scaled) for c in (q.codes, theirs)]
    assert (distance[0] < distance[1] + 2.0**-24).all() and (distance[0] < distance[1]).mean() > 0.99
    state.code = torch.from_numpy(codebooks.DYNAMIC.copy())
    decoded = bnb.dequantize_blockwise(torch.from_numpy(q.codes), state).numpy()
    same_bits(blockwise.dequantize(q).ravel(), decoded.ravel(), "decoded")


def test_tiny_blocks_do_not_overflow():
    """Below 1e-38 the codes are coarser, but they are numbers."""
    x = np.array([1e-40, -1e-40, 1e-45, 0], f32)
    q = blockwise.quantize(x, nf4.CODE, 4)
    assert q.codes.tolist() == [7, 7, 7, 7] and q.absmax[0] == f32(1e-40)
    assert blockwise.dequantize(q).tolist() == [0, 0, 0, 0]


def test_outlier_spoils_its_block_only():
    """The figures of the module's docstring."""
    x = np.random.default_rng(0).standard_normal((256, 4096)).astype(f32)
    found = [blockwise.round_trip_error(x, nf4.CODE, b) for b in (4096, 64)]
    x[:, 100] = 20
    found += [blockwise.round_trip_error(x, nf4.CODE, b) for b in (4096, 64)]
    assert np.round(found, 3).tolist() == [0.093, 0.073, 0.427, 0.078]


# Shapes, types, refusals.


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 7)])
def test_any_shape(shape, rng):
    x = np.asarray(rng.standard_normal(shape))
    q = blockwise.quantize(x, codebooks.INT8, 4)
    assert q.shape == shape and q.codes.shape == (x.size,) and q.absmax.shape == (-(-x.size // 4),)
    for dtype in (None, np.float16, np.float32, np.float64):
        found = blockwise.dequantize(q, dtype)
        assert found.shape == shape and found.dtype == (dtype or f32)
        same_bits(found, blockwise.dequantize(q).astype(dtype or f32), "one more rounding")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_are_rounded_to_float32_first(dtype, rng):
    x = rng.standard_normal(500).astype(dtype)
    q, expected = (blockwise.quantize(v, codebooks.INT8, 64) for v in (x, x.astype(f32)))
    same_bits(q.codes, expected.codes, "codes")
    same_bits(q.absmax, expected.absmax, "absmax")


def test_default_block_is_256():
    assert blockwise.quantize(np.ones(3, f32), codebooks.INT8).block_size == 256


def test_layout_does_not_matter(rng):
    x = rng.standard_normal((30, 41)).astype(f32)
    gaps = np.full((30, 82), np.nan, f32)
    gaps[:, ::2] = x
    expected = blockwise.quantize(x, codebooks.INT8, 64)
    for view in (np.asfortranarray(x), gaps[:, ::2], x[::-1].copy()[::-1]):
        same_bits(blockwise.quantize(view, codebooks.INT8, 64).codes, expected.codes, "codes")


def test_not_finite_is_refused():
    x = np.ones((2, 3, 50))
    x[1, 2, 9] = np.nan
    x[1, 2, 11] = np.inf
    message = (
        "cannot quantize nan at index (1, 2, 9) (2 of 300 elements are not finite in float32): one would destroy its "
        "whole block; replace or clip them first"
    )
    refused(lambda: blockwise.quantize(x, codebooks.INT8, 64), message)
    refused(lambda: blockwise.quantize(np.array(-np.inf), codebooks.INT8, 64), "quantize -inf at index ()")


@pytest.mark.parametrize("block_size", [0, -1, True, 2.0, "64", None])
def test_block_sizes_that_are_none(block_size):
    refused(lambda: blockwise.block_count(7, block_size), f"block_size: {block_size!r}, needed a positive")


def test_block_count():
    assert [blockwise.block_count(n, 4) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert [blockwise.block_count(5, b) for b in (1, 5, 6, np.int64(2))] == [5, 1, 1, 3]


@pytest.mark.parametrize("shape", [3, [3], (3, -1), (2.0,), (True,), ("3",)])
def test_shapes_that_are_none(shape):
    refused(lambda: blockwise.element_count(shape), f"shape: {shape!r}, needed a tuple of integers >= 0")


def test_element_count():
    assert [blockwise.element_count(s) for s in ((), (0,), (3,), (2, 3, 4), (1 << 20, 1 << 20))] == [
        1,
        0,
        3,
        24,
        1 << 40,
    ]


def test_codebooks_that_are_none():
    vector = "needed a float32 vector of 2 to 256 entries"
    for code, message in [
        (np.array([-1.0, 1.0]), f"code: float64 (2,), {vector}"),
        (f32([[-1, 1]]), f"code: float32 (1, 2), {vector}"),
        (f32([1]), f"code: float32 (1,), {vector}"),
        (np.linspace(-1, 1, 257, dtype=f32), f"code: float32 (257,), {vector}"),
        (
            codebooks.FP4_BY_CODE,
            "code: its entries must be finite and strictly increasing (FP4 sorted is codebooks.FP4)\n",
        ),
        (f32([-1, 0, 0, 1]), "finite and strictly increasing"),
        (f32([-1, 0, np.inf]), "finite and strictly increasing"),
        (f32([np.nan, 0]), "finite and strictly increasing"),
    ]:
        refused(lambda code=code: blockwise.check_codebook(code), message)
    blockwise.check_codebook(np.linspace(-1, 1, 256, dtype=f32))
    refused(lambda: blockwise.quantize(np.ones(3, f32), codebooks.FP4_BY_CODE), "strictly increasing")


def test_parts_that_do_not_fit_are_refused():
    codes, absmax, code = np.zeros(65, np.uint8), np.ones(2, f32), codebooks.INT4
    last = codes.copy()
    last[64] = 15
    blockwise.BlockwiseTensor(codes, absmax, code, (65,), 64)
    for args, message in [
        (
            (codes[:-1], absmax, code, (65,), 64),
            "codes: uint8 (64,), needed uint8 (65,), one for each element of shape",
        ),
        ((codes.astype(np.int64), absmax, code, (65,), 64), "codes: int64 (65,), needed uint8 (65,)"),
        (
            (codes, np.ones(3, f32), code, (65,), 64),
            "absmax: float32 (3,), needed float32 (2,), one for each block of 64",
        ),
        ((codes, absmax, code, (65,), 0), "block_size: 0"),
        ((codes, absmax, code[::-1], (65,), 64), "strictly increasing"),
        ((last, absmax, code, (65,), 64), "codes: found 15, the codebook has 15 entries"),
    ]:
        refused(lambda args=args: blockwise.BlockwiseTensor(*args), message)
    blockwise.BlockwiseTensor(codes + np.uint8(14), absmax, code, (65,), 64)


def test_frozen_and_compared_by_identity():
    q, same = (blockwise.quantize(np.ones(64, f32), codebooks.INT8) for _ in range(2))
    assert q == q and q != same and len({q, same}) == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        q.block_size = 32


def test_bytes_and_repr():
    q = blockwise.quantize(np.ones((50, 30), f32), codebooks.INT8, 64)
    assert q.nbytes == 1500 + 24 * 4
    assert repr(q) == "BlockwiseTensor((50, 30), blocks of 64, 1,596 bytes)"
