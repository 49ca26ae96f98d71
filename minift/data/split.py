"""What is held out for evaluation appears in no training text.

The side that an example falls on is decided by a hash of its *answer*, with case, white space and punctuation
normalized away, so that

- it is fixed: no seed, no file, and another order or a larger set moves nobody to the other side;
- two questions with one answer land together. Split the docstrings of the standard library by name instead, and an
  eighth of the answers that are held out stand word for word in training.

A hash cannot see that a short answer is part of a longer text. So after it, what is held out and still stands
somewhere in the training text is dropped: from the evaluation, which gets a little smaller and stays clean.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from minift.data.example import Example

HELD_OUT = 0.1  # the share of answers that is kept for evaluation

_NOT_WORD = re.compile(r"[\W_]+")


def normalize(text: str) -> str:
    """The words alone, in lower case, one blank between them: " Return  the `x`!" and "return the X" are equal.

    Text without any letter or digit is only case-folded and its white space collapsed: "+" is not "-"."""
    folded = text.casefold()
    return _NOT_WORD.sub(" ", folded).strip() or " ".join(folded.split())


def is_held_out(answer: str, share: float = HELD_OUT) -> bool:
    """Whether this answer is for evaluation: the first 8 bytes of sha256(normalized answer), as a fraction, < share."""
    digest = hashlib.sha256(normalize(answer).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def train_and_held_out(
    examples: Iterable[Example], other_training_text: Iterable[str] = (), share: float = HELD_OUT
) -> tuple[list[Example], list[Example]]:
    """The two sides, each in the order given.

    An example is held out if its answer's hash says so *and* its normalized answer is no run of words of the
    training side (its questions, answers and texts) or of `other_training_text`; if it is one, it is on neither
    side."""
    train: list[Example] = []
    chosen: list[Example] = []
    for example in examples:
        (chosen if is_held_out(example.answer, share) else train).append(example)
    corpus = searchable([*(e.everything for e in train), *other_training_text])
    return train, [e for e in chosen if not stands_in(e.answer, corpus)]


def searchable(texts: Iterable[str]) -> str:
    """All texts normalized in one string, for `stands_in`; a line break keeps matches within one text."""
    return "\n".join(f" {normalize(text)} " for text in texts)


def stands_in(text: str, corpus: str) -> bool:
    """Whether the normalized text is a run of whole words in a `searchable` corpus."""
    return f" {normalize(text)} " in corpus
