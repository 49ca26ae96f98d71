"""AdamW: Adam's step, and a weight decay that does not pass through it.

Adam divides each gradient by the size it usually has, so the length of a step does not depend on the gradient's scale.
Were the decay a part of the gradient (L2 regularization), it would be divided too, and weights with large gradients
would hardly decay; AdamW takes it out: a weight without gradient shrinks by exactly 1 − ηλ each step.

Notation: θ is the parameter, η `learning_rate`, λ `weight_decay`, t `step`, counted from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from minift.nn.weight import Arrays

_CHUNK = 1 << 15  # elements: the five arrays of one chunk stay in the second-level cache


def adamw_1(
    theta: Float[np.ndarray, "*shape"],
    gradient: Float[np.ndarray, "*shape"],
    m: Float[np.ndarray, "*shape"],
    v: Float[np.ndarray, "*shape"],
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step, as the paper writes it: θ, m, v -> θ′, m′, v′.     (Loshchilov & Hutter 2019, arXiv 1711.05101, alg. 2)

        m′ = β₁ m + (1 − β₁) g        v′ = β₂ v + (1 − β₂) g²                                           (1)
        m̂ = m′ / (1 − β₁ᵗ)            v̂ = v′ / (1 − β₂ᵗ)                                                (2)
        θ′ = (1 − ηλ) θ − η m̂ / (√v̂ + ε)                                                                (3)

    (The paper's λ is not multiplied by η; PyTorch's and ours is.)
    """
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    theta = (1 - learning_rate * weight_decay) * theta - learning_rate * m_hat / (np.sqrt(v_hat) + eps)
    return theta, m, v


def adamw_2(theta, gradient, m, v, step, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0) -> None:
    """The same in place: θ, m and v, contiguous arrays, are overwritten, a cache-sized piece at a time.

    The operations and their order are those of `adamw_1`, so the bits are too. ValueError for θ, m or v in another
    memory order: a copy would be updated, and nothing would learn."""
    if not all(a.flags.c_contiguous for a in (theta, m, v)):
        raise ValueError("AdamW writes into theta, m and v: needed contiguous arrays, see np.ascontiguousarray")
    flat = [a.reshape(-1) for a in (theta, gradient, m, v)]
    buffer, denominator = np.empty(_CHUNK, theta.dtype), np.empty(_CHUNK, theta.dtype)
    for start in range(0, theta.size, _CHUNK):
        t, g, m_, v_ = (a[start : start + _CHUNK] for a in flat)
        a, b = buffer[: t.size], denominator[: t.size]
        np.multiply(g, 1 - beta1, out=a)
        m_ *= beta1
        m_ += a
        np.multiply(g, 1 - beta2, out=a)
        a *= g
        v_ *= beta2
        v_ += a
        np.divide(v_, 1 - beta2**step, out=b)
        np.sqrt(b, out=b)
        b += eps
        np.divide(m_, 1 - beta1**step, out=a)
        a *= learning_rate
        a /= b
        t *= 1 - learning_rate * weight_decay
        t -= a


@dataclass
class AdamW:
    """The optimizer's state: two moments of the size of each parameter, and the number of steps taken.

    Matrices decay; one-dimensional arrays (gains of norms, biases) do not, as is the field's habit."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: int = 0
    m: Arrays = field(default_factory=dict, repr=False)
    v: Arrays = field(default_factory=dict, repr=False)

    def update(self, arrays: Arrays, gradients: Arrays, learning_rate: float) -> None:
        """One step on every array, in place. KeyError where a gradient has no array or an array no gradient."""
        check_names(arrays, gradients)
        self.step += 1
        for moments in (self.m, self.v):
            moments.update({name: np.zeros_like(theta) for name, theta in arrays.items() if name not in moments})
        for name, theta in arrays.items():
            decay = self.weight_decay if theta.ndim >= 2 else 0.0
            state = self.m[name], self.v[name], self.step
            adamw_2(theta, gradients[name], *state, learning_rate, self.beta1, self.beta2, self.eps, decay)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for moments in (self.m, self.v) for a in moments.values())


def check_names(arrays: Arrays, gradients: Arrays) -> None:
    """KeyError where a gradient has no array or an array no gradient."""
    if arrays.keys() != gradients.keys():
        raise KeyError(f"arrays and gradients differ in {sorted(arrays.keys() ^ gradients.keys())[:3]}")


def clip_by_global_norm(gradients: Arrays, max_norm: float) -> tuple[Arrays, float]:
    """Scale all gradients by one factor so that their common length is at most `max_norm`; returns the length before.

        g′ = g · min(1, max_norm / ‖g‖)    ‖g‖² = Σ over every array of Σ g²      (Pascanu et al. 2013, arXiv 1211.5063)

    One factor for all keeps the direction. ValueError when the length is not a finite number."""
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))
    if not math.isfinite(norm):
        broken = [name for name, g in gradients.items() if not np.isfinite(g).all()] or ["the sum of squares"]
        raise ValueError(f"the gradient is not finite, first in {broken[0]}: lower the learning rate")
    if norm <= max_norm:
        return gradients, norm
    return {name: g * g.dtype.type(max_norm / norm) for name, g in gradients.items()}, norm
