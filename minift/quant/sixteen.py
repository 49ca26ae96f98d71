"""Weights kept in 16 bits: float16, and bfloat16, which NumPy lacks, by rounding.

                 sign  exponent  fraction     u        largest       η, smallest subnormal
    float32        1       8        23      2⁻²⁴       3.4e38        2⁻¹⁴⁹
    bfloat16       1       8         7      2⁻⁸        3.4e38        2⁻¹³³
    float16        1       5        10      2⁻¹¹       65,504        2⁻²⁴

bfloat16 is the upper half of a float32: its range, and a third of its digits. float16 has eight times finer steps in a
narrow range. A number is rounded to the nearest, a tie to the even one:

    stored        |ŵ − w| ≤ u |w| + η / 2                                                               (1)
    multiplied    y = x float32(ŵ)ᵀ                                                                     (2)

**Mixed precision.** Only what is frozen is stored so. Arithmetic, activations, gradients and what learns are float32:
an AdamW step moves a weight by about the learning rate, and where that is less than u |w| / 2, 16 bits round it away.
So "LoRA over a 16-bit model" is exactly (2) and the adapter in float32, and its base takes half of the memory.
                                                                          (Micikevicius et al. 2018, arXiv 1710.03740)
NumPy has no arithmetic for bfloat16, and none for float16 that is not slower than float32's: (2) decodes the weight,
for the backward pass once more, and keeps 16 bits a number in between, as `nf4.NF4Tensor` keeps 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt16

from minift.nn.weight import Frozen, Params

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, eq=False)
class SixteenBitTensor:
    """A `Weight` (minift.nn.weight) that does not learn: float16 as such, bfloat16 as the uint16 of its bits.

    ValueError for bits of another type."""

    bits: np.ndarray  # float16 or uint16, of the weight's shape

    def __post_init__(self):
        if self.bits.dtype not in (np.float16, np.uint16):
            raise ValueError(f"bits: {self.bits.dtype}, needed float16, or uint16 that holds bfloat16")

    @property
    def dtype(self) -> str:
        return "float16" if self.bits.dtype == np.float16 else "bfloat16"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes

    def dense(self, dtype: Any = None) -> Float[np.ndarray, "*shape"]:
        """The numbers in float32, which holds each of them exactly, or in `dtype`."""
        exact = self.bits.astype(np.float32) if self.dtype == "float16" else from_bfloat16(self.bits)
        return exact.astype(dtype or np.float32, copy=False)

    def linear(
        self, x: Float[np.ndarray, "*rows d_in"], dropout_key: int | None = None
    ) -> tuple[Float[np.ndarray, "*rows d_out"], Callable]:
        """y = x Ŵᵀ, and `vjp(dy) -> dx, None` with dx = dy Ŵ: equation (2), in the type of x."""
        y = x @ self.dense(x.dtype).T  # (..., d_out)

        def vjp(dy):
            return dy @ self.dense(dy.dtype), None

        return y, vjp

    def arrays(self) -> dict[str, np.ndarray]:
        """What learns: nothing."""
        return {}

    def with_arrays(self, arrays: dict[str, np.ndarray]) -> SixteenBitTensor:
        return self

    def __repr__(self) -> str:
        return f"SixteenBitTensor({self.dtype} {self.shape}, {self.nbytes:,} bytes)"


def round_to(w: Float[np.ndarray, "*shape"], dtype: str) -> SixteenBitTensor:
    """The nearest 16-bit numbers: equation (1). float64 is rounded to float32 on the way to bfloat16.

    ValueError for float32, which is none of them, and for a number that is not finite in `dtype`, as those beyond
    65,504 are not in float16."""
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"dtype: {dtype!r}, needed 'bfloat16' or 'float16'")
    with np.errstate(over="ignore"):  # found by the next lines
        rounded = SixteenBitTensor(to_bfloat16(w) if dtype == "bfloat16" else w.astype(np.float16))
    if not (finite := np.isfinite(rounded.dense())).all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"{w[where]} at index {where} is not finite in {dtype}: keep this weight in float32")
    return rounded


def store(params: Params, dtype: str) -> dict[str, Any]:
    """The same parameters with every array in 16 bits, where none learns any more; "float32" leaves them as they are.

    4-bit weights keep their bits, and so does an adapter: what it is on does not. ValueError for an unknown dtype, and
    with a parameter's name for what does not fit."""
    return {name: stored(name, weight, dtype) for name, weight in params.items()}


def stored(name: str, weight: Any, dtype: str) -> Any:
    """`store` for one parameter, as it is read from a file."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype: {dtype!r}, needed one of {', '.join(map(repr, get_args(Dtype)))}")
    if dtype == "float32":
        return weight
    if isinstance(weight, np.ndarray | Frozen):
        try:
            return round_to(weight.array if isinstance(weight, Frozen) else weight, dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if hasattr(weight, "base"):
        return dataclasses.replace(weight, base=stored(name, weight.base, dtype))
    return weight


def to_bfloat16(x: Float[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
    """float32 → bfloat16, as uint16: round to nearest, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # half an ulp, less one bit where the kept part is even
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16).reshape(x.shape)


def from_bfloat16(bits: Shaped[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """bfloat16, as uint16 → float32, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
