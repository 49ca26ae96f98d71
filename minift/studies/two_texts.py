"""Two kinds of text about one subject, and a small model that has read only one of them.

    old     the language reference of Python: long sections of prose
    new     a dictionary of its library: "math.isqrt: Return the integer part of the square root of the input."

The tokenizer too is learned from the old text alone, as it is for whoever fine-tunes a model of others. Losses of two
kinds of text are no scale: one may simply be harder. What can be compared are two models on one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minift.data import stdlib_docs
from minift.data.batches import Batch, Encoded, batch_indices, pad
from minift.io import Tokenizer
from minift.models import llama
from minift.nn.weight import Params
from minift.train.engine import NUMPY
from minift.train.evaluate import held_out_loss
from minift.train.loop import Result, Settings, fit
from minift.train.pretraining import PRESETS, entry, marked, rows, train_tokenizer

BATCH = 16  # rows of a step
LENGTH = 64  # tokens of a row; longer entries are cut
NANO = PRESETS["nano"]


@dataclass(frozen=True)
class TwoTexts:
    """Both kinds as rows of tokens; what is held out of the new one in two halves, to stop by and to measure on."""

    old: list[Encoded]
    old_held_out: list[Encoded]
    new: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]


def two_texts(config: llama.Config = NANO, seed: int = 0) -> TwoTexts:
    """The embedded texts, in an order that the seed decides."""
    found, rng = stdlib_docs.embedded(), np.random.default_rng([seed, 1])
    reference = [example.text for example in found.train_text]
    tokenizer = train_tokenizer(reference, config.vocab_size)
    entries, held_out = (
        [_encoded(entry(pairs[i]), tokenizer) for i in rng.permutation(len(pairs))]
        for pairs in (found.train_pairs, found.held_out_pairs)
    )
    half = len(held_out) // 2
    return TwoTexts(
        old=rows(reference, tokenizer, LENGTH, rng),
        old_held_out=rows([example.text for example in found.held_out_text], tokenizer, LENGTH, rng),
        new=entries,
        validation=held_out[:half],
        test=held_out[half:],
    )


def pretrained(texts: TwoTexts, config: llama.Config, steps: int, seed: int) -> dict[str, Any]:
    """A model that has read the old text only: the weights of its lowest held-out loss."""
    start = llama.initialize(config, np.random.default_rng([seed, 2]))
    batches = mixed(texts.old, seed)
    return train(start, config, batches, steps, 8e-3, seed, texts.old_held_out, max(steps // 4, 1)).params


def train(
    params: Params,
    config: llama.Config,
    batches: Callable[[int], list[Batch]],
    steps: int,
    learning_rate: float,
    seed: int,
    validation: Sequence[Encoded],
    eval_every: int,
    keep_best: bool = True,
    watch: Callable[[Params], None] = lambda params: None,
) -> Result:
    """AdamW along a cosine. With `keep_best` the result is that of the lowest loss on `validation`: early stopping, at
    the same number of steps for all. `watch` sees the parameters whenever this loss is measured."""

    def loss(params, batch, normalizer, key):
        return NUMPY.loss(params, batch, config, normalizer)

    def evaluate(params):
        watch(params)
        return held_out_loss(params, validation, config, 64)

    settings = Settings(
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=max(steps // 10, 1),
        weight_decay=0.1,
        seed=seed,
        eval_every=eval_every,
        keep_best=keep_best,
    )
    result = fit(params, loss, batches, settings, evaluate=evaluate)
    if result.interrupted:  # Ctrl-C ends the study, not only this run of it
        raise KeyboardInterrupt
    return result


def mixed(
    texts: Sequence[Encoded], seed: int, old: Sequence[Encoded] = (), old_rows: int = 0
) -> Callable[[int], list[Batch]]:
    """Steps of BATCH rows of the texts, and beside them `old_rows` of an old kind."""

    def batches(step: int) -> list[Batch]:
        chosen = [texts[i] for i in batch_indices(len(texts), BATCH, seed, step - 1)]
        if old_rows:
            chosen += [old[i] for i in batch_indices(len(old), old_rows, seed + 1, step - 1)]
        return [pad(chosen)]

    return batches


def _encoded(text: str, tokenizer: Tokenizer) -> Encoded:
    tokens = np.array(tokenizer.encode(marked(text)), np.int32)[:LENGTH]
    return tokens, tokens.copy()
