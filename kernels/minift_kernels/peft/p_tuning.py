"""P-tuning on torch tensors: the twin of `minift.peft.p_tuning`, which explains it.

h⁰ = [encoder(E); E[tokens]]        E (p, d) and the encoder learn                                      (1)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from minift.peft import p_tuning as reference
from minift.peft.p_tuning import HEAD, PARTS, Encoder, names_of
from minift_kernels.nn.lstm import bidirectional_lstm
from minift_kernels.nn.weight import Params, Tensors, freeze
from minift_kernels.peft.prompt_tuning import embeddings
from minift_kernels.peft.reparameterization import EMBEDDING, feed_forward, learning

__all__ = ["Encoder", "attach", "encode", "names_of"]


def attach(
    params: Params,
    num_virtual_tokens: int,
    *,
    rng: np.random.Generator,
    encoder: Encoder = "MLP",
    encoder_hidden_size: int | None = None,
    encoder_num_layers: int = 2,
) -> dict[str, Any]:
    """The same parameters, frozen, with an encoder that learns, in float32: the reference's numbers.

    `encoder_hidden_size` is by default the model's width; `encoder_num_layers` are those of the LSTM, the MLP always
    has three. ValueError for a number out of range, another encoder, or parameters of which some learn behind an
    adapter."""
    frozen, words = freeze(params), embeddings(params)
    fresh = reference.fresh(
        words.shape[1],
        num_virtual_tokens,
        rng=rng,
        encoder=encoder,
        encoder_hidden_size=encoder_hidden_size,
        encoder_num_layers=encoder_num_layers,
    )
    return frozen | {name: learning(array, words.device) for name, array in fresh.items()}


def encode(arrays: Tensors) -> Float[Tensor, "prompt d"]:
    """Equation (2) or (3) of the reference, whichever the tensors are for. Once a batch, for all texts."""
    x, layers = arrays[EMBEDDING][None], sum(name.endswith("_reverse") for name in arrays) // len(PARTS)
    for layer in range(layers):
        ahead, back = (tuple(arrays[name] for name in names) for names in names_of(layer))
        x = bidirectional_lstm(x, ahead, back)
    return feed_forward(arrays, HEAD, x[0], "relu")
