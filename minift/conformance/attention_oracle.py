"""What attention computes, with a bound on what rounding may do to it, in each of the forms that one may compute it in.

The exact numbers are the same in all forms; so a result is right if it lies within the largest of their radii. The
forms round at different places: softmax first or last, with base e or 2, over all keys or tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from minift.conformance.ball import ELEMENTARY, Ball
from minift.conformance.operation import arithmetic

SMALLEST_TILE = 16  # keys: the bound allows for a sum that is rescaled once for so many


def oracle_for(dtype: str) -> Callable:
    """`oracle(number, dy, q, k, v, visible)` for `common.within`: balls of y, dq, dk, dv."""

    def oracle(number, dy, q, k, v, visible):
        forms = (_probabilities, _exponentials, lambda *args: _tiles(dtype, *args))
        found = [form(number, dy, q, k, v, visible) for form in forms]
        return tuple(
            Ball(balls[0].value, balls[0].dtype, np.max([b.radius for b in balls], axis=0))
            for balls in zip(*found, strict=True)
        )

    return oracle


def allowed(dtype: str, dy, q, k, v, visible) -> tuple[np.ndarray, ...]:
    """The radii for y, dq, dk and dv as they are stored in this dtype."""
    type_ = arithmetic(dtype)
    exact = (np.asarray(a, np.float64) for a in (dy, q, k, v))
    balls = oracle_for(dtype)(lambda a: Ball(a, type_), *exact, visible)
    return tuple(ball.stored(dtype).radius for ball in balls)


def _probabilities(number, dy, q, k, v, visible):
    """P itself, one key/value head for each query head: the form to read first, and softmax with base e."""
    group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])

    def fold(x):  # cotangents of one key/value head add up
        return x.reshape(len(k), k.shape[1], group, *x.value.shape[2:]).sum(2).reshape(*k.shape)

    q, dy, k_, v_ = number(q), number(dy), *(number(np.repeat(x, group, axis=1)) for x in (k, v))
    e, total = _softmax(q @ k_.T * scale, visible[:, None])
    p = e / total
    dp = dy @ v_.T
    dscores = p * (dp - (p * dp).sum(-1)) * scale
    return p @ v_, dscores @ k_, fold(dscores.T @ q), fold(p.T @ dy)


def _exponentials(number, dy, q, k, v, visible):
    """E over its sums at the end, the query heads of a group below each other."""
    shape, scale = q.shape, 1 / math.sqrt(q.shape[-1])
    q, dy, see = _stacked(number, q, dy, k, visible)
    k, v = number(k), number(v)
    q = q * scale
    e, total = _softmax(q @ k.T, see)
    y = e @ v / total
    dy = dy / total
    dscores = e * (dy @ v.T - (dy * y).sum(-1))
    return y.reshape(*shape), (dscores @ k * scale).reshape(*shape), dscores.T @ q, e.T @ dy


def _tiles(dtype, number, dy, q, k, v, visible):
    """Tile by tile with base 2, P formed again from its logarithm, and 16-bit factors of every product.

    The differences s − m to a maximum that grows from m₁ to m are rounded one after the other, but they have one sign,
    so together they are off by what one difference is: u |s − m|. What a rescaled sum adds are an exponential and a
    product a tile. Another maximum than the exact one multiplies E and its sum alike, so it is taken as exact."""
    shape, keys, scale = q.shape, k.shape[2], 1 / math.sqrt(q.shape[-1])
    q, dy, see = _stacked(number, q, dy, k, visible)
    k, v = number(k), number(v)

    def kept(x: Ball) -> Ball:
        """Rounded to the type of the inputs, and a factor in the arithmetic's type again."""
        stored = x.stored(dtype)
        return Ball(stored.value, x.dtype, stored.radius)

    s = q @ k.T * (math.log2(math.e) * scale)
    top = _top(s, see)
    e = _power_of_two(s - top, see)
    e = e._rounded(e.value, e.radius, -(-keys // SMALLEST_TILE) * (ELEMENTARY + 1)).where(see)
    total = _or_one(e.sum(-1), see)
    y = kept(e) @ v * (1 / total)
    level = total.log()._exact(lambda x: x / math.log(2)) + top
    p = _power_of_two(s - level, see)
    delta = (dy * kept(y)).sum(-1)
    ds = kept(p * (dy @ v.T - delta))
    dq, dk = ds @ k * scale, ds.T @ q * scale
    return y.reshape(*shape), dq.reshape(*shape), dk, kept(p).T @ dy


def _stacked(number, q, dy, k, visible):
    """q and dy, and their mask, with the query heads of a group below each other."""
    (batch, heads, tokens, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    see = np.broadcast_to(visible[:, None], (batch, heads, tokens, keys))
    rows = heads // kv_heads * tokens
    q, dy = (number(x.reshape(batch, kv_heads, rows, d)) for x in (q, dy))
    return q, dy, see.reshape(batch, kv_heads, rows, keys)


def _softmax(scores, see):
    """exp(scores − their maximum) where visible, and its sums; those of a row that sees nothing are one."""
    top = Ball(_top(scores, see), scores.dtype, scores.radius.max(-1, keepdims=True, initial=0))
    e = (scores - top).where(see).exp().where(see)
    return e, _or_one(e.sum(-1), see)


def _top(scores, see):
    hidden = np.where(see, scores.value, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    return np.where(np.isneginf(hidden), 0, hidden)


def _or_one(total, see):
    return total + Ball(np.broadcast_to(~see.any(-1, keepdims=True), total.value.shape), total.dtype)


def _power_of_two(x: Ball, see) -> Ball:
    """A GPU flushes what is smaller than 2⁻¹²⁶ to zero."""
    e = x.where(see)._exact(lambda x: x * math.log(2)).exp()
    return Ball(e.value, e.dtype, e.radius + 2.0**-126).where(see)
