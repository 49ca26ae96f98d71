"""The log-probability of each given token, and how undecided the model was there: what every method of RLHF needs.

    z = x Uᵀ / τ        log p[token] = z[token] − log Σ_v exp z_v        H = − Σ_v p_v log p_v             (1)

τ is the temperature that the answers were sampled with: the ratio of two policies is a ratio of the distributions
that were sampled from (a τ of 1 here for answers sampled at 0.7 shows up as a negative KL; trl #235, #1161).

Text keeps the convention of the labels: everything stands *at* its token. `logp[b, t]` is the log-probability of token
t given the tokens before it, read off the hidden state t − 1; 0 where a token does not count.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Integer

from minift.data.batches import Batch
from minift.models import llama
from minift.nn import losses
from minift.nn.linear import linear
from minift.nn.losses import IGNORE_INDEX
from minift.nn.weight import Params, Weight, add, gradients


def token_log_probs(
    logits: Float[np.ndarray, "*rows vocab"], tokens: Integer[np.ndarray, "*rows"], temperature: float = 1.0
) -> tuple[tuple[Float[np.ndarray, "*rows"], Float[np.ndarray, "*rows"]], Callable]:
    """Equation (1) from logits: (log-probabilities, entropies), in nats.

    `vjp(dlogp, dentropy) -> dlogits`; dentropy may be None, where nothing depends on the entropy:

        dz_v = dlogp (1[v = token] − p_v) − dH p_v (log p_v + H)        dlogits = dz / τ                    (2)

    ValueError for a token outside the vocabulary, or a temperature that is not positive.
    """
    vocab = logits.shape[-1]
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab):
        raise ValueError(f"tokens span {tokens.min()}..{tokens.max()}, needed 0..{vocab - 1}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, needed a positive number")
    log_p = losses.log_softmax(logits / temperature)  # (..., vocab)
    logp = np.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]  # (...)
    p = np.exp(log_p)
    log_p = np.maximum(log_p, np.finfo(log_p.dtype).min)  # of a token that cannot be: 0 · −∞ would be NaN
    entropy = -np.einsum("...v,...v->...", p, log_p)  # (...)

    def vjp(dlogp, dentropy=None):
        dz = p * -dlogp[..., None]
        if dentropy is not None:
            dz -= dentropy[..., None] * p * (log_p + entropy[..., None])
        at_token = np.take_along_axis(dz, tokens[..., None], axis=-1)
        np.put_along_axis(dz, tokens[..., None], at_token + dlogp[..., None], axis=-1)
        return dz / temperature

    return (logp, entropy), vjp


def linear_token_log_probs(
    x: Float[np.ndarray, "rows d"],
    weight: Float[np.ndarray, "vocab d"] | Weight,
    tokens: Integer[np.ndarray, " rows"],
    temperature: float = 1.0,
) -> tuple[tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]], Callable]:
    """The same through the output matrix U, `nn.losses.ROWS` rows at a time: the logits never exist all at once.

    `vjp(dlogp, dentropy) -> dx, dweight`. The cotangents come row by row and are not known in the forward pass, so
    the pullback forms each few rows' logits again; nothing of the size of the vocabulary is kept in between.
    """
    parts = [slice(first, first + losses.ROWS) for first in range(0, max(len(x), 1), losses.ROWS)]
    logp, entropy = np.empty_like(x, shape=len(x)), np.empty_like(x, shape=len(x))
    for part in parts:
        logits, _ = linear(x[part], weight)
        (logp[part], entropy[part]), _ = token_log_probs(logits, tokens[part], temperature)

    def vjp(dlogp, dentropy=None):
        dx, dweight = np.empty_like(x), None
        for part in parts:
            logits, linear_vjp = linear(x[part], weight)
            _, logp_vjp = token_log_probs(logits, tokens[part], temperature)
            dlogits = logp_vjp(dlogp[part], None if dentropy is None else dentropy[part])
            dx[part], dweight_part, _ = linear_vjp(dlogits)
            dweight = add(dweight, dweight_part)
        return dx, dweight

    return (logp, entropy), vjp


# --- text -------------------------------------------------------------------------------------------------------------


def answer_mask(
    prompt_lengths: Integer[np.ndarray, " batch"], lengths: Integer[np.ndarray, " batch"], width: int
) -> Bool[np.ndarray, "batch width"]:
    """Which tokens of right-padded rows belong to the answer: those from the prompt's end to the row's.

    ValueError for an answer without a token, or a prompt without one: the first token is predicted by nobody."""
    if not ((prompt_lengths >= 1) & (prompt_lengths < lengths) & (lengths <= width)).all():
        row = int(np.argmin((prompt_lengths >= 1) & (prompt_lengths < lengths) & (lengths <= width)))
        raise ValueError(
            f"row {row} of {width} tokens has a prompt of {prompt_lengths[row]} and ends at {lengths[row]}: "
            "needed 1 ≤ prompt < end ≤ width"
        )
    t = np.arange(width)
    return (t >= prompt_lengths[:, None]) & (t < lengths[:, None])


def answers(
    tokens: Integer[np.ndarray, "batch width"],
    prompt_lengths: Integer[np.ndarray, " batch"],
    lengths: Integer[np.ndarray, " batch"],
) -> Batch:
    """A batch in which the answers count, from right-padded rows of prompt and answer."""
    mask = answer_mask(prompt_lengths, lengths, tokens.shape[1])
    return Batch(tokens, np.where(mask, tokens, IGNORE_INDEX).astype(tokens.dtype), lengths)


def counts(batch: Batch) -> Bool[np.ndarray, "batch width"]:
    """Which tokens have a log-probability that counts: those with a label, and never the first one of a row."""
    return (batch.labels != IGNORE_INDEX) & (np.arange(batch.labels.shape[1]) > 0)


def at_answers(
    hidden: Float[np.ndarray, "batch width d"],
    weight: Float[np.ndarray, "vocab d"] | Weight,
    batch: Batch,
    temperature: float = 1.0,
) -> tuple[tuple[Float[np.ndarray, "batch width"], Float[np.ndarray, "batch width"]], Callable]:
    """Log-probabilities and entropies at the tokens that count, 0 at the others;
    `vjp(dlogp, dentropy) -> dhidden, dweight`.

    Only the hidden states in front of a token that counts are multiplied by the output matrix."""
    at = np.nonzero(counts(batch))  # (rows, columns)
    before = at[0], at[1] - 1
    (logp, entropy), rows_vjp = linear_token_log_probs(hidden[before], weight, batch.labels[at], temperature)

    def spread(values):
        out = np.zeros_like(hidden, shape=hidden.shape[:2])
        out[at] = values
        return out

    def vjp(dlogp, dentropy=None):
        drows, dweight = rows_vjp(dlogp[at], None if dentropy is None else dentropy[at])
        dhidden = np.zeros_like(hidden)
        dhidden[before] = drows
        return dhidden, dweight

    return (spread(logp), spread(entropy)), vjp


def sequence_log_probs(
    params: Params,
    batch: Batch,
    config: llama.Config,
    *,
    temperature: float = 1.0,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[tuple[Float[np.ndarray, "batch width"], Float[np.ndarray, "batch width"]], Callable]:
    """`at_answers` of a whole model; `vjp(dlogp, dentropy) -> {name: gradient}`.

    The log-probability of an answer is the sum of its row. `recompute` is that of `llama.backbone`: without a call of
    `vjp` nothing is kept."""
    hidden, backbone_vjp = llama.backbone(
        params,
        batch.tokens,
        config,
        lengths=batch.lengths,
        segments=batch.segments,
        dropout_key=dropout_key,
        recompute=recompute,
    )
    name = llama.head_name(config)
    outputs, answers_vjp = at_answers(hidden, params[name], batch, temperature)

    def vjp(dlogp, dentropy=None):
        dhidden, dhead = answers_vjp(dlogp, dentropy)
        _, _, below = backbone_vjp(dhidden)
        return gradients([*below.items(), (name, dhead)])

    return outputs, vjp
