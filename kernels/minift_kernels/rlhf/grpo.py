"""GRPO on torch tensors: the twin of `minift.rlhf.grpo`, where the equations are. Plain PyTorch, of PPO's parts."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minift.rlhf.grpo import Aggregation
from minift_kernels import backend as backends
from minift_kernels.rlhf.advantages import kl_penalty
from minift_kernels.rlhf.masked import count
from minift_kernels.rlhf.ppo import clipped_objective


@torch.no_grad()
def group_advantages(rewards: Float[Tensor, "prompts group"], *, scale: bool = True) -> Float[Tensor, "prompts group"]:
    """Â_i = (r_i − mean(r)) / (std(r) + 10⁻⁴), without its divisor where `scale` is False; exactly 0 for equal rewards.

    std is that of a sample, with 1/(G − 1). ValueError for a group of one, which has no baseline."""
    if rewards.shape[1] < 2:
        raise ValueError(f"groups of {rewards.shape[1]}, needed at least 2 answers to a prompt")
    moved = backends.widened(rewards)
    moved = moved - moved[:, :1]
    centered = moved - moved.mean(dim=1, keepdim=True)
    return (centered / (moved.std(dim=1, keepdim=True) + 1e-4) if scale else centered).to(rewards.dtype)


def loss(
    logp: Float[Tensor, "batch width"],
    old_logp: Float[Tensor, "batch width"],
    ref_logp: Float[Tensor, "batch width"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch width"],
    *,
    cliprange: float = 0.2,
    beta: float = 0.04,
    aggregation: Aggregation = "sequence",
    normalizer: float | None = None,
) -> Float[Tensor, ""]:
    """mean_i (1/|o_i|) Σ_t [−min(ρ_t Â_i, clip(ρ_t) Â_i) + β k3_t], or for "token" (1/N) Σ_i Σ_t.

    `normalizer` replaces the number of answers, or of tokens. ValueError for another aggregation."""
    divisor: Tensor | float
    if aggregation == "sequence":
        answers = max(len(mask), 1) if normalizer is None else normalizer
        divisor = answers * mask.sum(dim=1, keepdim=True).clamp(min=1)
    elif aggregation == "token":
        divisor = count(mask) if normalizer is None else normalizer
    else:
        raise ValueError(f"aggregation is {aggregation!r}, needed one of {get_args(Aggregation)}")
    each = clipped_objective(logp, old_logp, advantages[:, None], mask, cliprange)
    new, ref = (backends.widened(x).where(mask, 0) for x in (logp, ref_logp))
    kl = kl_penalty(new, ref, "k3")
    return ((each + beta * kl).where(mask, 0) / divisor).sum()
