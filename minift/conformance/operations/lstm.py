"""The LSTM: its equations in balls, one step after the other, for a layer and for both directions side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.ball import Ball
from minift.conformance.operation import Operation
from minift.nn import lstm
from minift.nn.linear import rows


class Layer(NamedTuple):
    batch: int
    tokens: int
    d_in: int
    d: int
    size: float = 1.0  # of the numbers
    dtype: str = "float32"
    seed: int = 0


def weights(rng: np.random.Generator, case: Layer) -> list[np.ndarray]:
    shapes = ((4 * case.d, case.d_in), (4 * case.d, case.d), (4 * case.d,), (4 * case.d,))
    return [case.size * rng.standard_normal(shape) for shape in shapes]


def of_a_layer(case: Layer) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(case.seed)
    x = case.size * rng.standard_normal((case.batch, case.tokens, case.d_in))
    return [x, *weights(rng, case)], rng.standard_normal((case.batch, case.tokens, case.d))


def of_both_directions(case: Layer) -> tuple[list[np.ndarray], np.ndarray]:
    """x, the weights ahead and those back."""
    args, _ = of_a_layer(case)
    rng = np.random.default_rng([case.seed, 1])
    return [*args, *weights(rng, case)], rng.standard_normal((case.batch, case.tokens, 2 * case.d))


def beside(*balls: Ball, axis: int = -1) -> Ball:
    value, radius = (np.concatenate([getattr(b, part) for b in balls], axis) for part in ("value", "radius"))
    return Ball(value, balls[0].dtype, radius)


def oracle(number: Callable, dy, x, W_ih, W_hh, b_ih, b_hh):
    """Equations (1) to (6), a step after the other: each sum is one product of balls, so it may have any order."""

    def sigma(a):
        return (a * 0.5).tanh() * 0.5 + 0.5

    batch, tokens, d = dy.shape
    ones = number(np.ones((batch, 1)))
    W = number(np.concatenate([W_ih, W_hh, b_ih[:, None], b_hh[:, None]], axis=1))
    h = c = number(np.zeros((batch, d)))
    kept, hs = [], [h]
    for t in range(tokens):
        a = beside(number(x[:, t]), h, ones, ones) @ W.T
        i, f, g, o = (a[:, n * d : (n + 1) * d] for n in range(4))
        i, f, g, o, before = sigma(i), sigma(f), g.tanh(), sigma(o), c
        c = f * c + i * g
        h = o * c.tanh()
        kept.append((i, f, g, o, before, c.tanh()))
        hs.append(h)
    dh = dc = number(np.zeros((batch, d)))
    das: list[Ball] = []
    for t in reversed(range(tokens)):
        i, f, g, o, before, shown = kept[t]
        dh = number(dy[:, t]) + dh
        dc = dc + dh * o * (1 - shown * shown)
        parts = dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * shown * o * (1 - o)
        das.insert(0, beside(*parts))
        dc, dh = dc * f, das[0] @ number(W_hh)

    def together(parts, width):  # (T, B, ·) as rows
        return beside(*parts, axis=0) if parts else number(np.zeros((0, width)))

    da, inputs = together(das, 4 * d), number(rows(x.swapaxes(0, 1)))
    dx = (da @ number(W_ih)).reshape(tokens, batch, x.shape[2]).swapaxes(0, 1)
    db = (da.T @ number(np.ones((tokens * batch, 1))))[:, 0]
    y = together(hs[1:], d).reshape(tokens, batch, d).swapaxes(0, 1)
    return y, dx, da.T @ inputs, da.T @ together(hs[:-1], d), db, db


def oracle_of_both(number: Callable, dy, x, *eight):
    """Equation (7): the second layer reads the text from its end."""
    d = dy.shape[2] // 2
    y, dx, *ahead = oracle(number, dy[..., :d], x, *eight[:4])
    y_back, dx_back, *back = oracle(number, dy[:, ::-1, d:], x[:, ::-1], *eight[4:])
    return beside(y, y_back[:, ::-1]), dx + dx_back[:, ::-1], *ahead, *back


def _properties(given: Callable, exact: Callable) -> tuple:
    def is_within_its_bound(f, case):
        args, dy = given(case)
        common.within(f, exact, args, dy, case.dtype)

    def any_layout(f, case):
        args, dy = given(case)
        common.any_layout(f, exact, args, dy, case.dtype)

    def changes_nothing(f, case):
        args, dy = given(case)
        common.changes_nothing(f, args, dy, case.dtype)

    def pullback_is_the_transpose_of_the_derivative(f, case):
        if case.dtype == "float64" and case.size <= 1 and case.tokens:
            common.is_differentiated(f, given(case)[0], np.random.default_rng(case.seed))

    return is_within_its_bound, any_layout, changes_nothing, pullback_is_the_transpose_of_the_derivative


def nothing_looks_ahead(f, case):
    """y at t is the same to the bit whatever comes after t, even if that is huge."""
    args, _ = of_a_layer(case)
    args = common.prepared(args, case.dtype)
    if case.tokens > 1:
        other = args[0].copy()
        other[:, -1] = 1e4
        found, y = (f(x, *args[1:])[0] for x in (other, args[0]))
        common.same_bits(found[:, :-1], y[:, :-1], "y before a change")


def _both(x, *eight):
    y, vjp = lstm.bidirectional_lstm(x, eight[:4], eight[4:])

    def flat_vjp(dy):
        dx, ahead, back = vjp(dy)
        return dx, *ahead, *back

    return y, flat_vjp


def cases(dtypes):
    sizes = (
        st.integers(1, 3),
        st.integers(0, 5),
        st.integers(1, 4),
        st.integers(1, 4),
        st.sampled_from([1e-3, 1.0, 4]),
    )
    return st.builds(Layer, *sizes, st.sampled_from(sorted(dtypes)), st.integers(0, 99))


FIXED = (
    Layer(2, 5, 3, 4, seed=1),
    Layer(1, 1, 4, 2, seed=2),
    Layer(3, 2, 2, 3, 6.0, seed=3),
    Layer(2, 3, 1, 1, 1e-3, seed=4),
    Layer(1, 0, 3, 2, seed=5),
    Layer(2, 4, 3, 2, dtype="float64", seed=6),
    Layer(1, 3, 2, 3, 0.5, dtype="float64", seed=7),
    Layer(2, 4, 3, 2, dtype="float16", seed=8),
    Layer(2, 3, 2, 3, dtype="bfloat16", seed=9),
)

OPERATIONS = (
    Operation(
        "lstm.lstm",
        lstm.lstm,
        "f(x (batch, tokens, d_in), W_ih (4 d, d_in), W_hh (4 d, d), b_ih (4 d,), b_hh (4 d,)) -> y (batch, tokens, d),"
        " vjp; gates in the order i, f, g, o; vjp(dy) -> dx, dW_ih, dW_hh, db_ih, db_hh",
        cases,
        FIXED,
        (*_properties(of_a_layer, oracle), nothing_looks_ahead),
    ),
    Operation(
        "lstm.bidirectional_lstm",
        _both,
        "f(x, W_ih, W_hh, b_ih, b_hh of the layer ahead, the same four of the layer back) -> y (batch, tokens, 2 d), "
        "vjp; vjp(dy) -> the nine cotangents",
        cases,
        FIXED,
        _properties(of_both_directions, oracle_of_both),
    ),
)
