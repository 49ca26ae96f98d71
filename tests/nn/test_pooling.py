"""Pooling: against torch, within bounds, padding that changes nothing, and wrong versions."""

import numpy as np
import pytest
import torch
import wrong_pooling

from minift.conformance.ball import Ball
from minift.conformance.bounds import gamma
from minift.conformance.gradients import check_vjp
from minift.nn import pooling
from nn import checks

CASES = [(1, (3, 5, 4)), (2, (2, 1, 6)), (3, (4, 7, 1)), (4, (1, 3, 33))]


def make(case, dtype=np.float64):
    """Hidden states, lengths that differ, padding of NaN, a cotangent."""
    seed, shape = case
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, shape[1], shape[0], endpoint=True)
    x = rng.standard_normal(shape)
    x[np.arange(shape[1]) >= lengths[:, None]] = np.nan
    return x.astype(dtype), lengths, rng.standard_normal((shape[0], shape[2])).astype(dtype), rng


def torch_gives(function, dy, *args):
    leaves = [torch.tensor(a, requires_grad=True) for a in args]
    y = function(*leaves)
    return [y.detach().numpy(), *(g.numpy() for g in torch.autograd.grad(y, leaves, torch.tensor(dy)))]


# --- properties: op(x, lengths) ---------------------------------------------------------------------------------------


def one_text_at_a_time(op, case, torch_form):
    x, lengths, dy, _ = make(case)
    y, vjp = op(x, lengths)
    dx = vjp(dy)
    for row, n in enumerate(lengths):
        y_, dx_ = torch_gives(torch_form, dy[row], x[row, :n])
        np.testing.assert_allclose(y[row], y_, rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(dx[row, :n], dx_, rtol=1e-14, atol=1e-15)
        assert not dx[row, n:].any(), "padding has a cotangent"


def mean_is_torchs(op, case):
    one_text_at_a_time(op, case, lambda text: text.mean(0))


def last_is_torchs(op, case):
    one_text_at_a_time(op, case, lambda text: text[-1])


def gradients(op, case):
    x, lengths, _, rng = make(case)
    check_vjp(lambda x: op(x, lengths), np.nan_to_num(x), rng=rng)


def keeps_the_dtype_and_its_arguments(op, case):
    for dtype in checks.DTYPES:
        x, lengths, dy, _ = make(case, dtype)
        before = x.tobytes(), lengths.tobytes(), dy.tobytes()
        y, vjp = op(x, lengths)
        assert y.dtype == vjp(dy).dtype == dtype
        assert vjp(dy).tobytes() == vjp(dy).tobytes()
        assert (x.tobytes(), lengths.tobytes(), dy.tobytes()) == before


# --- properties: op(x, eps) -------------------------------------------------------------------------------------------


def unit_case(case):
    seed, shape = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
    return x, rng.standard_normal(shape), rng


def unit_is_torchs(op, case):
    x, dy, _ = unit_case(case)
    for eps in (1e-12, 0.5):  # rows above and below
        y, vjp = op(x, eps)
        expected = torch_gives(lambda x, eps=eps: torch.nn.functional.normalize(x, dim=-1, eps=eps), dy, x)
        length = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), eps)
        cancelled = np.linalg.norm(dy, axis=-1, keepdims=True) / length  # the two terms of dx may cancel
        for found, theirs, size in zip((y, vjp(dy)), expected, (np.abs(y), cancelled), strict=True):
            assert (np.abs(found - theirs) <= 4 * gamma(x.shape[-1] + 4, np.float64) * size).all()


def unit_lies_within_its_bound(op, case):
    x, dy, _ = unit_case(case)
    for dtype in checks.DTYPES:
        checks.inside(op, unit_oracle, [x], dy, dtype)


def unit_oracle(dtype, dy, x):
    dy, x = Ball(dy, dtype), Ball(x, dtype)
    length = ((x * x).mean() * x.value.shape[-1]).sqrt()
    y = x / length
    return y, (dy - y * ((dy * y).mean() * x.value.shape[-1])) / length


def zero_stays_zero(op, case):
    x, dy, _ = unit_case(case)
    y, vjp = op(np.zeros_like(x), 0.25)
    assert not y.any()
    assert np.array_equal(vjp(dy), dy / 0.25)


def test_a_row_of_length_eps_counts_as_shorter():
    """There equation (3) has a kink, and takes dy / ε."""
    dy = np.array([2.0, 7.0])
    np.testing.assert_array_equal(pooling.unit_length(np.array([3.0, 4.0]), 5.0)[1](dy), dy / 5)


def test_the_smallest_length_is_torchs():
    """Rows so short that ε alone sets what becomes of them."""
    x = np.array([[3e-13, -4e-13], [2e-14, 0]])
    expected = torch.nn.functional.normalize(torch.tensor(x), dim=-1).numpy()
    np.testing.assert_allclose(pooling.unit_length(x)[0], expected, rtol=2.0**-51)


POOL = [gradients, keeps_the_dtype_and_its_arguments]
SUITES = {
    "mean_pool": (pooling.mean_pool, [mean_is_torchs, *POOL], wrong_pooling.MEAN_POOL),
    "last_token": (pooling.last_token, [last_is_torchs, *POOL], wrong_pooling.LAST_TOKEN),
    "unit_length": (
        pooling.unit_length,
        [unit_is_torchs, unit_lies_within_its_bound, zero_stays_zero],
        wrong_pooling.UNIT_LENGTH,
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SUITES)
def test_pooling(name, case):
    op, properties, _ = SUITES[name]
    for holds in properties:
        holds(op, case)


@pytest.mark.parametrize("name", SUITES)
def test_pooling_kill_matrix(name):
    _, properties, wrong = SUITES[name]
    checks.kill_matrix(properties, wrong, CASES)


@pytest.mark.parametrize("op", [pooling.mean_pool, pooling.last_token])
@pytest.mark.parametrize("lengths", [[1, 5, 0], [1, 5, 6]])
def test_a_row_needs_as_many_tokens_as_it_says(op, lengths):
    with pytest.raises(ValueError, match=rf"row 2 has {lengths[2]} tokens, needed 1 to 5"):
        op(np.zeros((3, 5, 4)), np.array(lengths))


@pytest.mark.parametrize("op", [pooling.mean_pool, pooling.last_token])
def test_a_batch_without_rows(op):
    y, vjp = op(np.zeros((0, 5, 4)), np.zeros(0, int))
    assert y.shape == (0, 4) and vjp(y).shape == (0, 5, 4)
