"""Prompt tuning: p embeddings that no token has, learned, before the text.  (Lester et al. 2021, arXiv 2104.08691, §2)

    h⁰ = [P; E[tokens]]        P (p, d) learns, everything else is frozen                               (1)

p·d numbers learn: 20,480 for five virtual tokens of T5-XXL, d = 4,096. A table that starts from the embeddings of a
text gives exactly the model that has read this text, so training starts from a prompt in words. The paper finds such
starts (class labels, common tokens) better than random ones, except for its largest models.

How this differs from its two neighbors, see `minift.peft.soft_prompt`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from minift.nn.weight import Params, dense, freeze

TABLE = "prompt_embeddings"  # (p, d), as in PEFT's files
WORDS = ("embed_tokens.weight",)  # how the name of the table ends in models that look for a prompt


def attach(
    params: Params,
    num_virtual_tokens: int,
    *,
    rng: np.random.Generator | None = None,
    tokens: Integer[np.ndarray, " tokens"] | None = None,
) -> dict[str, Any]:
    """The same parameters, frozen, with a table of virtual tokens that learns.

    With `tokens`, a text's, a copy of their embeddings, repeated or cut to the number of virtual tokens as PEFT does.
    Else from N(0, σ²), σ that of the model's own table, drawn from `rng`: PEFT's N(0, 1) is many times as large as any
    token of most models. ValueError for a negative number, for an empty text or both text and `rng` or neither, or for
    parameters of which some learn behind an adapter."""
    check_count(num_virtual_tokens)
    if (rng is None) == (tokens is None):
        raise ValueError("needed one of rng (to draw the prompt) and tokens (to copy it from a text)")
    words = embeddings(params)
    if tokens is None:
        assert rng is not None
        table = (words.std() * rng.standard_normal((num_virtual_tokens, words.shape[1]))).astype(words.dtype)
    elif tokens.size == 0:
        raise ValueError("tokens is empty, needed a text of at least one token to copy the prompt from")
    else:
        table = words[np.resize(tokens, num_virtual_tokens)]
    return freeze(params) | {TABLE: table}


def embeddings(params: Params) -> Float[np.ndarray, "vocab d"]:
    """The model's table of token embeddings. ValueError where there is none."""
    for name, weight in params.items():
        if name.endswith(WORDS):
            return dense(weight)
    raise ValueError(f"the model has no table of embeddings: no parameter's name ends in {' or '.join(WORDS)}")


def trainable_parameters(num_virtual_tokens: int, d: int) -> int:
    """p·d."""
    return num_virtual_tokens * d


def check_count(num_virtual_tokens: int) -> None:
    if num_virtual_tokens < 0:
        raise ValueError(f"num_virtual_tokens is {num_virtual_tokens}, needed 0 (which does nothing) or more")
