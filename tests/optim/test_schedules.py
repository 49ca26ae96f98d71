"""The learning rate as a function of the step: transformers' schedules, ends and joints, wrong versions."""

import inspect
import itertools
import math

import pytest
import torch
import transformers
import wrong_optim
from hypothesis import given
from hypothesis import strategies as st

from minift.optim.schedules import learning_rate
from nn import checks

# peak, total steps, warm-up steps, schedule, floor
CASES = [
    (peak, total, warmup, schedule, floor)
    for peak, total, warmup in ((0.3, 20, 5), (1e-3, 7, 0), (2.0, 5, 5), (0.5, 1, 0), (0.1, 12, 1), (0.7, 3, 9))
    for schedule in ("constant", "linear", "cosine")
    for floor in (0.0, 0.07 * peak)
]


def by_hand(op, case):
    """The formulas with progress written as a share of what is left."""
    peak, total, warmup, schedule, floor = case
    for step in range(1, total + 4):
        if step <= warmup:
            exact = peak * (step / warmup)
        else:
            left = max(total - step, 0) / max(total - warmup, 1)
            share = {"constant": 1, "linear": left, "cosine": math.sin(math.pi / 2 * left) ** 2}[schedule]
            exact = peak if schedule == "constant" else floor * (1 - share) + peak * share
        found = op(step, peak, total, warmup, schedule, floor)
        assert abs(found - exact) <= 16 * 2.0**-53 * peak, f"step {step}: {found}, needed {exact}"


def ends_and_joints(op, case):
    """Peak at the end of the warm-up, the floor at the last step and after it, never above or below them."""
    peak, total, warmup, schedule, floor = case
    rates = [op(step, peak, total, warmup, schedule, floor) for step in range(1, total + 5)]
    assert rates[0] > 0 or total == 1, "the first step moves"
    if warmup:
        assert warmup > len(rates) or rates[warmup - 1] == peak
        assert abs(rates[0] - peak / warmup) <= 2.0**-52 * peak
    if schedule != "constant" and total > warmup:
        slack = 4 * 2.0**-53 * peak
        assert all(abs(rate - floor) <= slack for rate in rates[total - 1 :]), "the floor at the last step and after it"
        assert all(a >= b - slack for a, b in itertools.pairwise(rates[warmup:])), "down"
    assert all(a <= b for a, b in itertools.pairwise(rates[:warmup])), "up"
    assert max(rates) <= peak


def transformers_agrees(op, case):
    """Theirs counts from 0, where the rate is 0; so their step n is ours. No floor there."""
    peak, total, warmup, schedule, floor = case
    if floor or total <= warmup:
        return
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    make = {
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total),
    }[schedule]
    scheduler = make()
    for step in range(1, total + 1):
        optimizer.step()
        scheduler.step()
        assert abs(op(step, peak, total, warmup, schedule, floor) - scheduler.get_last_lr()[0]) <= 16 * 2.0**-53 * peak


def refuses(op, case):
    """Bad settings at once, not when the warm-up is over."""
    peak, total, warmup, schedule, floor = case
    op = inspect.unwrap(op)  # without the type checker of the tests, as users call it
    for step, name in ((0, schedule), (-3, schedule), (1, "cosin"), (total + 1, "cosin")):
        try:
            op(step, peak, total, warmup, name, floor)
        except ValueError as error:
            assert "step is" in str(error) if step < 1 else "schedule" in str(error)
        else:
            raise AssertionError(f"step {step} and schedule {name} were accepted")


PROPERTIES = (by_hand, ends_and_joints, transformers_agrees, refuses)


@pytest.mark.parametrize("holds", PROPERTIES)
def test_learning_rate(holds):
    for case in CASES:
        holds(learning_rate, case)


def test_learning_rate_kill_matrix():
    checks.kill_matrix(PROPERTIES, wrong_optim.SCHEDULES, CASES)


@given(
    st.tuples(
        st.floats(1e-6, 10),
        st.integers(1, 60),
        st.integers(0, 60),
        st.sampled_from(("constant", "linear", "cosine")),
        st.just(0.0),
    ),
    st.floats(0, 1),
)
def test_any_settings(case, share):
    case = (*case[:4], share * case[0])
    by_hand(learning_rate, case)
    ends_and_joints(learning_rate, case)


def test_defaults_are_a_cosine_to_zero_without_warm_up():
    for step in range(1, 8):
        assert learning_rate(step, 0.3, 7) == learning_rate(step, 0.3, 7, 0, "cosine", 0.0)
    assert learning_rate(7, 0.3, 7) == 0
    assert learning_rate(7, 0.3, 14) == 0.15  # halfway


def test_the_error_lists_what_is_known():
    with pytest.raises(ValueError, match=r"schedule is 'cosin', needed one of \('constant', 'linear', 'cosine'\)"):
        inspect.unwrap(learning_rate)(1, 0.1, 10, 5, "cosin")
    with pytest.raises(ValueError, match="step is 0, needed 1 or more"):
        learning_rate(0, 0.1, 10)
