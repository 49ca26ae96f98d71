"""GRPO: advantages of a group and the loss, number by number, against torch, and with poisoned padding."""

import math

import numpy as np
import pytest
import torch
import wrong_ppo
from rectangles import POISON, SHAPES, dyadic, mask_of, poisoned

from minift.conformance.gradients import check_vjp
from minift.rlhf import grpo
from minift.rlhf.grpo import group_advantages
from nn import checks

GROUPS = [(1, 3, 4), (2, 2, 2), (3, 4, 9)]


def groups(case, dtype=np.float64):
    rng = np.random.default_rng(case[0])
    return (3 * rng.standard_normal(case[1:]) + rng.standard_normal((case[1], 1)) * 5).astype(dtype)


def group_number_by_number(op, case):
    rewards = groups(case)
    for scale in (True, False):
        found = op(rewards, scale=scale)
        for row, given in zip(found.tolist(), rewards.tolist(), strict=True):
            mean = math.fsum(given) / len(given)
            std = math.sqrt(math.fsum((r - mean) ** 2 for r in given) / (len(given) - 1))
            for a, r in zip(row, given, strict=True):
                assert abs(a - (r - mean) / (std + 1e-4 if scale else 1)) <= 1e-13 * (1 + abs(r))


def equally_good_answers_move_nothing(op, case):
    """Exactly: (0.1 + 0.1 + 0.1) / 3 is not 0.1, and 10⁻⁴ does not divide that away."""
    for dtype in checks.DTYPES:
        rewards = np.full(case[1:], 0.1, dtype) + np.arange(case[1], dtype=dtype)[:, None]
        for scale in (True, False):
            checks.same_bits(op(rewards, scale=scale) + dtype(0), np.zeros(case[1:], dtype), "advantages")


def a_shift_of_a_group_changes_nothing(op, case):
    rewards = dyadic(np.random.default_rng(case[0]), case[1:])
    rewards[:, 0] += 1  # not all equal
    shift = np.arange(case[1])[:, None] * 4.0
    checks.same_bits(op(rewards + shift), op(rewards), "shifted")


GROUP = (group_number_by_number, equally_good_answers_move_nothing, a_shift_of_a_group_changes_nothing)


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("holds", GROUP)
def test_group_advantages(holds, case):
    holds(group_advantages, case)


def test_group_kill_matrix():
    checks.kill_matrix(GROUP, wrong_ppo.GROUP, GROUPS)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match=r"^groups of 1, needed at least 2 answers to a prompt$"):
        group_advantages(np.zeros((3, 1)))


# --- the loss ---------------------------------------------------------------------------------------------------------

CASES = [
    (*shape, *options)
    for shape in SHAPES
    for options in (
        (0.2, 0.3, "sequence", None),
        (0.1, 0.04, "token", None),
        (0.2, 0.1, "token", 40.0),
        (0.2, 0.5, "sequence", 8.0),
    )
]


def make(case):
    rng = np.random.default_rng(case[0])
    mask = mask_of(case[:4], rng)
    old = -rng.exponential(1.0, mask.shape)
    rho = rng.uniform(0.4, 1.9, mask.shape)
    for edge in (1 - case[4], 1 + case[4]):
        rho = np.where(np.abs(rho - edge) < 1e-2, edge + 0.02, rho)
    logp = old + np.log(rho)
    return logp, old, logp + 0.5 * rng.standard_normal(mask.shape), rng.standard_normal(len(mask)), mask, rng


def options(case):
    return dict(zip(("cliprange", "beta", "aggregation", "normalizer"), case[4:], strict=True))


def number_by_number(op, case):
    logp, old, ref, advantages, mask, _ = make(case)
    cliprange, beta, aggregation, normalizer = case[4:]
    total = 0.0
    for b in range(len(mask)):
        terms = []
        for t in np.flatnonzero(mask[b]):
            rho, a = math.exp(logp[b, t] - old[b, t]), advantages[b]
            ell = ref[b, t] - logp[b, t]
            clipped = min(max(rho, 1 - cliprange), 1 + cliprange)
            terms.append(-min(rho * a, clipped * a) + beta * (math.exp(ell) - 1 - ell))
        total += math.fsum(terms) / (len(terms) if aggregation == "sequence" else 1)
    exact = total / (normalizer or (len(mask) if aggregation == "sequence" else mask.sum()))
    assert abs(op(logp, old, ref, advantages, mask, **options(case))[0] - exact) <= 1e-13 * (1 + abs(exact))


def gradients(op, case):
    logp, old, ref, advantages, mask, rng = make(case)
    check_vjp(lambda x: op(x, old, ref, advantages, mask, **options(case)), logp, rng=rng, directions=1)


def torch_agrees(op, case):
    logp, old, ref, advantages, mask, _ = make(case)
    cliprange, beta, aggregation, normalizer = case[4:]
    leaf, o, r, a, m = (torch.tensor(x) for x in (logp, old, ref, advantages[:, None], mask))
    leaf.requires_grad_()
    rho = (leaf - o).exp()
    each = -torch.min(rho * a, rho.clamp(1 - cliprange, 1 + cliprange) * a) + beta * ((r - leaf).exp() - (r - leaf) - 1)
    if aggregation == "sequence":
        loss = ((each * m).sum(1) / m.sum(1)).sum() / (normalizer or len(mask))
    else:
        loss = (each * m).sum() / (normalizer or mask.sum())
    loss.backward(torch.tensor(0.3, dtype=torch.float64))
    assert np.abs(op(logp, old, ref, advantages, mask, **options(case))[1](0.3) - leaf.grad.numpy()).max() <= 1e-14


def at_the_start_the_advantages_alone(op, case):
    """Policy, old policy and reference equal to the bit: the loss is −mean Â, the gradient −Â, each exactly weighed."""
    _, old, _, _, mask, rng = make(case)
    advantages = dyadic(rng, len(mask))
    found, vjp = op(old, old.copy(), old.copy(), advantages, mask, beta=0.3, aggregation="token", normalizer=8.0)
    assert found == -math.fsum((advantages[:, None] * mask).ravel()) / 8
    checks.same_bits(vjp(1.0) + 0.0, np.where(mask, -advantages[:, None] / 8, 0) + 0.0, "dlogp")


def padding_does_not_matter(op, case):
    logp, old, ref, advantages, mask, _ = make(case)
    found, vjp = op(logp, old, ref, advantages, mask, **options(case))
    for poison in POISON:
        given = [poisoned(x, mask, poison) for x in (logp, old, ref)]
        other, other_vjp = op(*given, advantages, mask, **options(case))
        checks.same_bits(other, found, f"{poison}")
        checks.same_bits(other_vjp(1.0) + 0.0, vjp(1.0) + 0.0, f"gradient with {poison}")


LOSS = (number_by_number, gradients, torch_agrees, at_the_start_the_advantages_alone, padding_does_not_matter)


@pytest.mark.parametrize("holds", LOSS)
def test_loss(holds):
    for case in CASES:
        holds(grpo.loss, case)


def inverted(logp, old_logp, ref_logp, advantages, mask, **options):
    return grpo.loss(logp, old_logp, ref_logp, -advantages, mask, **options)


def test_loss_kill_matrix():
    checks.kill_matrix(LOSS, (*wrong_ppo.GRPO, inverted), CASES[:8])


def test_an_answer_without_a_token_is_worth_nothing_and_counts_as_one():
    logp, old, ref, advantages, mask, _ = make(CASES[0])
    silent = mask & (np.arange(len(mask))[:, None] != 1)
    found, vjp = grpo.loss(logp, old, ref, advantages, silent)
    rest = [np.delete(x, 1, axis=0) for x in (logp, old, ref, advantages, mask)]
    assert abs(found - grpo.loss(*rest, normalizer=float(len(mask)))[0]) <= 1e-15
    assert not vjp(1.0)[1].any()


def test_float32_stays_float32():
    logp, old, ref, advantages, mask, _ = make(CASES[0])
    given = [x.astype(np.float32) for x in (logp, old, ref, advantages)]
    for aggregation in ("sequence", "token"):
        value, vjp = grpo.loss(*given, mask, aggregation=aggregation)
        assert value.dtype == vjp(1.0).dtype == np.float32
    assert group_advantages(groups((1, 3, 4), np.float32)).dtype == np.float32


def test_another_aggregation_is_refused():
    logp, old, ref, advantages, mask, _ = make(CASES[0])
    with pytest.raises(ValueError, match=r"^aggregation is 'mean', needed one of \('sequence', 'token'\)$"):
        grpo.loss.__wrapped__(logp, old, ref, advantages, mask, aggregation="mean")
