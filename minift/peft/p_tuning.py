"""P-tuning: prompt tuning through a network that ties virtual tokens together.  (Liu et al. 2021, arXiv 2103.10385, §3)

    h⁰ = [encoder(E); E[tokens]]        E (p, d) and the encoder learn                                  (1)
    LSTM   encoder(E) = W₂ relu(W₁ [LSTM→(E), LSTM←(E)] + b₁) + b₂                                      (2)
    MLP    encoder(E) = W₃ relu(W₂ relu(W₁ E + b₁) + b₂) + b₃                                           (3)

Discrete words depend on each other, and numbers that learn alone do not: hence the recurrent network over the prompt
(two layers in both directions). The second form is what later implementations take, and PEFT's default. The paper also
puts virtual tokens between those of the text; here, as in PEFT, they stand before it.

The encoder reads nothing but E, so `soft_prompt.fold` replaces it by its output, a table of p·d numbers, after which
nothing distinguishes this from prompt tuning. Names and shapes are those of PEFT's `PromptEncoder`.

How this differs from its two neighbors, see `minift.peft.soft_prompt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from minift.nn.lstm import bidirectional_lstm
from minift.nn.weight import Arrays, Params, freeze
from minift.peft.prompt_tuning import check_count, embeddings
from minift.peft.reparameterization import EMBEDDING, ENCODER, feed_forward, fresh_layers

HEAD, LSTM = f"{ENCODER}mlp_head", f"{ENCODER}lstm_head"
PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
Encoder = Literal["MLP", "LSTM"]


def attach(
    params: Params,
    num_virtual_tokens: int,
    *,
    rng: np.random.Generator,
    encoder: Encoder = "MLP",
    encoder_hidden_size: int | None = None,
    encoder_num_layers: int = 2,
) -> dict[str, Any]:
    """The same parameters, frozen, with an encoder that learns. `encoder_hidden_size` is by default the model's width;
    `encoder_num_layers` are those of the LSTM, the MLP always has three.

    E is drawn from N(0, 1), the rest as torch does: uniform in ±1/√in, in the LSTM in ±1/√H. ValueError for a number
    out of range, another encoder, or parameters of which some learn behind an adapter."""
    frozen, d = freeze(params), embeddings(params).shape[1]
    return frozen | fresh(
        d,
        num_virtual_tokens,
        rng=rng,
        encoder=encoder,
        encoder_hidden_size=encoder_hidden_size,
        encoder_num_layers=encoder_num_layers,
    )


def fresh(
    d: int,
    num_virtual_tokens: int,
    *,
    rng: np.random.Generator,
    encoder: Encoder,
    encoder_hidden_size: int | None,
    encoder_num_layers: int,
) -> Arrays:
    """E and the encoder before training, for a model of width d. ValueError as `attach`."""
    check_count(num_virtual_tokens)
    if encoder not in get_args(Encoder):
        raise ValueError(f"encoder is {encoder!r}, needed one of {get_args(Encoder)}")
    hidden = d if encoder_hidden_size is None else encoder_hidden_size
    for name, value in (("encoder_hidden_size", hidden), ("encoder_num_layers", encoder_num_layers)):
        if value < 1:
            raise ValueError(f"{name} is {value}, needed 1 or more")
    drawn = {EMBEDDING: rng.standard_normal((num_virtual_tokens, d)).astype(np.float32)}
    if encoder == "MLP":
        return drawn | fresh_layers(HEAD, (d, hidden, hidden, d), rng)
    bound = 1 / math.sqrt(hidden)
    for layer in range(encoder_num_layers):
        d_in = 2 * hidden if layer else d
        shapes = ((4 * hidden, d_in), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
        for names in names_of(layer):
            parts = (rng.uniform(-bound, bound, shape).astype(np.float32) for shape in shapes)
            drawn |= dict(zip(names, parts, strict=True))
    return drawn | fresh_layers(HEAD, (2 * hidden, 2 * hidden, d), rng)


def encode(arrays: Arrays) -> tuple[Float[np.ndarray, "prompt d"], Callable]:
    """Equation (2) or (3), whichever the arrays are for;  `vjp(dtable) -> {name: gradient}`.

    Once a batch, since every text gets the same prompt: PEFT runs it once a text."""
    x, layers = arrays[EMBEDDING], sum(name.endswith("_reverse") for name in arrays) // len(PARTS)
    x, pullbacks = x[None], []
    for layer in range(layers):
        ahead, back = (tuple(arrays[name] for name in names) for names in names_of(layer))
        x, layer_vjp = bidirectional_lstm(x, ahead, back)
        pullbacks.append(layer_vjp)
    made, head_vjp = feed_forward(arrays, HEAD, x[0], "relu")

    def vjp(dtable):
        dx, gradients = head_vjp(dtable)
        dx = dx[None]
        for layer in reversed(range(layers)):
            dx, *both = pullbacks[layer](dx)
            for names, cotangents in zip(names_of(layer), both, strict=True):
                gradients |= dict(zip(names, cotangents, strict=True))
        return {EMBEDDING: dx[0]} | gradients

    return made, vjp


def names_of(layer: int) -> tuple[list[str], list[str]]:
    """torch's names for the weights of one layer of the LSTM, ahead and back."""
    ahead = [f"{LSTM}.{part}_l{layer}" for part in PARTS]
    return ahead, [f"{name}_reverse" for name in ahead]
