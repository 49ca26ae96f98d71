"""PPO of a whole model in torch: rounds, losses and gradients as the reference's, and a first ratio of exactly 1."""

import dataclasses

import numpy as np
import pytest
import torch

from minift.rlhf import actor_critic as reference
from minift.rlhf import ppo
from minift_kernels.nn.weight import trainable
from minift_kernels.params import from_numpy
from minift_kernels.rlhf import actor_critic
from minift_kernels.rlhf.ppo import statistics
from rlhf import small_policy

SETTINGS = ppo.Settings(
    kl_coef=0.3, cliprange=0.1, vf_coef=0.7, entropy_coef=0.05, gamma=0.97, lam=0.9, temperature=0.8
)
VARIANTS = {
    "plain": SETTINGS,
    "whitened": dataclasses.replace(SETTINGS, whiten_rewards=True, kl_estimator="k3"),
    "penalized": dataclasses.replace(SETTINGS, missing_eos_penalty=0.5, cliprange_value=None, whiten_advantages=False),
}
NAMES = "old_logp", "old_values", "advantages", "returns"


def close(found, expected, within):
    found = found.detach().numpy()
    error, size = np.abs(found - expected).max(initial=0), np.abs(expected).max(initial=0)
    assert error <= within * (1 + size), f"off by {error:.2e} at a size of {size:.2e}"


def policy(kind):
    params = reference.with_value_head(small_policy.params(kind))
    rng = np.random.default_rng(6)
    return params | {reference.VALUE: 0.3 * rng.standard_normal(params[reference.VALUE].shape)}


@pytest.mark.parametrize("kind", small_policy.KINDS)
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_round_is_the_references(kind, settings, rng):
    """What is known of fresh answers, then the loss of a policy that has moved, and all of its gradients."""
    params, batch = policy(kind), small_policy.batch()
    scores, ended = rng.standard_normal(len(batch)), rng.random(len(batch)) < 0.5
    wanted, kl = reference.assess(params, batch, scores, small_policy.CONFIG, settings, ended=ended)
    there = from_numpy(params, dtype=torch.float64)
    given = torch.tensor(scores), small_policy.CONFIG, settings
    found, found_kl = actor_critic.assess(there, batch, *given, ended=torch.tensor(ended))
    close(found_kl, kl, 1e-6)
    for name in NAMES:
        close(getattr(found, name), getattr(wanted, name), 1e-5)
        assert not getattr(found, name).requires_grad
    order = np.array([2, 0])
    taken = found.take(order).cut(int(batch.lengths[order].max()))
    assert (taken.count, len(taken), list(taken.lengths)) == (wanted.take(order).count, 2, list(batch.lengths[order]))
    steps = {name: getattr(wanted, name) + 0.2 * rng.standard_normal(kl.shape)[:, None] for name in NAMES}
    moved = dataclasses.replace(wanted, **steps)
    value, vjp = reference.loss(params, moved, small_policy.CONFIG, settings, 9.0)
    fixed = [torch.tensor(getattr(moved, name)) for name in NAMES]
    loss = actor_critic.loss(there, actor_critic.Rollouts(batch, *fixed), small_policy.CONFIG, settings, 9.0)
    close(loss, value, 1e-5)
    learned, gradients = trainable(there), vjp(0.7)
    assert learned.keys() == gradients.keys()
    of_model = torch.autograd.grad(loss, list(learned.values()), torch.tensor(0.7, dtype=loss.dtype))
    for name, dw in zip(learned, of_model, strict=True):  # adapters are kept in float32
        assert np.abs(dw.numpy() - gradients[name]).max() <= 1e-4 * np.abs(gradients[name]).max(), name


@pytest.mark.parametrize("how", ["torch", "interpreter"])
def test_the_first_ratio_is_one(how):
    """In float32, in either backend: a step on the answers that were just written has ρ = 1 to the bit."""
    params, batch = policy("lora"), small_policy.batch(rows=2, width=6)
    there = from_numpy(params, dtype=torch.float32)
    scores = torch.tensor([0.5, -1.0])
    rollouts, _ = actor_critic.assess(there, batch, scores, small_policy.CONFIG, SETTINGS, backend=how)
    logp, _, values = actor_critic.forward(there, batch, small_policy.CONFIG, temperature=0.8, backend=how)
    found = statistics(logp, rollouts.old_logp, rollouts.advantages, rollouts.mask)
    assert found == {"clipfrac": 0.0, "approx_kl": 0.0, "ratio": 1.0}
    assert torch.equal(values, rollouts.old_values)
    other, _ = actor_critic.assess(there, batch, scores, small_policy.CONFIG, SETTINGS)
    assert all(torch.allclose(getattr(rollouts, n), getattr(other, n), atol=1e-5) for n in NAMES)


def test_a_value_head_begins_at_zero():
    there = from_numpy(small_policy.params("lora"), dtype=torch.float64)
    head = actor_critic.with_value_head(there)[actor_critic.VALUE]
    assert head.requires_grad and head.shape == (1, small_policy.CONFIG.hidden_size) and not head.any()
