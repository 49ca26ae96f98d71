"""The bounds that the other tests lean on: a right computation stays inside, and a slightly wrong one does not."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minift.conformance.ball import Ball
from minift.conformance.bounds import gamma, unit_roundoff
from nn import checks

SETTINGS = st.tuples(st.integers(0, 9999), st.integers(1, 6), st.sampled_from((1.0, 1e-3, 300.0)))


def program(rng, length, leaves, add, sub, mul, div):
    """A random straight-line program over +, −, ×, ÷; the same one for every kind of number."""
    values = list(leaves)
    for _ in range(length):
        a, b = rng.integers(0, len(values), 2)
        values.append((add, sub, mul, div)[rng.integers(0, 4)](values[a], values[b]))
    return values


@pytest.mark.parametrize("dtype", checks.DTYPES)
@given(SETTINGS)
def test_arithmetic_against_exact_fractions(dtype, case):
    """The exact result is within the ball of the computed one and the other way around."""
    seed, length, scale = case
    leaves = [dtype(x) for x in scale * (1 + np.random.default_rng(seed).random(4))]

    def run(kind, values):
        def divided(a, b):
            assume(b != 0 if kind is not Ball else abs(b.value) > 2 * b.radius)
            return a / b

        ops = (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, divided)
        return program(np.random.default_rng([seed, 1]), length, values, *ops)

    balls = run(Ball, [Ball(np.array(float(x)), dtype) for x in leaves])
    exact = run(Fraction, [Fraction(float(x)) for x in leaves])
    with np.errstate(all="ignore"):
        found = run(dtype, leaves)
    for ball, truth, computed in zip(balls, exact, found, strict=True):
        assume(np.isfinite(computed) and np.isfinite(ball.radius))
        radius = Fraction(float(ball.radius))
        assert abs(Fraction(float(computed)) - truth) <= radius * (1 + Fraction(1, 10**9))
        ball.check(computed, "computed")


@pytest.mark.parametrize("dtype", checks.DTYPES)
@given(st.integers(0, 9999), st.integers(1, 300))
def test_sums_and_products_in_any_order(dtype, seed, n):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(s).astype(dtype) for s in ((3, n), (n, 2)))
    order = rng.permutation(n)
    product = Ball(a, dtype) @ Ball(b, dtype)
    for found in (a @ b, a[:, order] @ b[order]):
        product.check(found, "product")
    one_after_the_other = np.array([np.add.accumulate(row)[-1:] for row in a])
    for found in (a.sum(-1, keepdims=True), a[:, order].sum(-1, keepdims=True), one_after_the_other):
        Ball(a, dtype).sum(-1).check(found, "sum")
    Ball(a, dtype).mean().check(a.mean(-1, keepdims=True), "mean")
    exact = np.array([[float(sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(row, column, strict=True)))
                       for column in b.T] for row in a])  # fmt: skip
    assert (np.abs(exact - product.value) <= product.radius).all()


@pytest.mark.parametrize("dtype", checks.DTYPES)
@given(st.integers(0, 9999))
def test_elementary_functions(dtype, seed):
    rng = np.random.default_rng(seed)
    x = np.clip(rng.standard_normal(50) * 10.0 ** rng.uniform(-3, 1.5, 50), -60, 60).astype(dtype)
    Ball(x, dtype).exp().check(np.exp(x), "exp")
    Ball(x, dtype).tanh().check(np.tanh(x), "tanh")
    positive = np.abs(x) + dtype(1e-3)
    Ball(positive, dtype).log().check(np.log(positive), "log")
    Ball(positive, dtype).sqrt().check(np.sqrt(positive), "sqrt")
    square = Ball(x, dtype) * Ball(x, dtype)  # what comes in with a radius goes out with one
    small = np.abs(x) < 6
    square[small].exp().check(np.exp((x * x)[small]), "exp x²")
    (square + 1).log().check(np.log(x * x + dtype(1)), "log(x² + 1)")
    square.sqrt().check(np.sqrt(x * x), "√x²")
    assert (square.sqrt().radius >= np.abs(np.abs(x) - square.sqrt().value)).all()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_the_radius_is_the_formula(dtype):
    """One addition: u |a + b|. One product of two uncertain numbers: both radii, and both together."""
    u = unit_roundoff(dtype) + 2.0**-53
    tiny = float(np.finfo(dtype).smallest_subnormal)
    a, b = Ball(np.array(3.0), dtype, 0.5), Ball(np.array(-5.0), dtype, 0.25)
    assert (a + b).value == -2
    assert (a + b).radius == 0.75 + u * (2 + 0.75) + tiny
    assert (a * b).radius == 3 * 0.25 + 0.5 * 5 + 0.125 + u * (15 + 3.375) + tiny
    assert (-a).radius == a.radius
    row = Ball(np.array([[1.0, -2.0, 4.0]]), dtype)
    assert row.sum(-1).radius[0, 0] == pytest.approx((gamma(3, dtype) + gamma(3, np.float64)) * 7, rel=1e-12)
    assert (row @ row.T).radius[0, 0] >= (gamma(3, dtype)) * 21
    assert (row @ row.T).radius[0, 0] <= (gamma(3, dtype) + gamma(3, np.float64)) * 21 * 1.001
    assert row.max().value == 4
    assert row.where(np.array([[True, False, True]])).value.tolist() == [[1, 0, 4]]
    assert (0.1 * row).value[0, 2] == pytest.approx(0.4)
    assert (0.1 * row).radius[0, 2] >= 4 * abs(float(dtype(0.1)) - 0.1)  # 0.1 itself is rounded first
    assert (0.25 * row).radius[0, 2] == u + tiny


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_slightly_wrong_result_is_outside(dtype, rng):
    """A relative change of a thousandth of the length times u more than allowed is seen: the bound is not loose."""
    a, b = (rng.random(s).astype(dtype) + dtype(0.5) for s in ((4, 50), (50, 3)))
    ball = Ball(a, dtype) @ Ball(b, dtype)
    ball.check(a @ b, "right")
    relative = (ball.radius / ball.value).max()
    assert relative <= 51 * (unit_roundoff(dtype) + 2.0**-53)
    with pytest.raises(AssertionError, match="off by"):
        ball.check((a @ b) * dtype(1 + 3 * relative), "a little more")


def test_check_refuses_other_dtypes_shapes_nan_and_empty_promises():
    ball = Ball(np.ones(2), np.float32)
    for wrong, message in (
        (np.ones(2), "float64, needed float32"),
        (np.ones((1, 2), np.float32), "shape"),
        (np.array([1, np.nan], np.float32), r"element \(1,\) is .*nan"),
        (np.array([1, np.inf], np.float32), "off by inf"),
    ):
        with pytest.raises(AssertionError, match=message):
            ball.check(wrong, "y")
    with pytest.raises(ValueError, match="the bound is not finite and says nothing"):
        Ball(np.ones(2), np.float32, np.inf).check(np.ones(2, np.float32), "y")
    with pytest.raises(ValueError, match="a divisor's ball contains 0"):
        ball / Ball(np.zeros(2), np.float32)
