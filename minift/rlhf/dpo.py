"""DPO: the policy is its own reward model.                         (Rafailov et al. 2023, arXiv 2305.18290)

Under a KL leash the best policy for a reward r is known: π*(y|x) ∝ π_ref(y|x) e^{r(x,y)/β}. Solved for the reward,

    r(x, y) = β (log π(y|x) − log π_ref(y|x)) + what depends on x only                                    (1)

and that last part cancels in a difference. Put into the reward model's loss, −log σ(r_w − r_l), there is no reward left
to learn and nothing to sample:

    loss = −log σ(β h)        h = (log π_w − log π_ref,w) − (log π_l − log π_ref,l)                        (2)

The reference is the policy with its adapter off, so there is no second copy of the model, and as it never changes its
log-probabilities are computed once (`reference_log_probs`). At the start h = 0 to the bit, and the loss is ln 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from minift.data.batches import Batch
from minift.models import llama
from minift.nn.weight import Params, freeze
from minift.peft import lora
from minift.rlhf.logprobs import counts, sequence_log_probs
from minift.rlhf.pairs import Pairs
from minift.rlhf.reward_model import preferred

LossType = Literal["sigmoid", "ipo"]


def preference_loss(
    chosen_logps: Float[np.ndarray, " pairs"],
    rejected_logps: Float[np.ndarray, " pairs"],
    ref_chosen_logps: Float[np.ndarray, " pairs"],
    ref_rejected_logps: Float[np.ndarray, " pairs"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    normalizer: float | None = None,
) -> tuple[np.floating, Callable]:
    """The mean over pairs of

        sigmoid    −(1 − ε) log σ(β h) − ε log σ(−β h)       ε: label_smoothing, the share of labels that are wrong  (3)
        ipo        (h − 1 / 2β)²                            (Azar et al. 2023, arXiv 2310.12036, eq. 17)  (4)

    `vjp(dloss) -> dchosen, drejected, None, None`, with dchosen = −drejected = dloss/P times

        β (−(1 − ε) σ(−β h) + ε σ(β h))      or      2 (h − 1 / 2β)

    (3) is cDPO (Mitchell 2023); ε = 0 is (2). IPO asks for log-probabilities *per token*, means instead of sums, as TRL
    gives it. P may be replaced by `normalizer`. ValueError for a β that is not positive, an ε outside [0, ½), or
    another type of loss.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}, needed a positive number")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, needed 0 <= label_smoothing < 0.5")
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    n = float(max(len(h), 1)) if normalizer is None else normalizer
    if loss_type == "sigmoid":
        z, kept = beta * h, 1 - label_smoothing
        each = kept * np.logaddexp(0, -z) + label_smoothing * np.logaddexp(0, z)  # (3)
        slope = beta * (label_smoothing * preferred(z) - kept * preferred(-z))
    elif loss_type == "ipo":
        each, slope = (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))  # (4)
    else:
        raise ValueError(f"loss_type is {loss_type!r}, needed one of {get_args(LossType)}")

    def vjp(dloss):
        dh = slope * (h.dtype.type(dloss) / n)
        return dh, -dh, None, None

    return h.dtype.type(each.sum() / n), vjp


def implicit_rewards(
    logps: Float[np.ndarray, "*shape"], ref_logps: Float[np.ndarray, "*shape"], beta: float = 0.1
) -> Float[np.ndarray, "*shape"]:
    """β (log π − log π_ref): equation (1), up to what depends on the prompt only."""
    return beta * (logps - ref_logps)


def statistics(
    logps: Float[np.ndarray, "pairs 2"], ref_logps: Float[np.ndarray, "pairs 2"], beta: float = 0.1
) -> dict[str, float]:
    """What to watch, under TRL's names; columns are chosen and rejected.

    Both log-probabilities may fall while the margin grows: then the policy moves away from both answers."""
    rewards = implicit_rewards(logps, ref_logps, beta)
    return {
        "rewards/chosen": float(rewards[:, 0].mean()),
        "rewards/rejected": float(rewards[:, 1].mean()),
        "rewards/margins": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "rewards/accuracies": float((rewards[:, 0] > rewards[:, 1]).mean()),
        "logps/chosen": float(logps[:, 0].mean()),
        "logps/rejected": float(logps[:, 1].mean()),
    }


def answer_log_probs(
    params: Params,
    batch: Batch,
    config: llama.Config,
    *,
    average: bool = False,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[Float[np.ndarray, " batch"], Callable]:
    """log π(y|x) of each row: the sum over its answer's tokens, or their mean;  `vjp(dlogps) -> {name: gradient}`."""
    (logp, _), logp_vjp = sequence_log_probs(params, batch, config, dropout_key=dropout_key, recompute=recompute)
    mask = counts(batch)
    n = np.maximum(mask.sum(axis=1), 1).astype(logp.dtype) if average else np.ones_like(logp, shape=len(logp))

    def vjp(dlogps):
        return logp_vjp(np.where(mask, (dlogps / n)[:, None], 0), None)

    return logp.sum(axis=1) / n, vjp


def reference_log_probs(
    params: Params, batches: Iterable[Batch], config: llama.Config, *, average: bool = False
) -> list[Float[np.ndarray, " batch"]]:
    """log π_ref(y|x) of the rows of each batch, with the adapter off: once, before the training.

    Without an adapter the reference is the model as it is now. Keep the batches as they are for the policy: the same
    rows in the same rectangle give the same bits, and a margin that begins at exactly 0."""
    reference = freeze(lora.bare(params))
    return [answer_log_probs(reference, batch, config, average=average, recompute=True)[0] for batch in batches]


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
) -> tuple[np.floating, Callable]:
    """`preference_loss` of a whole model on pairs that carry their `reference`;  `vjp(dloss) -> {name: gradient}`.

    ValueError where they do not."""
    if pairs.reference is None:
        raise ValueError("the pairs carry no reference log-probabilities: compute them once, `reference_log_probs`")
    logps, logps_vjp = answer_log_probs(
        params, pairs.batch, config, average=loss_type == "ipo", dropout_key=dropout_key
    )
    value, preference_vjp = preference_loss(
        logps[0::2],
        logps[1::2],
        pairs.reference[:, 0],
        pairs.reference[:, 1],
        beta,
        label_smoothing,
        loss_type,
        normalizer,
    )

    def vjp(dloss):
        dchosen, drejected, _, _ = preference_vjp(dloss)
        return logps_vjp(np.stack([dchosen, drejected], axis=1).reshape(-1))

    return value, vjp
