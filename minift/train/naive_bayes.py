"""What counting words comes to: the peer that a neural classifier must beat to be worth its seconds.

    label = argmax_c  log P(c) + Σ_{words w of the text} log P(w | c)                                   (1)
    P(w | c) = (n_wc + 1) / (n_c + V)        P(c) = (texts with label c) / (all texts)                  (2)

Multinomial naive Bayes with Laplace's rule of succession: n_wc counts the word in the training texts of class c, n_c
all words there, V the different words. A word that no training text has says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class NaiveBayes:
    """Log-probabilities of (2)."""

    vocabulary: dict[str, int]
    log_prior: Float[np.ndarray, " classes"]
    log_likelihood: Float[np.ndarray, "vocab classes"]

    def predict(self, texts: Sequence[str]) -> Integer[np.ndarray, " texts"]:
        """Equation (1)."""
        counts = _counts(texts, self.vocabulary)
        return np.argmax(counts @ self.log_likelihood + self.log_prior, axis=1)


def fit(texts: Sequence[str], labels: Integer[np.ndarray, " texts"], classes: int) -> NaiveBayes:
    """Count. ValueError where a class has no text."""
    texts_of = np.bincount(labels, minlength=classes)
    if not texts_of.all():
        raise ValueError(f"class {int(np.argmin(texts_of))} has no text, needed one of each")
    vocabulary = {word: i for i, word in enumerate(sorted({word for text in texts for word in words(text)}))}
    n = _counts(texts, vocabulary).T @ np.eye(classes)[labels]  # (V, classes)
    return NaiveBayes(
        vocabulary,
        np.log(texts_of / len(texts)),
        np.log((n + 1) / (n.sum(axis=0) + len(vocabulary))),
    )


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _counts(texts: Sequence[str], vocabulary: dict[str, int]) -> Float[np.ndarray, "texts vocab"]:
    counts = np.zeros((len(texts), len(vocabulary)))
    for row, text in zip(counts, texts, strict=True):
        np.add.at(row, [vocabulary[word] for word in words(text) if word in vocabulary], 1)
    return counts
