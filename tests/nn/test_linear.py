"""The linear map and the reductions behind every broadcast: loops, exact integers, bounds, wrong versions."""

import numpy as np
import pytest
import wrong_nn
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance.gradients import check_vjp
from minift.conformance.operations import linear as known
from minift.nn.linear import linear, rows, sum_to
from minift.nn.weight import Frozen
from nn import checks

oracle = checks.in_dtype(known.oracle)
CASES = [(1, (2, 3), 5, 7, True), (2, (4,), 3, 3, True), (3, (), 6, 2, False), (4, (3, 1, 2), 1, 1, True)]
CASES += [(5, (2, 2), 4, 4, False), (6, (0, 3), 2, 4, True)]


def make(case, integers=False):
    seed, n, d_in, d_out, with_bias = case
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.integers(-8, 9, s).astype(float)) if integers else rng.standard_normal
    args = [draw((*n, d_in)), draw((d_out, d_in))] + [draw((d_out,))] * with_bias
    return args, draw((*n, d_out)), rng


def without_none(op):
    """Two arguments, two cotangents: the third must be None."""

    def called(*args):
        y, vjp = op(*args)

        def checked(dy):
            cotangents = vjp(dy)
            assert len(cotangents) == 3, "the arity of a pullback is fixed"
            if len(args) == 2:
                assert cotangents[2] is None, "there is no bias to have a cotangent"
                return cotangents[:2]
            return cotangents

        return y, checked

    return called


def gradients(op, case):
    args, _, rng = make(case)
    if args[0].size:
        check_vjp(without_none(op), *args, rng=rng)


def exact_on_integers(op, case):
    """Against a loop over Python integers, whose sums are exact: every bit, in float32."""
    args, dy, _ = make(case, integers=True)
    y, vjp = without_none(op)(*(a.astype(np.float32) for a in args))
    found = [y, *vjp(dy.astype(np.float32))]
    x, W = rows(args[0]).astype(int).tolist(), args[1].astype(int).tolist()
    b, d = [0] * len(W) if len(args) == 2 else args[2].astype(int).tolist(), rows(dy).astype(int).tolist()
    I, O, N = range(args[1].shape[1]), range(len(W)), range(len(x))
    expected = [
        [[sum(x[n][i] * W[o][i] for i in I) + b[o] for o in O] for n in N],
        [[sum(d[n][o] * W[o][i] for o in O) for i in I] for n in N],
        [[sum(d[n][o] * x[n][i] for n in N) for i in I] for o in O],
        [sum(d[n][o] for n in N) for o in O],
    ]
    for what, a, e in zip(("y", "dx", "dW", "db"), found, expected, strict=False):
        checks.same_bits(a, np.array(e, np.float32).reshape(a.shape), what)


def within_the_bound(op, case):
    args, dy, _ = make(case)
    for dtype in checks.DTYPES:
        checks.inside(without_none(op), oracle, args, dy, dtype)


def in_any_layout(op, case):
    args, dy, _ = make(case)
    for layout in checks.LAYOUTS:
        checks.inside(without_none(op), oracle, args, dy, np.float32, layout)


def changes_nothing(op, case):
    args, dy, _ = make(case)
    checks.pure(op, args, dy)


PROPERTIES = (gradients, exact_on_integers, within_the_bound, in_any_layout, changes_nothing)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_linear(holds, case):
    holds(linear, case)


def test_linear_kill_matrix():
    checks.kill_matrix(PROPERTIES, wrong_nn.LINEAR, CASES)


@given(
    st.tuples(
        st.integers(0, 9999),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.integers(1, 70),
        st.integers(1, 9),
        st.booleans(),
    ),
    st.sampled_from((checks.contiguous, *checks.LAYOUTS)),
    st.sampled_from(checks.DTYPES),
)
def test_any_shape_and_layout(case, layout, dtype):
    args, dy, _ = make(case)
    checks.inside(without_none(linear), oracle, args, dy, dtype, layout)
    exact_on_integers(linear, case)


def test_a_frozen_weight_has_no_cotangent_and_the_same_bits(rng):
    x, W, b, dy = (rng.standard_normal(s) for s in ((2, 3, 5), (7, 5), (7,), (2, 3, 7)))
    (y, vjp), (y_frozen, vjp_frozen) = linear(x, W, b), linear(x, Frozen(W), b)
    checks.same_bits(y_frozen, y, "y")
    dx, dW, db = vjp_frozen(dy)
    assert dW is None
    for found, expected in zip((dx, db), (vjp(dy)[0], vjp(dy)[2]), strict=True):
        checks.same_bits(found, expected, "cotangent")


def test_a_weight_hears_the_dropout_key_and_names_its_own_cotangent(rng):
    class Doubling(Frozen):
        def linear(self, x, dropout_key=None):
            return dropout_key * x, lambda dy: (dropout_key * dy, {"scale": np.vdot(x, dy)[None]})

    x, dy = rng.standard_normal((2, 4, 3))
    y, vjp = linear(x, Doubling(np.eye(3)), dropout_key=5)
    assert np.array_equal(y, 5 * x)
    dx, dweight, dbias = vjp(dy)
    assert np.array_equal(dx, 5 * dy)
    assert list(dweight) == ["scale"]
    assert dbias is None
    with pytest.raises(TypeError):  # no key: nobody made one up
        linear(x, Doubling(np.eye(3)))


@st.composite
def broadcasts(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    small = [draw(st.sampled_from((1, n))) for n in shape[draw(st.integers(0, len(shape))) :]]
    return tuple(shape), tuple(small), draw(st.integers(0, 999))


@given(broadcasts())
def test_sum_to_is_the_transpose_of_broadcasting(case):
    """⟨dy, broadcast(v)⟩ = ⟨sum_to(dy), v⟩, exactly, for whole numbers; and once more, element by element."""
    shape, small, seed = case
    rng = np.random.default_rng(seed)
    dy, v = rng.integers(-9, 10, shape).astype(float), rng.integers(-9, 10, small).astype(float)
    found = sum_to(dy, small)
    assert found.shape == small
    assert np.vdot(dy, np.broadcast_to(v, shape)) == np.vdot(found, v)
    expected = np.zeros(small)
    for index in np.ndindex(shape):
        own = index[len(shape) - len(small) :]
        expected[tuple(0 if n == 1 else i for i, n in zip(own, small, strict=True))] += dy[index]
    assert np.array_equal(found, expected)


def test_rows_of_any_number_of_axes():
    assert rows(np.zeros((2, 3, 4))).shape == (6, 4)
    assert rows(np.arange(4)).shape == (1, 4)
    assert rows(np.arange(24).reshape(2, 3, 4))[4].tolist() == [16, 17, 18, 19]
