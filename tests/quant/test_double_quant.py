"""Double quantization: bitsandbytes' scheme, and the sign that it can lose."""

import json

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from minift.conformance import check
from minift.conformance.common import same_bits
from minift.conformance.operations.double_quant import OPERATIONS, TO_ZERO, battery
from minift.quant import double_quant, nf4
from minift.quant.codebooks import DYNAMIC
from minift.quant.double_quant import DoubleQuantizedScales
from quant import wrong_quant
from quant.quant_checks import refused

f32 = np.float32


def with_scales(scales):
    """An NF4 tensor with these scales, the last block short and the number of weights odd."""
    n = max(0, 64 * len(scales) - 13)
    codes = nf4.pack((np.arange(n) * 5 % 16).astype(np.uint8))
    return nf4.NF4Tensor(codes, np.asarray(scales, f32), (n,), 64)


CASES = [(with_scales(scales), block_size) for block_size in (256, 64, 7) for scales in battery()]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_drawn(operation):
    check(operation.name, operation.reference, examples=100)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_compress_keeps_the_weights(case):
    """Their codes, sizes and bytes; the offset is the mean to the bit; decompressed scales are what the 8 bits say."""
    q, block_size = CASES[case]
    compressed = double_quant.compress(q, block_size)
    same_bits(compressed.codes, q.codes, "the weights' codes")
    assert (compressed.shape, compressed.block_size) == (q.shape, q.block_size)
    back, blocks = double_quant.decompress(compressed), q.absmax.size
    same_bits(back.codes, q.codes, "the weights' codes, decompressed")
    same_bits(back.absmax, compressed.absmax.decode(), "decompressed scales")
    same_bits(compressed.absmax.offset, f32(sum(q.absmax.tolist()) / max(1, blocks)), "offset")
    assert compressed.nbytes == q.codes.size + blocks + 4 * -(-blocks // block_size) + 4


def test_nearest_entry_can_be_negative():
    """One block 1,000 times smaller than the others: its nearest entry decodes to a negative scale, ours does not."""
    rng = np.random.default_rng(0)
    trapped = 0

    def compress(scales):
        codes, absmax, offset = wrong_quant.NoGuard().compress(scales)
        return codes, absmax, f32(offset)

    for _ in range(400):
        w = rng.standard_normal((64, 64)).astype(f32)
        w[7] *= f32(1e-3) * f32(0.01)
        q = nf4.quantize(w)
        naive = nf4.NF4Tensor(q.codes, DoubleQuantizedScales(*compress(q.absmax)), q.shape)
        ours = double_quant.compress(q)
        same = naive.absmax.codes == ours.absmax.codes
        if naive.scales()[7] < 0:
            trapped += 1
            assert not same[7] and 0 <= ours.scales()[7] < 0.0141 * ours.absmax.absmax[0]
            assert (np.sign(naive.dense()[7]) == -np.sign(q.dense()[7])).all()
            assert (np.sign(ours.dense()[7]) * np.sign(q.dense()[7]) >= 0).all()
            same[7] = True
        assert same.all(), "codes differ only where the nearest entry decodes to a negative scale"
    assert trapped > 0


def test_a_scale_of_exactly_zero_is_kept():
    scales = double_quant.compress_scales(f32(TO_ZERO))
    assert scales.codes[0] == 1 and scales.decode()[0] == 0


def test_zero_blocks_stay_zero(rng):
    w = rng.standard_normal((40, 64)).astype(f32)
    w[[0, 3, 39]] = 0
    q = double_quant.compress(nf4.quantize(w))
    zero = q.dense()[[0, 3, 39]]
    assert zero.tobytes() == np.zeros_like(zero).tobytes(), "+0.0, bit for bit"


def test_files_of_bitsandbytes_decode_to_the_same_bits(rng):
    """bitsandbytes' codes and statistics, in our dataclass: scales and weights as it decodes them."""
    w = (rng.standard_normal((130, 300)) * rng.lognormal(0, 1, (130, 1))).astype(f32)
    w[3] *= 1e-6
    packed, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True)
    scales = DoubleQuantizedScales(
        state.absmax.numpy(), state.state2.absmax.numpy(), f32(state.offset.item()), 256, state.state2.code.numpy()
    )
    assert scales.size > 2 * 256 and scales.size % 256
    assert state.state2.code.numpy().tobytes() == DYNAMIC.tobytes()
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    same_bits(scales.decode(), theirs.numpy(), "scales")
    q = nf4.NF4Tensor(packed.numpy().ravel(), scales, w.shape)
    same_bits(nf4.dequantize(q), bnb.dequantize_4bit(packed, state).numpy(), "weights")


def test_decoding_clamps_nothing():
    """A file may hold a scale that decodes to a negative number, and its reader has always got that number."""
    scales = DoubleQuantizedScales(np.array([0, 255], np.uint8), f32([1]), f32(0.5))
    assert scales.decode().tolist() == [DYNAMIC[0] + f32(0.5), 1.5]
    assert double_quant.decompress(nf4.NF4Tensor(np.zeros(64, np.uint8), scales, (128,))).scales()[0] < 0


def test_codes_of_bitsandbytes_where_they_are_nearest(rng):
    """On a CPU bitsandbytes looks up 65,536 numbers: a small share of its codes is not nearest. All others are ours."""
    w = rng.standard_normal((2048, 512)).astype(f32)
    _, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = double_quant.compress(nf4.quantize(w)).absmax
    theirs = state.absmax.numpy()
    assert abs(float(ours.offset) - state.offset.item()) <= 2.0**-22, "the mean, summed in another order"
    centered = nf4.quantize(w).absmax.astype(np.float64) - float(ours.offset)
    nested = np.repeat(ours.absmax.astype(np.float64), 256)
    distance = [np.abs(DYNAMIC[codes] * nested - centered) for codes in (ours.codes, theirs)]
    differ = ours.codes != theirs
    assert differ.mean() < 0.005, f"{differ.mean():.3%} of the codes"
    assert (distance[0][differ] <= distance[1][differ] + 2.0**-22).all(), "one of theirs is nearer"


def test_bits_of_the_papers_arithmetic():
    assert double_quant.overhead_bits(64, None) == 0.5
    assert double_quant.overhead_bits(64, 256) == double_quant.overhead_bits() == 0.126953125
    assert double_quant.overhead_bits(64, None) - double_quant.overhead_bits() == 0.373046875
    assert double_quant.overhead_bits(32, 128) == 8 / 32 + 32 / (32 * 128)


def test_bytes_of_a_real_size():
    """655,360 weights: 4.127002 bits each, the offset included."""
    q = double_quant.compress(nf4.quantize(np.ones((1280, 512), f32)))
    assert q.nbytes == 655_360 // 2 + 10_240 + 4 * 40 + 4
    assert round(q.bits_per_parameter, 6) == 4.127002
    assert repr(q) == "NF4Tensor((1280, 512), 4.127 bits per parameter, 338,084 bytes)"
    assert repr(q.absmax) == "DoubleQuantizedScales(10240, blocks of 256, 10,404 bytes)"


def test_frozen_and_compared_by_identity():
    q, same = (double_quant.compress_scales(np.ones(64, f32)) for _ in range(2))
    assert q == q and q != same and len({q, same}) == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        q.block_size = 32


def test_defaults():
    q = double_quant.compress(with_scales(np.ones(300)))
    assert q.absmax.block_size == 256 and q.absmax.absmax.shape == (2,) and q.absmax.size == 300
    scales = double_quant.compress_scales(np.ones(300, f32))
    assert scales.block_size == 256 and scales.code is DYNAMIC
    again = DoubleQuantizedScales(scales.codes, scales.absmax, scales.offset)
    assert again.block_size == 256 and again.code is DYNAMIC


def test_decompress_is_what_it_decodes_to():
    q = with_scales(np.linspace(1, 2, 300))
    back = double_quant.decompress(double_quant.compress(q))
    same_bits(back.dense(), double_quant.compress(q).dense(), "weights")
    assert double_quant.decompress(q).absmax is q.absmax


def test_linear_with_compressed_scales(rng):
    q = double_quant.compress(nf4.quantize(rng.standard_normal((9, 33))))
    x, dy = rng.standard_normal((4, 33)), rng.standard_normal((4, 9))
    y, vjp = q.linear(x)
    w = q.dense().astype(np.float64)
    same_bits(y, x @ w.T, "y")
    same_bits(vjp(dy)[0], dy @ w, "dx")


def test_refusals():
    q = double_quant.compress(with_scales([1, 2]))
    refused(lambda: double_quant.compress(q), "is double-quantized already: decompress it first")
    for bad in (-1e-9, np.nan, np.inf):
        message = f"scales: {f32(bad)} at index 2, an absmax is finite and >= 0"
        refused(lambda bad=bad: double_quant.compress(with_scales([1, 0, bad, bad])), message)
    s = q.absmax
    for args, message in [
        ((s.codes.astype(np.int8), s.absmax, s.offset), "codes: int8 (2,), needed uint8"),
        ((s.codes, s.absmax[:0], s.offset), "absmax: float32 (0,), needed float32 (1,)"),
        ((s.codes, s.absmax, float(s.offset)), "offset: 1.5, needed a np.float32"),
        ((s.codes, s.absmax, s.offset, 0), "block_size: 0"),
    ]:
        refused(lambda args=args: unchecked(*args), message)
    refused(lambda: nf4.NF4Tensor(q.codes, s, (128 + 63,), 64), "codes: uint8 (58,), needed uint8 (96,)")
    codes = np.full(96, 0x77, np.uint8)
    refused(lambda: nf4.NF4Tensor(codes, s, (191,), 64), "absmax: 2 scales, needed 3, one a block of 64")


def unchecked(*args):
    """The dataclass without the tests' type checker, which would refuse first."""
    instance = object.__new__(DoubleQuantizedScales)
    for name, value in zip(("codes", "absmax", "offset", "block_size", "code"), (*args, 256, DYNAMIC), strict=False):
        object.__setattr__(instance, name, value)
    if len(args) == 4:
        object.__setattr__(instance, "code", DYNAMIC)
    instance.__post_init__()


def test_offset_survives_json():
    """Files keep it as a JSON number."""
    offset = double_quant.compress(with_scales([0.1, 0.7])).absmax.offset
    assert f32(json.loads(json.dumps(float(offset)))) == offset
