"""Texts with a label each, for classification: as text, in files, and as batches.

A label is a name in the data and its number in a batch, in the order of `Split.labels`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from minift.data.batches import Batch, pad
from minift.data.json_lines import read_lines, string
from minift.data.split import is_held_out, normalize, searchable, stands_in

HELD_OUT = 0.2  # of the texts: with a few hundred of them, an accuracy is known to ± 2 %


@dataclass(frozen=True)
class LabeledText:
    text: str
    label: str


@dataclass(frozen=True)
class Split:
    """What to learn from, and what is held out; `labels` are those of the first, sorted."""

    train: list[LabeledText]
    held_out: list[LabeledText]

    @property
    def labels(self) -> list[str]:
        return sorted({example.label for example in self.train})


def split(examples: Iterable[LabeledText], share: float = HELD_OUT) -> Split:
    """The two sides, by the hash of each text (`data.split`). No text stands twice, on one side or on both.

    What several labels claim is on neither side: nobody could know. Nor is a text to be held out that stands within a
    longer one of the training side, or whose label no training text has."""
    labels: dict[str, set[str]] = {}
    first: dict[str, LabeledText] = {}
    for example in examples:
        key = normalize(example.text)
        labels.setdefault(key, set()).add(example.label)
        first.setdefault(key, example)
    clear = [example for key, example in first.items() if len(labels[key]) == 1]
    train = [example for example in clear if not is_held_out(example.text, share)]
    corpus, known = searchable(example.text for example in train), {example.label for example in train}
    return Split(
        train,
        [
            example
            for example in clear
            if is_held_out(example.text, share) and not stands_in(example.text, corpus) and example.label in known
        ],
    )


def read(path: str | os.PathLike[str]) -> Split:
    """A JSONL file of {"text", "label"}, split. DataError for a line of something else, ValueError where it holds fewer
    than two labels or nothing is held out."""
    needed = '{"text", "label"}, both strings'
    found = read_lines(path, lambda fields: LabeledText(string(fields, "text"), string(fields, "label")), needed)
    sides = split(found)
    if len(sides.labels) < 2 or not sides.held_out:
        raise ValueError(
            f"{os.fspath(path)}: {len(sides.labels)} labels and {len(sides.held_out)} held-out texts, needed at least "
            "2 labels and 1 text; add examples"
        )
    return sides


@dataclass(frozen=True)
class Labeled:
    """A batch of texts, and the number of each one's label."""

    batch: Batch
    labels: Int[np.ndarray, " B"]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        return self.batch.lengths

    @property
    def count(self) -> int:
        """What the summed loss of a step is divided by: each text weighs the same, however long it is."""
        return len(self)

    def take(self, rows: Int[np.ndarray, " b"]) -> Labeled:
        """These texts, in this order."""
        return Labeled(self.batch.take(rows), self.labels[rows])

    def cut(self, width: int) -> Labeled:
        """The first `width` columns; no text may be longer."""
        return Labeled(self.batch.cut(width), self.labels)


def pad_labeled(texts: Sequence[np.ndarray], labels: Sequence[int] | np.ndarray, pad_id: int = 0) -> Labeled:
    """Encoded texts as a batch, filled up on the right. ValueError for no texts, or an empty one."""
    return Labeled(pad([(tokens, tokens) for tokens in texts], pad_id=pad_id), np.asarray(labels, np.int64))
