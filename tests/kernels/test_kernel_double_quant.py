"""Double-quantized scales in torch: the reference's codes and bits."""

import numpy as np
import pytest
import torch
from nf4_properties import bits, twin

from minift.quant import double_quant as reference
from minift_kernels.quant import double_quant, nf4
from minift_kernels.quant.double_quant import DoubleQuantizedScales
from quant.test_double_quant import CASES


@pytest.mark.parametrize("case", range(len(CASES)))
def test_compress_is_the_reference(case):
    """The reference's own cases: scales far below the mean, groups of other sizes, zeros, a short last group."""
    q, block_size = CASES[case]
    with np.errstate(all="ignore"):
        wanted = reference.compress(q, block_size)
        found = double_quant.compress(twin(q), block_size)
        s, t = wanted.absmax, found.absmax
        for part in ("codes", "absmax", "offset", "code"):
            assert bits(getattr(t, part)) == getattr(s, part).tobytes(), part
        assert bits(t.decode()) == s.decode().tobytes()
        assert bits(double_quant.decompress(found).absmax) == s.decode().tobytes()
    assert found.nbytes == wanted.nbytes and repr(found) == repr(wanted) and repr(t) == repr(s)
    assert t.block_size == s.block_size and t.size == s.size


def test_decoding_rounds_twice(rng):
    """One rounding gives other scales for several percent of them: a fused multiply-add would show here."""
    codes, absmax = rng.integers(0, 256, 4096).astype(np.uint8), np.exp(rng.standard_normal(16)).astype(np.float32)
    scales = reference.DoubleQuantizedScales(codes, absmax, np.float32(1.1))
    found = DoubleQuantizedScales(*(torch.tensor(part) for part in (codes, absmax, scales.offset))).decode()
    assert bits(found) == scales.decode().tobytes()
    once = scales.code.astype(np.float64)[codes] * np.repeat(absmax, 256) + np.float64(scales.offset)
    assert 0.02 < np.mean(once.astype(np.float32) != scales.decode()) < 0.2


def test_default_block_sizes():
    q = double_quant.compress(nf4.quantize(torch.ones(64 * 300)))
    assert q.absmax.block_size == 256 and q.absmax.absmax.shape == (2,)
    assert double_quant.overhead_bits is reference.overhead_bits


def test_opcheck():
    q = double_quant.compress(nf4.quantize(torch.arange(640.0)), 4).absmax
    args = (q.codes, q.absmax, q.code, q.offset, 4)
    torch.library.opcheck(torch.ops.minift.double_quant_decode.default, args)


def test_refusals():
    q = double_quant.compress(nf4.quantize(torch.ones(128)))
    s = q.absmax
    with pytest.raises(ValueError, match="is double-quantized already: decompress it first"):
        double_quant.compress(q)
    for bad in (-1e-9, torch.nan, torch.inf):
        message = f"scales: {np.float32(bad).item()} at index 1, an absmax is finite and >= 0"
        with pytest.raises(ValueError, match=message):
            double_quant.compress_scales(torch.tensor([1, bad]))
    for args, message in [
        ((s.codes.char(), s.absmax, s.offset), r"codes: torch.int8 \(2,\), needed torch.uint8 \(2,\)"),
        ((s.codes, s.absmax[:0], s.offset), r"absmax: torch.float32 \(0,\), needed torch.float32 \(1,\)"),
        ((s.codes, s.absmax, s.offset.double()), r"offset: .*, needed one float32 number"),
        ((s.codes, s.absmax, s.offset.to("meta")), r"offset: on meta, but the codes are on cpu"),
        ((s.codes, s.absmax, s.offset, 0), r"block_size: 0"),
        ((s.codes, s.absmax, s.offset, 256, s.code[:9]), r"code: torch.float32 \(9,\), needed torch.float32 \(256,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            DoubleQuantizedScales(*args)
    with pytest.raises(ValueError, match="absmax: 2 scales, needed 3, one a block of 64"):
        nf4.NF4Tensor(torch.full((96,), 0x77, dtype=torch.uint8), s, (191,))
