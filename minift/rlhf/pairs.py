"""Comparisons as a batch: two answers to one prompt, of which somebody preferred the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from minift.data.batches import Batch, Encoded, pad


@dataclass(frozen=True)
class Pairs:
    """P comparisons: rows 2i and 2i + 1 of `batch` are the chosen and the rejected answer of pair i.

    Both go through the model in one pass. `margin` says by how much the first is better, where a rater said so;
    `reference` holds the log-probabilities of both answers under the reference model (`dpo.reference_log_probs`)."""

    batch: Batch
    margin: Float[np.ndarray, " pairs"] | None = None
    reference: Float[np.ndarray, "pairs 2"] | None = None

    def __post_init__(self):
        if len(self.batch.tokens) % 2:
            raise ValueError(f"a batch of {len(self.batch.tokens)} rows, needed two for each pair")

    def __len__(self) -> int:
        return len(self.batch.tokens) // 2

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        return self.batch.lengths

    @property
    def count(self) -> int:
        """What the summed loss of a step is divided by: each pair weighs the same, however long it is."""
        return len(self)

    def take(self, pairs: Int[np.ndarray, " p"]) -> Pairs:
        """These pairs, in this order."""
        rows = np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)
        margin, reference = (None if a is None else a[pairs] for a in (self.margin, self.reference))
        return Pairs(self.batch.take(rows), margin, reference)

    def cut(self, width: int) -> Pairs:
        """The first `width` columns; no row may be longer."""
        return dataclasses.replace(self, batch=self.batch.cut(width))


def pad_pairs(
    chosen: Sequence[Encoded],
    rejected: Sequence[Encoded],
    *,
    margin: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    pad_id: int = 0,
) -> Pairs:
    """A batch of pairs, filled up on the right. ValueError where their numbers differ."""
    if len(chosen) != len(rejected):
        raise ValueError(
            f"{len(chosen)} chosen and {len(rejected)} rejected answers: needed one of each for every pair"
        )
    both = [answer for pair in zip(chosen, rejected, strict=True) for answer in pair]
    return Pairs(pad(both, pad_id=pad_id), margin, reference)
