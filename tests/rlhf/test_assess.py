"""What a round of PPO knows of its answers: by hand, with each switch, whatever fills the rows up."""

import dataclasses
import math

import numpy as np
import small_policy
import wrong_actor_critic
from small_policy import CONFIG

from minift.rlhf import ppo
from minift.rlhf.actor_critic import VALUE, assess, forward
from minift.rlhf.logprobs import counts, sequence_log_probs
from nn import checks

SETTINGS = ppo.Settings(kl_coef=0.3, gamma=0.9, lam=0.8, temperature=0.7, whiten_advantages=False)
ARRAYS = ("old_logp", "old_values", "advantages", "returns")


def model(seed=1, **options):
    """A policy whose value head is not 0."""
    head = np.random.default_rng(seed).standard_normal((1, CONFIG.hidden_size))
    return small_policy.params("lora", seed, **options) | {VALUE: head}


def make(case):
    """params, batch, scores, which answers have their end."""
    scores = np.random.default_rng([case, 4]).standard_normal(5)
    return model(case), small_policy.batch(rows=5, seed=case), scores, np.array([True, False, True, False, True])


def k3(ell):
    return math.expm1(ell) - ell


def by_hand(op, case):
    """Every step in Python floats, from log-probabilities of the policy and of its bare base."""
    params, batch, scores, ended = make(case)
    (logp, _, values), _ = forward(params, batch, CONFIG, temperature=0.7)
    (ref, _), _ = sequence_log_probs(small_policy.params("full", case), batch, CONFIG, temperature=0.7)
    for estimator, given, penalty in (("k1", 0.11, 0.6), ("k2", 0.2, 0.0), ("k3", None, 0.4)):
        settings = dataclasses.replace(SETTINGS, missing_eos_penalty=penalty, kl_estimator=estimator)
        rollouts, kl = op(params, batch, scores, CONFIG, settings, kl_coef=given, ended=ended)
        checks.same_bits(rollouts.old_logp, logp, "old log-probabilities")
        checks.same_bits(rollouts.old_values, values, "old values")
        costs = {"k1": lambda ell: -ell, "k2": lambda ell: ell * ell / 2, "k3": k3}[estimator]
        for b in range(5):
            at = np.flatnonzero(batch.labels[b] != -100).tolist()
            ratios = [float(ref[b, t] - logp[b, t]) for t in at]
            assert abs(kl[b] + math.fsum(ratios)) <= 1e-12, "the KL of an answer is −Σ ℓ, whatever the estimator"
            rewards = [-(0.3 if given is None else given) * costs(ell) for ell in ratios]
            rewards[-1] += scores[b] - (0 if ended[b] else penalty)
            v = [*(float(values[b, t]) for t in at), 0.0]
            advantage = 0.0
            for i in reversed(range(len(at))):
                advantage = rewards[i] + 0.9 * v[i + 1] - v[i] + 0.9 * 0.8 * advantage
                assert abs(rollouts.advantages[b, at[i]] - advantage) <= 1e-12
                assert abs(rollouts.returns[b, at[i]] - advantage - v[i]) <= 1e-12
        outside = batch.labels == -100
        assert not rollouts.advantages[outside].any()
        assert not rollouts.returns[outside].any()


def whitening_has_two_switches(op, case):
    """Of rewards the mean stays, so a policy that is always praised has positive returns still."""
    params, batch, scores, _ = make(case)
    mask, scores = counts(batch), scores + 5
    plain = op(params, batch, scores, CONFIG, SETTINGS)[0]
    whitened = op(params, batch, scores, CONFIG, dataclasses.replace(SETTINGS, whiten_advantages=True))[0]
    expected = (plain.advantages - plain.advantages[mask].mean()) / plain.advantages[mask].std()
    assert np.abs(whitened.advantages - expected)[mask].max() <= 1e-6
    checks.same_bits(whitened.returns, plain.returns, "returns are of advantages that are not whitened")
    sums = dataclasses.replace(SETTINGS, gamma=1.0, lam=1.0)  # the return of an answer's first token: its rewards' sum
    earned, scaled = (
        op(params, batch, scores, CONFIG, dataclasses.replace(sums, whiten_rewards=w))[0].returns for w in (False, True)
    )
    rewards = np.where(mask, earned - np.where(np.roll(mask, -1, 1), np.roll(earned, -1, 1), 0), 0)
    rewards[:, -1] = np.where(mask[:, -1], earned[:, -1], 0)
    mean, std = rewards[mask].mean(), rewards[mask].std()
    for b, row in enumerate(mask):
        (at,) = np.nonzero(row)
        total = math.fsum((rewards[b, t] - mean) / std + mean for t in at)
        assert abs(scaled[b, at[0]] - total) <= 1e-6 * (1 + abs(total))


def padding_does_not_matter(op, case):
    params, batch, scores, ended = make(case)
    settings = dataclasses.replace(SETTINGS, whiten_advantages=True, whiten_rewards=True)
    (a, a_kl), (b, b_kl) = (
        op(params, x, scores, CONFIG, settings, ended=ended) for x in (batch, small_policy.other_padding(batch))
    )
    checks.same_bits(b_kl, a_kl, "KL")
    for name in ARRAYS:
        checks.same_bits(getattr(b, name), getattr(a, name), name)
    wide = op(params, small_policy.wider(batch), scores, CONFIG, settings, ended=ended)[0]
    for name in ARRAYS:
        found = getattr(wide, name)
        assert np.abs(found[:, : batch.tokens.shape[1]] - getattr(a, name)).max() <= 1e-12, f"{name}, wider"
        assert not found[:, batch.tokens.shape[1] :].any()


def a_fresh_adapter_has_no_kl(op, case):
    _, batch, scores, _ = make(case)
    _, kl = op(model(case, moved=False), batch, scores, CONFIG, SETTINGS)
    checks.same_bits(kl, np.zeros(5), "KL to the reference")


def cut_off_or_ended_the_answer_is_over(op, case):
    """Nothing is bootstrapped: its length is part of the task, and the score is all that comes after its last token."""
    params, batch, scores, ended = make(case)
    there, cut = (op(params, batch, scores, CONFIG, SETTINGS, ended=e)[0] for e in (ended, ~ended))
    checks.same_bits(cut.returns, there.returns, "without a penalty")
    fined = dataclasses.replace(SETTINGS, missing_eos_penalty=0.5)
    lost = there.returns - op(params, batch, scores, CONFIG, fined, ended=ended)[0].returns
    at = np.arange(5), batch.lengths - 1
    assert np.abs(lost[at] - np.where(ended, 0, 0.5)).max() <= 1e-12


PROPERTIES = (
    by_hand,
    whitening_has_two_switches,
    padding_does_not_matter,
    a_fresh_adapter_has_no_kl,
    cut_off_or_ended_the_answer_is_over,
)


def test_assess():
    for case in (1, 3):
        for holds in PROPERTIES:
            holds(assess, case)


def test_assess_kill_matrix():
    checks.kill_matrix(PROPERTIES, wrong_actor_critic.ASSESS, [3])


def test_the_leash_of_the_settings_unless_another_is_given():
    params, batch, scores, _ = make(1)
    expected = assess(params, batch, scores, CONFIG, SETTINGS)[0].advantages
    again = assess(params, batch, scores, CONFIG, SETTINGS, kl_coef=0.3)[0].advantages
    checks.same_bits(again, expected, "β of the settings")
    assert np.abs(assess(params, batch, scores, CONFIG, SETTINGS, kl_coef=0.0)[0].advantages - expected).max() > 1e-3
