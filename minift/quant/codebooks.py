"""Codebooks: the sorted values in [−1, 1] that a code stands for.

A k-bit code is an index into a codebook of at most 2ᵏ float32 values. Which values is the whole difference between
the "data types" of the literature; `blockwise` treats them alike.

    INT4, INT8            evenly spaced, and symmetric: 15 of 16 and 255 of 256 codes are used
    FP4                   bitsandbytes' 4-bit floating point
    DYNAMIC               8 bits, signed: a decimal exponent in unary, the rest of the bits linear
    DYNAMIC_UNSIGNED      the same without the sign, for what is never negative (Adam's second moment)
    nf4.CODE              the quantiles of a normal distribution                       (minift.quant.nf4)

All are read-only float32 arrays, strictly increasing, with an exact zero.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8


def linear(bits: int) -> Float[np.ndarray, " entries"]:
    """Evenly spaced and symmetric around zero.

        c_i = i / (2^(bits−1) − 1)      i = −(2^(bits−1) − 1) … 2^(bits−1) − 1                            (1)

    bits = 4 gives 15 values, bits = 8 gives 255. Two's complement has one more code, −2^(bits−1), which is left out:
    with it the largest weight and its negative could not both be represented, or the absmax not be a code at all.
    """
    top = 2 ** (bits - 1) - 1
    return read_only(np.arange(-top, top + 1) / top)


def dynamic(signed: bool = True) -> Float[np.ndarray, " 256"]:
    """Dynamic 8-bit map.                      (Dettmers 2016, arXiv 1511.04561; Dettmers et al. 2022, arXiv 2110.02861)

    A byte is a sign, then zeros that count the decimal exponent, then a one, then a linear fraction in the bits that
    are left. For the exponents e = 0 … 6, with b_0 … b_m evenly spaced from 0.1 to 1 and m = 2^e (2^(e+1) unsigned):

        c = ± 10^(e−6) (b_j + b_(j+1)) / 2                                                               (2)

    and 0 and +1; there is no −1, the smallest value is −0.99297. Bit for bit bitsandbytes' `create_dynamic_map`, whose
    evenly spaced points are `torch.linspace` with a fused multiply-add (`torch_linspace`): 42 entries depend on it.
    """
    values = [np.array([0.0, 1.0], np.float32)]
    for exponent in range(7):
        edges = torch_linspace(0.1, 1.0, 2 ** (exponent if signed else exponent + 1) + 1, fused=True)
        decade = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [decade, -decade] if signed else [decade]
    return read_only(np.sort(np.concatenate(values)))


def torch_linspace(start: float, stop: float, n: int, fused: bool = False) -> Float[np.ndarray, " n"]:
    """`torch.linspace` in float32: the first half counts up from `start`, the second half down from `stop`.

        step = (stop − start) / (n − 1)      start + i step  (i < n/2)      stop − (n − 1 − i) step       (3)

    `fused`: with one rounding for the product and the sum together, as a fused multiply-add does. In float64 the
    product of an index and a float32 is exact, and the sum nearly so: what counts is the rounding to float32.
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float32((last - first) / np.float32(n - 1))
    up: np.ndarray = np.arange(n).astype(np.float64 if fused else np.float32)
    return np.where(up < n // 2, first + up * step, last - up[::-1] * step).astype(np.float32)


def read_only(values: np.ndarray) -> np.ndarray:
    """A float32 copy that cannot be changed."""
    array = values.astype(np.float32)
    array.setflags(write=False)
    return array


INT4 = linear(4)
INT8 = linear(8)
DYNAMIC = dynamic(signed=True)
DYNAMIC_UNSIGNED = dynamic(signed=False)

# FP4: sign, two bits of exponent and one of mantissa, in twelfths. Listed by code, as bitsandbytes does: 1 is the
# subnormal, and 2 … 7 do not ascend. Zero has two codes, 0 and 8.
FP4_BY_CODE = read_only(np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12)
FP4 = read_only(np.unique(FP4_BY_CODE))  # 15 values, ascending

# Where each of the 15 sorts to. Of zero's two codes it is the positive one, whatever the sign of what became zero.
_FP4_CODE_OF_RANK = np.array([11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3], np.uint8)


def fp4_codes(ranks: UInt8[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """bitsandbytes' 4-bit codes from indices into `FP4`, which is in ascending order; `FP4_BY_CODE[codes]` decodes.

    A tie goes to the lower value, as for every codebook here. bitsandbytes' back-ends disagree with each other: CUDA
    rounds |x| and so takes ties toward zero, the CPU rounds x and gives tiny positive numbers the code 8."""
    return _FP4_CODE_OF_RANK[ranks]
