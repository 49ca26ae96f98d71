"""Softmax cross-entropy over next tokens, with labels that do not count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer

IGNORE_INDEX = -100  # the label of a position that does not count; PyTorch's default, every library's convention


def log_softmax(x: Float[np.ndarray, "*rows vocab"]) -> Float[np.ndarray, "*rows vocab"]:
    """log softmax(x) = x − max − log Σ exp(x − max): shifted, so that nothing overflows."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(
    logits: Float[np.ndarray, "*rows vocab"],
    labels: Integer[np.ndarray, "*rows"],
    normalizer: float | None = None,
) -> tuple[np.floating, Callable]:
    """Mean negative log-probability of the labels, in nats.

        loss = −(1/N) Σ_{n counts} log p_n[label_n]        p = softmax(logits)                          (1)

    `vjp(dloss) -> dlogits`, for a scalar dloss:

        dlogits_n = dloss (p_n − onehot(label_n)) / N  where n counts, else exactly 0                   (2)

    Rows whose label is `IGNORE_INDEX` do not count. N is the number of rows that do, or `normalizer`: to accumulate
    micro-batches into the gradient of one large batch, pass the number in the *whole* batch to each. With nothing to
    count the loss is 0. ValueError for any other label outside the vocabulary.
    """
    vocab = logits.shape[-1]
    counts = labels != IGNORE_INDEX
    target = np.where(counts, labels, 0)
    if target.size and not (target.min() >= 0 and target.max() < vocab):
        raise ValueError(f"labels span {target.min()}..{target.max()}, needed 0..{vocab - 1} or {IGNORE_INDEX}")
    n = logits.dtype.type(max(counts.sum(), 1) if normalizer is None else normalizer)

    log_p = log_softmax(logits)  # (..., vocab)
    nll = -np.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]  # (...)
    loss = np.where(counts, nll, 0).sum() / n

    def vjp(dloss):
        dlogits = np.exp(log_p)  # p
        np.put_along_axis(  # p − onehot
            dlogits, target[..., None], np.take_along_axis(dlogits, target[..., None], axis=-1) - 1, axis=-1
        )
        dlogits *= logits.dtype.type(dloss) / n
        dlogits[~counts] = 0  # also where padding's logits are not finite
        return dlogits

    return loss, vjp
