"""From the hidden states of a text to one vector for all of it.

Padding stands to the right, and `lengths` counts the real tokens of each row: what lies behind them is not looked at
and gets a cotangent of exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer


def mean_pool(
    x: Float[np.ndarray, "batch tokens d"], lengths: Integer[np.ndarray, " batch"]
) -> tuple[Float[np.ndarray, "batch d"], Callable]:
    """The mean over each row's real tokens: a sentence embedding. (Reimers & Gurevych 2019, arXiv 1908.10084, §3)

        y_b = (1/n_b) Σ_{t < n_b} x_bt        dx_bt = dy_b / n_b where t < n_b, else 0                  (1)

    `vjp(dy) -> dx`. ValueError for a row without a token, or with more than there are columns.
    """
    real = _real(x, lengths)[..., None]  # (B, T, 1)
    n = lengths[:, None].astype(x.dtype)
    y = np.where(real, x, 0).sum(axis=1) / n  # (B, d); where: padding may hold NaN

    def vjp(dy):
        return np.where(real, (dy / n)[:, None], 0).astype(dy.dtype)

    return y, vjp


def last_token(
    x: Float[np.ndarray, "batch tokens d"], lengths: Integer[np.ndarray, " batch"]
) -> tuple[Float[np.ndarray, "batch d"], Callable]:
    """Each row's last real token: in a causal model the only one that has seen the whole text.

        y_b = x_b,n−1        dx is dy there and 0 elsewhere,  n = lengths_b                             (2)

    `vjp(dy) -> dx`. ValueError as `mean_pool`.
    """
    _real(x, lengths)
    at = np.arange(len(x)), lengths - 1
    y = x[at]  # (B, d)

    def vjp(dy):
        dx = np.zeros(x.shape, dy.dtype)
        dx[at] = dy
        return dx

    return y, vjp


def unit_length(x: Float[np.ndarray, "*rows d"], eps: float = 1e-12) -> tuple[Float[np.ndarray, "*rows d"], Callable]:
    """Scale each row to length 1, so that a product of two rows is the cosine of their angle.

        y = x / max(|x|, ε)        dx = (dy − y Σ dy y) / |x|        where |x| > ε, else dy / ε          (3)

    `vjp(dy) -> dx`. ε keeps a row of zeros at zero, as torch's `normalize` does.
    """
    norm = np.sqrt(np.vecdot(x, x))[..., None]  # (..., 1)
    longer = norm > eps
    length = np.maximum(norm, x.dtype.type(eps))
    y = x / length

    def vjp(dy):
        along = np.where(longer, np.vecdot(dy, y)[..., None], 0)  # below ε nothing depends on the length
        return (dy - y * along) / length

    return y, vjp


def _real(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which columns hold a token of the text, (B, T)."""
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= x.shape[1]:
        row = int(np.argmax((lengths < 1) | (lengths > x.shape[1])))
        raise ValueError(f"row {row} has {lengths[row]} tokens, needed 1 to {x.shape[1]}")
    return np.arange(x.shape[1]) < lengths[:, None]
