"""The reward model on torch tensors: the twin of `minift.rlhf.reward_model`, where the equations are.

    r(x, y) = w · hidden[last token of x y]        loss = −log σ(r_w − r_l − m)

The loss and its gradients are one kernel on a GPU (`reward_model_kernels`), with centering in the same pass. Losses are
float32 (float64 for float64 rewards). Margins do not learn. What says how good a trained model is works on the scores
of a whole set, on the host, and is the reference's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional

from minift.data.batches import Batch
from minift.models.classifier import SCORE
from minift.rlhf.pairs import Pairs
from minift.rlhf.reward_model import accuracy, calibration, normalization
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.models import llama
from minift_kernels.nn.linear import linear
from minift_kernels.nn.weight import Params, dense
from minift_kernels.rlhf.logprobs import on_device

__all__ = ["SCORE", "accuracy", "calibration", "centering", "loss", "normalization", "pairwise_loss", "preferred"]
__all__ += ["ranking_loss_2", "score", "with_head"]

KERNELS = "minift_kernels.rlhf.reward_model_kernels"


def with_head(params: Params, rng: np.random.Generator) -> dict[str, Any]:
    """The parameters with a fresh scalar head in place of the output matrix, drawn from N(0, 1/(d + 1)).

    The reference's bits for the same generator. The head is float32 at least, and learns."""
    norm = dense(params["model.norm.weight"])
    head = torch.tensor(rng.standard_normal((1, len(norm))) / np.sqrt(len(norm) + 1))
    dtype = backends.widened(norm).dtype
    head = head.to(device=norm.device, dtype=dtype).requires_grad_()
    return {name: w for name, w in params.items() if name != llama.HEAD} | {SCORE: head}


def score(
    params: Params,
    batch: Batch,
    config: llama.Config,
    *,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, " batch"]:
    """One reward a row, read at its last real token, which `batch.lengths` knows.

    ValueError for packed rows, and for a row without a token."""
    if batch.segments is not None:
        raise ValueError("a packed row holds several texts, needed one a row: use `pad`")
    if not (batch.lengths >= 1).all():
        raise ValueError(f"row {int(np.argmin(batch.lengths))} has no token, so there is nothing to score")
    like = dense(params[llama.EMBEDDING])
    hidden = llama.backbone(
        params,
        on_device(batch.tokens, like),
        config,
        dropout_key=dropout_key,
        recompute=recompute,
        dtype=dtype,
        backend=backend,
    )
    at_last = hidden[torch.arange(len(hidden), device=hidden.device), on_device(batch.lengths - 1, hidden)]
    head = params[SCORE]
    if isinstance(head, Tensor):
        at_last = at_last.to(torch.promote_types(at_last.dtype, head.dtype))  # a reward is not rounded to 16 bits
    return linear(at_last, head, backend=backend)[:, 0]


# --- losses -----------------------------------------------------------------------------------------------------------


def preferred(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """σ(d): P(the first is preferred) where its reward is higher by d."""
    return torch.sigmoid(d)


def pairwise_loss(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    margin: Float[Tensor, " pairs"] | None = None,
    normalizer: float | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """(1/P) Σ softplus(−d), d = r_w − r_l − m: the mean over pairs, or the sum divided by `normalizer`."""
    return _centered_loss(chosen, rejected, margin, normalizer, 0.0, backend)


def ranking_loss_2(
    rewards: Float[Tensor, "prompts k"], ranks: Integer[Tensor, "prompts k"], normalizer: float | None = None
) -> Float[Tensor, ""]:
    """(1/N) Σ_prompts (1/C(K,2)) Σ_{y_i better than y_j} −log σ(r_i − r_j). `ranks`: the smaller the better."""
    n = float(max(len(rewards), 1)) if normalizer is None else normalizer
    wide = backends.widened(rewards)
    better = ranks[:, :, None] < ranks[:, None, :]  # (N, K, K)
    pairs = better.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    d = wide[:, :, None] - wide[:, None, :]
    return (better / pairs.to(wide.dtype) / n * softplus(-d)).sum()


def centering(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], normalizer: float | None = None
) -> Float[Tensor, ""]:
    """(1/P) Σ (r_w + r_l)², to be added with a small factor: it holds the zero that the pairwise loss leaves free."""
    both = backends.widened(chosen) + backends.widened(rejected)
    return (both * both).sum() / count_pairs(chosen, normalizer)


def loss(
    params: Params,
    pairs: Pairs,
    config: llama.Config,
    normalizer: float | None = None,
    dropout_key: int | None = None,
    *,
    center: float = 0.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """`pairwise_loss` of a whole model, plus `center` times `centering`."""
    rewards = score(params, pairs.batch, config, dropout_key=dropout_key, dtype=dtype, backend=backend)
    margin = None if pairs.margin is None else torch.from_numpy(pairs.margin).to(rewards.device, rewards.dtype)
    return _centered_loss(rewards[0::2], rewards[1::2], margin, normalizer, center, backend)


def _centered_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    normalizer: float | None,
    center: float,
    backend: str | None,
) -> Tensor:
    how = backends.choose(backend, chosen.device, chosen.dtype)
    margin = None if margin is None else margin.detach()
    if how != "torch":
        total, _, _ = _pairwise(chosen, rejected, margin, center, how)
        return total / count_pairs(chosen, normalizer)
    d = backends.widened(chosen) - backends.widened(rejected)
    d = d if margin is None else d - margin
    value = softplus(-d).sum() / count_pairs(chosen, normalizer)
    return value + center * centering(chosen, rejected, normalizer) if center else value


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) without PyTorch's threshold, beyond which its own returns x."""
    return -functional.logsigmoid(-x)


def count_pairs(chosen: Tensor, normalizer: float | None) -> float:
    return float(max(len(chosen), 1)) if normalizer is None else normalizer


# In Triton.


def _forward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `minift::pairwise_loss`: the sum over pairs, and its slopes by both rewards."""
    sums, *slopes = new_outputs(chosen, 2, backend)
    pairwise_launch((sums, *slopes), chosen, rejected, margin, center, backend).run(chosen.device)
    return sums.sum(), slopes[0], slopes[1]


def new_outputs(x: Tensor, slopes: int, backend: str) -> list[Tensor]:
    """A sum for each program, and so many slopes as long as x."""
    programs = -(-len(x) // backends.load(KERNELS, backend).TILE[0])
    return [x.new_empty(n, dtype=torch.float32) for n in (programs, *[len(x)] * slopes)]


def pairwise_launch(
    outputs: tuple[Tensor, ...],
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    center: float,
    backend: str,
) -> Launch:
    """Equation (4) of `reward_model_kernels`, a program for each of the sums."""
    kernels = backends.load(KERNELS, backend)
    block, warps = kernels.TILE
    chosen, rejected = chosen.contiguous(), rejected.contiguous()
    options = {"MARGIN": margin is not None, "BLOCK": block, "num_warps": warps}
    given = chosen, rejected, chosen if margin is None else margin.contiguous()
    return Launch(kernels.pairwise, (len(outputs[0]),), (*outputs, *given, len(chosen), center), options, outputs=3)


def _save(ctx, inputs, output):
    ctx.dtypes = [x.dtype for x in inputs[:2]]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dtotal, *_):
    found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *((slope * dtotal).to(dtype) for slope, dtype in found), None, None, None


_pairwise = backends.operator(
    "pairwise_loss(Tensor chosen, Tensor rejected, Tensor? margin, float center, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda chosen, *_: tuple(chosen.new_empty(shape, dtype=torch.float32) for shape in ((), len(chosen), len(chosen))),
    _differentiate,
    _save,
)
