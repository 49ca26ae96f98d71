"""KL estimators, rewards of tokens, GAE and whitening: loops over definitions, exact cases, poisoned padding."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
import wrong_advantages
from rectangles import POISON, SHAPES, dyadic, mask_of, poisoned

from minift.conformance import bounds
from minift.conformance.gradients import check_vjp
from minift.rlhf.advantages import gae_1, gae_2, kl_penalty, last, returns, token_rewards, whiten
from nn import checks

GAE = [(*shape, *decay) for shape in SHAPES for decay in ((0.9, 0.7), (1.0, 0.95), (0.5, 0.5))]


def make(case, dtype=np.float64):
    rng = np.random.default_rng(case[0])
    mask = mask_of(case[:4], rng)
    rewards, values = rng.standard_normal((2, *mask.shape)).astype(dtype)
    return rewards, values, mask, rng.standard_normal(len(mask)).astype(dtype), rng


def episodes(row):
    """(start, end) of each run of a row's mask."""
    edges = np.flatnonzero(np.diff(np.r_[False, row, False]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def by_definition(rewards, values, mask, gamma, lam, bootstrap):
    """Σ_{s ≥ t} (γλ)^{s−t} δ_s in Python floats, and the same of absolute values for the bound."""
    advantages, size = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        for start, end in episodes(row):
            is_last = end == last(mask[b : b + 1])[0] + 1
            v = [float(x) for x in values[b, start:end]]
            v.append(float(bootstrap[b]) if is_last and bootstrap is not None else 0.0)
            r = [float(x) for x in rewards[b, start:end]]
            n = end - start
            delta = [r[s] + gamma * v[s + 1] - v[s] for s in range(n)]
            terms = [abs(r[s]) + gamma * abs(v[s + 1]) + abs(v[s]) for s in range(n)]
            for t in range(n):
                advantages[b, start + t] = math.fsum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
                size[b, start + t] = math.fsum((gamma * lam) ** (s - t) * terms[s] for s in range(t, n))
    return advantages, size


def is_the_sum_of_the_definition(op, case):
    """Within (2T + 8) u Σ (γλ)^{s−t} (|r| + γ|V'| + |V|)."""
    gamma, lam = case[4:]
    for dtype in checks.DTYPES:
        rewards, values, mask, bootstrap, _ = make(case, dtype)
        for end in (None, bootstrap):
            found = op(rewards, values, mask, gamma, lam, end)
            exact, size = by_definition(rewards, values, mask, gamma, lam, end)
            assert found.dtype == dtype
            slack = (2 * mask.shape[1] + 8) * bounds.unit_roundoff(dtype) * size
            assert (np.abs(found - exact) <= slack).all(), f"off by {np.abs(found - exact).max():.3g}"


def without_lambda_the_residual(op, case):
    _, _, mask, _, rng = make(case)
    rewards, values = dyadic(rng, (2, *mask.shape))
    found = op(rewards, values, mask, 0.5, 0.0)
    inside = np.where(mask, values, 0)
    following = np.concatenate([inside[:, 1:], np.zeros((len(mask), 1))], axis=1)
    checks.same_bits(found + 0.0, np.where(mask, rewards + 0.5 * following - values, 0) + 0.0, "δ")


def with_lambda_one_the_return_minus_the_value(op, case):
    _, _, mask, _, rng = make(case)
    rewards, values = dyadic(rng, (2, *mask.shape))
    found = op(rewards, values, mask, 1.0, 1.0)
    expected = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        for start, end in episodes(row):
            expected[b, start:end] = np.cumsum(rewards[b, start:end][::-1])[::-1] - values[b, start:end]
    checks.same_bits(found + 0.0, expected + 0.0, "return − V")
    checks.same_bits(np.where(mask, returns(found, values), 0) + 0.0, np.where(mask, expected + values, 0) + 0.0, "R")


def is_linear_in_rewards_and_values(op, case):
    _, _, mask, _, rng = make(case)
    first, second = dyadic(rng, (2, 2, *mask.shape))
    both = op(*(first - 2 * second), mask, 0.5, 0.5)
    checks.same_bits(both + 0.0, op(*first, mask, 0.5, 0.5) - 2 * op(*second, mask, 0.5, 0.5) + 0.0, "linear")


def padding_does_not_matter(op, case):
    gamma, lam = case[4:]
    rewards, values, mask, bootstrap, _ = make(case)
    expected = op(rewards, values, mask, gamma, lam, bootstrap)
    assert not expected[~mask].any()
    for poison in POISON:
        found = op(poisoned(rewards, mask, poison), poisoned(values, mask, poison), mask, gamma, lam, bootstrap)
        checks.same_bits(found, expected, f"{poison} outside the mask")


def episodes_are_on_their_own(op, case):
    """Each run of a row's mask as a row of its own: the same bits."""
    gamma, lam = case[4:]
    rewards, values, mask, _, _ = make(case)
    found = op(rewards, values, mask, gamma, lam)
    for b, row in enumerate(mask):
        for start, end in episodes(row):
            alone = (rewards[b : b + 1, start:end], values[b : b + 1, start:end], np.ones((1, end - start), bool))
            expected = op(*alone, gamma, lam)
            slack = 8 * mask.shape[1] * 2.0**-53 * np.abs(expected).max()
            assert (np.abs(found[b, start:end] - expected[0]) <= slack).all()


def cut_off_is_not_ended(op, case):
    """A bootstrap b moves token t by (γλ)^{s−t} γ b, s the last token; of its episode only."""
    _, _, mask, _, rng = make(case)
    rewards, values = dyadic(rng, (2, *mask.shape))
    b = 1 + dyadic(rng, len(mask)) ** 2
    ended, cut = (op(rewards, values, mask, 0.5, 0.5, end) for end in (None, b))
    for row in range(len(mask)):
        start, end = episodes(mask[row])[-1]
        expected = np.zeros(mask.shape[1])
        expected[start:end] = 0.25 ** np.arange(end - start)[::-1] * 0.5 * b[row]
        checks.same_bits(cut[row] - ended[row] + 0.0, expected, "what the bootstrap adds")


GAE_PROPERTIES = (
    is_the_sum_of_the_definition,
    without_lambda_the_residual,
    with_lambda_one_the_return_minus_the_value,
    is_linear_in_rewards_and_values,
    padding_does_not_matter,
    episodes_are_on_their_own,
    cut_off_is_not_ended,
)


@pytest.mark.parametrize("op", [gae_1, gae_2])
@pytest.mark.parametrize("holds", GAE_PROPERTIES)
def test_gae(holds, op):
    for case in GAE:
        holds(op, case)


def nothing_linear(rewards, values, mask, gamma=1.0, lam=0.95, bootstrap=None):
    return np.abs(gae_1(rewards, values, mask, gamma, lam, bootstrap))


def test_gae_kill_matrix():
    checks.kill_matrix(GAE_PROPERTIES, (*wrong_advantages.GAE, nothing_linear), GAE)


def test_lambda_and_gamma_have_the_defaults_of_the_field(rng):
    rewards, values = rng.standard_normal((2, 2, 5))
    mask = np.ones((2, 5), bool)
    for op in (gae_1, gae_2):
        checks.same_bits(op(rewards, values, mask), op(rewards, values, mask, 1.0, 0.95), "defaults")


# --- rewards of tokens ------------------------------------------------------------------------------------------------


def rewards_case(case):
    rng = np.random.default_rng(case[0])
    mask = mask_of(case, rng)
    return dyadic(rng, len(mask)) + 3, dyadic(rng, mask.shape), mask, rng.random(len(mask)) < 0.5


def token_by_token(op, case):
    """β = ¼ and multiples of 1/8: exact."""
    scores, kl, mask, ended = rewards_case(case)
    for given, penalty in ((None, 0.0), (ended, 0.0), (ended, 1.5), (~ended, 0.5)):
        found = op(scores, kl, mask, 0.25, ended=given, missing_eos_penalty=penalty)
        for b in range(len(mask)):
            columns = np.flatnonzero(mask[b]).tolist()
            for t in range(mask.shape[1]):
                earned = -0.25 * kl[b, t] if t in columns else 0.0
                if t == columns[-1]:
                    earned += scores[b] - (penalty if given is not None and not given[b] else 0.0)
                assert found[b, t] == earned, f"row {b}, token {t}: {found[b, t]}, needed {earned}"


def reward_padding_does_not_matter(op, case):
    scores, kl, mask, ended = rewards_case(case)
    for dtype in checks.DTYPES:
        expected = op(scores.astype(dtype), kl.astype(dtype), mask, 0.3, ended=ended, missing_eos_penalty=0.7)
        assert expected.dtype == dtype
        for poison in POISON:
            given = scores.astype(dtype), poisoned(kl.astype(dtype), mask, poison)
            checks.same_bits(op(*given, mask, 0.3, ended=ended, missing_eos_penalty=0.7), expected, f"{poison}")


REWARD_PROPERTIES = (token_by_token, reward_padding_does_not_matter)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("holds", REWARD_PROPERTIES)
def test_token_rewards(holds, case):
    holds(token_rewards, case)


def test_token_rewards_kill_matrix():
    checks.kill_matrix(REWARD_PROPERTIES, wrong_advantages.REWARDS, SHAPES)


def test_a_score_without_a_place_is_refused():
    mask = np.array([[True, True], [False, False]])
    with pytest.raises(ValueError, match=r"^row 1 has no token that counts, so its score has no place$"):
        token_rewards(np.ones(2), np.zeros((2, 2)), mask, 0.1)
    with pytest.raises(
        ValueError, match=r"^missing_eos_penalty needs `ended`: which of the answers have their end-of-text token$"
    ):
        token_rewards(np.ones(1), np.zeros((1, 2)), mask[:1], 0.1, missing_eos_penalty=1.0)


# --- KL ---------------------------------------------------------------------------------------------------------------

KL_CASES = [(seed, scale, k) for seed, scale in ((1, 1.0), (2, 1e-3), (3, 1e-7), (4, 5.0)) for k in ("k1", "k2", "k3")]


def kl_inputs(case, dtype=np.float64):
    seed, scale, _ = case
    rng = np.random.default_rng(seed)
    ref = -rng.exponential(2.0, (3, 5))
    return (ref + scale * rng.standard_normal((3, 5))).astype(dtype), ref.astype(dtype), rng


def kl_number_by_number(op, case):
    """k3 by its series where it cancels: Σ ℓᵏ/k! from k = 2."""
    logp, ref, _ = kl_inputs(case)
    found, _ = op(logp, ref, case[2])
    for i in np.ndindex(logp.shape):
        ell = float(ref[i] - logp[i])
        series = math.fsum(ell**k / math.factorial(k) for k in range(2, 60))
        exact = {"k1": -ell, "k2": ell * ell / 2, "k3": series}[case[2]]
        slack = 8 * 2.0**-53 * (abs(ell) + abs(exact)) if case[2] == "k3" else 4 * 2.0**-53 * abs(exact)
        assert abs(found[i] - exact) <= slack, f"{found[i]}, needed {exact}"


def kl_gradients(op, case):
    logp, ref, rng = kl_inputs(case)
    check_vjp(lambda a, b: op(a, b, case[2]), logp, ref, rng=rng, frozen=[1])


def k3_is_never_negative(op, case):
    rng = np.random.default_rng(case[0])
    ref = -rng.exponential(2.0, 2000).astype(np.float32)
    logp = ref + (case[1] * rng.standard_normal(2000)).astype(np.float32)
    found, _ = op(logp, ref, "k3")
    assert found.dtype == np.float32
    assert (found >= 0).all(), f"{found.min()}"
    assert np.array_equal(op(ref, ref, case[2])[0], np.zeros(2000)), "the same policy: exactly nothing"


def test_k3_is_not_negative_where_expm1_is_an_ulp_low():
    """As vectorized libraries may be."""
    expm1 = np.expm1
    logp = np.zeros(9, np.float32)
    with patch.object(np, "expm1", lambda x: np.nextafter(expm1(x), np.float32(-np.inf))):
        kl, _ = kl_penalty(logp, logp + np.float32(1e-6) * np.arange(-4, 5, dtype=np.float32), "k3")
    assert (kl >= 0).all()


def is_kl_on_average(op, case):
    """Σ_v π(v) k(v) = KL(π, π_ref) for k1 and k3; Σ_v π(v) ∇k(v) = ∇KL for k2 and not for k3, nor k1, where it is 0."""
    rng = np.random.default_rng(case[0])
    theta = torch.tensor(rng.standard_normal(6), requires_grad=True)
    ref = torch.log_softmax(torch.tensor(rng.standard_normal(6)), 0)
    log_p = torch.log_softmax(theta, 0)
    p = log_p.exp()
    kl = (p * (log_p - ref)).sum()
    (exact,) = torch.autograd.grad(kl, theta, retain_graph=True)
    found, vjp = op(log_p.detach().numpy(), ref.numpy(), case[2])
    weight = p.detach().numpy()
    if case[2] != "k2":
        assert abs(weight @ found - kl.item()) <= 1e-14
    dlogp, dref = vjp(weight)
    assert dref is None
    (on_average,) = torch.autograd.grad(log_p, theta, torch.tensor(dlogp))
    if case[2] == "k1":
        assert on_average.abs().max() <= 1e-14
    assert (torch.allclose(on_average, exact, rtol=0, atol=1e-14)) == (case[2] == "k2")


KL_PROPERTIES = (kl_number_by_number, kl_gradients, k3_is_never_negative, is_kl_on_average)


@pytest.mark.parametrize("case", KL_CASES)
@pytest.mark.parametrize("holds", KL_PROPERTIES)
def test_kl_penalty(holds, case):
    holds(kl_penalty, case)


def test_kl_kill_matrix():
    checks.kill_matrix(KL_PROPERTIES, wrong_advantages.KL, KL_CASES)


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match=r"^estimator is 'k4', needed one of \('k1', 'k2', 'k3'\)$"):
        kl_penalty.__wrapped__(np.zeros(2), np.zeros(2), "k4")


# --- whitening --------------------------------------------------------------------------------------------------------


def whitened_number_by_number(op, case):
    for dtype in checks.DTYPES:
        x, _, mask, _, _ = make((*case, 1, 1), dtype)
        x = x * dtype(3) + dtype(2)
        counted = [float(v) for v in x[mask]]
        mean = math.fsum(counted) / len(counted)
        variance = math.fsum((v - mean) ** 2 for v in counted) / len(counted)
        for shift in (True, False):
            found = op(x, mask, shift_mean=shift)
            assert found.dtype == dtype
            exact = (x.astype(float) - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean)
            size = (np.abs(x).max() + abs(mean)) / math.sqrt(variance + 1e-8) + abs(mean)
            slack = (4 * len(counted) + 20) * bounds.unit_roundoff(dtype) * size * (1 + np.abs(exact[mask]).max())
            assert (np.abs(found - np.where(mask, exact, 0)) <= slack).all()


def whitened_without_padding(op, case):
    x, _, mask, _, _ = make((*case, 1, 1))
    for shift in (True, False):
        expected = op(x, mask, shift_mean=shift)
        for poison in POISON:
            checks.same_bits(op(poisoned(x, mask, poison), mask, shift_mean=shift), expected, f"{poison}")


WHITEN_PROPERTIES = (whitened_number_by_number, whitened_without_padding)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("holds", WHITEN_PROPERTIES)
def test_whiten(holds, case):
    holds(whiten, case)


def test_whiten_kill_matrix():
    checks.kill_matrix(WHITEN_PROPERTIES, wrong_advantages.WHITEN, SHAPES)
