"""The linear map, and the two reductions that every pullback of a broadcast needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from minift.nn.weight import Weight, unwrap


def linear(
    x: Float[np.ndarray, "*rows d_in"],
    weight: Float[np.ndarray, "d_out d_in"] | Weight,
    bias: Float[np.ndarray, " d_out"] | Weight | None = None,
    *,
    dropout_key: int | None = None,
) -> tuple[Float[np.ndarray, "*rows d_out"], Callable]:
    """A linear map; the weight may be quantized or carry an adapter.

        y = x Wᵀ + b                                                                                    (1)

    `vjp(dy) -> dx, dweight, dbias`:

        dx = dy W       dW = dyᵀ x  (summed over rows)       db = Σ_rows dy                             (2)

    W is (out, in), as in every checkpoint of the field. For a weight that is not an ndarray `dweight` is whatever
    learns in it (`minift.nn.weight.Cotangent`), None if nothing does, and so is `dbias`. `dropout_key` reaches a LoRA's
    dropout.
    """
    if isinstance(weight, np.ndarray):
        y = x @ weight.T  # (..., d_out)
    else:
        y, weight_vjp = weight.linear(x, dropout_key)
    shift, shift_learns = (None, False) if bias is None else unwrap(bias)
    if shift is not None:
        y = y + shift

    def vjp(dy):
        if isinstance(weight, np.ndarray):
            dx = dy @ weight
            dweight = rows(dy).T @ rows(x)  # (d_out, d_in)
        else:
            dx, dweight = weight_vjp(dy)
        dbias = sum_to(dy, shift.shape) if shift is not None and shift_learns else None
        return dx, dweight, dbias

    return y, vjp


def rows(x: np.ndarray) -> np.ndarray:
    """(..., d) as a matrix (N, d)."""
    return x.reshape(-1, x.shape[-1])


def sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The pullback of broadcasting `shape` to `x.shape`: sum over what was repeated."""
    extra = x.ndim - len(shape)
    repeated = tuple(range(extra)) + tuple(
        extra + axis for axis, n in enumerate(shape) if n == 1 and x.shape[extra + axis] != 1
    )
    return x.sum(axis=repeated, keepdims=True).reshape(shape) if repeated else x
