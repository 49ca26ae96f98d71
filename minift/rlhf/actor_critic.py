"""The model that PPO trains: one trunk, a head that writes the next token, and one that says what the text is worth.

The value V_t of the text in front of token t is read off hidden state t − 1, as its log-probability is. The reference
is the same trunk with its adapter off, so a round needs one model in memory, not four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from minift.data.batches import Batch
from minift.models import llama
from minift.nn.linear import linear
from minift.nn.weight import Params, dense, freeze, gradients
from minift.peft import lora
from minift.rlhf import ppo
from minift.rlhf.advantages import gae_1, kl_penalty, returns, token_rewards, whiten
from minift.rlhf.logprobs import at_answers, counts, sequence_log_probs

VALUE = "value.weight"  # (1, d): the value head


@dataclass(frozen=True)
class Rollouts:
    """Answers, and what was known of them when they were written: all (B, T), at the tokens.

    `batch.labels` says which tokens were written by the policy; nothing else counts."""

    batch: Batch
    old_logp: Float[np.ndarray, "B T"]
    old_values: Float[np.ndarray, "B T"]
    advantages: Float[np.ndarray, "B T"]
    returns: Float[np.ndarray, "B T"]

    @property
    def mask(self) -> Bool[np.ndarray, "B T"]:
        return counts(self.batch)

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        return self.batch.lengths

    @property
    def count(self) -> int:
        """What the summed loss of a step is divided by."""
        return int(np.count_nonzero(self.mask))

    def take(self, rows: Int[np.ndarray, " b"]) -> Rollouts:
        """These answers, in this order."""
        return Rollouts(self.batch.take(rows), *(array[rows] for array in self._of_tokens()))

    def cut(self, width: int) -> Rollouts:
        """The first `width` columns; no row may be longer."""
        return Rollouts(self.batch.cut(width), *(array[:, :width] for array in self._of_tokens()))

    def _of_tokens(self) -> tuple[np.ndarray, ...]:
        return self.old_logp, self.old_values, self.advantages, self.returns


def with_value_head(params: Params) -> dict[str, Any]:
    """The parameters with a value head that begins at 0: the first advantages are then the rewards to come."""
    norm = dense(params["model.norm.weight"])
    return dict(params) | {VALUE: np.zeros((1, len(norm)), norm.dtype)}


def forward(
    params: Params,
    batch: Batch,
    config: llama.Config,
    *,
    temperature: float = 1.0,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], Callable]:
    """(log-probabilities, entropies, values), each (B, T) and 0 where a token does not count.

    `vjp(dlogp, dentropy, dvalues) -> {name: gradient}`; dentropy may be None. One pass through the trunk for all."""
    hidden, backbone_vjp = llama.backbone(
        params, batch.tokens, config, lengths=batch.lengths, dropout_key=dropout_key, recompute=recompute
    )
    name, mask = llama.head_name(config), counts(batch)
    (logp, entropy), answers_vjp = at_answers(hidden, params[name], batch, temperature)
    ahead, value_vjp = linear(hidden[:, :-1], params[VALUE])  # (B, T − 1, 1)
    values = np.zeros_like(logp)
    values[:, 1:] = np.where(mask[:, 1:], ahead[..., 0], 0)

    def vjp(dlogp, dentropy, dvalues):
        dhidden, dhead = answers_vjp(dlogp, dentropy)
        dbefore, dvalue, _ = value_vjp(np.where(mask, dvalues, 0)[:, 1:, None])
        dhidden[:, :-1] += dbefore
        _, _, below = backbone_vjp(dhidden)
        return gradients([*below.items(), (name, dhead), (VALUE, dvalue)])

    return (logp, entropy, values), vjp


def assess(
    params: Params,
    batch: Batch,
    scores: Float[np.ndarray, " batch"],
    config: llama.Config,
    settings: ppo.Settings,
    *,
    kl_coef: float | None = None,
    ended: Bool[np.ndarray, " batch"] | None = None,
) -> tuple[Rollouts, Float[np.ndarray, " batch"]]:
    """What a minibatch needs to know of fresh answers and their scores; and each answer's KL to the reference, in nats.

    No activations are kept. Take minibatches as `Rollouts.take` gives them: with the rows of one round in one minibatch
    the first ratio is 1 to the bit; a matrix product of fewer rows may round differently. `kl_coef` is that of the
    settings unless a controller has moved it."""
    options: dict[str, Any] = {"temperature": settings.temperature, "recompute": True}
    (logp, _, values), _ = forward(params, batch, config, **options)
    reference = freeze(lora.bare({name: w for name, w in params.items() if name != VALUE}))
    (ref_logp, _), _ = sequence_log_probs(reference, batch, config, **options)
    mask = counts(batch)
    kl, _ = kl_penalty(logp, ref_logp, settings.kl_estimator)
    rewards = token_rewards(
        scores,
        kl,
        mask,
        settings.kl_coef if kl_coef is None else kl_coef,
        ended=ended,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages = gae_1(rewards, values, mask, settings.gamma, settings.lam)
    targets = returns(advantages, values)
    if settings.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Rollouts(batch, logp, values, advantages, targets), np.where(mask, logp - ref_logp, 0).sum(axis=1)


def loss(
    params: Params,
    rollouts: Rollouts,
    config: llama.Config,
    settings: ppo.Settings,
    normalizer: float | None = None,
    dropout_key: int | None = None,
) -> tuple[np.floating, Callable]:
    """`ppo.minibatch_loss` of a whole model;  `vjp(dloss) -> {name: gradient}`.

    Leave dropout off: with another mask than at the writing, the first ratio is not 1."""
    outputs, forward_vjp = forward(
        params, rollouts.batch, config, temperature=settings.temperature, dropout_key=dropout_key
    )
    value, ppo_vjp = ppo.minibatch_loss(
        *outputs,
        rollouts.old_logp,
        rollouts.old_values,
        rollouts.advantages,
        rollouts.returns,
        rollouts.mask,
        settings,
        normalizer,
    )
    return value, lambda dloss: forward_vjp(*ppo_vjp(dloss))
