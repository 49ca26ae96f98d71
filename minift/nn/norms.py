"""RMSNorm and LayerNorm: rescale each row of activations to unit size, then let each feature have its own gain.

Notation: x̂ is `x_hat`, the normalized row; γ (Zhang & Sennrich's g) is `weight`, β is `bias`; means are over the last
axis. The backward passes differentiate *through* the statistics. For ρ = 1 / rms(x), `inv_rms`,

    ρ = (mean(x²) + ε)^(−1/2)    so    dρ = −ρ³ mean(x dx)    and    dx̂ = ρ dx + x dρ = ρ (dx − x̂ mean(x̂ dx))

a symmetric map, so the pullback is the same with the cotangent in the place of dx: that is the term subtracted in (2).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from minift.nn.linear import sum_to
from minift.nn.weight import Weight, unwrap


def rms_norm(
    x: Float[np.ndarray, "*rows d"], weight: Float[np.ndarray, " d"] | Weight, eps: float = 1e-6
) -> tuple[Float[np.ndarray, "*rows d"], Callable]:
    """Divide each row by its root mean square.                      (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)

        y = x̂ γ        x̂ = x / rms(x)        rms(x) = √(mean(x²) + ε)                                  (1)

    `vjp(dy) -> dx, dweight`:

        dx = (dx̂ − x̂ mean(dx̂ x̂)) / rms(x)       dx̂ = dy γ       dγ = Σ_rows dy x̂                       (2)

    The mean is not subtracted, unlike in `layer_norm`; ε keeps an all-zero row at zero.
    """
    gain, gain_learns = unwrap(weight)
    inv_rms = 1 / np.sqrt(_mean_of_products(x, x) + eps)  # (..., 1), from rms(x) of (1)
    x_hat = x * inv_rms  # (..., d)
    y = x_hat * gain

    def vjp(dy):
        dx_hat = dy * gain  # from  y = x_hat * gain
        dweight = sum_to(dy * x_hat, gain.shape) if gain_learns else None  # dγ of (2)
        dx = dx_hat - x_hat * _mean_of_products(dx_hat, x_hat)
        dx *= inv_rms
        return dx, dweight

    return y, vjp


def layer_norm(
    x: Float[np.ndarray, "*rows d"],
    weight: Float[np.ndarray, " d"] | Weight,
    bias: Float[np.ndarray, " d"] | Weight,
    eps: float = 1e-5,
) -> tuple[Float[np.ndarray, "*rows d"], Callable]:
    """Subtract each row's mean, then divide by its standard deviation.     (Ba, Kiros & Hinton 2016, arXiv 1607.06450)

        y = x̂ γ + β        x̂ = (x − mean(x)) / √(var(x) + ε)                                           (3)

    `vjp(dy) -> dx, dweight, dbias`:

        dx = (dx̂ − mean(dx̂) − x̂ mean(dx̂ x̂)) / √(var(x) + ε)       dγ = Σ_rows dy x̂       dβ = Σ_rows dy  (4)

    The variance is the biased one, mean((x − mean(x))²), as everywhere in the field.
    """
    gain, gain_learns = unwrap(weight)
    shift, shift_learns = unwrap(bias)
    centered = x - np.mean(x, axis=-1, keepdims=True)  # (..., d)
    inv_std = 1 / np.sqrt(_mean_of_products(centered, centered) + eps)  # (..., 1)
    x_hat = centered * inv_std
    y = x_hat * gain + shift

    def vjp(dy):
        dx_hat = dy * gain  # from  y = x_hat * gain + shift
        dweight = sum_to(dy * x_hat, gain.shape) if gain_learns else None
        dbias = sum_to(dy, shift.shape) if shift_learns else None
        dx = dx_hat - np.mean(dx_hat, axis=-1, keepdims=True)
        dx -= x_hat * _mean_of_products(dx_hat, x_hat)
        dx *= inv_std
        return dx, dweight, dbias

    return y, vjp


def _mean_of_products(x, y):
    """mean(x y) over the last axis, which stays as one of length 1: a dot product a row, with no array of products."""
    return np.vecdot(x, y)[..., None] / x.shape[-1]
