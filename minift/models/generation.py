"""From logits to text: choose a token, append it, and look only at what is new.

The prompt is read in one pass that fills a key/value cache; from then on every pass is one token long. A row that has
produced a stop token keeps repeating it until all rows are done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
from jaxtyping import Float, Integer

from minift.nn.losses import log_softmax


def check_settings(
    max_new_tokens: int = 0, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None
) -> None:
    """ValueError for a setting outside its range, also for one that is not used at temperature 0."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, needed 0 or more")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, needed 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, needed at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, needed 0 < top_p <= 1")


def choose(
    logits: Float[np.ndarray, "batch vocab"],
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Integer[np.ndarray, " batch"]:
    """One token a row: the likeliest at temperature 0, else a sample of softmax(logits / temperature).

    `top_k` keeps the k likeliest tokens (Fan et al. 2018); `top_p` then keeps the smallest set of likeliest tokens
    whose probabilities sum to at least p (Holtzman et al. 2020), always at least one. ValueError for a setting
    outside its range, or sampling without `rng`."""
    check_settings(0, temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(axis=-1)
    if rng is None:
        raise ValueError("sampling at a temperature above 0 needs rng=np.random.default_rng(seed)")
    return sample(probabilities(logits, temperature, top_k, top_p), rng)


def probabilities(
    logits: Float[np.ndarray, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[np.ndarray, "batch vocab"]:
    """The distribution that `choose` samples from, in float64: tempered, cut to top_k, then to top_p, normalized."""
    check_settings(0, temperature, top_k, top_p)
    p = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    if top_k is None and top_p is None:
        return p / p.sum(axis=-1, keepdims=True)  # nothing is cut off, so nothing need be sorted
    order = np.argsort(-p, axis=-1, kind="stable")  # likeliest first; of equals, the lower id
    ranked = np.take_along_axis(p, order, axis=-1)
    if top_k is not None:
        ranked[:, top_k:] = 0
        ranked /= ranked.sum(axis=-1, keepdims=True)
    if top_p is not None:
        ranked[np.cumsum(ranked, axis=-1) - ranked >= top_p] = 0  # those before it already reach p
    np.put_along_axis(p, order, ranked, axis=-1)
    return p / p.sum(axis=-1, keepdims=True)


def sample(p: Float[np.ndarray, "batch vocab"], rng: np.random.Generator) -> Integer[np.ndarray, " batch"]:
    """One index a row, drawn with these probabilities: the first whose cumulated sum exceeds a uniform number."""
    cumulated = np.cumsum(p, axis=-1)
    u = rng.random((len(p), 1)) * cumulated[:, -1:]
    return np.minimum((cumulated <= u).sum(axis=-1), p.shape[-1] - 1)


def stream(
    next_logits: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tokens: Integer[np.ndarray, "batch tokens"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    lengths: Integer[np.ndarray, " batch"] | None = None,
) -> Iterator[Integer[np.ndarray, " batch"]]:
    """Yield the next token of every row, step by step, until `max_new_tokens` or until every row has stopped.

    `next_logits(text, lengths) -> (batch, vocab)` reads the text that is new and remembers it. `lengths` are the real
    tokens of right-padded prompts; without them every row is full. ValueError for an empty prompt, and for a setting
    outside its range."""
    check_settings(max_new_tokens, temperature, top_k, top_p)
    batch, width = tokens.shape
    lengths = np.full(batch, width) if lengths is None else lengths
    if width == 0 or lengths.min(initial=1) < 1:
        raise ValueError("a prompt is empty: generation needs at least one token to continue")
    stop, stopped = np.array(sorted(stop_tokens), np.int64), np.zeros(batch, bool)
    text = tokens
    for _ in range(max_new_tokens):
        chosen = choose(next_logits(text, lengths), temperature, rng, top_k, top_p)
        chosen = np.where(stopped, text[:, -1], chosen)  # a row that has stopped repeats its stop token
        stopped |= np.isin(chosen, stop)
        yield chosen
        if stopped.all():
            return
        text, lengths = chosen[:, None], np.ones(batch, np.int64)
