"""Prompt tuning on torch tensors: the twin of `minift.peft.prompt_tuning`, which explains it.

h⁰ = [P; E[tokens]]        P (p, d) learns, everything else is frozen                                   (1)

The prompt learns in float32, whatever the type of the model's own table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from minift.peft.prompt_tuning import TABLE, WORDS, check_count, trainable_parameters
from minift_kernels import backend as backends
from minift_kernels.nn.weight import Params, dense, freeze

__all__ = ["TABLE", "attach", "check_count", "embeddings", "trainable_parameters"]


def attach(
    params: Params,
    num_virtual_tokens: int,
    *,
    rng: np.random.Generator | None = None,
    tokens: Integer[Tensor, " tokens"] | None = None,
) -> dict[str, Any]:
    """The same parameters, frozen, with a table of virtual tokens that learns.

    With `tokens`, a text's, a copy of their embeddings, repeated or cut to the number of virtual tokens as PEFT does.
    Else from N(0, σ²), σ that of the model's own table, drawn from `rng`. ValueError as in the reference."""
    check_count(num_virtual_tokens)
    if (rng is None) == (tokens is None):
        raise ValueError("needed one of rng (to draw the prompt) and tokens (to copy it from a text)")
    words = backends.widened(embeddings(params).detach())
    if tokens is None:
        assert rng is not None
        drawn = torch.from_numpy(rng.standard_normal((num_virtual_tokens, words.shape[1])))
        table = (words.std(correction=0).cpu() * drawn).to(words)
    elif tokens.numel() == 0:
        raise ValueError("tokens is empty, needed a text of at least one token to copy the prompt from")
    else:
        index = torch.arange(num_virtual_tokens, device=tokens.device) % tokens.numel()
        table = words[tokens[index].to(words.device)]
    return freeze(params) | {TABLE: table.clone().requires_grad_()}


def embeddings(params: Params) -> Float[Tensor, "vocab d"]:
    """The model's table of token embeddings. ValueError where there is none."""
    for name, weight in params.items():
        if name.endswith(WORDS):
            return dense(weight)
    raise ValueError(f"the model has no table of embeddings: no parameter's name ends in {' or '.join(WORDS)}")
