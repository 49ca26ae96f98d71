"""Held-out text for the studies: the language reference's sections that no training here reads."""

from __future__ import annotations

import numpy as np

from minift.data import stdlib_docs
from minift.io import Tokenizer


def held_out_rows(tokenizer: Tokenizer, length: int, count: int) -> list[np.ndarray]:
    """The first `count` rows of `length` tokens of the held-out text in this model's tokens; fewer if it is shorter."""
    text = "\n\n".join(example.text for example in stdlib_docs.embedded().held_out_text)
    return rows_of(text, tokenizer, length)[:count]


def rows_of(text: str, tokenizer: Tokenizer, length: int) -> list[np.ndarray]:
    """A text cut into rows of `length` tokens; what does not fill a row is left out."""
    tokens = np.array(tokenizer.encode(text), np.int32)
    return list(tokens[: len(tokens) // length * length].reshape(-1, length))
