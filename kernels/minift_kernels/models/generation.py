"""From logits to text on torch tensors: the twin of `minift.models.generation`, which chooses the tokens.

A model computes on its device, a token is chosen on the host, from logits in float32 and by the reference's code: with
the same `rng` the texts differ only where two logits are closer than their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from minift.models import generation as reference


def stream(
    next_logits: Callable[[Tensor, Tensor], Tensor],
    tokens: Integer[Tensor, "batch tokens"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    lengths: Integer[Tensor, " batch"] | None = None,
) -> Iterator[Integer[Tensor, " batch"]]:
    """Yield the next token of every row, step by step, until `max_new_tokens` or until every row has stopped.

    `next_logits(text, lengths) -> (batch, vocab)` gets the text that is new on the device of `tokens`, and lengths on
    the CPU; no gradient is kept. ValueError as in the reference."""

    def on_the_host(text, lengths):
        text, lengths = (torch.from_numpy(np.asarray(a, np.int64)) for a in (text, lengths))
        with torch.no_grad():
            return next_logits(text.to(tokens.device), lengths).float().cpu().numpy()

    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "stop_tokens": stop_tokens}
    options["lengths"] = None if lengths is None else np.asarray(lengths)
    prompts = tokens.cpu().numpy()
    for chosen in reference.stream(on_the_host, prompts, max_new_tokens, temperature, rng, **options):
        yield torch.from_numpy(chosen).to(tokens.device)
