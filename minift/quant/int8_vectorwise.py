"""LLM.int8(): a product of 8-bit matrices, with the few columns that would spoil it kept apart.

                                                                          (Dettmers et al. 2022, arXiv 2208.07339)
    codes of x, row by row        q_ij = round(127 x_ij / a_i)        a_i = max_j |x_ij|                 (1)
    codes of W, row by row        p_oj = round(127 w_oj / b_o)        b_o = max_j |w_oj|                 (2)
    the product                   y_io ≈ (a_i b_o / 127²) Σ_j q_ij p_oj                                  (3)

The sum is one of integers and exact, and a scale for each row of either matrix ("vector-wise") factors out of it, which
a scale for each block of 64 would not. (The paper writes X W and speaks of W's columns: here W is (out, in).)

**Outliers.** From some billions of parameters on, the same few features are 20 times as large as all others, in every
token. One of them sets a_i for its whole row, and the other 99.9 % are left with a few of the 255 codes. So each column
in which some |x_ij| ≥ τ = 6 is taken out of (3), and multiplied as it is:

    y_io ≈ (a_i b_o / 127²) Σ_(j ∉ O) q_ij p_oj + Σ_(j ∈ O) x_ij ŵ_oj        O = { j : max_i |x_ij| ≥ τ }  (4)

with ŵ = p b / 127, as W exists in 8 bits only. In (4) a_i is the maximum over |x_ij| < τ, in whichever column: that is
bitsandbytes' rule (0.50), whose codes and scales these are, bit for bit. (The paper's, over j ∉ O, is at most that.)
The error, but for rounding in the type of x, is at most, with the first sum over j ∉ O only,

    |y − x Wᵀ|_io ≤ Σ_j (a_i |w_oj| + a_i b_o / 254) / 254 + Σ_j |x_ij| b_o / 254                        (5)

**The pullback.** Rounding has derivative zero almost everywhere, which is of no use; what (4) computes is x Ŵᵀ up to
rounding, and its pullback is that function's: dx = dy Ŵ. W does not learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int8, Int32, Integer

from minift.nn.linear import rows
from minift.quant.blockwise import check_vector, refuse_non_finite

THRESHOLD = 6.0
TINY = np.float32(1e-36)  # 127 / a is finite from here on
EXACT = 1040  # 127² · 1040 < 2²⁴: sums of that many products are exact in float32, in any order


@dataclass(frozen=True, eq=False)
class Int8Tensor:
    """A `Weight` (minift.nn.weight) of 8-bit codes and one scale a row, that does not learn: equation (2).

    ValueError if the parts do not fit each other."""

    codes: np.ndarray  # int8 (out, in)
    absmax: np.ndarray  # float32 (out,): b
    threshold: float = THRESHOLD

    def __post_init__(self):
        if self.codes.dtype != np.int8 or self.codes.ndim != 2:
            raise ValueError(f"codes: {self.codes.dtype} {self.codes.shape}, needed int8 (out, in)")
        check_vector("absmax", self.absmax, np.float32, len(self.codes), "one for each row of the codes")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def dense(self, dtype: Any = None) -> Float[np.ndarray, "out d_in"]:
        """ŵ = p b / 127."""
        return decoded(self.codes, self.absmax).astype(dtype or np.float32, copy=False)

    def linear(
        self, x: Float[np.ndarray, "*rows d_in"], dropout_key: int | None = None
    ) -> tuple[Float[np.ndarray, "*rows d_out"], Callable]:
        """`forward` with this weight's threshold; `vjp(dy) -> dx, None`."""
        y, forward_vjp = forward(x, self, self.threshold)
        return y, lambda dy: (forward_vjp(dy), None)

    def arrays(self) -> dict[str, np.ndarray]:
        """What learns: nothing."""
        return {}

    def with_arrays(self, arrays: dict[str, np.ndarray]) -> Int8Tensor:
        return self

    def __repr__(self) -> str:
        return f"Int8Tensor({self.shape}, {self.nbytes:,} bytes)"


def quantize(w: Float[np.ndarray, "out d_in"], threshold: float = THRESHOLD) -> Int8Tensor:
    """Equation (2). The threshold is for the products to come: outliers of W itself are not kept apart.

    ValueError for NaN and infinities."""
    codes, absmax, _ = quantize_rows(w)
    return Int8Tensor(codes, absmax, threshold)


def quantize_rows(
    x: Float[np.ndarray, "n d"], threshold: float = 0.0
) -> tuple[Int8[np.ndarray, "n d"], Float32[np.ndarray, " n"], Integer[np.ndarray, " outliers"]]:
    """Codes, scales a, and the columns O, whose codes are 0: equations (1) and (4). A threshold of 0 is none.

    In float32, each operation rounded once: 1/a, times 127, times x; ties to the even code.
    ValueError for NaN and infinities."""
    with np.errstate(over="ignore"):
        x32 = x.astype(np.float32, copy=False)
    magnitude = np.abs(x32)
    if not np.isfinite(magnitude).all():
        refuse_non_finite(x)
    outliers = np.zeros(0, np.int64)
    if threshold > 0:
        large = magnitude >= threshold
        outliers = np.flatnonzero(large.any(axis=0))
        magnitude[large] = 0
    absmax = magnitude.max(axis=1, initial=0)
    inverse = 1 / np.maximum(absmax, TINY) * np.float32(127)
    kept = x32.copy()
    kept[:, outliers] = 0
    return np.rint(kept * inverse[:, None]).astype(np.int8), absmax, outliers


def forward(
    x: Float[np.ndarray, "*rows d_in"], w: Int8Tensor, threshold: float = THRESHOLD
) -> tuple[Float[np.ndarray, "*rows d_out"], Callable]:
    """Equation (4); with a threshold of 0, equation (3). `vjp(dy) -> dx` with dx = dy Ŵ.

    In the type of x; float16 is raised to float32, and rounded once at the end.
    Which columns are outliers depends on all rows together, so y does too, by as much as rounding differs."""
    q, a, outliers = quantize_rows(rows(x), threshold)
    dtype = np.promote_types(x.dtype, np.float32)
    total = integer_product_2(q, w.codes).astype(dtype)  # (n, out), exact until here
    y = total * np.multiply.outer(a.astype(dtype), w.absmax) / dtype.type(127**2)
    if outliers.size:
        y += rows(x)[:, outliers].astype(dtype) @ decoded(w.codes[:, outliers], w.absmax).T

    def vjp(dy):
        return dy @ w.dense(dy.dtype)

    return y.reshape(*x.shape[:-1], w.shape[0]).astype(x.dtype, copy=False), vjp


def decoded(codes: Int8[np.ndarray, "n d"], absmax: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, "n d"]:
    """x̂ = q (a / 127), two roundings."""
    return codes * (absmax / np.float32(127))[:, None]


# The sum of equation (3) two ways.


def integer_product_1(q: Int8[np.ndarray, "n d"], p: Int8[np.ndarray, "out d"]) -> Int32[np.ndarray, "n out"]:
    """As it is written. NumPy multiplies integers one after the other."""
    return q.astype(np.int32) @ p.T.astype(np.int32)


def integer_product_2(q: Int8[np.ndarray, "n d"], p: Int8[np.ndarray, "out d"]) -> Int32[np.ndarray, "n out"]:
    """With the fast product of float32, which is exact as long as no sum reaches 2²⁴: EXACT columns at a time."""
    total = np.zeros((len(q), len(p)), np.int32)
    for first in range(0, q.shape[1], EXACT):
        strip = slice(first, first + EXACT)
        total += (q[:, strip].astype(np.float32) @ p[:, strip].T.astype(np.float32)).astype(np.int32)
    return total
