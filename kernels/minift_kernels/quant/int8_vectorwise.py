"""LLM.int8() on torch tensors: the twin of `minift.quant.int8_vectorwise`, where the equations are.

Codes, scales and the choice of outlier columns are the reference's, bit for bit, and so is the sum of integers: y can
differ in the product with the outlier columns alone, whose sums have another order.

**A sum of integers that is exact.** On a GPU it is the library's product of 8-bit matrices, summed in int32. It takes
more than 16 rows and multiples of 8 (`torch._int_mm`): zeros fill up what is missing, and add nothing. On a CPU it is
the product of float32, EXACT columns at a time, whose sums stay below 2²⁴: the library's own would have to be trusted
not to saturate pairs of products in 16 bits, as instructions older than VNNI do.

There is no kernel for it here: which columns are kept apart is known only after all rows have been seen, and then both
products are the library's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int8, Int32, Integer
from torch import Tensor
from torch.nn import functional

from minift.quant.blockwise import refuse_non_finite
from minift.quant.int8_vectorwise import EXACT, THRESHOLD, TINY
from minift_kernels import backend as backends
from minift_kernels.backend import rows
from minift_kernels.quant.blockwise import check_device, check_vector

__all__ = ["EXACT", "THRESHOLD", "TINY", "Int8Tensor", "decoded", "forward", "integer_product_2", "quantize"]
__all__ += ["quantize_rows"]


@dataclass(frozen=True, eq=False)
class Int8Tensor:
    """A `Weight` (minift_kernels.nn.weight) of 8-bit codes and one scale a row, that does not learn.

    ValueError if the parts do not fit each other, lie on different devices or require a gradient."""

    codes: Tensor  # int8 (out, in)
    absmax: Tensor  # float32 (out,)
    threshold: float = THRESHOLD

    def __post_init__(self):
        if self.codes.dtype != torch.int8 or self.codes.ndim != 2:
            raise ValueError(f"codes: {self.codes.dtype} {tuple(self.codes.shape)}, needed int8 (out, in)")
        check_vector("absmax", self.absmax, torch.float32, len(self.codes), "one for each row of the codes")
        check_device("absmax", self.absmax, self.codes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out d_in"]:
        """ŵ = p b / 127."""
        return decoded(self.codes, self.absmax).to(dtype or torch.float32)

    def linear(
        self, x: Float[Tensor, "*rows d_in"], dropout_key: int | None = None, *, backend: str | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """`forward` with this weight's threshold, the same in every backend."""
        backends.choose(backend, x.device, x.dtype)
        return forward(x, self, self.threshold)

    def arrays(self) -> dict[str, Tensor]:
        """What learns: nothing."""
        return {}

    def with_arrays(self, arrays: dict[str, Tensor]) -> Int8Tensor:
        return self

    def __repr__(self) -> str:
        return f"Int8Tensor({self.shape}, {self.nbytes:,} bytes)"


def quantize(w: Float[Tensor, "out d_in"], threshold: float = THRESHOLD) -> Int8Tensor:
    """Codes and scales of each row. The threshold is for the products to come. ValueError for NaN and infinities."""
    codes, absmax, _ = quantize_rows(w)
    return Int8Tensor(codes, absmax, threshold)


@torch.no_grad()
def quantize_rows(
    x: Float[Tensor, "n d"], threshold: float = 0.0
) -> tuple[Int8[Tensor, "n d"], Float32[Tensor, " n"], Integer[Tensor, " outliers"]]:
    """Codes, scales, and the outlier columns, whose codes are 0. A threshold of 0 is none.

    In float32, each operation rounded once: 1/a, times 127, times x; ties to the even code. How many columns there are
    is waited for, and so is ValueError for NaN and infinities."""
    x32 = x.to(torch.float32)
    magnitude = x32.abs()
    if not torch.isfinite(magnitude).all():
        refuse_non_finite(x.double().cpu().numpy())
    outliers = torch.zeros(0, dtype=torch.int64, device=x.device)
    if threshold > 0:
        large = magnitude >= threshold
        outliers = large.any(dim=0).nonzero()[:, 0]
        magnitude = magnitude.masked_fill(large, 0)
    absmax = magnitude.amax(dim=1) if x.shape[1] else magnitude.new_zeros(len(x))
    inverse = 1 / absmax.clamp(min=float(TINY)) * 127
    codes = torch.round(x32 * inverse[:, None]).index_fill(1, outliers, 0)
    return codes.to(torch.int8), absmax, outliers


def forward(
    x: Float[Tensor, "*rows d_in"], w: Int8Tensor, threshold: float = THRESHOLD
) -> Float[Tensor, "*rows d_out"]:
    """y ≈ (a b / 127²) Σ q p over what is kept, and x ŵ over the outlier columns, with the gradient dx = dy Ŵ.

    In the type of x; 16 bits are raised to float32, and rounded once at the end. Which columns are outliers depends on
    all rows together. ValueError for x and w that do not fit each other, and for NaN and infinities."""
    if x.shape[-1:] != w.codes.shape[1:]:
        raise ValueError(f"forward: x {tuple(x.shape)} and a weight {w.shape}, needed (…, in), (out, in)")
    return _Forward.apply(x, w, threshold)


class _Forward(torch.autograd.Function):
    """Rounding has derivative zero almost everywhere; the gradient is that of x Ŵᵀ."""

    @staticmethod
    def forward(ctx, x, w, threshold):
        ctx.w = w
        wide = backends.widened(rows(x))
        q, a, outliers = quantize_rows(wide, threshold)
        total = integer_product_2(q, w.codes).to(wide.dtype)  # (n, out), exact until here
        scales = a.to(wide.dtype)[:, None] * w.absmax.to(wide.dtype)
        y = total * scales / wide.new_full((), 127**2)  # a tensor: a GPU multiplies by the reciprocal of a number
        if len(outliers):
            y += wide[:, outliers] @ decoded(w.codes[:, outliers], w.absmax).to(wide.dtype).T
        return y.view(*x.shape[:-1], w.shape[0]).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        wide = backends.widened(dy)
        return (wide @ ctx.w.dense(wide.dtype)).to(dy.dtype), None, None


def decoded(codes: Int8[Tensor, "n d"], absmax: Float32[Tensor, " n"]) -> Float32[Tensor, "n d"]:
    """x̂ = q (a / 127), two roundings."""
    return codes * (absmax / absmax.new_full((), 127))[:, None]  # a tensor, as in `forward`


def integer_product_2(q: Int8[Tensor, "n d"], p: Int8[Tensor, "out d"]) -> Int32[Tensor, "n out"]:
    """Σ_j q_ij p_oj, exact while it fits into int32: up to 133,144 columns of codes -127 … 127."""
    if q.device.type == "cuda":
        return _padded_product(q, p)
    total = torch.zeros(len(q), len(p), dtype=torch.int32, device=q.device)
    for first in range(0, q.shape[1], EXACT):
        strip = slice(first, first + EXACT)
        total += (q[:, strip].float() @ p[:, strip].float().T).to(torch.int32)
    return total


def _padded_product(q: Tensor, p: Tensor) -> Tensor:
    """The library's, of matrices filled up with zeros to what it takes."""
    (n, d), out = q.shape, len(p)
    columns = max(-(-d // 8), 1) * 8
    q = functional.pad(q, (0, columns - d, 0, max(17 - n, 0)))
    p = functional.pad(p, (0, columns - d, 0, max(-(-out // 8), 1) * 8 - out))
    return torch._int_mm(q, p.T)[:n, :out]
