"""PPO: its losses number by number and against torch, the table of its gradient, padding, controllers and settings."""

import dataclasses
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
import wrong_ppo
from rectangles import POISON, SHAPES, dyadic, mask_of, poisoned

from minift.conformance import bounds
from minift.conformance.gradients import check_vjp
from minift.rlhf.masked import masked_mean
from minift.rlhf.ppo import Settings, minibatch_loss, next_kl_coef, policy_loss, ratio, statistics, too_far, value_loss
from nn import checks

CASES = [(*shape, *options) for shape in SHAPES for options in ((0.2, None), (0.05, 11.0))]


def make(case, dtype=np.float64):
    """logp, old_logp, advantages, mask: steps of all sizes, no ratio within 1e-2 of an edge of the clip."""
    rng = np.random.default_rng(case[0])
    mask = mask_of(case[:4], rng)
    old = -rng.exponential(1.0, mask.shape)
    rho = rng.uniform(0.4, 1.9, mask.shape)
    for edge in (1 - case[4], 1 + case[4]):
        rho = np.where(np.abs(rho - edge) < 1e-2, edge + 0.02, rho)
    return (
        (old + np.log(rho)).astype(dtype),
        old.astype(dtype),
        rng.standard_normal(mask.shape).astype(dtype),
        mask,
        rng,
    )


def policy_number_by_number(op, case):
    cliprange, normalizer = case[4:]
    for dtype in checks.DTYPES:
        logp, old, advantages, mask, _ = make(case, dtype)
        found, vjp = op(logp, old, advantages, mask, cliprange, normalizer)
        dlogp = vjp(dtype(0.7))
        assert found.dtype == dlogp.dtype == dtype
        n = normalizer or mask.sum()
        total, slack = 0.0, 0.0
        u = bounds.unit_roundoff(dtype)
        for i in np.ndindex(mask.shape):
            if not mask[i]:
                assert dlogp[i] == 0
                continue
            rho, a = math.exp(float(logp[i]) - float(old[i])), float(advantages[i])
            clipped = min(max(rho, 1 - cliprange), 1 + cliprange)
            total -= min(rho * a, clipped * a) / n
            # the difference of logp is rounded once, and exp is within 8 u
            slack += (12 + mask.size) * u * (1 + abs(float(logp[i])) + abs(float(old[i]))) * (rho + 1) * abs(a) / n
            free = rho * a <= clipped * a
            exact = -rho * a * 0.7 / n if free else 0.0
            assert abs(dlogp[i] - exact) <= 32 * u * abs(exact) + 1e-30, f"{i}: {dlogp[i]}, needed {exact}"
        assert abs(found - total) <= slack


def policy_gradients(op, case):
    logp, old, advantages, mask, rng = make(case)
    check_vjp(lambda x: op(x, old, advantages, mask, *case[4:]), logp, rng=rng)


def torch_agrees(op, case):
    logp, old, advantages, mask, _ = make(case)
    leaf = torch.tensor(logp, requires_grad=True)
    rho = torch.exp(leaf - torch.tensor(old))
    a = torch.tensor(advantages)
    each = torch.max(-rho * a, -torch.clamp(rho, 1 - case[4], 1 + case[4]) * a)
    loss = each[torch.tensor(mask)].sum() / (case[5] or mask.sum())
    loss.backward(torch.tensor(0.3, dtype=torch.float64))
    found, vjp = op(logp, old, advantages, mask, *case[4:])
    assert abs(found - loss.item()) <= 1e-14 * (1 + abs(loss.item()))
    assert np.abs(vjp(0.3) - leaf.grad.numpy()).max() <= 1e-15


def at_the_first_minibatch_the_plain_policy_gradient(op, case):
    """Equal bits: ρ exactly 1, the loss exactly −mean Â and its gradient exactly −Â / N."""
    _, old, _, mask, rng = make(case)
    advantages = dyadic(rng, mask.shape)
    found, vjp = op(old, old.copy(), advantages, mask, case[4], 8.0)
    assert found == -math.fsum(advantages[mask]) / 8
    checks.same_bits(vjp(1.0) + 0.0, np.where(mask, -advantages / 8, 0) + 0.0, "dlogp")


def the_table_of_the_gradient(op, case):
    """A > 0: −ρ A below the upper edge, else 0; A < 0: −ρ A above the lower edge, else 0."""
    cliprange = case[4]
    rho = np.array([[0.5, 1 - cliprange / 2, 1.0, 1 + cliprange / 2, 1.8]])
    for a, moves in ((2.0, [1, 1, 1, 1, 0]), (-2.0, [0, 1, 1, 1, 1]), (0.0, [0, 0, 0, 0, 0])):
        _, vjp = op(np.log(rho), np.zeros_like(rho), np.full_like(rho, a), np.ones_like(rho, bool), cliprange, 1.0)
        assert np.abs(vjp(1.0) + rho * a * moves).max() <= 1e-15, f"A = {a}: {vjp(1.0)}"


def is_pessimistic_and_homogeneous(op, case):
    logp, old, advantages, mask, _ = make(case)
    found, vjp = op(logp, old, advantages, mask, case[4])
    free = -(np.exp(logp - old) * advantages)[mask].mean()
    assert found >= free - 1e-14 * (1 + abs(free))
    twice, twice_vjp = op(logp, old, 2 * advantages, mask, case[4])
    checks.same_bits(twice, 2 * found, "twice the advantages")
    checks.same_bits(twice_vjp(1.0), 2 * vjp(1.0), "their gradient")


def policy_padding_does_not_matter(op, case):
    logp, old, advantages, mask, _ = make(case)
    found, vjp = op(logp, old, advantages, mask, *case[4:])
    for poison in POISON:
        other, other_vjp = op(*(poisoned(x, mask, poison) for x in (logp, old, advantages)), mask, *case[4:])
        checks.same_bits(other, found, f"{poison}")
        checks.same_bits(other_vjp(1.0) + 0.0, vjp(1.0) + 0.0, f"gradient with {poison}")


POLICY = (
    policy_number_by_number,
    policy_gradients,
    torch_agrees,
    at_the_first_minibatch_the_plain_policy_gradient,
    the_table_of_the_gradient,
    is_pessimistic_and_homogeneous,
    policy_padding_does_not_matter,
)


@pytest.mark.parametrize("holds", POLICY)
def test_policy_loss(holds):
    for case in CASES:
        holds(policy_loss, case)


def test_policy_kill_matrix():
    checks.kill_matrix(POLICY, wrong_ppo.POLICY, CASES)


def test_policy_loss_is_pure(rng):
    logp, old, advantages, mask, _ = make(CASES[0])
    checks.pure(lambda *x: policy_loss(*x, mask), [logp, old, advantages], rng.standard_normal())


def test_equal_bits_have_the_ratio_one(rng):
    for dtype in checks.DTYPES:
        logp = (-50 * rng.random((3, 40))).astype(dtype)
        found = ratio(logp, logp.copy(), np.ones((3, 40), bool))
        checks.same_bits(found, np.ones((3, 40), dtype), "ρ")


# --- values -----------------------------------------------------------------------------------------------------------


def value_inputs(case, dtype=np.float64):
    """values, old values, returns, mask: some clipped on either side, of which some are the worse of the two."""
    rng = np.random.default_rng(case[0])
    mask = mask_of(case[:4], rng)
    return (*(rng.standard_normal((3, *mask.shape)) * 0.5).astype(dtype), mask, rng)


def value_number_by_number(op, case):
    for cliprange, normalizer in ((0.2, None), (None, 3.0), (0.5, 7.0)):
        for dtype in checks.DTYPES:
            values, old, returns, mask, _ = value_inputs(case, dtype)
            found, vjp = op(values, old, returns, mask, cliprange, normalizer)
            dvalues, n = vjp(dtype(0.7)), normalizer or mask.sum()
            assert found.dtype == dvalues.dtype == dtype
            total = 0.0
            for i in np.ndindex(mask.shape):
                v, r, o = float(values[i]), float(returns[i]), float(old[i])
                near = v if cliprange is None else min(max(v, o - cliprange), o + cliprange)
                total += max((v - r) ** 2, (near - r) ** 2) / 2 / n if mask[i] else 0
                exact = 0.7 * (v - r) / n if mask[i] and (v - r) ** 2 >= (near - r) ** 2 else 0.0
                if abs(abs(v - r) - abs(near - r)) > 1e-6 or near == v:
                    assert abs(dvalues[i] - exact) <= 16 * bounds.unit_roundoff(dtype) * (abs(v) + abs(r)) / n
            assert abs(found - total) <= 100 * bounds.unit_roundoff(dtype) * (1 + total)


def value_gradients(op, case):
    values, old, returns, mask, rng = value_inputs(case)
    check_vjp(lambda v: op(v, old, returns, mask, None), values, rng=rng)
    dvalues = op(values, old, returns, mask, 0.2, 1.0)[1](1.0)
    leaf = torch.tensor(values, requires_grad=True)
    near = torch.clamp(leaf, torch.tensor(old - 0.2), torch.tensor(old + 0.2))
    target = torch.tensor(returns)
    worst = torch.max((leaf - target) ** 2, (near - target) ** 2)
    (worst[torch.tensor(mask)].sum() / 2).backward()
    assert np.abs(dvalues - leaf.grad.numpy()).max() <= 1e-15


def value_padding_does_not_matter(op, case):
    values, old, returns, mask, _ = value_inputs(case)
    found, vjp = op(values, old, returns, mask, 0.2)
    for poison in POISON:
        other, other_vjp = op(*(poisoned(x, mask, poison) for x in (values, old, returns)), mask, 0.2)
        checks.same_bits(other, found, f"{poison}")
        checks.same_bits(other_vjp(1.0) + 0.0, vjp(1.0) + 0.0, f"gradient with {poison}")


def values_that_have_not_moved_are_not_clipped(op, case):
    values, _, returns, mask, _ = value_inputs(case)
    (a, a_vjp), (b, b_vjp) = (op(values, values.copy(), returns, mask, clip, 4.0) for clip in (0.2, None))
    checks.same_bits(a, b, "loss")
    checks.same_bits(a_vjp(1.0), b_vjp(1.0), "dvalues")


VALUE = (
    value_number_by_number,
    value_gradients,
    value_padding_does_not_matter,
    values_that_have_not_moved_are_not_clipped,
)


@pytest.mark.parametrize("holds", VALUE)
def test_value_loss(holds):
    for case in SHAPES:
        holds(value_loss, case)


def test_where_both_errors_are_equal_the_value_goes_on_learning():
    """Clipped at ¼ it is as far below the return as the free one is above: the gradient is that of the free one."""
    value, old, target, mask = np.array([[1.0]]), np.array([[0.0]]), np.array([[0.625]]), np.ones((1, 1), bool)
    found, vjp = value_loss(value, old, target, mask, 0.25)
    assert found == 0.375**2 / 2
    checks.same_bits(vjp(1.0), np.array([[0.375]]), "dvalues")


def test_value_kill_matrix():
    checks.kill_matrix(VALUE, wrong_ppo.VALUE, SHAPES)


# --- the whole loss ---------------------------------------------------------------------------------------------------

SETTINGS = Settings(cliprange=0.15, vf_coef=0.3, cliprange_value=0.4, entropy_coef=0.07)


def whole_inputs(case):
    logp, old, advantages, mask, rng = make((*case, 0.15, None))
    entropy = rng.random(mask.shape)
    values, old_values, returns, _, _ = value_inputs(case)
    return (logp, entropy, values), (old, old_values, advantages, returns), mask, rng


def is_the_sum_of_its_parts(op, case):
    (logp, entropy, values), (old, old_values, advantages, returns), mask, _ = whole_inputs(case)
    for settings, n in ((SETTINGS, 5.0), (dataclasses.replace(SETTINGS, cliprange_value=None), None)):
        found, vjp = op(logp, entropy, values, old, old_values, advantages, returns, mask, settings, n)
        policy, policy_vjp = policy_loss(logp, old, advantages, mask, 0.15, n)
        value, value_vjp = value_loss(values, old_values, returns, mask, settings.cliprange_value, n)
        count = n or float(mask.sum())
        assert abs(found - (policy + 0.3 * value - 0.07 * entropy[mask].sum() / count)) <= 1e-14
        dlogp, dentropy, dvalues = vjp(0.7)
        assert np.abs(dlogp - 0.7 * policy_vjp(1.0)).max() <= 1e-15
        assert np.abs(dentropy + 0.07 * 0.7 / count * mask).max() <= 1e-15
        assert np.abs(dvalues - 0.3 * 0.7 * value_vjp(1.0)).max() <= 1e-15


def whole_gradients(op, case):
    outputs, (old, old_values, advantages, returns), mask, rng = whole_inputs(case)
    settings = dataclasses.replace(SETTINGS, cliprange_value=None)
    check_vjp(lambda *o: op(*o, old, old_values, advantages, returns, mask, settings), *outputs, rng=rng)


WHOLE = (is_the_sum_of_its_parts, whole_gradients)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("holds", WHOLE)
def test_minibatch_loss(holds, case):
    holds(minibatch_loss, case)


def test_minibatch_kill_matrix():
    checks.kill_matrix(WHOLE, wrong_ppo.MINIBATCH, SHAPES)


# --- between the steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_statistics(case):
    logp, old, advantages, mask, _ = make(case)
    found = statistics(*(poisoned(x, mask, 1e6) for x in (logp, old, advantages)), mask, case[4])
    rho = [math.exp(x) for x in (logp - old)[mask]]
    assert found["clipfrac"] == np.mean([abs(r - 1) > case[4] for r in rho])
    assert abs(found["ratio"] - math.fsum(rho) / len(rho)) <= 1e-14
    assert abs(found["approx_kl"] - math.fsum(r - 1 - math.log(r) for r in rho) / len(rho)) <= 1e-14
    same = statistics(old, old, advantages, mask, case[4])
    assert same == {"clipfrac": 0.0, "approx_kl": 0.0, "ratio": 1.0}


def test_a_ratio_at_the_edge_is_not_counted_as_cut_off():
    one, mask = np.array([[0.5]]), np.ones((1, 1), bool)
    edge = float(np.exp(0.5) - 1)
    assert statistics(one, 0 * one, one, mask, edge)["clipfrac"] == 0
    assert statistics(one, 0 * one, one, mask, np.nextafter(edge, 0))["clipfrac"] == 1


def test_the_kl_is_not_negative_where_expm1_is_an_ulp_low():
    """As vectorized libraries may be."""
    expm1, moved = np.expm1, np.array([[np.float32(1e-8)]])
    with patch.object(np, "expm1", lambda x: np.nextafter(expm1(x), np.float32(-np.inf))):
        assert statistics(moved, 0 * moved, moved, np.ones((1, 1), bool))["approx_kl"] == 0


def test_of_nothing_mean_and_loss_are_zero():
    x, nothing = np.ones((2, 3)), np.zeros((2, 3), bool)
    for found, vjp in (masked_mean(x, nothing), policy_loss(x, x, x, nothing), value_loss(x, x, x, nothing)):
        assert found == 0 and not vjp(1.0).any()


def test_steps_stop_above_the_target():
    assert not too_far(1e9, None)
    assert too_far(0.021, 0.02)
    assert not too_far(0.02, 0.02)


def test_the_leash_follows_its_target():
    """Ziegler's controller: a fifth of the horizon at most, up above the target, down below it, fixed without one."""
    assert next_kl_coef(0.3, 9.0, 64, None, 100.0) == 0.3
    assert next_kl_coef(0.3, 6.0, 64, 6.0, 640.0) == 0.3
    assert abs(next_kl_coef(0.3, 6.6, 64, 6.0, 640.0) - 0.3 * 1.01) <= 1e-15
    assert abs(next_kl_coef(0.3, 60.0, 64, 6.0, 640.0) - 0.3 * 1.02) <= 1e-15
    assert abs(next_kl_coef(0.3, -60.0, 64, 6.0, 640.0) - 0.3 * 0.98) <= 1e-15
    assert next_kl_coef(0.3, 0.0, 500, 6.0, 100.0) == 0.0
    with pytest.raises(
        ValueError, match=r"^horizon is 100\.0 for rounds of 501 answers, needed at least a fifth of that$"
    ):
        next_kl_coef(0.3, 0.0, 501, 6.0, 100.0)


RANGES = {
    "1 or more": (("num_ppo_epochs", "num_mini_batches"), (0,)),
    "0 or more": (("kl_coef", "vf_coef", "entropy_coef", "missing_eos_penalty"), (-0.1, math.inf, math.nan)),
    "a positive number": (
        ("kl_target", "kl_horizon", "cliprange", "cliprange_value", "target_kl", "temperature"),
        (0.0, -1.0, math.inf, math.nan),
    ),
    "a number from 0 to 1": (("gamma", "lam"), (-0.1, 1.1, math.nan)),
}


@pytest.mark.parametrize(
    ("name", "wrong", "needed"),
    [(name, value, needed) for needed, (names, values) in RANGES.items() for name in names for value in values],
)
def test_settings_out_of_range_are_refused(name, wrong, needed):
    with pytest.raises(ValueError, match=f"^{name} is {wrong!r}, needed {needed}$"):
        Settings(**{name: wrong})


def test_another_estimator_is_refused():
    settings = Settings()
    object.__setattr__(settings, "kl_estimator", "k4")  # past the checker of types
    with pytest.raises(ValueError, match=r"^kl_estimator is 'k4', needed one of \('k1', 'k2', 'k3'\)$"):
        settings.__post_init__()


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().cliprange = 0.3


def test_settings_at_their_ends():
    Settings(num_ppo_epochs=1, kl_coef=0, vf_coef=0, entropy_coef=0, gamma=0, lam=0, kl_target=None, target_kl=1e-9)
    Settings(gamma=1, lam=1, cliprange_value=None, kl_estimator="k3")
