"""A-priori error bounds: how far a right implementation may be from the exact result, from an operation's length alone.

Every bound is derived (Higham 2002, "Accuracy and Stability of Numerical Algorithms", chapter 3), none was widened
until a test went green. u is the unit roundoff, half the distance from 1 to the next number.
"""

from __future__ import annotations

import math

import numpy as np

from minift.quant.double_quant import DoubleQuantizedScales
from minift.quant.nf4 import CODE


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


def nf4(absmax: np.ndarray, nested: DoubleQuantizedScales | None = None) -> np.ndarray:
    """|ŵ − w| for every number w of a block whose largest magnitude is a ≥ 1e-38, one bound a block:

        a (h + 4u)        h = 0.1519, half the widest gap of the table, between −1 and its neighbor

    One u each for 1/a, its product with w, the midpoint, and c a, relative to numbers ≤ 1. Scales that are stored in
    8 bits, with nested scales a₂ and the offset ā, add

        |â − a| ≤ h₂ a₂ + 4u (a₂ + ā + a)        h₂ = 0.00703, half the widest gap of the dynamic map

    and h₂ a₂ once more where the nearest entry would have been negative, which needs a ≤ h₂ a₂."""
    u, a = unit_roundoff(np.float32), np.asarray(absmax, np.float64)
    bound = a * (np.diff(CODE.astype(np.float64)).max() / 2 + 4 * u)
    if nested is None:
        return bound
    h = max(np.diff(nested.code.astype(np.float64)).max() / 2, 1 + float(nested.code[0]))
    a2 = np.repeat(nested.absmax.astype(np.float64), nested.block_size)[: a.size]
    share = h * a2 * np.where(a <= 1.001 * h * a2, 2, 1)
    return bound + (1 + u) * (share + 4 * u * (a2 + abs(float(nested.offset)) + a))


def rope_angle(position: int, dtype: np.dtype | type) -> float:
    """Error of cos φ and sin φ with φ = mω formed in float64 and rounded once: u for the value, and 2·2⁻⁵³·m for the
    angle in float64."""
    return unit_roundoff(dtype) + 2 * math.ldexp(1, -53) * max(position, 1)


def int8_product(x: np.ndarray, w: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """|y − x Wᵀ| for 8-bit codes of both, a scale for each row of either, and columns of x kept apart that reach the
    threshold: equation (5) of `int8_vectorwise`,

        Σ_(j ∉ O) (a_i |w_oj| + a_i b_o / 254) / 254 + Σ_j |x_ij| b_o / 254

    a_i the largest of a row of x below the threshold. Codes are off by half, and 127 · 4u more for the rounding of
    127 / a and its product; the arithmetic behind it adds γ_(k+6) of Σ |x̂| |ŵ|."""
    u = unit_roundoff(np.float32)
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(w, np.float64))
    large = x >= threshold if threshold > 0 else np.zeros(x.shape, bool)
    d = x.shape[-1]
    apart = large.reshape(-1, d).any(axis=0)
    half = (0.5 + 600 * u) / 127
    a = half * np.where(large, 0, x).max(axis=-1, keepdims=True, initial=0)  # (..., 1): error of each number of x
    b = half * w.max(axis=-1, initial=0)  # (out,)
    x_error = np.where(apart, 0, a)  # (..., in)
    error = x_error @ w.T + (x + x_error).sum(axis=-1, keepdims=True) * b
    return error + gamma(d + 6, np.float32) * ((x + x_error) @ (w + b[:, None]).T)
