"""Block-wise quantization: every block of numbers shares one scale, its largest magnitude ("absmax").

    scale of a block      a = max |x|                                                                   (1)
    code of a number      q = #{ i : x · (1/a) > m_i }      m_i = (c_i + c_(i+1)) / 2                   (2)
    what it stands for    x̂ = c_q · a                                                                   (3)

c is the codebook (`minift.quant.codebooks`), sorted values in [−1, 1]; m are its midpoints, so that (2) counts to
the nearest entry, and a tie goes to the lower one. Everything in (1)–(3) is float32, each operation rounded once:
the midpoints, the reciprocal 1/a (once a block), its product with x, and c_q · a. So a code is not a matter of opinion
in the last bit, and equals bitsandbytes' (0.50, `backends/default/ops.py`; Dettmers et al. 2022, arXiv 2110.02861).

**Why blocks.** An outlier sets the scale for all who share it. Among 4,096 normal numbers, one of size 20 pushes the
others into the middle of the table: in NF4 their mean error is 0.43 with one block of 4,096 (0.093 without the
outlier), but 0.078 with blocks of 64 (0.073 without), as 63 of these 64 never see it (`round_trip_error`).

**Zeros and tiny numbers.** 1/a overflows for a < 2.9e-39, so a below TINY = 1e-38 is replaced by it in the reciprocal
(not in the scale that is stored), as in bitsandbytes: an all-zero block becomes the entry at zero, times 0. A block of
subnormal numbers below TINY keeps its scale but is rounded more coarsely, with errors up to a (2a if the codebook has
no zero) instead of a small part of it. That is tiny still, and never NaN.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from minift.nn.threads import on_all_cores

TINY = np.float32(1e-38)
CHUNK = 1 << 17  # elements at a time, so that the temporaries (half a megabyte each) stay in the cache
FEW = 16  # thresholds up to which a pass for each is as fast as the table


@dataclass(frozen=True, eq=False)
class BlockwiseTensor:
    """Codes, one a byte, and one float32 scale a block of `block_size` consecutive elements in row-major order.

    Raises ValueError if the arrays do not fit each other."""

    codes: np.ndarray  # uint8 (n,)
    absmax: np.ndarray  # float32 (ceil(n / block_size),)
    code: np.ndarray  # float32 (2 … 256,), the codebook
    shape: tuple[int, ...]
    block_size: int

    def __post_init__(self):
        n = element_count(self.shape)
        check_codebook(self.code)
        check_vector("codes", self.codes, np.uint8, n, f"one for each element of shape {self.shape}")
        blocks = block_count(n, self.block_size)
        check_vector("absmax", self.absmax, np.float32, blocks, f"one for each block of {self.block_size}")
        if n and self.codes.max() >= self.code.size:
            raise ValueError(f"codes: found {self.codes.max()}, the codebook has {self.code.size} entries")

    @property
    def nbytes(self) -> int:
        """Codes and scales; the codebook is shared by all tensors of its kind."""
        return self.codes.nbytes + self.absmax.nbytes

    def __repr__(self) -> str:
        return f"BlockwiseTensor({self.shape}, blocks of {self.block_size}, {self.nbytes:,} bytes)"


def quantize(
    x: Float[np.ndarray, "*shape"], code: Float32[np.ndarray, " entries"], block_size: int = 256
) -> BlockwiseTensor:
    """The nearest codebook entry for every number, relative to its block's absmax: equations (1) and (2).

    `x` is of any shape, layout and floating type, and is rounded to float32 first. Its elements are taken in row-major
    order; the last block may be short. `block_size` is any positive integer. What lies beyond the codebook's ends gets
    the end: an unsigned map turns negative numbers into zero.
    Raises ValueError for NaN and infinities (of which float32 must be free), for a codebook that is not strictly
    increasing, and for a block size that is not a positive integer.
    """
    thresholds = midpoints(code)
    codes = np.empty(x.size, np.uint8)
    absmax = np.empty(block_count(x.size, block_size), np.float32)
    for_scaled_chunks(partial(_encode, codes, thresholds), x, block_size, absmax)
    return BlockwiseTensor(codes, absmax, code, x.shape, block_size)


def dequantize(q: BlockwiseTensor, dtype: Any = None) -> Float[np.ndarray, "*shape"]:
    """x̂ = c_q · a: equation (3), rounded to float32 once, and once more to `dtype` if that is not float32."""
    x = np.empty(q.codes.size, np.float32)
    on_all_cores(partial(_decode, q, x), chunks(x.size, q.block_size))
    return x.reshape(q.shape).astype(dtype or np.float32, copy=False)


def _encode(codes: np.ndarray, thresholds: np.ndarray, elements: slice, scaled: np.ndarray) -> None:
    codes[elements] = count_below(scaled, thresholds)


def _decode(q: BlockwiseTensor, x: np.ndarray, elements: slice, blocks: slice, width: int) -> None:
    q.code.take(q.codes[elements], out=x[elements], mode="clip")
    rows = x[elements].reshape(-1, width)  # (blocks, width), a view
    rows *= q.absmax[blocks, None]  # (3)


def round_trip_error(x: Float[np.ndarray, "*shape"], code: Float32[np.ndarray, " entries"], block_size: int) -> float:
    """mean |x̂ − x|: what a codebook and a block size lose on these numbers."""
    return float(np.mean(np.abs(dequantize(quantize(x, code, block_size), np.float64) - x)))


def midpoints(code: Float32[np.ndarray, " entries"]) -> Float32[np.ndarray, " thresholds"]:
    """m_i = (c_i + c_(i+1)) / 2, each rounded to float32."""
    return (code[:-1] + code[1:]) / 2


# Equation (2) three ways: how many of the thresholds lie strictly below each number?


def count_below_1(
    scaled: Float32[np.ndarray, "*rows"], thresholds: Float32[np.ndarray, " t"]
) -> UInt8[np.ndarray, "*rows"]:
    """As it is written. Needs a byte for every pair of a number and a threshold."""
    return (scaled[..., None] > thresholds).sum(axis=-1, dtype=np.uint8)


def count_below_2(
    scaled: Float32[np.ndarray, "*rows"], thresholds: Float32[np.ndarray, " t"]
) -> UInt8[np.ndarray, "*rows"]:
    """One pass over the numbers for each threshold: for 15 thresholds ten times as fast as `np.searchsorted`, because
    comparing and adding bytes is what vector instructions do best."""
    count = np.zeros(scaled.shape, np.uint8)
    above = np.empty(scaled.shape, bool)
    for threshold in thresholds:
        np.greater(scaled, threshold, out=above)
        count += above.view(np.uint8)
    return count


def count_below_3(
    scaled: Float32[np.ndarray, "*rows"], thresholds: Float32[np.ndarray, " t"]
) -> UInt8[np.ndarray, "*rows"]:
    """One comparison a number. The upper 16 bits of a float32 (sign, exponent, 7 bits of fraction) name an interval.
    A table holds, for each of these 65,536, how many thresholds lie below all of it and the next threshold; whether
    that one is below the number as well, only the number can say.

    Raises ValueError if two thresholds lie in one interval."""
    below, following, unique = _intervals(thresholds.tobytes())
    if not unique:
        raise ValueError("two thresholds share their upper 16 bits: use count_below_2")
    interval = np.right_shift(scaled.view(np.uint32), 16).astype(np.intp)
    count = below.take(interval, mode="clip")
    count += (scaled > following.take(interval, mode="clip")).view(np.uint8)
    return count


def count_below(
    scaled: Float32[np.ndarray, "*rows"], thresholds: Float32[np.ndarray, " t"]
) -> UInt8[np.ndarray, "*rows"]:
    """The fastest of the three: passes for a few thresholds, the table for many."""
    if thresholds.size <= FEW or not _intervals(thresholds.tobytes())[2]:
        return count_below_2(scaled, thresholds)
    return count_below_3(scaled, thresholds)


@lru_cache(maxsize=16)
def _intervals(thresholds: bytes) -> tuple[UInt8[np.ndarray, " 65536"], Float32[np.ndarray, " 65536"], bool]:
    """For the 65,536 upper halves of a float32: thresholds below the interval, the next one (or inf); and whether
    no interval holds two."""
    t = np.frombuffer(thresholds, np.float32)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    smallest = np.where(upper < 1 << 31, upper, upper | 0xFFFF).view(np.float32)  # in magnitude the largest if negative
    below = np.searchsorted(t, smallest, side="left")
    following = np.append(t, np.float32(np.inf))[below]
    return below.astype(np.uint8), following, np.unique(t.view(np.uint32) >> 16).size == t.size


# What every block-wise format shares: cutting into blocks, their scales, and refusing what cannot be represented.


def chunks(n: int, block_size: int) -> Iterator[tuple[slice, slice, int]]:
    """Whole blocks, about CHUNK elements at a time, then the short last block: (elements, blocks, block's width)."""
    whole = n // block_size
    step = max(1, CHUNK // block_size)
    for first in range(0, whole, step):
        last = min(first + step, whole)
        yield slice(first * block_size, last * block_size), slice(first, last), block_size
    if n % block_size:
        yield slice(whole * block_size, n), slice(whole, whole + 1), n % block_size


def for_scaled_chunks(
    encode: Callable[[slice, np.ndarray], None],
    x: np.ndarray,
    block_size: int,
    absmax: Float32[np.ndarray, " blocks"],
) -> None:
    """Equation (1) and the product in (2), chunk by chunk: fills `absmax`, calls `encode(elements, x · (1/a))`."""
    on_all_cores(partial(_scale, encode, x, x.reshape(-1), absmax), chunks(x.size, block_size))


def _scale(
    encode: Callable, x: np.ndarray, flat: np.ndarray, absmax: np.ndarray, elements: slice, blocks: slice, width: int
) -> None:
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused as such
        rows = flat[elements].astype(np.float32, copy=False).reshape(-1, width)  # (blocks, width)
    magnitude = np.abs(rows)
    scale = np.max(magnitude, axis=1, out=absmax[blocks])  # a of (1)
    if not np.isfinite(scale).all():
        refuse_non_finite(x)
    inverse = 1 / np.maximum(scale, TINY)  # 1/a of (2)
    encode(elements, np.multiply(rows, inverse[:, None], out=magnitude).reshape(-1))


def refuse_non_finite(x: np.ndarray) -> None:
    """ValueError that says where the first NaN or infinity is."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(x.astype(np.float32))
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
        f"cannot quantize {x[where]} at index {where} ({np.count_nonzero(bad):,} of {x.size:,} elements are not "
        "finite in float32): one would destroy its whole block; replace or clip them first"
    )


def element_count(shape: Any) -> int:
    """The number of elements of a shape; ValueError unless it is a tuple of integers >= 0."""
    if not isinstance(shape, tuple) or any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in shape):
        raise ValueError(f"shape: {shape!r}, needed a tuple of integers >= 0")
    return math.prod(shape)


def block_count(n: int, block_size: Any) -> int:
    """ceil(n / block_size); ValueError unless the block size is a positive integer."""
    if isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer)) or block_size < 1:
        raise ValueError(f"block_size: {block_size!r}, needed a positive integer")
    return -(-n // operator.index(block_size))


def check_codebook(code: np.ndarray) -> None:
    """ValueError unless `code` is float32, 2 … 256 finite values, strictly increasing."""
    if code.dtype != np.float32 or code.ndim != 1 or not 2 <= code.size <= 256:
        raise ValueError(f"code: {code.dtype} {code.shape}, needed a float32 vector of 2 to 256 entries")
    if not (np.isfinite(code).all() and (code[:-1] < code[1:]).all()):
        raise ValueError("code: its entries must be finite and strictly increasing (FP4 sorted is codebooks.FP4)")


def check_vector(name: str, array: np.ndarray, dtype: Any, size: int, what: str) -> None:
    """ValueError unless `array` is a vector of this type and size."""
    if array.dtype != dtype or array.shape != (size,):
        raise ValueError(f"{name}: {array.dtype} {array.shape}, needed {np.dtype(dtype)} ({size},), {what}")


def numbers_per_scale(shape: tuple[int, ...], per: str | int) -> int:
    """The block size that makes a scale for "tensor", all numbers; for "row", those of the last axis; or as it is."""
    whole = {"tensor": element_count(shape), "row": shape[-1] if shape else 1}
    if isinstance(per, str) and per not in whole:
        raise ValueError(f"per: {per!r}, needed 'tensor', 'row' or a block size")
    return max(whole[per], 1) if isinstance(per, str) else per
