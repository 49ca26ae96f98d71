"""Means over the entries that count, on torch tensors: the twin of `minift.rlhf.masked`.

What does not count is left out with `where`, in both passes: autograd's cotangent of it is exactly 0.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from minift_kernels import backend as backends


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], normalizer: float | None = None
) -> Float[Tensor, ""]:
    """(1/N) Σ_{i counts} x_i, 0 with nothing to count. N is the number of entries that count, or `normalizer`."""
    return backends.widened(x).where(mask, 0).sum() / (count(mask) if normalizer is None else normalizer)


def count(mask: Bool[Tensor, "*shape"]) -> Tensor:
    """How many entries count, at least 1: what a sum is divided by. A tensor, for which nobody waits."""
    return mask.sum().clamp(min=1)
