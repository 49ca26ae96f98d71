"""GRPO: several answers to one prompt are each other's baseline, so no value head is needed.

    Â_i = (r_i − mean(r)) / (std(r) + 10⁻⁴)        over the G answers to a prompt, the same for all tokens of one   (1)
    loss = mean_i (1/|o_i|) Σ_t [−min(ρ_t Â_i, clip(ρ_t) Â_i) + β k3_t]                                     (2)

                                                      (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, eq. 3 and §4.1)
The ratio ρ and its clip are PPO's; the leash is inside the loss, in the form k3 that is never negative.

Two details have been called biases (Liu et al. 2025, "Dr. GRPO", arXiv 2503.20783), and have switches: dividing by the
standard deviation makes prompts weigh more whose answers are nearly all right or nearly all wrong (`scale=False`), and
dividing by each answer's own length makes a wrong answer the cheaper the longer it is (`aggregation`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from minift.rlhf.advantages import kl_penalty
from minift.rlhf.masked import count
from minift.rlhf.ppo import clipped_objective

Aggregation = Literal["sequence", "token"]


def group_advantages(
    rewards: Float[np.ndarray, "prompts group"], *, scale: bool = True
) -> Float[np.ndarray, "prompts group"]:
    """Equation (1), without its divisor where `scale` is False; exactly 0 for a group of equally good answers.

    std is that of a sample, with 1/(G − 1), as in TRL. ValueError for a group of one, which has no baseline."""
    if rewards.shape[1] < 2:
        raise ValueError(f"groups of {rewards.shape[1]}, needed at least 2 answers to a prompt")
    moved = rewards - rewards[:, :1]  # so that equal rewards are exactly 0, and so is their mean
    centered = moved - moved.mean(axis=1, keepdims=True)
    return centered / (moved.std(axis=1, ddof=1, keepdims=True) + 1e-4) if scale else centered


def loss(
    logp: Float[np.ndarray, "batch width"],
    old_logp: Float[np.ndarray, "batch width"],
    ref_logp: Float[np.ndarray, "batch width"],
    advantages: Float[np.ndarray, " batch"],
    mask: Bool[np.ndarray, "batch width"],
    *,
    cliprange: float = 0.2,
    beta: float = 0.04,
    aggregation: Aggregation = "sequence",
    normalizer: float | None = None,
) -> tuple[np.floating, Callable]:
    """Equation (2);  `vjp(dloss) -> dlogp`, exactly 0 where nothing counts.

        sequence    (1/N) Σ_i (1/|o_i|) Σ_t        N: answers. The paper's                                  (3)
        token       (1/N) Σ_i Σ_t                  N: tokens that count, or as `normalizer` a constant: for Dr. GRPO
                                                   the number of answers times the most tokens that one may have

    `normalizer` replaces N, also to let micro-batches add up. ValueError for another aggregation."""
    if aggregation == "sequence":
        n = float(max(len(mask), 1)) if normalizer is None else normalizer
        weight = 1 / (n * np.maximum(mask.sum(axis=1, keepdims=True), 1).astype(logp.dtype))
    elif aggregation == "token":
        weight = np.full_like(logp, 1 / (count(mask) if normalizer is None else normalizer), shape=(len(mask), 1))
    else:
        raise ValueError(f"aggregation is {aggregation!r}, needed one of {get_args(Aggregation)}")
    each, slope = clipped_objective(logp, old_logp, advantages[:, None], mask, cliprange)
    kl, kl_vjp = kl_penalty(np.where(mask, logp, 0), np.where(mask, ref_logp, 0), "k3")
    value = (np.where(mask, weight, 0) * (each + beta * kl)).sum()

    def vjp(dloss):
        share = np.where(mask, weight, 0) * logp.dtype.type(dloss)
        return share * slope + kl_vjp(beta * share)[0]

    return value, vjp
