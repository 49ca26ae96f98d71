"""SwiGLU and both GELUs: against torch and `math.erf`, within bounds, at the extremes, and wrong versions."""

import math

import numpy as np
import pytest
import torch
import wrong_nn
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance.ball import Ball
from minift.conformance.bounds import unit_roundoff
from minift.conformance.gradients import check_vjp
from minift.conformance.operations import mlp as known
from minift.conformance.operations.mlp import EXTREME, KINDS
from minift.nn import mlp
from nn import checks

CASES = [
    (1, (5, 8), "normal"),
    (2, (2, 3, 7), "large"),
    (3, (4,), "tiny"),
    (4, (3, 5), "extreme"),
    (5, (0, 3), "normal"),
]
swiglu_oracle, gelu_oracle, gelu_tanh_oracle = map(
    checks.in_dtype, (known.swiglu_oracle, known.gelu_oracle, known.gelu_tanh_oracle)
)


def make(case):
    seed, shape, kind = case
    rng = np.random.default_rng(seed)
    x, u, dy = rng.standard_normal((3, *shape))
    if kind == "large":
        x *= 8
    elif kind == "tiny":
        x *= 1e-6
    elif kind == "extreme":
        x = rng.permutation(EXTREME)[: x.size].reshape(shape)
    return x, u, dy, rng


def agree(found, expected, balls):
    for i, (a, b, ball) in enumerate(zip(found, expected, balls, strict=True)):
        assert (np.abs(a - np.asarray(b)) <= 2 * ball.radius).all(), f"result {i}"


# --- SwiGLU: op(gate, up) ---------------------------------------------------------------------------------------------


def one_number_at_a_time(op, case):
    g, u, dy, _ = make(case)
    y, vjp = op(g, u)
    balls = swiglu_oracle(np.float64, dy, g, u)
    dg, du = vjp(dy)
    for i in np.ndindex(g.shape):
        a, b, c = float(g[i]), float(u[i]), float(dy[i])
        s = 1 / (1 + math.exp(-a)) if a > -700 else 0.0
        expected = a * s * b, c * b * (s + a * s * (1 - s)), c * a * s
        for found, exact, ball in zip((y, dg, du), expected, balls, strict=True):
            assert abs(found[i] - exact) <= 2 * ball.radius[i], f"g {a}, u {b}: {found[i]}, needed {exact}"


def gradients(op, case):
    g, u, _, rng = make(case)
    if g.size and case[2] != "extreme":
        check_vjp(op, g, u, rng=rng)


def torch_agrees(op, case):
    g, u, dy, _ = make(case)
    leaves = [torch.tensor(a, requires_grad=True) for a in (g, u)]
    y = torch.nn.functional.silu(leaves[0]) * leaves[1]
    y.backward(torch.tensor(dy))
    found, vjp = op(g, u)
    agree((found, *vjp(dy)), (y.detach(), *(t.grad for t in leaves)), swiglu_oracle(np.float64, dy, g, u))


def within_the_bound_in_any_layout(op, case):
    g, u, dy, _ = make(case)
    for layout in (checks.contiguous, *checks.LAYOUTS):
        for dtype in checks.DTYPES:
            checks.inside(op, swiglu_oracle, [g, u], dy, dtype, layout)


def changes_nothing(op, case):
    g, u, dy, _ = make(case)
    checks.pure(op, (g, u), dy)


def quiet_at_the_extremes(op, case):
    """No overflow on either side: silu is 0 below and the identity above."""
    for dtype in checks.DTYPES:
        g = np.array([-1e30, -1e4, -200, 200, 1e4, 1e30], dtype)
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            y, vjp = op(g, np.ones_like(g))
            dy = np.array([-0.5, 2, -2, 0.25, -4, 0.5], dtype)  # powers of two: products are exact
            dg, du = vjp(dy)
        for found, expected in ((y, np.maximum(g, 0)), (dg, dy * (g > 0)), (du, dy * np.maximum(g, 0))):
            assert np.array_equal(found, np.asarray(expected, dtype))


SWIGLU_PROPERTIES = (
    one_number_at_a_time,
    gradients,
    torch_agrees,
    within_the_bound_in_any_layout,
    changes_nothing,
    quiet_at_the_extremes,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", SWIGLU_PROPERTIES)
def test_swiglu(holds, case):
    holds(mlp.swiglu, case)


def test_swiglu_kill_matrix():
    def scribbles(g, u):
        y, vjp = mlp.swiglu(g, u)
        g *= 0.5
        return y, vjp

    checks.kill_matrix(SWIGLU_PROPERTIES, (*wrong_nn.SWIGLU, scribbles), CASES)


# --- GELU, exact and with a tanh: op(x) -------------------------------------------------------------------------------


class Gelu:
    """The properties of one of the two: an oracle in Balls, torch's name for it."""

    def __init__(self, oracle, approximate):
        self.oracle, self.approximate = oracle, approximate

    def properties(self):
        def gelu_gradient(op, case):
            x, _, _, rng = make(case)
            if x.size and case[2] != "extreme":
                check_vjp(op, x, rng=rng)

        def gelu_torch_agrees(op, case):
            x, _, dy, _ = make(case)
            x = np.clip(x, -1e4, 1e4)
            leaf = torch.tensor(x, requires_grad=True)
            y = torch.nn.functional.gelu(leaf, approximate=self.approximate)
            y.backward(torch.tensor(dy))
            found, vjp = op(x)
            agree((found, vjp(dy)), (y.detach(), leaf.grad), self.oracle(np.float64, dy, x))

        def gelu_within_the_bound_in_any_layout(op, case):
            x, _, dy, _ = make(case)
            x = np.clip(x, -1e3, 1e3)
            for layout in (checks.contiguous, *checks.LAYOUTS):
                for dtype in checks.DTYPES:
                    checks.inside(op, self.oracle, [x], dy, dtype, layout)

        def gelu_changes_nothing(op, case):
            x, _, dy, _ = make(case)
            checks.pure(op, (np.clip(x, -1e3, 1e3),), dy)

        def reflection(op, case):
            """y(x) − y(−x) = x: Φ(x) + Φ(−x) = 1, and tanh is odd."""
            x, _, dy, _ = make(case)
            x = np.clip(x, -1e3, 1e3)
            slack = 4 * (self.oracle(np.float64, dy, x)[0].radius + self.oracle(np.float64, dy, -x)[0].radius)
            assert (np.abs(op(x)[0] - op(-x)[0] - x) <= slack).all()

        return gelu_gradient, gelu_torch_agrees, gelu_within_the_bound_in_any_layout, gelu_changes_nothing, reflection


GELUS = {
    "gelu": (mlp.gelu, Gelu(gelu_oracle, "none").properties(), wrong_nn.GELU),
    "gelu_tanh": (mlp.gelu_tanh, Gelu(gelu_tanh_oracle, "tanh").properties(), wrong_nn.GELU_TANH),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GELUS)
def test_gelu(name, case):
    op, properties, _ = GELUS[name]
    for holds in properties:
        holds(op, case)


@pytest.mark.parametrize("name", GELUS)
def test_gelu_kill_matrix(name):
    op, properties, wrong = GELUS[name]

    def scribbles(x):
        y, vjp = op(x)

        def pullback(dy):
            dx = vjp(dy)
            dy *= 2
            return dx

        return y, pullback

    def not_odd(x):
        y, vjp = op(x)
        return y + (x < 0) * 1e-3, vjp

    checks.kill_matrix(properties, (*wrong, scribbles, not_odd), CASES)


@given(
    st.tuples(
        st.integers(0, 9999), st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), st.sampled_from(KINDS[:3])
    ),
    st.sampled_from((checks.contiguous, *checks.LAYOUTS)),
    st.sampled_from(checks.DTYPES),
)
def test_any_shape_and_layout(case, layout, dtype):
    x, u, dy, _ = make(case)
    checks.inside(mlp.swiglu, swiglu_oracle, [x, u], dy, dtype, layout)
    checks.inside(mlp.gelu, gelu_oracle, [x], dy, dtype, layout)
    checks.inside(mlp.gelu_tanh, gelu_tanh_oracle, [x], dy, dtype, layout)


def test_the_two_gelus_differ_by_at_most_what_is_written():
    x = np.linspace(-8, 8, 100_001)
    difference = np.abs(mlp.gelu(x)[0] - mlp.gelu_tanh(x)[0])
    assert 4e-4 < difference.max() <= 5e-4


# --- sigmoid and erf --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_sigmoid(dtype, rng):
    x = np.concatenate([EXTREME, 10 * rng.standard_normal(1000)]).astype(dtype)
    with np.errstate(over="raise", invalid="raise"):
        y = mlp.sigmoid(x)
    (0.5 * (0.5 * Ball(x, dtype)).tanh() + 0.5).check(y, "σ")
    exact = [1 / (1 + math.exp(-t)) if t > -700 else 0.0 for t in x.tolist()]
    assert np.abs(y - np.array(exact)).max() <= 8 * unit_roundoff(dtype)
    assert (y[x == 0] == 0.5).all()
    u = unit_roundoff(dtype)
    assert (np.abs(mlp.sigmoid(x) + mlp.sigmoid(-x) - 1) <= 4 * u).all()


def test_erf_is_maths():
    """On the grid, between its points, at its edges and beyond: a few units of the last place of 1."""
    grid = np.arange(-98, 99) / 16
    x = np.concatenate([grid, grid + 1 / 32, np.nextafter(grid + 1 / 32, 9), grid - 1 / 32 + 1e-12,
                        np.linspace(-7, 7, 20_001), [0.0, -0.0, 1e-300, 5.99, 6, 6.1, 30, 1e300]])  # fmt: skip
    exact = np.array([math.erf(t) for t in x.tolist()])
    found = mlp.erf(x)
    assert np.abs(found - exact).max() <= 4 * 2.0**-53
    small = np.abs(x) < 1 / 32  # where the grid's value is 0 and the series is all: relative, too
    assert (np.abs(found - exact)[small] <= 8 * 2.0**-53 * np.abs(exact[small])).all()
    assert np.array_equal(mlp.erf(-x), -found)
    assert (found[np.abs(x) >= 6] == np.sign(x[np.abs(x) >= 6])).all()
    assert math.copysign(1, mlp.erf(np.array([-0.0]))[0]) == -1
    assert np.isnan(mlp.erf(np.array([math.nan]))).all()


@pytest.mark.parametrize("op", [mlp.gelu, mlp.gelu_tanh])
def test_nan_stays_where_it_is(op):
    """One broken activation breaks one output, and the rest is as without it."""
    x = np.array([1.0, math.nan, -2.0], np.float32)
    (y, vjp), (clean, clean_vjp) = op(x), op(x[[0, 0, 2]])
    dy = np.array([2, 3, 4], np.float32)
    for found, expected in ((y, clean), (vjp(dy), clean_vjp(dy))):
        assert np.isnan(found).tolist() == [False, True, False]
        assert np.array_equal(found[[0, 2]], expected[[0, 2]])
