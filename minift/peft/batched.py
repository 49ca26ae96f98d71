"""Many adapters on one base, in one batch: every row, or every sequence, says which is its own.

    y_i = x_i Wᵀ + s_a (x_i A_aᵀ) B_aᵀ        a = index_i, and for index_i = −1 the base alone              (1)

So a server keeps one large model and a small adapter for each of its users (Chen et al. 2023, arXiv 2310.18547; Sheng
et al. 2023, arXiv 2311.03285). The base product is the same for all rows and done at once. The detours differ. Row by
row, equation (1) as it stands, each adapter is read once for every row that uses it, and each product has one row. So
rows are sorted by adapter first; those of one adapter are then neighbors, a segment, and share two products.

Adapters may differ in rank and in scaling. A `Stack` holds them behind each other, filled up with zeros to the largest
rank. Zeros do no harm, now or later: what is filled up in A makes zeros in h, those meet zeros in B, and by (2) the
gradients there are zero, so an optimizer that multiplies and adds leaves them zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from minift.nn.linear import rows
from minift.nn.weight import Frozen, Weight


@dataclass(frozen=True, eq=False)
class Stack:
    """Adapters of one layer, by number. ValueError where the parts do not fit each other."""

    A: np.ndarray  # (n, r, in), r the largest rank
    B: np.ndarray  # (n, out, r)
    scaling: np.ndarray  # (n,): s of each

    def __post_init__(self):
        n, r, _ = self.A.shape
        if (self.B.shape[0], self.B.shape[2]) != (n, r) or self.scaling.shape != (n,):
            shapes = self.A.shape, self.B.shape, self.scaling.shape
            raise ValueError("A {}, B {}, scaling {}: needed (n, r, in), (n, out, r), (n,)".format(*shapes))

    def __repr__(self) -> str:
        return f"Stack({len(self.A)} adapters, r <= {self.A.shape[1]}, {self.A.nbytes + self.B.nbytes:,} bytes)"


def stack(adapters: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> Stack:
    """A `Stack` of (A, B, scaling), in this order: `[(w.A, w.B, w.scaling) for w in loras]`.

    ValueError for none, or for adapters of layers of different shapes."""
    shapes = {(A.shape[1], B.shape[0]) for A, B, _ in adapters}
    if len(shapes) != 1:
        raise ValueError(f"adapters: for layers of shapes (in, out) {sorted(shapes)}, needed one shape")
    r = max(len(A) for A, _, _ in adapters)
    A_stack = np.stack([np.pad(A, ((0, r - len(A)), (0, 0))) for A, _, _ in adapters])
    B_stack = np.stack([np.pad(B, ((0, 0), (0, r - len(A)))) for A, B, _ in adapters])
    return Stack(A_stack, B_stack, np.array([s for _, _, s in adapters], A_stack.dtype))


def forward_1(
    x: Float[np.ndarray, "*rows d_in"],
    W: Float[np.ndarray, "d_out d_in"] | Weight,
    adapters: Stack,
    index: Int[np.ndarray, "*some"],
) -> Float[np.ndarray, "*rows d_out"]:
    """1. Equation (1) as it stands."""
    base = Frozen(W) if isinstance(W, np.ndarray) else W
    y, _ = base.linear(x)
    for x_row, y_row, a in zip(rows(x), rows(y), of_rows(index, x.shape, len(adapters.A)), strict=True):
        if a >= 0:
            y_row += adapters.scaling[a] * (x_row @ adapters.A[a].T) @ adapters.B[a].T
    return y


def forward(
    x: Float[np.ndarray, "*rows d_in"],
    W: Float[np.ndarray, "d_out d_in"] | Weight,
    adapters: Stack,
    index: Int[np.ndarray, "*some"],
) -> tuple[Float[np.ndarray, "*rows d_out"], Callable]:
    """2. Segment by segment: equation (1) for all rows of an adapter at once.

    `index` has a number for each row, or for each of x's leading axes, such as one a sequence. `vjp(dy) -> dx, dW, dA,
    dB`, with the gradients of the stack, zero for an adapter that no row used, and over the rows i of each adapter

        dh_i = s_a dy_i B_a        dA_a = Σ_i dh_iᵀ x_i        dB_a = Σ_i dy_iᵀ h_i        dx_i = dy_i W + dh_i A_a  (2)

    dW is None: W is frozen. ValueError for an index that does not fit x or names no adapter of the stack."""
    base = Frozen(W) if isinstance(W, np.ndarray) else W
    segments = list(_segments(of_rows(index, x.shape, len(adapters.A)), len(adapters.A)))
    A, B, scaling = adapters.A, adapters.B, adapters.scaling
    y, base_vjp = base.linear(x)
    h = np.zeros((len(rows(x)), A.shape[1]), y.dtype)  # (N, r)
    for a, at in segments:
        h[at] = scaling[a] * (rows(x)[at] @ A[a].T)
        rows(y)[at] += h[at] @ B[a].T

    def vjp(dy):
        dx, _ = base_vjp(dy)
        dA, dB = np.zeros_like(A), np.zeros_like(B)
        for a, at in segments:
            dh = scaling[a] * (rows(dy)[at] @ B[a])
            dA[a] = dh.T @ rows(x)[at]
            dB[a] = rows(dy)[at].T @ h[at]
            rows(dx)[at] += dh @ A[a]
        return dx, None, dA, dB

    return y, vjp


def of_rows(index: Int[np.ndarray, "*some"], shape: tuple[int, ...], n: int) -> Int[np.ndarray, " N"]:
    """The adapter of each row of an x of this shape. ValueError for an index that does not fit."""
    if index.shape != shape[: index.ndim] or index.ndim >= len(shape):
        raise ValueError(f"index: shape {index.shape}, needed the first axes of x's rows, {shape[:-1]}")
    if index.size and not (index.min() >= -1 and index.max() < n):
        raise ValueError(f"index: from {index.min()} to {index.max()}, needed -1 (none) to {n - 1}")
    alone = index.reshape(index.shape + (1,) * (len(shape) - 1 - index.ndim))
    return np.broadcast_to(alone, shape[:-1]).reshape(-1)


def _segments(index: np.ndarray, n: int) -> Iterator[tuple[int, np.ndarray]]:
    """The adapters that are used, each with the places of its rows."""
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(n + 1))
    for a in range(n):
        if starts[a] < starts[a + 1]:
            yield a, order[starts[a] : starts[a + 1]]
