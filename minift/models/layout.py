"""Where the tokens of a pass stand: in which slot among the keys, and at which position of their own text."""

from __future__ import annotations

import numpy as np
from jaxtyping import Integer


def slots_and_positions(
    before: Integer[np.ndarray, " batch"], tokens: int, segments: Integer[np.ndarray, "batch tokens"] | None = None
) -> tuple[Integer[np.ndarray, "batch tokens"], Integer[np.ndarray, "batch tokens"]]:
    """The slot of each of the next tokens' keys, behind the `before` ones of a prefix or cache, and its position.

    The two differ in a packed row alone, where positions start again with each text, behind what comes before."""
    slots = before[:, None] + np.arange(tokens)  # (B, T)
    if segments is None:
        return slots, slots
    starts = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return slots, slots - np.maximum.accumulate(np.where(starts, np.arange(tokens), 0), axis=1)
