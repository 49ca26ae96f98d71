"""Softmax cross-entropy over next tokens, with labels that do not count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer

from minift.nn.linear import linear
from minift.nn.weight import Weight, add, times

ROWS = 128  # of logits at a time: for 50,000 tokens 25 MB
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

    e = logits - logits.max(axis=-1, keepdims=True)  # (..., vocab)
    at_label = np.take_along_axis(e, target[..., None], axis=-1)  # (..., 1)
    np.exp(e, out=e)
    total = e.sum(axis=-1, keepdims=True)  # e / total is p of (1)
    nll = (np.log(total) - at_label)[..., 0]  # (...)
    loss = np.where(counts, nll, 0).sum() / n

    def vjp(dloss):
        share = logits.dtype.type(dloss) / n
        dlogits = e * (share / total)  # dloss p / N
        p_label = np.take_along_axis(dlogits, target[..., None], axis=-1)
        np.put_along_axis(dlogits, target[..., None], p_label - share, axis=-1)
        dlogits[~counts] = 0  # also where padding's logits are not finite
        return dlogits

    return loss, vjp


def linear_cross_entropy(
    x: Float[np.ndarray, "rows d"],
    weight: Float[np.ndarray, "vocab d"] | Weight,
    labels: Integer[np.ndarray, " rows"],
    normalizer: float | None = None,
    *,
    recompute: bool = False,
) -> tuple[np.floating, Callable]:
    """The output matrix and the loss behind it, `ROWS` rows at a time: the logits never exist all at once.

        loss = cross_entropy(x Wᵀ, labels)                                                              (3)

    `vjp(dloss) -> dx, dweight`. As the loss is a single number, its pullback only multiplies by dloss; so the gradient
    is formed along with the value, while a few rows' logits are at hand (Hsu et al. 2024, arXiv 2410.10989, §3.2).
    With `recompute` it is formed in the pullback, from logits computed again: for evaluation, where no one calls it.
    """
    n = float(max(int((labels != IGNORE_INDEX).sum()), 1)) if normalizer is None else normalizer
    parts = [slice(first, first + ROWS) for first in range(0, max(len(x), 1), ROWS)]  # one, if there are no rows

    def gradient():
        total, dx, dweight = x.dtype.type(0), np.empty_like(x), None
        for part in parts:
            logits, linear_vjp = linear(x[part], weight)
            value, loss_vjp = cross_entropy(logits, labels[part], n)
            total += value
            dx[part], dweight_part, _ = linear_vjp(loss_vjp(1.0))
            dweight = add(dweight, dweight_part)
        return total, dx, dweight

    def value_only():
        values = (cross_entropy(linear(x[part], weight)[0], labels[part], n)[0] for part in parts)
        return sum(values, x.dtype.type(0))

    loss, dx, dweight = (value_only(), None, None) if recompute else gradient()

    def vjp(dloss):
        _, dx_, dweight_ = gradient() if recompute else (loss, dx, dweight)
        factor = x.dtype.type(dloss)
        return dx_ * factor, times(factor, dweight_)

    return loss, vjp
