"""A-priori error bounds: how far a right implementation may be from the exact result, from an operation's length alone.

Every bound is derived (Higham 2002, "Accuracy and Stability of Numerical Algorithms", chapter 3), none was widened
until a test went green. u is the unit roundoff, half the distance from 1 to the next number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """|fl(ab) − ab| ≤ γ_K |a||b|, element by element, whatever the order of summation.       (Higham, eq. 3.13)"""
    return gamma(a.shape[-1], dtype) * (np.abs(a) @ np.abs(b))


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


# --- where no closed formula is worth its length: carry the bound along with the value --------------------------------

ELEMENTARY = 8  # u: exp, log, tanh, sin, cos of NumPy and of C libraries are within 4 units in the last place


class Ball:
    """A float64 value, and a radius that any right computation of it in `dtype` stays within.

    Midpoint-radius arithmetic (Rump 1999; the running error analysis of Higham, §3.3): each operation moves the radii
    of its operands through the exact operation, second-order terms included, and adds its own rounding, u |result|,
    or γ_n Σ|terms| for a sum of n in any order, and the smallest subnormal for underflow. An oracle written with Balls
    is therefore the formula, its value and its bound at once. u includes 2⁻⁵³ for the oracle's own float64.
    """

    __array_ufunc__ = None  # ndarray + Ball is Ball.__radd__

    def __init__(self, value, dtype: np.dtype | type, radius=0.0):
        self.value = np.asarray(value, np.float64)
        self.radius = np.broadcast_to(np.asarray(radius, np.float64), self.value.shape)
        self.dtype = np.dtype(dtype)

    def _lift(self, other) -> Ball:
        """Arrays are exact; a Python number is rounded to the dtype first."""
        if isinstance(other, Ball):
            return other
        value = np.asarray(other, np.float64)
        return Ball(value, self.dtype, np.abs(value - value.astype(self.dtype)) if value.ndim == 0 else 0.0)

    def _rounded(self, value, radius, n: float = 1) -> Ball:
        u = n * (unit_roundoff(self.dtype) + 2.0**-53)
        tiny = float(np.finfo(self.dtype).smallest_subnormal)
        return Ball(value, self.dtype, radius + u * (np.abs(value) + radius) + n * tiny)

    def _exact(self, move: Callable) -> Ball:
        return Ball(move(self.value), self.dtype, move(self.radius))

    def __neg__(self):
        return Ball(-self.value, self.dtype, self.radius)

    def __add__(self, other):
        other = self._lift(other)
        return self._rounded(self.value + other.value, self.radius + other.radius)

    def __sub__(self, other):
        return self + -self._lift(other)

    def __mul__(self, other):
        a, b = self, self._lift(other)
        return self._rounded(
            a.value * b.value, np.abs(a.value) * b.radius + a.radius * np.abs(b.value) + a.radius * b.radius
        )

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return self._lift(other) - self

    def __truediv__(self, other):
        b = self._lift(other)
        nearest = np.abs(b.value) - b.radius
        if not (nearest > 0).all():
            raise ValueError("a divisor's ball contains 0")
        value = self.value / b.value
        return self._rounded(value, (self.radius + np.abs(value) * b.radius) / nearest)

    def __rtruediv__(self, other):
        return self._lift(other) / self

    def __matmul__(self, other):
        a, b = self, self._lift(other)
        x, y = np.abs(a.value) + a.radius, np.abs(b.value) + b.radius
        spread = x @ y - np.abs(a.value) @ np.abs(b.value)
        n, tiny = a.value.shape[-1], float(np.finfo(self.dtype).smallest_subnormal)
        rounding = (gamma(n, self.dtype) + gamma(n, np.float64)) * (x @ y) * (1 + 1e-12) + n * tiny
        return Ball(a.value @ b.value, self.dtype, spread + rounding)

    def sum(self, axis=None) -> Ball:
        """Keeps its axes, as every reduction here."""
        value, radius = (x.sum(axis=axis, keepdims=True) for x in (self.value, self.radius))
        n = self.value.size // max(value.size, 1)
        terms = np.abs(self.value).sum(axis=axis, keepdims=True) + radius
        return Ball(value, self.dtype, radius + (gamma(n, self.dtype) + gamma(n, np.float64)) * terms)

    def mean(self, axis=-1) -> Ball:
        return self.sum(axis) / float(self.value.shape[axis])

    def max(self, axis=-1) -> Ball:
        return Ball(
            self.value.max(axis=axis, keepdims=True), self.dtype, self.radius.max(axis=axis, keepdims=True)
        )  # no rounding

    def sqrt(self) -> Ball:
        value, lowest = np.sqrt(self.value), np.sqrt(np.maximum(self.value - self.radius, 0))
        return self._rounded(value, self.radius / np.maximum(value + lowest, np.finfo(np.float64).tiny))

    def exp(self) -> Ball:
        value = np.exp(self.value)
        return self._rounded(value, value * np.expm1(self.radius), ELEMENTARY)

    def log(self) -> Ball:
        return self._rounded(np.log(self.value), -np.log1p(-self.radius / self.value), ELEMENTARY)

    def tanh(self) -> Ball:
        return self._rounded(np.tanh(self.value), self.radius, ELEMENTARY)  # its slope is at most 1

    def where(self, mask: np.ndarray) -> Ball:
        """Exactly 0 outside the mask."""
        return self._exact(lambda x: np.where(mask, x, 0.0))

    def reshape(self, *shape: int) -> Ball:
        return self._exact(lambda x: x.reshape(shape))

    def swapaxes(self, a: int, b: int) -> Ball:
        return self._exact(lambda x: x.swapaxes(a, b))

    @property
    def T(self) -> Ball:
        return self.swapaxes(-1, -2)

    def __getitem__(self, index) -> Ball:
        return self._exact(lambda x: x[index])

    def check(self, found: np.ndarray | np.floating, what: str) -> None:
        """AssertionError with the worst element unless `found` lies in the ball (and has its dtype and shape)."""
        found = np.asarray(found)
        assert found.dtype == self.dtype, f"{what}: {found.dtype}, needed {self.dtype}"
        assert found.shape == self.value.shape, f"{what}: shape {found.shape}, needed {self.value.shape}"
        if not np.isfinite(self.radius).all():
            raise ValueError(f"{what}: the bound is not finite and says nothing")
        error = np.abs(found.astype(np.float64) - self.value)
        outside = ~(error <= self.radius)
        if outside.any():
            i = tuple(int(j) for j in np.argwhere(outside)[0])
            raise AssertionError(
                f"{what}: element {i} is {found[i]!r}, exactly {self.value[i]!r}, off by {error[i]:.3g} where "
                f"{self.radius[i]:.3g} is allowed ({outside.sum()} of {found.size} elements)"
            )
