"""The LSTM: equations in balls, central differences, torch's own layer, and wrong versions."""

import numpy as np
import pytest
import torch
import wrong_lstm
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance.gradients import check_vjp
from minift.conformance.operations import lstm as operations
from minift.nn import lstm
from nn import checks

# (seed, batch, tokens, d_in, d, size of the numbers)
CASES = [(1, 2, 5, 3, 4, 1.0), (2, 1, 1, 4, 2, 1.0), (3, 3, 2, 2, 3, 6.0), (4, 2, 3, 1, 1, 1e-3), (5, 1, 0, 3, 2, 1.0)]
FORMS = [lstm.lstm_1, lstm.lstm_2]


def weights(rng, d_in, d, size=1.0):
    return [size * rng.standard_normal(shape) for shape in ((4 * d, d_in), (4 * d, d), (4 * d,), (4 * d,))]


def make(case):
    seed, batch, tokens, d_in, d, size = case
    rng = np.random.default_rng(seed)
    x, dy = size * rng.standard_normal((batch, tokens, d_in)), rng.standard_normal((batch, tokens, d))
    return [x, *weights(rng, d_in, d, size)], dy, rng


oracle = checks.in_dtype(operations.oracle)


# --- a layer: op(x, W_ih, W_hh, b_ih, b_hh) ---------------------------------------------------------------------------


def follows_the_equations_in_any_layout(op, case):
    args, dy, _ = make(case)
    for layout in (checks.contiguous, *checks.LAYOUTS):
        for dtype in checks.DTYPES:
            checks.inside(op, oracle, args, dy, dtype, layout)


def gradients(op, case):
    args, dy, rng = make(case)
    if dy.size and case[5] <= 1:
        check_vjp(op, *args, rng=rng)


def torch_agrees(op, case):
    """The layer of torch in float64, with our bound for both: also the order of the gates in its weights."""
    args, dy, _ = make(case)
    if not dy.size:
        return
    layer = torch.nn.LSTM(args[0].shape[2], dy.shape[2], batch_first=True).double()
    for parameter, value in zip(layer.parameters(), args[1:], strict=True):
        parameter.data = torch.tensor(value)
    x = torch.tensor(args[0], requires_grad=True)
    expected = layer(x)[0]
    expected.backward(torch.tensor(dy))
    y, vjp = op(*args)
    theirs = (expected.detach(), x.grad, *(p.grad for p in layer.parameters()))
    for i, (a, b, ball) in enumerate(zip((y, *vjp(dy)), theirs, oracle(np.float64, dy, *args), strict=True)):
        assert (np.abs(a - b.numpy()) <= 2 * ball.radius).all(), f"result {i}"


def changes_nothing(op, case):
    args, dy, _ = make(case)
    checks.pure(op, args, dy)


def both_biases_have_a_gradient_of_their_own(op, case):
    """Whoever adds up gradients in place would otherwise add to both at once."""
    args, dy, _ = make(case)
    *_, db_ih, db_hh = op(*args)[1](dy)
    assert not np.shares_memory(db_ih, db_hh)


def nothing_looks_ahead(op, case):
    """y at t is the same to the bit whatever comes after t, even if that is huge."""
    args, dy, _ = make(case)
    tokens = dy.shape[1]
    if tokens < 2:
        return
    other = args[0].copy()
    other[:, -1] = 1e30
    y, _ = op(*args)
    checks.same_bits(op(other, *args[1:])[0][:, :-1], y[:, :-1], "y before the change")


PROPERTIES = (
    follows_the_equations_in_any_layout,
    gradients,
    torch_agrees,
    both_biases_have_a_gradient_of_their_own,
)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("holds", [*PROPERTIES, changes_nothing, nothing_looks_ahead], ids=lambda p: p.__name__)
@pytest.mark.parametrize("op", FORMS, ids=lambda op: op.__name__)
def test_layer(op, holds, case):
    holds(op, case)


@given(st.tuples(st.integers(0, 999), *3 * [st.integers(1, 4)], st.integers(1, 3), st.sampled_from([1e-3, 1.0, 4.0])))
def test_layer_drawn(case):
    follows_the_equations_in_any_layout(lstm.lstm_2, case)


def test_kill_matrix_of_the_layer():
    checks.kill_matrix(PROPERTIES, wrong_lstm.LSTM, CASES)


def test_the_layer_is_the_fast_form():
    assert lstm.lstm is lstm.lstm_2


@pytest.mark.parametrize("which", [0, 1])
def test_cell_by_central_differences(rng, which):
    """Each of its two results by itself: the cotangent of the other is zero."""
    args = [rng.standard_normal((2, n)) for n in (3, 4, 4)] + weights(rng, 3, 4)

    def one(*args):
        both, vjp = lstm.lstm_cell(*args)
        return both[which], lambda dy: vjp(*(dy if i == which else np.zeros_like(dy) for i in range(2)))

    check_vjp(one, *args, rng=rng)


# --- both directions: op(x, ahead, back) ------------------------------------------------------------------------------


def both_ways(case):
    args, _, rng = make(case)
    _, batch, tokens, d_in, d, size = case
    return (
        args[0],
        tuple(args[1:]),
        tuple(weights(rng, d_in, d, size)),
        rng.standard_normal((batch, tokens, 2 * d)),
        rng,
    )


def flat(op):
    """With the eight weights as arguments of their own."""

    def call(x, *eight):
        y, vjp = op(x, tuple(eight[:4]), tuple(eight[4:]))

        def flat_vjp(dy):
            dx, ahead, back = vjp(dy)
            return dx, *ahead, *back

        return y, flat_vjp

    return call


def torch_agrees_in_both_directions(op, case):
    x, ahead, back, dy, _ = both_ways(case)
    if not dy.size:
        return
    layer = torch.nn.LSTM(x.shape[2], dy.shape[2] // 2, batch_first=True, bidirectional=True).double()
    for parameter, value in zip(layer.parameters(), ahead + back, strict=True):
        parameter.data = torch.tensor(value)
    leaf = torch.tensor(x, requires_grad=True)
    expected = layer(leaf)[0]
    expected.backward(torch.tensor(dy))
    y, vjp = flat(op)(x, *ahead, *back)
    d = dy.shape[2] // 2
    a = oracle(np.float64, dy[..., :d], x, *ahead)
    b = oracle(np.float64, dy[:, ::-1, d:], x[:, ::-1], *back)
    radii = [np.concatenate([a[0].radius, b[0].radius[:, ::-1]], 2), a[1].radius + b[1].radius[:, ::-1]]
    radii[1] = radii[1] + 2.0**-52 * np.abs(leaf.grad.numpy())  # of the sum of both
    radii += [ball.radius for ball in (*a[2:], *b[2:])]
    theirs = (expected.detach(), leaf.grad, *(p.grad for p in layer.parameters()))
    for i, (ours, other, radius) in enumerate(zip((y, *vjp(dy)), theirs, radii, strict=True)):
        assert (np.abs(ours - other.numpy()) <= 2 * radius).all(), f"result {i}"


def gradients_in_both_directions(op, case):
    x, ahead, back, dy, rng = both_ways(case)
    if dy.size and case[5] <= 1:
        check_vjp(flat(op), x, *ahead, *back, rng=rng)


BOTH = (torch_agrees_in_both_directions, gradients_in_both_directions)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("holds", BOTH, ids=lambda p: p.__name__)
def test_both_directions(holds, case):
    holds(lstm.bidirectional_lstm, case)


def test_both_directions_change_nothing():
    x, ahead, back, dy, _ = both_ways(CASES[0])
    checks.pure(flat(lstm.bidirectional_lstm), [x, *ahead, *back], dy)


def test_kill_matrix_of_both_directions():
    checks.kill_matrix(BOTH, wrong_lstm.BIDIRECTIONAL, CASES)
