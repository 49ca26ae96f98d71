"""DPO on torch tensors: the twin of `minift.rlhf.dpo`, where the equations are.

    h = (log π_w − log π_ref,w) − (log π_l − log π_ref,l)        loss = −log σ(β h), or (h − 1 / 2β)²

The loss and its gradient are one kernel on a GPU, beside the reward model's (`reward_model_kernels`). The reference's
log-probabilities do not learn. Losses are float32 (float64 for float64 log-probabilities).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from minift.data.batches import Batch
from minift.rlhf.dpo import LossType
from minift.rlhf.pairs import Pairs
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.models import llama
from minift_kernels.nn.weight import Params
from minift_kernels.peft import lora
from minift_kernels.rlhf.logprobs import counts, on_device, sequence_log_probs
from minift_kernels.rlhf.reward_model import KERNELS, count_pairs, new_outputs, softplus


def preference_loss(
    chosen_logps: Float[Tensor, " pairs"],
    rejected_logps: Float[Tensor, " pairs"],
    ref_chosen_logps: Float[Tensor, " pairs"],
    ref_rejected_logps: Float[Tensor, " pairs"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    normalizer: float | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """The mean over pairs of −(1 − ε) log σ(β h) − ε log σ(−β h), or for "ipo" of (h − 1 / 2β)².

    P may be replaced by `normalizer`. ValueError for a β that is not positive, an ε outside [0, ½), or another type of
    loss."""
    if not beta > 0:
        raise ValueError(f"beta is {beta}, needed a positive number")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, needed 0 <= label_smoothing < 0.5")
    if loss_type not in get_args(LossType):
        raise ValueError(f"loss_type is {loss_type!r}, needed one of {get_args(LossType)}")
    how = backends.choose(backend, chosen_logps.device, chosen_logps.dtype)
    n = count_pairs(chosen_logps, normalizer)
    fixed = ref_chosen_logps.detach(), ref_rejected_logps.detach()
    if how != "torch":
        ipo = loss_type == "ipo"
        return _preference(chosen_logps, rejected_logps, *fixed, beta, label_smoothing, ipo, how)[0] / n
    new_w, new_l, ref_w, ref_l = map(backends.widened, (chosen_logps, rejected_logps, *fixed))
    h = (new_w - ref_w) - (new_l - ref_l)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)).square().sum() / n
    z = beta * h
    each = (1 - label_smoothing) * softplus(-z)
    return (each + label_smoothing * softplus(z) if label_smoothing else each).sum() / n


def implicit_rewards(
    logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"], beta: float = 0.1
) -> Float[Tensor, "*shape"]:
    """β (log π − log π_ref), up to what depends on the prompt only."""
    return beta * (logps - ref_logps)


@torch.no_grad()
def statistics(
    logps: Float[Tensor, "pairs 2"], ref_logps: Float[Tensor, "pairs 2"], beta: float = 0.1
) -> dict[str, float]:
    """What to watch, under TRL's names; columns are chosen and rejected. It waits for the GPU, once."""
    rewards = implicit_rewards(logps, ref_logps, beta)
    margins = rewards[:, 0] - rewards[:, 1]
    found = {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).to(rewards.dtype).mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
    }
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def answer_log_probs(
    params: Params,
    batch: Batch,
    config: llama.Config,
    *,
    average: bool = False,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, " batch"]:
    """log π(y|x) of each row: the sum over its answer's tokens, or their mean."""
    logp, _ = sequence_log_probs(
        params, batch, config, dropout_key=dropout_key, recompute=recompute, dtype=dtype, backend=backend
    )
    total = logp.sum(dim=1)
    return total / on_device(counts(batch), total).sum(dim=1).clamp(min=1) if average else total


@torch.no_grad()
def reference_log_probs(
    params: Params,
    batches: Iterable[Batch],
    config: llama.Config,
    *,
    average: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """log π_ref(y|x) of the rows of each batch, with the adapter off: once, before the training."""
    bare = lora.bare(params)
    return [answer_log_probs(bare, batch, config, average=average, dtype=dtype, backend=backend) for batch in batches]


def loss(
    params: Params,
    pairs: Pairs,
    config: llama.Config,
    normalizer: float | None = None,
    dropout_key: int | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """`preference_loss` of a whole model on pairs that carry their `reference`. ValueError where they do not."""
    if pairs.reference is None:
        raise ValueError("the pairs carry no reference log-probabilities: compute them once, `reference_log_probs`")
    logps = answer_log_probs(
        params,
        pairs.batch,
        config,
        average=loss_type == "ipo",
        dropout_key=dropout_key,
        dtype=dtype,
        backend=backend,
    )
    ref = torch.from_numpy(pairs.reference).to(logps.device, logps.dtype)
    options = beta, label_smoothing, loss_type, normalizer
    return preference_loss(logps[0::2], logps[1::2], ref[:, 0], ref[:, 1], *options, backend=backend)


# In Triton.


def _forward(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float,
    ipo: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The operator `minift::preference_loss`: the sum over pairs, and its slope by h."""
    sums, slope = new_outputs(chosen, 1, backend)
    logps = chosen, rejected, ref_chosen, ref_rejected
    preference_launch((sums, slope), logps, beta, label_smoothing, ipo, backend).run(chosen.device)
    return sums.sum(), slope


def preference_launch(
    outputs: tuple[Tensor, Tensor],
    logps: tuple[Tensor, ...],
    beta: float,
    label_smoothing: float,
    ipo: bool,
    backend: str,
) -> Launch:
    """Equation (5) or (6) of `reward_model_kernels`, a program for each of the sums."""
    kernels = backends.load(KERNELS, backend)
    block, warps = kernels.TILE
    numbers = len(logps[0]), beta, 1 / (2 * beta), 1 - label_smoothing, label_smoothing
    arguments = (*outputs, *(x.contiguous() for x in logps), *numbers)
    options = {"IPO": ipo, "BLOCK": block, "num_warps": warps}
    return Launch(kernels.preference, (len(outputs[0]),), arguments, options, outputs=2)


def _save(ctx, inputs, output):
    ctx.dtypes = [x.dtype for x in inputs[:2]]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dtotal, _):
    dh = ctx.saved_tensors[0] * dtotal
    return dh.to(ctx.dtypes[0]), (-dh).to(ctx.dtypes[1]), *(None,) * 6


_preference = backends.operator(
    "preference_loss(Tensor chosen, Tensor rejected, Tensor ref_chosen, Tensor ref_rejected, float beta, "
    "float label_smoothing, bool ipo, str backend) -> (Tensor, Tensor)",
    _forward,
    lambda chosen, *_: tuple(chosen.new_empty(shape, dtype=torch.float32) for shape in ((), len(chosen))),
    _differentiate,
    _save,
)
