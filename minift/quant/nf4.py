"""NF4: the 4-bit data type for normally distributed weights.           (Dettmers et al. 2023, arXiv 2305.14314)

**Where the sixteen numbers come from.** If weights are normal, then codes are used equally often when the entries
are quantiles of N(0, 1). Φ⁻¹ is the inverse of its distribution function:

    positive entries    v_i =  Φ⁻¹(p_i)     p_i evenly spaced from δ down to ½, 9 points, the last left out      (1)
    negative entries    v_i = −Φ⁻¹(p_i)     p_i evenly spaced from δ down to ½, 8 points, the last left out      (2)
    and one zero        c = sort(v) / max(v)                                                                    (3)
    with                δ = ½ ((1 − 1/30) + (1 − 1/32)) = 0.9677083                                             (4)

8 positive entries, 7 negative ones and an exact zero: sixteen. δ is where a quantile stops short of 1, whose Φ⁻¹ is
infinite. The paper prints another equation (its 4), q_i = ½ (Φ⁻¹(i/17) + Φ⁻¹((i+1)/17)), which gives −∞ for i = 0 and
does not produce the table; (1)–(4) is what the authors' code does (`create_normal_map` in bitsandbytes), and it does
so bit for bit if p is float32, Φ⁻¹ is computed in float64, and (3) is float32 again. All in float64, ten differ.

**How a weight becomes four bits.** Blocks of 64, each with a float32 scale; the rule is `blockwise`'s, bit for bit
bitsandbytes'. Two codes share a byte, the first in the high nibble; an odd last one is paired with code 7, the zero.
4 + 32/64 = 4.5 bits a weight, or 4.127 with `double_quant`.

The table is not symmetric: NF4(−x) ≠ −NF4(x) for most x, and the mean of the error is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8

from minift.nn.threads import on_all_cores
from minift.quant import blockwise
from minift.quant.codebooks import read_only, torch_linspace

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes and its files
ZERO = 7  # the code of 0.0
OFFSET = 0.9677083  # δ of (4), with the seven digits that bitsandbytes gives it


def normal_quantiles(offset: float = OFFSET) -> Float32[np.ndarray, " 16"]:
    """The sixteen NF4 values, ascending from −1 to 1: equations (1)–(3), rounded where bitsandbytes rounds."""
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(torch_linspace(offset, 0.5, 9)[:-1].astype(np.float64))  # (1)
    negative = -quantile(torch_linspace(offset, 0.5, 8)[:-1].astype(np.float64))  # (2)
    values = np.sort(np.concatenate([negative, [0.0], positive]).astype(np.float32))
    return read_only(values / values[-1])  # (3)


CODE = normal_quantiles()
MIDPOINTS = read_only(blockwise.midpoints(CODE))
_PAIRS = CODE[np.stack([np.arange(256) >> 4, np.arange(256) & 15], axis=1)]  # (256, 2): what a byte stands for
_WORDS = _PAIRS.view(np.uint64).reshape(256)  # the same 2,048 bytes, a pair at a time


@runtime_checkable
class Scales(Protocol):
    """Scales that are stored some other way than as float32, e.g. `double_quant.DoubleQuantizedScales`."""

    @property
    def size(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def decode(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A tensor in NF4: `codes` two a byte, one scale a block of `block_size` elements in row-major order.

    A `Weight` (minift.nn.weight) that does not learn. Raises ValueError if its parts do not fit each other."""

    codes: np.ndarray  # uint8 (ceil(n / 2),)
    absmax: np.ndarray | Scales  # float32 (ceil(n / block_size),), or double-quantized
    shape: tuple[int, ...]
    block_size: int = 64

    def __post_init__(self):
        n = self.size
        check_block_size(self.block_size)
        what = f"two of the {n} elements of shape {self.shape} a byte"
        blockwise.check_vector("codes", self.codes, np.uint8, (n + 1) // 2, what)
        if n % 2 and self.codes[-1] & 15 != ZERO:
            raise ValueError(f"codes: odd size {n}, the low nibble of the last byte is {self.codes[-1] & 15}, not 7")
        blocks = blockwise.block_count(n, self.block_size)
        if isinstance(self.absmax, np.ndarray):
            what = f"one for each block of {self.block_size}"
            blockwise.check_vector("absmax", self.absmax, np.float32, blocks, what)
        elif self.absmax.size != blocks:
            raise ValueError(f"absmax: {self.absmax.size} scales, needed {blocks}, one a block of {self.block_size}")

    @property
    def size(self) -> int:
        return blockwise.element_count(self.shape)

    @property
    def nbytes(self) -> int:
        """Codes and scales, as they are kept in memory and in files."""
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / self.size if self.size else 0.0

    def scales(self) -> Float32[np.ndarray, " blocks"]:
        """The float32 scale of every block, decoded if it is double-quantized."""
        return self.absmax if isinstance(self.absmax, np.ndarray) else self.absmax.decode()

    def dense(self, dtype: Any = None) -> Float[np.ndarray, "*shape"]:
        """The tensor that this stands for."""
        return dequantize(self, dtype)

    def linear(
        self, x: Float[np.ndarray, "*rows d_in"], dropout_key: int | None = None
    ) -> tuple[Float[np.ndarray, "*rows d_out"], Callable]:
        """y = x Ŵᵀ, and `vjp(dy) -> dx, None` with dx = dy Ŵ. A frozen weight gets no gradient.

        Ŵ has the type of x, and is decoded again for the backward pass: the closure keeps 4.5 bits a weight, not 32."""
        if len(self.shape) != 2:
            raise ValueError(f"linear: the weight has shape {self.shape}, needed (out, in)")
        y = x @ self.dense(x.dtype).T  # (..., d_out)

        def vjp(dy):
            return dy @ self.dense(dy.dtype), None

        return y, vjp

    def arrays(self) -> dict[str, np.ndarray]:
        """What learns: nothing."""
        return {}

    def with_arrays(self, arrays: dict[str, np.ndarray]) -> NF4Tensor:
        return self

    def __repr__(self) -> str:
        return f"NF4Tensor({self.shape}, {self.bits_per_parameter:.3f} bits per parameter, {self.nbytes:,} bytes)"


def quantize(w: Float[np.ndarray, "*shape"], block_size: int = 64) -> NF4Tensor:
    """NF4 codes and block scales; equations (1) and (2) of `blockwise` with this table.

        a = max |w|       q = #{ i : w · (1/a) > m_i }                                                           (5)

    `w` is of any shape, layout and floating type, and is rounded to float32 first. `block_size` is one of BLOCK_SIZES;
    the last block may be short. Raises ValueError for NaN and infinities, and for other block sizes.
    """
    check_block_size(block_size)
    codes = np.empty((w.size + 1) // 2, np.uint8)
    absmax = np.empty(blockwise.block_count(w.size, block_size), np.float32)
    blockwise.for_scaled_chunks(partial(_encode, codes), w, block_size, absmax)
    return NF4Tensor(codes, absmax, w.shape, block_size)


def _encode(codes: np.ndarray, elements: slice, scaled: np.ndarray) -> None:
    pairs = pack(blockwise.count_below(scaled, MIDPOINTS))  # q of (5)
    codes[elements.start // 2 : elements.start // 2 + pairs.size] = pairs  # a chunk starts at an even element


def dequantize(q: NF4Tensor, dtype: Any = None) -> Float[np.ndarray, "*shape"]:
    """ŵ = c_q · a, rounded to float32 once, and once more to `dtype` if that is not float32 (the default).

    One look-up gives both numbers of a byte: a pair of float32 is moved as one 8-byte word."""
    w = np.empty(2 * q.codes.size, np.float32)
    on_all_cores(partial(_decode, q.codes, q.scales(), w), blockwise.chunks(q.size, q.block_size))
    return w[: q.size].reshape(q.shape).astype(dtype or np.float32, copy=False)


def _decode(codes: np.ndarray, scales: np.ndarray, w: np.ndarray, elements: slice, blocks: slice, width: int) -> None:
    first, last = elements.start // 2, (elements.stop + 1) // 2
    _WORDS.take(codes[first:last], out=w[2 * first : 2 * last].view(np.uint64), mode="clip")
    rows = w[elements].reshape(-1, width)  # (blocks, width), a view
    rows *= scales[blocks, None]


def pack(codes: UInt8[np.ndarray, " n"]) -> UInt8[np.ndarray, " bytes"]:
    """Two codes a byte, the first of each pair in the high nibble; an odd last one is paired with code 7."""
    high, low = codes[0::2], codes[1::2]
    packed = high << np.uint8(4)
    packed[: low.size] |= low
    packed[low.size :] |= ZERO  # one byte if the number of codes is odd, else none
    return packed


def unpack(packed: UInt8[np.ndarray, " bytes"], n: int) -> UInt8[np.ndarray, " n"]:
    """The `n` codes of these bytes: the inverse of `pack`."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


def check_block_size(block_size: Any) -> None:
    """ValueError unless it is one of BLOCK_SIZES."""
    if not isinstance(block_size, (int, np.integer)) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: {block_size!r}, needed one of {', '.join(map(str, BLOCK_SIZES))}")
