"""A-priori error bounds: how far a right implementation may be from the exact result, from an operation's length alone.

Every bound is derived (Higham 2002, "Accuracy and Stability of Numerical Algorithms", chapter 3), none was widened
until a test went green. u is the unit roundoff, half the distance from 1 to the next number.
"""

from __future__ import annotations

import math

import numpy as np


def unit_roundoff(dtype: np.dtype | type) -> float:
    """u = ε / 2: 2⁻⁵³, 2⁻²⁴ or 2⁻¹¹."""
    return float(np.finfo(dtype).eps) / 2


def gamma(n: float, dtype: np.dtype | type) -> float:
    """γ_n = n u / (1 − n u): the relative error of n roundings in a row, in any order.         (Higham, lemma 3.1)"""
    nu = n * unit_roundoff(dtype)
    if nu >= 1:
        raise ValueError(f"γ_{n} of {np.dtype(dtype)} says nothing: n u is {nu:.2g}")
    return nu / (1 - nu)


def rms_norm(y: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """|fl(y) − y| ≤ (n/2 + 5) u |y|: a sum of n squares has no cancellation, its root halves the relative error, and
    five roundings follow: ε, root, reciprocal, two products."""
    return (y.shape[-1] / 2 + 5) * unit_roundoff(dtype) * np.abs(y) * (1 + 1e-3)


def softmax(x: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """|fl(p) − p| for softmax over the last axis, shifted by the maximum.     (Blanchard, Higham & Higham 2021, §4)

        p_i (u (d_i + Σ_j p_j d_j) + 2 ε_exp + γ_n + 2u)        d = max − x, ε_exp = 2u

    plus the smallest subnormal, where the exponential underflows."""
    u, n = unit_roundoff(dtype), x.shape[-1]
    exact = np.asarray(x, np.float64)
    d = exact.max(axis=-1, keepdims=True) - exact
    p = np.exp(-d)
    p /= p.sum(axis=-1, keepdims=True)
    relative = u * (d + np.sum(p * d, axis=-1, keepdims=True)) + 4 * u + gamma(n, dtype) + 2 * u
    return p * relative + float(np.finfo(dtype).smallest_subnormal)


def lora(x, W, A, B, scaling: float, dtype: np.dtype | type) -> np.ndarray:
    """|fl(y) − y| for y = x Wᵀ + s (x Aᵀ) Bᵀ: γ_{k+1} |x||W|ᵀ + s γ_{k+r+2} |x||A|ᵀ|B|ᵀ."""
    (r, k), x = A.shape, np.abs(x)
    base = gamma(k + 1, dtype) * (x @ np.abs(W).T)
    return base + abs(scaling) * gamma(k + r + 2, dtype) * ((x @ np.abs(A).T) @ np.abs(B).T)


def lora_merge(W, A, B, scaling: float, dtype: np.dtype | type) -> np.ndarray:
    """|fl(W′) − W′| for W′ = W + s B A: u |W′| for storing it, s γ_{r+1} |B||A| for the product, both once more for
    second-order terms."""
    product = np.abs(B) @ np.abs(A)
    return (
        unit_roundoff(dtype) * (np.abs(W) + abs(scaling) * product) + abs(scaling) * gamma(len(A) + 2, dtype) * product
    )


def rope_angle(position: int, dtype: np.dtype | type) -> float:
    """Error of cos φ and sin φ with φ = mω formed in float64 and rounded once: u for the value, and 2·2⁻⁵³·m for the
    angle in float64."""
    return unit_roundoff(dtype) + 2 * math.ldexp(1, -53) * max(position, 1)
