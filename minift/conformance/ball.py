"""Where no closed formula for an error bound is worth its length: carry the bound along with the value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minift.conformance.bounds import gamma, unit_roundoff

ELEMENTARY = 8  # u: exp, log, tanh, sin, cos of NumPy, of C libraries and of GPUs are within 4 units in the last place
QUOTIENT = 5  # u: division and root are rounded correctly on a CPU; a GPU's fast ones are within 2 units


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

    def stored(self, dtype: str) -> Ball:
        """Rounded once more, to the type that it is kept in: "float16", "bfloat16", or the type of the arithmetic."""
        if dtype == self.dtype.name:
            return self
        u, tiny = (2.0**-8, 2.0**-133) if dtype == "bfloat16" else (2.0**-11, 2.0**-24)
        kept = Ball(self.value, np.float32 if dtype == "bfloat16" else np.float16)
        kept.radius = self.radius + u * (np.abs(self.value) + self.radius) + tiny
        return kept

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
        return self._rounded(value, (self.radius + np.abs(value) * b.radius) / nearest, QUOTIENT)

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
        """|√a − √b| = |a − b| / (√a + √b), and never more than √|a − b|, which says something around 0."""
        value, lowest = np.sqrt(self.value), np.sqrt(np.maximum(self.value - self.radius, 0))
        quotient = self.radius / np.maximum(value + lowest, np.finfo(np.float64).tiny)
        return self._rounded(value, np.minimum(quotient, np.sqrt(self.radius)), QUOTIENT)

    def exp(self) -> Ball:
        value = np.exp(self.value)
        return self._rounded(value, value * np.expm1(self.radius), ELEMENTARY)

    def log(self) -> Ball:
        return self._rounded(np.log(self.value), -np.log1p(-self.radius / self.value), ELEMENTARY)

    def tanh(self) -> Ball:
        return self._rounded(np.tanh(self.value), self.radius, ELEMENTARY)  # its slope is at most 1

    def softplus(self) -> Ball:
        """log(1 + e^x): its slope is at most 1, and that of its logarithm too, so it moves by no more than e^r − 1 of
        itself. In the form max(x, 0) + log1p(e^−|x|): two elementary functions and a sum."""
        value = np.logaddexp(0, self.value)
        moved = np.minimum(self.radius, value * np.expm1(np.minimum(self.radius, 1)))
        return self._rounded(value, moved, 2 * ELEMENTARY + 1)

    def sigmoid(self) -> Ball:
        """1 / (1 + e^−x), which moves by no more than e^r − 1 of itself, as softplus does. It may be formed as
        e^−softplus(−x), whose rounding of the exponent counts: softplus(−x) u."""
        value = np.exp(-np.logaddexp(0, -self.value))
        exponent = np.logaddexp(0, -self.value) * (2 * ELEMENTARY + 1) * (unit_roundoff(self.dtype) + 2.0**-53)
        return self._rounded(value, value * np.expm1(self.radius + exponent), 2 * ELEMENTARY + QUOTIENT)

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
