"""Rotary position embedding: turn each pair of features by an angle that grows with the position.

A rotation by mω followed by the transpose of one by nω is a rotation by (m − n)ω, so the score of a query at m and a
key at n depends on their distance only. Notation: θ in the paper is both base and angle; here the base is `rope_theta`
(as in every config.json), ω the frequency, φ = mω the angle.

Pairs are *half-split*: feature i turns with feature i + d/2, as in Hugging Face's checkpoints. The paper and GGUF files
interleave (feature 2i with 2i + 1); a fixed permutation of features leads from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer


@dataclass(frozen=True)
class RopeScaling:
    """How a model trained on short texts stretches its frequencies to read longer ones.

    `linear` divides all frequencies by `factor` (Chen et al. 2023). `llama3` divides only those whose wavelength is
    long against the original context and blends in between (Llama 3.1)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def frequencies(
    head_dim: int, rope_theta: float = 10000.0, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " half"]:
    """ω_i = rope_theta^(−2i / d) for i < d/2, in float64.                    (Su et al. 2021, arXiv 2104.09864, eq. 15)

    ValueError for an odd head_dim or an unknown kind of scaling."""
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, needed an even number: features turn in pairs")
    omega = rope_theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    if scaling is None:
        return omega
    if scaling.rope_type == "linear":
        return omega / scaling.factor
    if scaling.rope_type == "llama3":
        turns = scaling.original_max_position_embeddings * omega / (2 * math.pi)  # over the original context
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0, 1)  # 1: many turns, kept; 0: less than one turn, stretched
        return omega * (keep + (1 - keep) / scaling.factor)
    raise ValueError(f"rope_type {scaling.rope_type!r} is not known; known are 'linear' and 'llama3'")


def rotations(
    positions: Integer[np.ndarray, "*rows"], omega: Float[np.ndarray, " half"], dtype: np.dtype | type = np.float32
) -> tuple[Float[np.ndarray, "*rows half"], Float[np.ndarray, "*rows half"]]:
    """cos φ and sin φ of φ = mω. The angle is formed in float64: in float32 it is off by 0.008 at position 131,071, and
    16-bit positions, a well-known bug, are simply wrong."""
    phi = positions[..., None] * omega
    return np.cos(phi).astype(dtype), np.sin(phi).astype(dtype)


def rope(
    x: Float[np.ndarray, "batch heads tokens d"],
    cos: Float[np.ndarray, "#batch tokens half"],
    sin: Float[np.ndarray, "#batch tokens half"],
) -> tuple[Float[np.ndarray, "batch heads tokens d"], Callable]:
    """Turn every pair of features by its position's angle.                   (Su et al. 2021, arXiv 2104.09864, eq. 34)

        y₁ = x₁ cos φ − x₂ sin φ        y₂ = x₂ cos φ + x₁ sin φ                                        (1)

    x₁, x₂ are the first and second half of each head. `vjp(dy) -> dx`: the transpose of a rotation is the rotation
    by −φ.
    """
    cos, sin = cos[:, None], sin[:, None]  # (batch, 1, tokens, half): the same for every head
    first, second = np.s_[..., : x.shape[-1] // 2], np.s_[..., x.shape[-1] // 2 :]

    def turn(x, sin):
        y = np.empty_like(x)
        np.subtract(x[first] * cos, x[second] * sin, out=y[first])
        np.add(x[second] * cos, x[first] * sin, out=y[second])
        return y

    def vjp(dy):
        return turn(dy, -sin)

    return turn(x, sin), vjp
