"""Log-probabilities of tokens, wrong in the ways they have been wrong in published code."""

import numpy as np

from minift.nn import losses
from minift.nn.linear import linear
from minift.nn.losses import log_softmax
from minift.nn.weight import add
from minift.rlhf import logprobs
from minift.rlhf.logprobs import counts, token_log_probs
from nn.wrong_nn import variants


def _token_log_probs(
    logits,
    tokens,
    temperature=1.0,
    *,
    value="log p",
    heat="both",
    stable=True,
    entropy_of="p",
    entropy_slope="whole",
    sign=1,
    checked=True,
    scribbles=False,
):
    if checked and tokens.size and not (tokens.min() >= 0 and tokens.max() < logits.shape[-1]):
        raise ValueError
    z = logits if heat == "gradient only" else logits / temperature
    log_p = log_softmax(z) if stable else z - np.log(np.exp(z).sum(-1, keepdims=True))
    p = np.exp(log_p)
    at = (tokens + (value == "next token")) % logits.shape[-1]
    picked = np.take_along_axis(log_p if value != "logit" else z, at[..., None], -1)[..., 0]
    entropy = -(p * log_p).sum(-1)
    shown = {"p": entropy, "bits": entropy / np.log(2.0).astype(z.dtype), "negative": -entropy}[entropy_of]

    def vjp(dlogp, dentropy=None):
        onehot = np.arange(logits.shape[-1]) == at[..., None]
        dz = sign * dlogp[..., None] * (onehot - p)
        if dentropy is not None:
            inner = log_p + (entropy[..., None] if entropy_slope == "whole" else 1)
            dz = dz - (0 if entropy_slope == "nothing" else 1) * dentropy[..., None] * p * inner
        if scribbles:
            dlogp *= 2
        return (dz / (1 if heat == "value only" else temperature)).astype(logits.dtype)

    return (picked, shown), vjp


TOKEN = variants(
    _token_log_probs,
    value=("next token", "logit"),
    heat=("gradient only", "value only"),
    stable=False,
    entropy_of=("bits", "negative"),
    entropy_slope=("without H", "nothing"),
    sign=-1,
    checked=False,
    scribbles=True,
)


def _linear(x, weight, tokens, temperature=1.0, *, dweight="sum", border="right", entropy="kept", again="right"):
    parts = [slice(i, i + losses.ROWS) for i in range(0, max(len(x), 1), losses.ROWS)]
    logp, h = np.zeros(len(x), x.dtype), np.zeros(len(x), x.dtype)
    for part in parts[: -1 if border == "last chunk lost" and len(parts) > 1 else None]:
        (logp[part], h[part]), _ = token_log_probs(linear(x[part], weight)[0], tokens[part], temperature)

    def vjp(dlogp, dentropy=None):
        dx, total = np.empty_like(x), None
        for part in parts:
            logits, linear_vjp = linear(x[part], weight)
            own = parts[0] if again == "first cotangents" and len(dlogp[part]) == len(dlogp[parts[0]]) else part
            _, pullback = token_log_probs(logits, tokens[part], 1.0 if again == "cold" else temperature)
            dh = None if dentropy is None or entropy == "forgotten" else dentropy[own]
            dx[part], part_dweight, _ = linear_vjp(pullback(dlogp[own], dh))
            total = part_dweight if dweight == "last chunk" else add(total, part_dweight)
        return dx, total

    return (logp, h), vjp


LINEAR = variants(
    _linear,
    dweight="last chunk",
    border="last chunk lost",
    entropy="forgotten",
    again=("first cotangents", "cold"),
)


def _at_answers(hidden, weight, batch, temperature=1.0, *, before=1, counting="answer", spread="at"):
    mask = counts(batch)
    if counting == "all real":
        mask = (np.arange(mask.shape[1]) < batch.lengths[:, None]) & (np.arange(mask.shape[1]) > 0)
    if counting == "padding too":
        mask = (np.cumsum(mask, 1) > 0) & (np.arange(mask.shape[1]) > 0)
    at = np.nonzero(mask)
    front = at[0], at[1] - before
    placed = at if spread == "at" else (at[0], at[1] - 1)
    (logp, entropy), rows_vjp = logprobs.linear_token_log_probs(hidden[front], weight, batch.tokens[at], temperature)

    def out(values):
        full = np.zeros(hidden.shape[:2], hidden.dtype)
        full[placed] = values
        return full

    def vjp(dlogp, dentropy=None):
        drows, dweight = rows_vjp(dlogp[placed], None if dentropy is None else dentropy[placed])
        dhidden = np.zeros_like(hidden)
        dhidden[front] = drows
        return dhidden, dweight

    return (out(logp), out(entropy)), vjp


ANSWERS = variants(_at_answers, before=0, counting=("all real", "padding too"), spread="in front")
