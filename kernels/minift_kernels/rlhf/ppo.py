"""PPO on torch tensors: the twin of `minift.rlhf.ppo`, where the equations are.

What was there when the answers were written (old log-probabilities and values, advantages, returns) is fixed: nothing
is differentiated by it. Losses are float32 (float64 for float64), gradients have the types of what they belong to.
`minibatch_loss` is one kernel on a GPU (`ppo_kernels`); its parts alone are plain PyTorch.

Where both terms of a maximum are equal the gradient is the free one's: `torch.max` and `clamp` would share it out.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minift.rlhf.ppo import Settings, next_kl_coef, too_far
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.rlhf.masked import count, masked_mean

__all__ = ["Settings", "clipped_objective", "minibatch_loss", "next_kl_coef", "policy_loss", "ratio", "statistics"]
__all__ += ["too_far", "value_loss"]

KERNELS = "minift_kernels.rlhf.ppo_kernels"


def policy_loss(
    logp: Float[Tensor, "batch width"],
    old_logp: Float[Tensor, "batch width"],
    advantages: Float[Tensor, "batch width"],
    mask: Bool[Tensor, "batch width"],
    cliprange: float = 0.2,
    normalizer: float | None = None,
) -> Float[Tensor, ""]:
    """−mean_t min(ρ_t Â_t, clip(ρ_t, 1 − ε, 1 + ε) Â_t) over the tokens that count."""
    return masked_mean(clipped_objective(logp, old_logp, advantages, mask, cliprange), mask, normalizer)


def clipped_objective(logp, old_logp, advantages, mask, cliprange):
    """(B, T): each token's term of the policy's loss."""
    rho = ratio(logp, old_logp, mask)
    advantages = backends.widened(advantages.detach()).where(mask, 0)
    free, clipped = -rho * advantages, -rho.detach().clamp(1 - cliprange, 1 + cliprange) * advantages
    return torch.where(free >= clipped, free, clipped)


def ratio(
    logp: Float[Tensor, "batch width"], old_logp: Float[Tensor, "batch width"], mask: Bool[Tensor, "batch width"]
) -> Float[Tensor, "batch width"]:
    """ρ = exp(log π − log π_old), and 1 where nothing counts; equal bits give exactly 1."""
    new, old = (backends.widened(x).where(mask, 0) for x in (logp, old_logp.detach()))
    return (new - old).exp()


def value_loss(
    values: Float[Tensor, "batch width"],
    old_values: Float[Tensor, "batch width"],
    returns: Float[Tensor, "batch width"],
    mask: Bool[Tensor, "batch width"],
    cliprange_value: float | None = 0.2,
    normalizer: float | None = None,
) -> Float[Tensor, ""]:
    """½ mean_t max((V − R)², (clip(V, V_old ± ε_v) − R)²) over the tokens that count, without its clip for None."""
    v, old, target = (backends.widened(x).where(mask, 0) for x in (values, old_values.detach(), returns.detach()))
    error = worst = v - target
    if cliprange_value is not None:
        near = v.detach().clamp(old - cliprange_value, old + cliprange_value) - target
        worst = torch.where(near.abs() > error.abs(), near, error)
        worst = torch.where(worst == error, error, worst)
    return masked_mean(worst * worst / 2, mask, normalizer)


def minibatch_loss(
    logp: Float[Tensor, "batch width"],
    entropy: Float[Tensor, "batch width"],
    values: Float[Tensor, "batch width"],
    old_logp: Float[Tensor, "batch width"],
    old_values: Float[Tensor, "batch width"],
    advantages: Float[Tensor, "batch width"],
    returns: Float[Tensor, "batch width"],
    mask: Bool[Tensor, "batch width"],
    settings: Settings,
    normalizer: float | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """policy loss + c_v value loss − c_H mean_t H_t; it has a gradient by logp, entropy and values.

    `normalizer`, the number of tokens that count in the whole batch, lets micro-batches add up to it."""
    how = backends.choose(backend, logp.device, logp.dtype)
    if how == "torch":
        of_policy = policy_loss(logp, old_logp, advantages, mask, settings.cliprange, normalizer)
        of_values = value_loss(values, old_values, returns, mask, settings.cliprange_value, normalizer)
        bonus = masked_mean(entropy, mask, normalizer)
        return of_policy + settings.vf_coef * of_values - settings.entropy_coef * bonus
    fixed = old_logp, old_values, advantages, returns
    clips = settings.cliprange, settings.cliprange_value, settings.vf_coef, settings.entropy_coef
    total, _, _ = _minibatch_loss(logp, entropy, values, *(x.detach() for x in fixed), mask, *clips, how)
    return total / (count(mask) if normalizer is None else normalizer)


# --- between the steps ------------------------------------------------------------------------------------------------


@torch.no_grad()
def statistics(
    logp: Float[Tensor, "batch width"],
    old_logp: Float[Tensor, "batch width"],
    advantages: Float[Tensor, "batch width"],
    mask: Bool[Tensor, "batch width"],
    cliprange: float = 0.2,
) -> dict[str, float]:
    """The reference's: clipfrac, approx_kl and ratio, over the tokens that count. It waits for the GPU, once."""
    rho, n = ratio(logp, old_logp, mask), count(mask)
    log_rho = backends.widened(logp).where(mask, 0) - backends.widened(old_logp).where(mask, 0)
    kl = (torch.expm1(log_rho) - log_rho).clamp(min=0)
    sums = ((rho - 1).abs() > cliprange).sum(), kl.sum(), rho.where(mask, 0).sum()
    found = (torch.stack([x.to(rho.dtype) for x in sums]) / n).tolist()
    return dict(zip(("clipfrac", "approx_kl", "ratio"), found, strict=True))


# In Triton.


def _forward(
    logp: Tensor,
    entropy: Tensor,
    values: Tensor,
    old_logp: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange: float,
    cliprange_value: float | None,
    vf_coef: float,
    entropy_coef: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `minift::ppo_minibatch_loss`: the sum of the losses, and its slopes by logp and by values."""
    given = logp, entropy, values, old_logp, old_values, advantages, returns
    settings = cliprange, cliprange_value, vf_coef, entropy_coef
    programs = -(-logp.numel() // backends.load(KERNELS, backend).TILE[0])
    sums = logp.new_empty(programs, dtype=torch.float32)
    slopes = [torch.empty(logp.shape, dtype=torch.float32, device=logp.device) for _ in range(2)]
    minibatch_launch((sums, *slopes), given, mask, settings, backend).run(logp.device)
    return sums.sum(), slopes[0], slopes[1]


def minibatch_launch(
    outputs: tuple[Tensor, ...],
    given: tuple[Tensor, ...],
    mask: Tensor,
    settings: tuple[float, float | None, float, float],
    backend: str,
) -> Launch:
    """Equations (1) to (3) of `ppo_kernels`, a program for each of the sums; the outputs are contiguous."""
    kernels = backends.load(KERNELS, backend)
    block, warps = kernels.TILE
    cliprange, cliprange_value, vf_coef, entropy_coef = settings
    tensors = [x.contiguous() for x in given]
    options = {"CLIP_VALUE": cliprange_value is not None, "BLOCK": block, "num_warps": warps}
    numbers = cliprange, cliprange_value or 0.0, vf_coef, entropy_coef
    arguments = (*outputs, *tensors, mask.contiguous().view(torch.uint8), mask.numel(), *numbers)
    return Launch(kernels.minibatch, (len(outputs[0]),), arguments, options, outputs=3)


def _save(ctx, inputs, output):
    logp, entropy, values, *_, mask, _, _, _, ctx.entropy_coef, _ = inputs
    ctx.dtypes = logp.dtype, entropy.dtype, values.dtype
    ctx.save_for_backward(*output[1:], mask)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dtotal, *_):
    of_logp, of_values, mask = ctx.saved_tensors
    of_entropy = torch.where(mask, -ctx.entropy_coef * dtotal, 0)
    found = of_logp * dtotal, of_entropy, of_values * dtotal
    return *(x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True)), *(None,) * 10


_minibatch_loss = backends.operator(
    "ppo_minibatch_loss(Tensor logp, Tensor entropy, Tensor values, Tensor old_logp, Tensor old_values, "
    "Tensor advantages, Tensor returns, Tensor mask, float cliprange, float? cliprange_value, float vf_coef, "
    "float entropy_coef, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda logp, *_: (
        logp.new_empty((), dtype=torch.float32),
        torch.empty(logp.shape, dtype=torch.float32, device=logp.device),
        torch.empty(logp.shape, dtype=torch.float32, device=logp.device),
    ),
    _differentiate,
    _save,
)
