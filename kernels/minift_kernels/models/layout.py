"""Where the tokens of a pass stand, on torch tensors: the twin of `minift.models.layout`."""

from __future__ import annotations

import torch
from jaxtyping import Integer
from torch import Tensor


def slots_and_positions(
    before: Integer[Tensor, " batch"], tokens: int, segments: Integer[Tensor, "batch tokens"] | None = None
) -> tuple[Integer[Tensor, "batch tokens"], Integer[Tensor, "batch tokens"]]:
    """The slot of each of the next tokens' keys, behind the `before` ones of a prefix or cache, and its position.

    The two differ in a packed row alone, where positions start again with each text. All on one device."""
    index = torch.arange(tokens, device=before.device)
    slots = before[:, None] + index  # (B, T)
    if segments is None:
        return slots, slots
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return slots, slots - torch.where(starts, index, 0).cummax(dim=1).values
