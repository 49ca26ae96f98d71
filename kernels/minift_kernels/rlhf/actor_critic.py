"""The model that PPO trains, on torch tensors: the twin of `minift.rlhf.actor_critic`.

One trunk, a head that writes the next token, and one that says what the text is worth. What is known of answers when
they are written are constants: `assess` runs without a graph, and `loss` differentiates by what is new alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minift.data.batches import Batch
from minift.rlhf.actor_critic import VALUE
from minift_kernels import backend as backends
from minift_kernels.models import llama
from minift_kernels.nn.linear import linear
from minift_kernels.nn.weight import Params, dense
from minift_kernels.peft import lora
from minift_kernels.rlhf import ppo
from minift_kernels.rlhf.advantages import gae_1, kl_penalty, returns, token_rewards, whiten
from minift_kernels.rlhf.logprobs import at_answers, counts, on_device, sequence_log_probs

__all__ = ["VALUE", "Rollouts", "assess", "forward", "loss", "with_value_head"]


@dataclass(frozen=True)
class Rollouts:
    """Answers, and what was known of them when they were written: all (B, T), at the tokens.

    `batch.labels`, on the host, says which tokens were written by the policy; nothing else counts."""

    batch: Batch
    old_logp: Float[Tensor, "B T"]
    old_values: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        return on_device(counts(self.batch), self.old_logp)

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        return self.batch.lengths

    @property
    def count(self) -> int:
        """What the summed loss of a step is divided by."""
        return int(np.count_nonzero(counts(self.batch)))

    def take(self, rows: Int[np.ndarray, " b"]) -> Rollouts:
        """These answers, in this order."""
        there = on_device(rows, self.old_logp)
        return Rollouts(self.batch.take(rows), *(x[there] for x in self._of_tokens()))

    def cut(self, width: int) -> Rollouts:
        """The first `width` columns; no row may be longer."""
        return Rollouts(self.batch.cut(width), *(x[:, :width] for x in self._of_tokens()))

    def _of_tokens(self) -> tuple[Tensor, ...]:
        return self.old_logp, self.old_values, self.advantages, self.returns


def with_value_head(params: Params) -> dict[str, Any]:
    """The parameters with a value head that begins at 0, in float32 at least: it learns."""
    norm = backends.widened(dense(params["model.norm.weight"]))
    return dict(params) | {VALUE: torch.zeros_like(norm)[None].detach().requires_grad_()}


def forward(
    params: Params,
    batch: Batch,
    config: llama.Config,
    *,
    temperature: float = 1.0,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, entropies, values), each (B, T) and 0 where a token does not count, from one pass."""
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
    logp, entropy = at_answers(hidden, params[llama.head_name(config)], batch, temperature, backend=backend)
    head = params[VALUE]
    before = hidden[:, :-1].to(head.dtype) if isinstance(head, Tensor) else hidden[:, :-1]
    ahead = linear(before, head, backend=backend)[..., 0]  # (B, T − 1)
    values = torch.nn.functional.pad(ahead, (1, 0))
    return logp, entropy, torch.where(on_device(counts(batch), values), values, 0)


@torch.no_grad()
def assess(
    params: Params,
    batch: Batch,
    scores: Float[Tensor, " batch"],
    config: llama.Config,
    settings: ppo.Settings,
    *,
    kl_coef: float | None = None,
    ended: Bool[Tensor, " batch"] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Rollouts, Float[Tensor, " batch"]]:
    """What a minibatch needs to know of fresh answers and their scores; and each answer's KL to the reference, in nats.

    With the rows of one round in one minibatch the first ratio is 1 to the bit; a matrix product of fewer rows may
    round differently. `kl_coef` is that of the settings unless a controller has moved it."""
    options: dict[str, Any] = {"temperature": settings.temperature, "dtype": dtype, "backend": backend}
    logp, _, values = forward(params, batch, config, **options)
    reference = lora.bare({name: w for name, w in params.items() if name != VALUE})
    ref_logp, _ = sequence_log_probs(reference, batch, config, **options)
    mask = on_device(counts(batch), logp)
    rewards = token_rewards(
        scores,
        kl_penalty(logp, ref_logp, settings.kl_estimator),
        mask,
        settings.kl_coef if kl_coef is None else kl_coef,
        ended=ended,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages = gae_1(rewards, values, mask, settings.gamma, settings.lam, backend=backend)
    targets = returns(advantages, values)
    if settings.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Rollouts(batch, logp, values, advantages, targets), torch.where(mask, logp - ref_logp, 0).sum(dim=1)


def loss(
    params: Params,
    rollouts: Rollouts,
    config: llama.Config,
    settings: ppo.Settings,
    normalizer: float | None = None,
    dropout_key: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """`ppo.minibatch_loss` of a whole model. Leave dropout off: with another mask than at the writing, the first ratio
    is not 1."""
    outputs = forward(
        params,
        rollouts.batch,
        config,
        temperature=settings.temperature,
        dropout_key=dropout_key,
        dtype=dtype,
        backend=backend,
    )
    fixed = rollouts.old_logp, rollouts.old_values, rollouts.advantages, rollouts.returns
    return ppo.minibatch_loss(*outputs, *fixed, rollouts.mask, settings, normalizer, backend=backend)
