"""The activations of the feed-forward block: SiLU and its gated form SwiGLU (Llama), GELU (GPT-2, BERT)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float


def sigmoid(x: np.ndarray) -> np.ndarray:
    """σ(x) = 1 / (1 + e^−x), through tanh: no overflow on either side."""
    s = np.multiply(x, 0.5)
    np.tanh(s, out=s)
    s *= 0.5
    s += 0.5
    return s


def swiglu(
    gate: Float[np.ndarray, "*rows d"], up: Float[np.ndarray, "*rows d"]
) -> tuple[Float[np.ndarray, "*rows d"], Callable]:
    """The gated unit of Llama's feed-forward block.                             (Shazeer 2020, arXiv 2002.05202, eq. 5)

        y = silu(g) u        silu(g) = g σ(g)        silu′(g) = σ(g) (1 + g (1 − σ(g)))                 (1)

    `vjp(dy) -> dgate, dup`. g and u are the outputs of `gate_proj` and `up_proj`.
    """
    y = gate * sigmoid(gate)
    y *= up

    def vjp(dy):
        s = sigmoid(gate)  # again: it takes less time than it would take memory to keep
        silu = gate * s
        dup = dy * silu
        dgate = 1 - s
        dgate *= silu
        dgate += s  # σ + gσ(1 − σ)
        dgate *= up
        dgate *= dy
        return dgate, dup

    return y, vjp


def gelu(x: Float[np.ndarray, "*shape"]) -> tuple[Float[np.ndarray, "*shape"], Callable]:
    """Weigh x by the share of a standard normal below it.            (Hendrycks & Gimpel 2016, arXiv 1606.08415, §2)

        y = x Φ(x)        Φ(x) = ½ (1 + erf(x / √2))        dy/dx = Φ(x) + x φ(x)                       (2)

    `vjp(dy) -> dx`. This is the exact form (BERT); GPT-2 uses `gelu_tanh`.
    """
    cdf = (0.5 * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)  # Φ
    y = x * cdf

    def vjp(dy):
        pdf = np.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))  # φ
        return dy * (cdf + x * pdf)

    return y, vjp


def gelu_tanh(x: Float[np.ndarray, "*shape"]) -> tuple[Float[np.ndarray, "*shape"], Callable]:
    """GELU with a tanh for the error function; "gelu_new" of GPT-2.     (Hendrycks & Gimpel 2016, arXiv 1606.08415, §2)

        y = ½ x (1 + tanh z)        z = √(2/π) (x + 0.044715 x³)                                        (3)

    `vjp(dy) -> dx`. At most 5e-4 away from `gelu`.
    """
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x * x * x))
    y = 0.5 * x * (1 + t)

    def vjp(dy):
        dz = c * (1 + 3 * 0.044715 * x * x)
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * dz)

    return y, vjp


_SPACING = 1 / 256
_CHUNK = 1 << 13  # elements at a time: all of their intermediate results stay in the cache


def _taylor(terms: int = 6) -> np.ndarray:
    """Coefficients of erf around each point of the grid from 0 to 6, (terms, points); erf(6) = 1 − 2e-17."""
    a = np.arange(round(6 / _SPACING) + 1) * _SPACING
    hermite, previous = np.ones_like(a), np.zeros_like(a)
    coefficients = [np.array([math.erf(t) for t in a.tolist()])]
    for n in range(1, terms):
        coefficients.append((-1) ** (n - 1) * 2 / math.sqrt(math.pi) * np.exp(-a * a) * hermite / math.factorial(n))
        hermite, previous = 2 * a * hermite - 2 * (n - 1) * previous, hermite
    return np.array(coefficients)


_TAYLOR = _taylor()


def erf(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The error function, in float64 whatever x is: a Taylor series from the nearest of 1,537 points.

        erf(a + h) = erf(a) + 2/√π e^(−a²) Σ_{n≥1} (−1)^(n−1) H_{n−1}(a) hⁿ / n!                         (4)

    H are the Hermite polynomials, H_{n+1} = 2a H_n − 2n H_{n−1}. NumPy has no erf. With |h| ≤ 1/512 the series up to h⁵
    leaves 3e-18; of float32 numbers it stops at h³, which leaves 3e-12.
    """
    flat, y = x.reshape(-1), np.empty(x.size)
    table = _TAYLOR[: 4 if x.dtype == np.float32 else len(_TAYLOR)]
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        magnitude = np.fmin(np.abs(part), 6).astype(np.float64)  # fmin: NaN has no nearest point of the grid
        nearest = np.rint(magnitude / _SPACING)
        h = magnitude - nearest * _SPACING
        index = nearest.astype(np.intp)
        value = table[-1].take(index)
        for coefficient in table[-2::-1]:
            value *= h
            value += coefficient.take(index)
        y[start : start + _CHUNK] = np.where(np.isnan(part), part, np.copysign(value, part))
    return y.reshape(x.shape)
