"""Integers with a scale: absmax, which is symmetric, and affine, which also has a place to begin.

    absmax    s = max |x| / (2^(b−1) − 1)               x̂ = q s            q = −(2^(b−1) − 1) … 2^(b−1) − 1     (1)
    affine    s = (max x − m) / (2^b − 1),  m = min x   x̂ = q s + m        q = 0 … 2^b − 1                      (2)

with q = round((x − m) / s), so that |x̂ − x| ≤ s / 2. (1) needs no code of its own: it is `blockwise.quantize` with the
codebook `codebooks.linear(b)`, INT4 or INT8. (2) uses all 2^b codes, and none on a side where no numbers are: in 4 bits
its s is 14/15 of (1)'s where they are symmetric, 7/15 where all have one sign. It costs a second number a block.

**Who shares a scale.** All numbers of a tensor, those of a row (`per="row"`: of W, what one output is made from), or a
block of consecutive ones. In row-major order the first two are blocks as well, of x.size and of x.shape[-1] numbers
(`blockwise.numbers_per_scale`), so there is one format for the three. Bits a parameter:

    b + 32 / B  for absmax        b + 64 / B  for affine        B numbers a scale                                (3)

Other libraries store m as an integer zero point (z = −round(m / s)), which gives zero a code of its own; GGUF's Q4_1
stores s and m in 16 bits, for blocks of 32. Numbers that lie on such a grid come back as they were: an error that
somebody measures on a model from such a file is that of the file, not of the data type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from minift.quant.blockwise import block_count, check_vector, element_count, refuse_non_finite


@dataclass(frozen=True, eq=False)
class AffineTensor:
    """Codes, one a byte, and for each block of `block_size` elements in row-major order its step s and least number m.

    ValueError if the parts do not fit each other."""

    codes: np.ndarray  # uint8 (n,)
    step: np.ndarray  # float32 (ceil(n / block_size),)
    least: np.ndarray  # float32, the same
    shape: tuple[int, ...]
    block_size: int
    bits: int = 4

    def __post_init__(self):
        n = element_count(self.shape)
        blocks = block_count(n, self.block_size)
        check_bits(self.bits)
        check_vector("codes", self.codes, np.uint8, n, f"one for each element of shape {self.shape}")
        for name, array in (("step", self.step), ("least", self.least)):
            check_vector(name, array, np.float32, blocks, f"one for each block of {self.block_size}")
        if n and self.codes.max() >> self.bits:
            raise ValueError(f"codes: found {self.codes.max()}, {self.bits} bits hold 0 … {2**self.bits - 1}")

    @property
    def bits_per_parameter(self) -> float:
        """Equation (3), of codes that are packed; here they are not."""
        return self.bits + 64 * self.step.size / max(self.codes.size, 1)

    def __repr__(self) -> str:
        return f"AffineTensor({self.shape}, {self.bits} bits, blocks of {self.block_size})"


def quantize(x: Float[np.ndarray, "*shape"], bits: int = 4, block_size: int = 32) -> AffineTensor:
    """Equation (2), with ties to the even code. `x` is rounded to float32 first, `s` once; the rest is float64.

    Where all numbers of a block are equal, s is 0 and they come back as they were. Raises ValueError for NaN and
    infinities, for bits other than 2 … 8, and for a block size that is not a positive integer."""
    check_bits(bits)
    top = 2**bits - 1
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused as such
        flat = x.reshape(-1).astype(np.float32, copy=False)
    starts = np.arange(block_count(x.size, block_size)) * block_size
    least, most = (extreme.reduceat(flat, starts) for extreme in (np.minimum, np.maximum))  # (blocks,)
    if not (np.isfinite(least) & np.isfinite(most)).all():
        refuse_non_finite(x)
    step = ((most.astype(np.float64) - least) / top).astype(np.float32)
    s, m = (np.repeat(a.astype(np.float64), block_size)[: x.size] for a in (step, least))
    codes = np.minimum(np.rint((flat - m) / np.where(s == 0, 1, s)), top).astype(np.uint8)
    return AffineTensor(codes, step, least, x.shape, block_size, bits)


def dequantize(q: AffineTensor) -> Float32[np.ndarray, "*shape"]:
    """x̂ = q s + m in float64, where the product is exact, rounded to float32."""
    s, m = (np.repeat(a.astype(np.float64), q.block_size)[: q.codes.size] for a in (q.step, q.least))
    return (q.codes * s + m).astype(np.float32).reshape(q.shape)


def check_bits(bits: int) -> None:
    """ValueError unless it is 2 … 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits: {bits!r}, needed 2 … 8")
