"""A weight that is trained in full beside an adapter: PEFT's `modules_to_save`.

A new head, or a model's norms, have no use for a difference of low rank, so they learn as they are. But an adapter
must come off again and leave the base as it was, to the bit. Therefore the weight that is replaced is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minift.nn.linear import linear
from minift.nn.weight import Arrays, Weight, learns

UNTIE = "give params['lm_head.weight'] a copy of it, and the config tie_word_embeddings=False"


@dataclass(frozen=True)
class Tuned:
    """An array that learns, in place of a frozen `base` of the same shape. ValueError for another shape."""

    base: Weight
    array: np.ndarray

    def __post_init__(self):
        if self.array.shape != tuple(self.base.shape):
            raise ValueError(f"an array of shape {self.array.shape} cannot replace a weight of shape {self.base.shape}")
        if learns(self.base):
            raise ValueError(f"{self.base!r} learns itself, and cannot be trained in full as well")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.array.nbytes

    def linear(self, x, dropout_key=None):
        y, array_vjp = linear(x, self.array)

        def vjp(dy):
            dx, dweight, _ = array_vjp(dy)
            return dx, {"weight": dweight}

        return y, vjp

    def arrays(self) -> Arrays:
        return {"weight": self.array}

    def with_arrays(self, arrays: Arrays) -> Tuned:
        return dataclasses.replace(self, array=arrays["weight"])

    def dense(self, dtype=None) -> np.ndarray:
        return self.array if dtype is None else self.array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"Tuned({self.array.dtype} {self.array.shape} in place of {self.base!r})"


def tied(params: Mapping[str, Any], paths: Iterable[str]) -> str | None:
    """The first of these modules that is table of embeddings and output matrix at once; it has no name of its own. PEFT
    trains a copy for one of the two uses and leaves the other as it was, though the model says that they are one."""
    if any(head in params for head in ("lm_head.weight", "score.weight")):
        return None
    return next((path for path in paths if path.split(".")[-1] in ("embed_tokens", "wte", "lm_head")), None)
