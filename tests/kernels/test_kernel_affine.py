"""Affine integers in torch: the reference's codes, steps and least numbers bit for bit; wrong versions; refusals."""

import numpy as np
import pytest
import torch

from minift.quant import affine as reference
from minift_kernels.quant import affine
from nn.checks import kill_matrix, same_bits
from quant.wrong_integers import AFFINE

CASES = [
    ((7,), 4, 3),
    ((5, 33), 4, 32),
    ((64,), 2, 64),
    ((3, 50), 8, 50),
    ((130,), 3, 1000),
    ((1,), 4, 32),
    ((9,), 5, 1),
]


def draw(shape):
    """Of several sizes, on one side of zero in places; equal numbers; ties between two codes."""
    rng = np.random.default_rng(shape)
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)
    flat = x.reshape(-1)
    flat[: len(flat) // 3] = np.abs(flat[: len(flat) // 3])
    if len(flat) >= 64:
        flat[32:64] = -0.7
        flat[:32] = np.tile([0, 15, 0.5, 1.5, 2.5, 7.5, 13.5, 14.5], 4)
    return x


def round_trip(x, bits, block_size):
    q = affine.quantize(torch.tensor(x), bits, block_size)
    return q.codes.numpy(), affine.dequantize(q).numpy()


def as_the_reference(quantizer, case):
    shape, *settings = case
    q = reference.quantize(draw(shape), *settings)
    codes, back = quantizer(draw(shape), *settings)
    same_bits(codes, q.codes, "codes")
    same_bits(back, reference.dequantize(q), "decoded")


@pytest.mark.parametrize("case", [*CASES, ((0,), 4, 32), ((0, 3), 8, 2)], ids=str)
def test_codes_and_statistics_bit_for_bit(case):
    as_the_reference(round_trip, case)
    shape, bits, block_size = case
    for dtype in (np.float16, np.float32, np.float64):
        x = draw(shape).astype(dtype)
        found, expected = affine.quantize(torch.tensor(x), bits, block_size), reference.quantize(x, bits, block_size)
        for name in ("codes", "step", "least"):
            same_bits(getattr(found, name).numpy(), getattr(expected, name), name)
        assert repr(found) == repr(expected) and found.bits_per_parameter == expected.bits_per_parameter


def test_wrong_versions_are_rejected():
    def holds(wrong, case):
        as_the_reference(wrong(), case)

    kill_matrix([holds], AFFINE, CASES)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"bits: 9, needed 2 … 8"):
        affine.quantize(torch.zeros(3), 9)
    with pytest.raises(ValueError, match=r"cannot quantize nan at index \(1,\)"):
        affine.quantize(torch.tensor([0, torch.nan, 1]))
    with pytest.raises(ValueError, match=r"step: torch.float32 \(1,\), needed torch.float32 \(2,\)"):
        q = affine.quantize(torch.arange(64.0))
        affine.AffineTensor(q.codes, q.step[:1], q.least, (64,), 32)
