"""PPO: several steps on one batch of answers, none of which may lead far from the policy that wrote them.

    ρ_t = π(token_t) / π_old(token_t) = exp(log π − log π_old)                                              (1)
    policy loss   −mean_t min(ρ_t Â_t, clip(ρ_t, 1 − ε, 1 + ε) Â_t)                                         (2)
    value loss    ½ mean_t max((V_t − R_t)², (clip(V_t, V_old,t ± ε_v) − R_t)²)                             (3)
    loss          policy loss + c_v value loss − c_H mean_t H_t                                             (4)

                              (Schulman et al. 2017, arXiv 1707.06347, eq. 7 and 9; the clip of (3) is OpenAI's code)
At the first minibatch π is π_old: ρ is exactly 1 and the gradient that of the plain policy gradient, −Â_t / N. Then (2)
is the pessimist of two: what would pay for going on in the same direction is cut off, what undoes a mistake is not.

              ρ < 1 − ε      between       ρ > 1 + ε
    Â > 0       −ρ Â          −ρ Â            0            ∂/∂log π of each term of (2)                     (5)
    Â < 0         0           −ρ Â          −ρ Â

Everything here is arrays (B, T) at the tokens; `actor_critic` has the model that they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float

from minift.rlhf.advantages import Estimator
from minift.rlhf.masked import count, masked_mean


@dataclass(frozen=True)
class Settings:
    """What PPO can be told, under TRL's names and with its defaults. ValueError for a number out of range."""

    num_ppo_epochs: int = 4  # passes over the answers of one round
    num_mini_batches: int = 1  # steps a pass
    kl_coef: float = 0.05  # β, the leash: what a nat of KL costs
    kl_estimator: Estimator = "k1"
    kl_target: float | None = None  # nats an answer that β is steered towards; None leaves β as it is
    kl_horizon: float = 10_000  # answers that β takes to follow
    cliprange: float = 0.2  # ε
    vf_coef: float = 0.1  # c_v
    cliprange_value: float | None = 0.2  # ε_v; None does not clip
    entropy_coef: float = 0.0  # c_H
    gamma: float = 1.0  # a token late in an answer counts as much as an early one
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float = 0.0  # what an answer without an end loses
    target_kl: float | None = None  # nats a token between π and π_old at which a round ends early
    temperature: float = 1.0  # that the answers are sampled with

    def __post_init__(self):
        for name in ("num_ppo_epochs", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needed 1 or more")
        for name in ("kl_coef", "vf_coef", "entropy_coef", "missing_eos_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, needed 0 or more")
        for name in ("kl_target", "kl_horizon", "cliprange", "cliprange_value", "target_kl", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, needed a positive number")
        if self.kl_estimator not in get_args(Estimator):
            raise ValueError(f"kl_estimator is {self.kl_estimator!r}, needed one of {get_args(Estimator)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needed a number from 0 to 1")


def policy_loss(
    logp: Float[np.ndarray, "batch width"],
    old_logp: Float[np.ndarray, "batch width"],
    advantages: Float[np.ndarray, "batch width"],
    mask: Bool[np.ndarray, "batch width"],
    cliprange: float = 0.2,
    normalizer: float | None = None,
) -> tuple[np.floating, Callable]:
    """Equation (2) over the tokens that count;  `vjp(dloss) -> dlogp`, table (5), exactly 0 elsewhere.

    Where both terms of the minimum are equal the gradient is that of the first one."""
    each, slope = clipped_objective(logp, old_logp, advantages, mask, cliprange)
    loss, mean_vjp = masked_mean(each, mask, normalizer)  # (2)

    def vjp(dloss):
        return mean_vjp(dloss) * slope

    return loss, vjp


def clipped_objective(logp, old_logp, advantages, mask, cliprange):
    """(B, T): each token's term of (2), and its derivative by log π."""
    rho = ratio(logp, old_logp, mask)
    advantages = np.where(mask, advantages, 0)
    free, clipped = -rho * advantages, -np.clip(rho, 1 - cliprange, 1 + cliprange) * advantages
    return np.maximum(free, clipped), np.where(free >= clipped, free, 0)  # (2), and (5) as ∂ρ/∂log π = ρ


def ratio(
    logp: Float[np.ndarray, "batch width"],
    old_logp: Float[np.ndarray, "batch width"],
    mask: Bool[np.ndarray, "batch width"],
) -> Float[np.ndarray, "batch width"]:
    """ρ of (1), and 1 where nothing counts; equal bits give exactly 1."""
    return np.exp(np.where(mask, logp, 0) - np.where(mask, old_logp, 0))  # ρ of (1)


def value_loss(
    values: Float[np.ndarray, "batch width"],
    old_values: Float[np.ndarray, "batch width"],
    returns: Float[np.ndarray, "batch width"],
    mask: Bool[np.ndarray, "batch width"],
    cliprange_value: float | None = 0.2,
    normalizer: float | None = None,
) -> tuple[np.floating, Callable]:
    """Equation (3) over the tokens that count, without its clip for None;  `vjp(dloss) -> dvalues`.

    dV = (V − R) dloss/N, or 0 where the clipped value is the worse one: it does not move with V             (6)
    """
    error = np.where(mask, values, 0) - np.where(mask, returns, 0)
    worst = error
    if cliprange_value is not None:
        old = np.where(mask, old_values, 0)
        near = np.clip(np.where(mask, values, 0), old - cliprange_value, old + cliprange_value)
        clipped = near - np.where(mask, returns, 0)
        worst = np.where(np.abs(clipped) > np.abs(error), clipped, error)
    loss, mean_vjp = masked_mean(worst * worst / 2, mask, normalizer)  # (3)

    def vjp(dloss):
        return mean_vjp(dloss) * np.where(worst == error, error, 0)  # (6)

    return loss, vjp


def minibatch_loss(
    logp: Float[np.ndarray, "batch width"],
    entropy: Float[np.ndarray, "batch width"],
    values: Float[np.ndarray, "batch width"],
    old_logp: Float[np.ndarray, "batch width"],
    old_values: Float[np.ndarray, "batch width"],
    advantages: Float[np.ndarray, "batch width"],
    returns: Float[np.ndarray, "batch width"],
    mask: Bool[np.ndarray, "batch width"],
    settings: Settings,
    normalizer: float | None = None,
) -> tuple[np.floating, Callable]:
    """Equation (4);  `vjp(dloss) -> dlogp, dentropy, dvalues`: what was there when the answers were written is fixed.

    `normalizer`, the number of tokens that count in the whole batch, lets micro-batches add up to it."""
    of_policy, policy_vjp = policy_loss(logp, old_logp, advantages, mask, settings.cliprange, normalizer)
    of_values, values_vjp = value_loss(values, old_values, returns, mask, settings.cliprange_value, normalizer)
    bonus, bonus_vjp = masked_mean(entropy, mask, normalizer)
    loss = of_policy + settings.vf_coef * of_values - settings.entropy_coef * bonus  # (4)

    def vjp(dloss):
        return policy_vjp(dloss), bonus_vjp(-settings.entropy_coef * dloss), values_vjp(settings.vf_coef * dloss)

    return loss, vjp


# --- between the steps ------------------------------------------------------------------------------------------------


def statistics(
    logp: Float[np.ndarray, "batch width"],
    old_logp: Float[np.ndarray, "batch width"],
    advantages: Float[np.ndarray, "batch width"],
    mask: Bool[np.ndarray, "batch width"],
    cliprange: float = 0.2,
) -> dict[str, float]:
    """How far a minibatch is from the policy that wrote it, over the tokens that count.

    clipfrac    share of the tokens whose gradient (5) cuts off, or would for the other sign: |ρ − 1| > ε
    approx_kl   mean of (ρ − 1) − log ρ, an estimate of KL(π_old, π) in nats a token, never negative
    ratio       mean of ρ
    """
    rho, n = ratio(logp, old_logp, mask), count(mask)
    log_rho = np.where(mask, logp, 0) - np.where(mask, old_logp, 0)
    kl = np.maximum(np.expm1(log_rho) - log_rho, 0)
    return {
        "clipfrac": float((np.abs(rho - 1) > cliprange).sum() / n),
        "approx_kl": float(kl.sum() / n),
        "ratio": float(rho[mask].sum() / n),
    }


def too_far(approx_kl: float, target_kl: float | None) -> bool:
    """Whether to stop the steps on this round's answers and write new ones: KL above the target. Never for None."""
    return target_kl is not None and approx_kl > target_kl


def next_kl_coef(kl_coef: float, kl: float, answers: int, target: float | None, horizon: float) -> float:
    """β after a round of `answers` whose KL to the reference was `kl` nats an answer; fixed where the target is None.

        e = clip(kl / target − 1, −0.2, 0.2)        β' = β (1 + e · answers / horizon)                      (7)

                                                                    (Ziegler et al. 2019, arXiv 1909.08593, §2.2)
    ValueError for more answers than 5 horizons, where β could become negative."""
    if target is None:
        return kl_coef
    if answers > 5 * horizon:
        raise ValueError(f"horizon is {horizon} for rounds of {answers} answers, needed at least a fifth of that")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)
