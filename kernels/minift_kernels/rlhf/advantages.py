"""From a score at the end of an answer to an advantage for each of its tokens: the twin of `minift.rlhf.advantages`.

Everything but `kl_penalty` is a constant of the losses, and has no gradient. Advantages and whitened numbers have the
type of the rewards; inside 16-bit numbers are raised to float32. The recursion is a scan on a GPU
(`advantages_kernels`); the rest is a few operations on small rectangles, in plain PyTorch.
"""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minift.rlhf.advantages import Estimator
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.rlhf.masked import count

KERNELS = "minift_kernels.rlhf.advantages_kernels"


def kl_penalty(
    logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"], estimator: Estimator = "k1"
) -> Float[Tensor, "*shape"]:
    """An estimate of KL(π, π_ref) from each token that π sampled; the reference does not learn.

        ℓ = log π_ref − log π        k1 = −ℓ        k2 = ½ ℓ²        k3 = e^ℓ − 1 − ℓ

    ValueError for another estimator."""
    ell = ref_logp.detach() - logp
    if estimator == "k1":
        return -ell
    if estimator == "k2":
        return ell * ell / 2
    if estimator == "k3":
        return _k3(ell)
    raise ValueError(f"estimator is {estimator!r}, needed one of {get_args(Estimator)}")


def _k3(ell: Tensor) -> Tensor:
    """Never negative, though a rounding may be; the gradient is e^ℓ − 1 there too, which no `clamp` gives."""
    kl = torch.expm1(ell) - ell
    return kl + (kl.clamp(min=0) - kl).detach()


@torch.no_grad()
def token_rewards(
    scores: Float[Tensor, " batch"],
    kl: Float[Tensor, "batch width"],
    mask: Bool[Tensor, "batch width"],
    kl_coef: float,
    *,
    ended: Bool[Tensor, " batch"] | None = None,
    missing_eos_penalty: float = 0.0,
) -> Float[Tensor, "batch width"]:
    """What each token earns: −β kl_t on all of them, and the score on the last one that is real.

    `ended` says which answers have their end-of-text token; the others lose `missing_eos_penalty`. ValueError for a
    penalty without `ended`, and on a CPU for a row without an answer."""
    if mask.device.type == "cpu" and not mask.any(dim=1).all():
        row = int(mask.any(dim=1).long().argmin())
        raise ValueError(f"row {row} has no token that counts, so its score has no place")
    if missing_eos_penalty and ended is None:
        raise ValueError("missing_eos_penalty needs `ended`: which of the answers have their end-of-text token")
    rewards = torch.where(mask, -kl_coef * kl, 0)
    if ended is not None:
        scores = torch.where(ended, scores, scores - missing_eos_penalty)
    at_last = torch.arange(mask.shape[1], device=mask.device) == last(mask)[:, None]
    return torch.where(at_last, rewards + scores[:, None].to(rewards.dtype), rewards)


@torch.no_grad()
def gae_1(
    rewards: Float[Tensor, "batch width"],
    values: Float[Tensor, "batch width"],
    mask: Bool[Tensor, "batch width"],
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[Tensor, " batch"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "batch width"]:
    """Generalized advantage estimation:  δ_t = r_t + γ V_{t+1} − V_t,  Â_t = δ_t + γλ Â_{t+1}.

    V behind the last token of an answer is 0, for the text is over, or `bootstrap` where it was only cut off."""
    how = backends.choose(backend, rewards.device, rewards.dtype)
    if how == "torch":
        return _gae_torch(rewards, values, mask, gamma, lam, bootstrap)
    return _gae(rewards, values, mask, gamma, lam, bootstrap, how)


def _gae_torch(rewards, values, mask, gamma, lam, bootstrap):
    r, v = (backends.widened(x).where(mask, 0) for x in (rewards, values))
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], dim=1)
    if bootstrap is not None:
        at_last = torch.arange(mask.shape[1], device=mask.device) == last(mask)[:, None]
        following = torch.where(at_last, bootstrap[:, None].to(v.dtype), following)
    delta = torch.where(mask, r + gamma * following - v, 0)
    advantages, carried = torch.zeros_like(delta), torch.zeros_like(delta[:, 0]) if delta.shape[1] else delta
    for t in reversed(range(delta.shape[1])):
        carried = torch.where(mask[:, t], delta[:, t] + gamma * lam * carried, 0)
        advantages[:, t] = carried
    return advantages.to(rewards.dtype)


def returns(
    advantages: Float[Tensor, "batch width"], values: Float[Tensor, "batch width"]
) -> Float[Tensor, "batch width"]:
    """R_t = Â_t + V_t, what the values learn to predict: of advantages that are not whitened yet."""
    return advantages + values.detach()


@torch.no_grad()
def whiten(
    x: Float[Tensor, "batch width"], mask: Bool[Tensor, "batch width"], *, shift_mean: bool = True
) -> Float[Tensor, "batch width"]:
    """(x − μ) / √(σ² + 10⁻⁸) [+ μ if not shift_mean], with μ and σ² = mean (x − μ)² over what counts; 0 elsewhere."""
    wide, n = backends.widened(x), count(mask)
    mean = wide.where(mask, 0).sum() / n
    centered = torch.where(mask, wide - mean, 0)
    whitened = centered / ((centered * centered).sum() / n + 1e-8).sqrt()
    return (whitened if shift_mean else torch.where(mask, whitened + mean, 0)).to(x.dtype)


def last(mask: Bool[Tensor, "batch width"]) -> Tensor:
    """The last column that counts in each row."""
    return mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(dim=1)


# In Triton.


def _forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    backend: str,
) -> Tensor:
    """The operator `minift::gae`."""
    advantages = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    gae_launch(advantages, rewards, values, mask, gamma, lam, bootstrap, backend).run(rewards.device)
    return advantages


def gae_launch(
    advantages: Tensor,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    backend: str,
) -> Launch:
    """Equations (1) and (2) of `advantages_kernels`, a program a row; `advantages` is contiguous."""
    kernels = backends.load(KERNELS, backend)
    rows, width = rewards.shape
    block, warps = kernels.TILE
    block = min(block, max(backends.power_of_two(width), 16))
    given = rewards.contiguous(), values.contiguous(), mask.contiguous().view(torch.uint8)
    end = given[1] if bootstrap is None else bootstrap.contiguous()  # not touched if there is none
    options = {"BOOTSTRAP": bootstrap is not None, "BLOCK": block, "num_warps": warps}
    programs = rows if width else 0
    return Launch(kernels.gae, (programs,), (advantages, *given, end, width, gamma, gamma * lam), options)


_gae = backends.operator(
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? bootstrap, str backend) -> Tensor",
    _forward,
    lambda rewards, *_: torch.empty_like(rewards, memory_format=torch.contiguous_format),
)
