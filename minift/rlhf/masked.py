"""Means over the entries that count: every loss here is one, and the rest of a rectangle must not matter.

What does not count is left out with `where`, never multiplied by 0: padding may hold anything, and 0 · NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float


def masked_mean(
    x: Float[np.ndarray, "*shape"], mask: Bool[np.ndarray, "*shape"], normalizer: float | None = None
) -> tuple[np.floating, Callable]:
    """(1/N) Σ_{i counts} x_i;  `vjp(dmean) -> dx`, exactly 0 where nothing counts.                        (1)

    N is the number of entries that count, or `normalizer`: to add micro-batches up to one large batch, pass the number
    in the *whole* batch to each. With nothing to count the mean is 0."""
    n = count(mask) if normalizer is None else normalizer
    mean = np.where(mask, x, 0).sum() / n  # (1)

    def vjp(dmean):
        return np.where(mask, x.dtype.type(dmean) / n, x.dtype.type(0))

    return x.dtype.type(mean), vjp


def count(mask: Bool[np.ndarray, "*shape"]) -> float:
    """How many entries count, at least 1: what a sum is divided by."""
    return float(max(int(np.count_nonzero(mask)), 1))
