"""Causal attention with grouped key/value heads, and the cache that generation keeps.

Notation: `q` has H heads, `k` and `v` have G ≤ H (grouped-query attention, Ainslie et al. 2023); query head h reads
key/value head h // (H / G). T queries may look at S ≥ T keys: a prefix or a cache comes before the text.

*Who may look at whom* is one boolean array, `visible`, made by `causal_mask`; attention itself knows nothing of
positions, padding, packing or caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Integer


def causal_mask(
    positions: Integer[np.ndarray, "batch tokens"],
    keys: int,
    segments: Integer[np.ndarray, "batch tokens"] | None = None,
) -> Bool[np.ndarray, "batch tokens keys"]:
    """Key slot j is visible from the query at slot m if j ≤ m, and, in a packed row, if both belong to one segment.

    `positions` are the queries' slots among the `keys`; slots before the first of them (prefix, cache) are visible to
    all. Padding to the right of a text needs no mask: no real token looks ahead.
    """
    visible = np.arange(keys) <= positions[..., None]  # (batch, tokens, keys)
    if segments is not None:
        before = keys - segments.shape[-1]  # a prefix belongs to every segment
        same = segments[:, :, None] == segments[:, None, :]
        visible[..., before:] &= same
    return visible


def attention_1(q, k, v, visible):
    """The same as `attention_3`, one head of one sequence at a time: the form to read first."""
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1])
    y, probabilities = np.empty_like(q), {}
    for b, h in np.ndindex(q.shape[:2]):
        scores = q[b, h] @ k[b, h // group].T * scale  # (T, S), S of (3)
        e, total = _exponentials(np.where(visible[b], scores, -np.inf))
        p = probabilities[b, h] = e / total
        y[b, h] = p @ v[b, h // group]

    def vjp(dy):
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for (b, h), p in probabilities.items():
            g = h // group
            dv[b, g] += p.T @ dy[b, h]  # several query heads read one value head: their cotangents add up
            dp = dy[b, h] @ v[b, g].T
            dscores = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))  # dS of (2)
            dq[b, h] = dscores @ k[b, g] * scale
            dk[b, g] += dscores.T @ q[b, h] * scale
        return dq, dk, dv

    return y, vjp


def attention_2(
    q: Float[np.ndarray, "batch heads tokens d"],
    k: Float[np.ndarray, "batch kv_heads keys d"],
    v: Float[np.ndarray, "batch kv_heads keys d"],
    visible: Bool[np.ndarray, "#batch tokens keys"],
) -> tuple[Float[np.ndarray, "batch heads tokens d"], Callable]:
    """All heads at once, and P itself is never formed: its numerators E and their sums Z are enough.

        y = E v / Z        E = exp(S − max S)        Z = Σ_j E        S = q kᵀ / √d where visible, else −∞     (3)

    In the pullback every row is divided by its Z once, and Σ_j P dP is a product of two short rows instead of two long
    ones, because P dP = P (dy vᵀ) sums to dy y (Dao et al. 2022, arXiv 2205.14135, eq. 4):

        dy′ = dy / Z        dv = Eᵀ dy′        dS = E (dy′ vᵀ − Σ dy′ y)                                       (4)

    The query heads of a group stand below each other as one taller matrix (H/G · T rows), so each key/value head is
    read by a single product and nothing is repeated.
    """
    (batch, heads, tokens, d), kv_heads = q.shape, k.shape[1]
    scale = 1 / math.sqrt(d)

    def stack(x):  # (batch, heads, tokens, ·) -> (batch, kv_heads, heads/kv_heads · tokens, ·)
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    q_scaled = stack(q) * scale
    e = q_scaled @ k.swapaxes(-1, -2)  # S, then E in its place: (batch, kv_heads, rows, keys)
    if not visible.all():
        blocked = np.broadcast_to(~visible[:, None, None], (batch, kv_heads, heads // kv_heads, tokens, k.shape[2]))
        np.copyto(e.reshape(blocked.shape), -np.inf, where=blocked)
    e, total = _exponentials(e)
    y = e @ v
    y /= total

    def vjp(dy):
        dy = stack(dy) / total
        dv = e.swapaxes(-1, -2) @ dy
        dscores = dy @ v.swapaxes(-1, -2)
        dscores -= np.sum(dy * y, axis=-1, keepdims=True)
        dscores *= e
        dq = dscores @ k
        dq *= scale
        dk = dscores.swapaxes(-1, -2) @ q_scaled
        return dq.reshape(batch, heads, tokens, d), dk, dv

    return y.reshape(batch, heads, tokens, d), vjp


TILE = 64  # queries: E of a tile stays in the cache of one core


def attention_3(
    q: Float[np.ndarray, "batch heads tokens d"],
    k: Float[np.ndarray, "batch kv_heads keys d"],
    v: Float[np.ndarray, "batch kv_heads keys d"],
    visible: Bool[np.ndarray, "#batch tokens keys"],
) -> tuple[Float[np.ndarray, "batch heads tokens d"], Callable]:
    """Each token's mean of the visible values, weighted by how well its query fits their keys.

        y = P v        P = softmax(q kᵀ / √d  where visible, else −∞)     (Vaswani et al. 2017, arXiv 1706.03762, eq. 1)

    `vjp(dy) -> dq, dk, dv`:

        dv = Pᵀ dy        dP = dy vᵀ        dS = P (dP − Σ_j P dP)        dq = dS k / √d        dk = dSᵀ q / √d   (2)

    Computed as in `attention_2`, for a tile of queries at a time, and of the keys only from the first to the last one
    that some query of the tile sees: in a causal text the half above the diagonal is neither computed nor kept. A token
    that sees nothing gets zeros.
    """
    y, tiles = np.empty_like(q), []
    for first in range(0, q.shape[2], TILE):
        queries = slice(first, first + TILE)
        seen = np.flatnonzero(visible[:, queries].any(axis=(0, 1)))
        keys = slice(seen[0], seen[-1] + 1) if seen.size else slice(0, 1)
        part = q[:, :, queries], k[:, :, keys], v[:, :, keys], visible[:, queries, keys]
        y[:, :, queries], tile_vjp = attention_2(*part)
        tiles.append((queries, keys, tile_vjp))

    def vjp(dy):
        dq, dk, dv = np.empty_like(dy), np.zeros_like(k), np.zeros_like(v)
        for queries, keys, tile_vjp in tiles:
            dq[:, :, queries], dk_tile, dv_tile = tile_vjp(dy[:, :, queries])
            dk[:, :, keys] += dk_tile  # the same keys are seen from several tiles
            dv[:, :, keys] += dv_tile
        return dq, dk, dv

    return y, vjp


attention = attention_3


def _exponentials(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(scores − the row's maximum), in place, and the sums of the rows; a row of −∞ becomes zeros over one."""
    top = scores.max(axis=-1, keepdims=True)
    scores -= np.where(np.isneginf(top), 0, top)
    e = np.exp(scores, out=scores)
    total = e @ np.ones((e.shape[-1], 1), e.dtype)  # a product: several times as fast as e.sum
    return e, np.where(total == 0, 1, total)


@dataclass
class KVCache:
    """The keys and values of the tokens so far; the one place where the model writes into something it was given.

    Slot m of row b holds its token at position m; `lengths[b]` slots are filled. Rows may differ in length: what a
    longer row's padding wrote beyond a shorter row's length is overwritten by that row's next tokens, and no query
    ever looks there."""

    layers: int
    batch: int
    kv_heads: int
    capacity: int
    head_dim: int
    dtype: np.dtype | type = np.float32
    keys: np.ndarray = field(init=False, repr=False)
    values: np.ndarray = field(init=False, repr=False)
    lengths: np.ndarray = field(init=False)

    def __post_init__(self):
        shape = (self.layers, self.batch, self.kv_heads, self.capacity, self.head_dim)
        self.keys, self.values = np.zeros(shape, self.dtype), np.zeros(shape, self.dtype)
        self.lengths = np.zeros(self.batch, np.int64)

    def write(
        self,
        layer: int,
        k: Float[np.ndarray, "batch kv_heads tokens d"],
        v: Float[np.ndarray, "batch kv_heads tokens d"],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put k and v behind the filled slots; returns views of all slots in use. ValueError when they do not fit."""
        tokens = k.shape[2]
        end = int(self.lengths.max()) + tokens
        if end > self.capacity:
            raise ValueError(
                f"the cache has {self.capacity} slots, {end} are needed: make it larger or the text shorter"
            )
        row = np.arange(self.batch)[:, None]
        slot = self.lengths[:, None] + np.arange(tokens)  # (batch, tokens)
        self.keys[layer][row, :, slot] = k.swapaxes(1, 2)
        self.values[layer][row, :, slot] = v.swapaxes(1, 2)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, lengths: np.ndarray) -> None:
        """The tokens just written are part of the text: call once, after the last layer."""
        self.lengths = self.lengths + lengths

    def put_prefix(self, prefix: Float[np.ndarray, "layers 2 kv_heads prefix d"]) -> None:
        """Fill the first slots of every row with learned keys and values."""
        for layer, (k, v) in enumerate(prefix):
            self.write(layer, *(np.broadcast_to(x, (self.batch, *x.shape)) for x in (k, v)))
        self.advance(np.full(self.batch, prefix.shape[3]))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
