"""From encoded examples to batches: padding, packing, and an order that needs no state.

A batch is a rectangle, examples are not. Two ways to fill it, with the same loss and the same gradient:

    pad     one example a row, the rest of the row is filled up and ignored
    pack    several examples a row, each in a segment that sees only itself

Labels follow the field's convention: they stand *at* their tokens, −100 where nothing is learned, and the loss does the
shift: position t predicts label t + 1. The first token of an example is predicted by nobody, so its label is always
−100 here; in a packed row the position before it belongs to somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from minift.nn.losses import IGNORE_INDEX

PADDING = -1  # the segment number of what fills up a packed row

Encoded = tuple[np.ndarray, np.ndarray]  # tokens (T,) and labels (T,)


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens.

    `lengths` counts the tokens of each row before its padding. `segments` numbers the examples of each row 0, 1, …,
    −1 in the padding; None where a row is one example. Attention is causal within a segment and nothing crosses
    its borders; positions restart at 0 in each."""

    tokens: Int[np.ndarray, "B T"]
    labels: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    segments: Int[np.ndarray, "B T"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def count(self) -> int:
        """What the summed loss of a step is divided by."""
        return count_labels(self)

    def take(self, rows: Int[np.ndarray, " b"]) -> Batch:
        """These rows of the batch, in this order."""
        segments = None if self.segments is None else self.segments[rows]
        return Batch(self.tokens[rows], self.labels[rows], self.lengths[rows], segments)

    def cut(self, width: int) -> Batch:
        """The first `width` columns; no row may be longer."""
        segments = None if self.segments is None else self.segments[:, :width]
        return Batch(self.tokens[:, :width], self.labels[:, :width], self.lengths, segments)


def count_labels(batch: Batch) -> int:
    """How many predictions count, after the shift: what the summed loss of a batch is divided by.

    With gradient accumulation: by the sum of these over *all* micro-batches of a step; a mean of means weighs short
    answers more (transformers #34191)."""
    return int(np.count_nonzero(batch.labels[:, 1:] != IGNORE_INDEX))


def pad(examples: Sequence[Encoded], length: int | None = None, multiple_of: int = 1, pad_id: int = 0) -> Batch:
    """One example a row, filled up on the right to `length`, or to the longest rounded up to a multiple.

    Raises ValueError for no examples, an empty one, or one that is longer than `length`."""
    longest = _longest(examples, length)
    width = length if length is not None else -(-longest // multiple_of) * multiple_of
    tokens, labels = _blank(len(examples), width, pad_id)
    for row, example in enumerate(examples):
        _place(tokens[row], labels[row], 0, example)
    return Batch(tokens, labels, np.array([len(t) for t, _ in examples], np.int32))


def pack(examples: Sequence[Encoded], length: int, pad_id: int = 0) -> Batch:
    """All examples in as few rows of `length` tokens as first-fit-decreasing finds, several to a row.

    Raises ValueError for no examples, an empty one, or one that is longer than `length`: nothing is cut."""
    _longest(examples, length)
    bins = first_fit_decreasing([len(tokens) for tokens, _ in examples], length)
    tokens, labels = _blank(len(bins), length, pad_id)
    segments = np.full_like(tokens, PADDING)
    lengths = np.zeros(len(bins), np.int32)
    for row, members in enumerate(bins):
        for segment, index in enumerate(members):
            start = int(lengths[row])
            end = start + len(examples[index][0])
            _place(tokens[row], labels[row], start, examples[index])
            segments[row, start:end] = segment
            lengths[row] = end
    return Batch(tokens, labels, lengths, segments)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in bins whose lengths sum to at most `capacity`; at most 11/9 of the fewest bins, plus 6/9 (Dósa 2007).

    The longest first, each into the first bin with room for it; equal lengths keep their order."""
    bins: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)  # of each bin, 0 where none is open yet
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        fits = room[: len(bins)] >= lengths[index]
        first = int(np.argmax(fits)) if fits.any() else len(bins)
        if first == len(bins):
            bins.append([])
            room[first] = capacity
        bins[first].append(index)
        room[first] -= lengths[index]
    return bins


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, " batch_size"]:
    """Which of `n` examples make up the batch of this step: a pure function, so that resuming needs the step alone.

    The order is one long stream, a new permutation each epoch; a batch takes the next `batch_size` of it, over the
    end of an epoch if need be. Each epoch holds every index once."""
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"needed n ≥ 1, batch_size ≥ 1 and step ≥ 0, got n={n}, batch_size={batch_size}, step={step}")
    epoch, offset = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    indices = np.empty(batch_size, np.int64)
    for e in np.unique(epoch).tolist():
        indices[epoch == e] = _permutation(n, seed, e)[offset[epoch == e]]
    return indices


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def chunks(token_ids: Sequence[int] | np.ndarray, length: int) -> list[Encoded]:
    """One long text as examples of at most `length` tokens, for pre-training.

    Neighbors share one token: the last that a chunk predicts is the first that the next one reads. So every token
    except the very first is predicted exactly once. Raises ValueError for a length under 2."""
    if length < 2:
        raise ValueError(f"length is {length}, needed at least 2: one token to read and one to predict")
    ids = np.asarray(token_ids, np.int32)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
    return [(piece, _unpredicted_first(piece)) for piece in pieces]


def _unpredicted_first(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[:1] = IGNORE_INDEX
    return labels


def _blank(rows: int, width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((rows, width), pad_id, np.int32), np.full((rows, width), IGNORE_INDEX, np.int32)


def _place(tokens: np.ndarray, labels: np.ndarray, start: int, example: Encoded) -> None:
    end = start + len(example[0])
    tokens[start:end] = example[0]
    labels[start:end] = _unpredicted_first(example[1])


def _longest(examples: Sequence[Encoded], length: int | None) -> int:
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    for index, (tokens, labels) in enumerate(examples):
        if len(tokens) == 0 or len(tokens) != len(labels):
            raise ValueError(f"example {index} has {len(tokens)} tokens and {len(labels)} labels")
        if length is not None and len(tokens) > length:
            raise ValueError(f"example {index} has {len(tokens)} tokens, more than length={length}: truncate it first")
    return max(len(tokens) for tokens, _ in examples)
