"""Dropout whose mask is a pure function of (key, element), and the random numbers it is made of.

A stateful generator would hand a recomputed block another mask than the one it was run with, and the gradient would be
silently wrong. A counter-based generator (Salmon et al. 2011) has no state: element i of the mask is `philox` of
counter i under a key, so the mask is never stored and is the same on every pass, in any order, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32, UInt32

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the two key words each round: the golden ratio and √3 − 1
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(key: int, counter: np.ndarray, rounds: int = 10) -> UInt32[np.ndarray, "4 n"]:
    """Philox4x32-10: four random 32-bit words a counter.             (Salmon et al. 2011, "as easy as 1, 2, 3", fig. 2)

    `key` and each `counter` are 64-bit; the upper 64 bits of the counter are zero, as in Triton's `randint4x`.
    One round multiplies two words by fixed constants and mixes the upper halves of the products with the key.
    """
    counter = counter.astype(np.uint64).reshape(-1)
    c0, c1 = counter & _LOW, counter >> _32
    c2 = c3 = np.zeros_like(c0)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(rounds):
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 × 32 -> 64 bits
        c0, c1 = (product2 >> _32) ^ c1 ^ np.uint64(k0), product2 & _LOW
        c2, c3 = (product0 >> _32) ^ c3 ^ np.uint64(k1), product0 & _LOW
        k0, k1 = k0 + _WEYL[0] & 0xFFFFFFFF, k1 + _WEYL[1] & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def uniform(key: int, counter: np.ndarray) -> Float32[np.ndarray, " n"]:
    """Uniform float32 numbers in [0, 1), bit-equal to Triton's `tl.rand(key, counter)`.

    The first word is read as a signed integer, folded to 31 bits (x < 0 becomes −x − 1) and scaled by the largest
    float32 that keeps the result below 1."""
    word = philox(key, counter)[0].view(np.int32)
    return np.where(word < 0, ~word, word).astype(np.float32) * np.float32(4.6566127342e-10)


def fold_in(key: int, data: int) -> int:
    """A new 64-bit key from a key and a number: independent streams for each step, layer and module."""
    words = philox(key, np.array([data], np.uint64))
    return int(words[0, 0]) | int(words[1, 0]) << 32


def dropout(
    x: Float[np.ndarray, "*shape"], p: float, key: int, offset: int = 0
) -> tuple[Float[np.ndarray, "*shape"], Callable]:
    """Zero each element with probability p and scale up the rest.                       (Srivastava et al. 2014, §10)

        y_i = x_i m_i / (1 − p)        m_i = [u(key, offset + i) > p]                                   (1)

    i counts elements in row-major order. `vjp(dy) -> dx`: the same mask. ValueError unless 0 ≤ p < 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}, needed 0 <= p < 1")
    keep = uniform(key, np.arange(offset, offset + x.size, dtype=np.uint64)).reshape(x.shape) > np.float32(p)
    scaled_mask = keep * x.dtype.type(1 / (1 - p))
    y = x * scaled_mask

    def vjp(dy):
        return dy * scaled_mask

    return y, vjp
