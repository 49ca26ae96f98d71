"""Train an encoder in place of a table, and keep the table that it makes.

    table = W_n φ(… φ(W_0 E + b_0) …) + b_n        E: one row a virtual token                           (1)

Li & Liang (2021, §4.3) found a prefix hard to train directly: it was unstable and ended a little worse. Behind a shared
network all rows move together. The network reads no text, so after training its output is a constant: it is computed
once, kept, and the network is dropped. Names are those of torch's `Sequential`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float

from minift.nn.linear import linear
from minift.nn.weight import Arrays

ENCODER = "prompt_encoder."  # PEFT's name, without that of the adapter behind it
EMBEDDING = f"{ENCODER}embedding.weight"
Activation = Literal["relu", "tanh"]


def feed_forward(
    arrays: Arrays, path: str, x: Float[np.ndarray, "*rows d_in"], activation: Activation
) -> tuple[Float[np.ndarray, "*rows d_out"], Callable]:
    """Equation (1) for the layers {path}.0, .2, .4, … (the odd ones are the activations);  `vjp(dy) -> dx, gradients`.

    `gradients` are {name: array} for the weight and bias of every layer."""
    layers = [f"{path}.{i}" for i in range(0, len(arrays), 2) if f"{path}.{i}.weight" in arrays]
    pullbacks, activated = [], []
    for index, layer in enumerate(layers):
        if index:
            x = np.maximum(x, 0) if activation == "relu" else np.tanh(x)
            activated.append(x)
        x, linear_vjp = linear(x, arrays[f"{layer}.weight"], arrays[f"{layer}.bias"])
        pullbacks.append(linear_vjp)

    def vjp(dy):
        found: Arrays = {}
        for index in reversed(range(len(layers))):
            dy, dweight, dbias = pullbacks[index](dy)
            found |= {f"{layers[index]}.weight": dweight, f"{layers[index]}.bias": dbias}
            if index:
                h = activated[index - 1]
                dy = dy * ((h > 0) if activation == "relu" else (1 - h * h))
        return dy, found

    return x, vjp


def fresh_layers(path: str, widths: Sequence[int], rng: np.random.Generator) -> Arrays:
    """Weights and biases of layers of these widths, uniform in ±1/√in as torch draws them, in float32."""
    arrays = {}
    for index, (d_in, d_out) in enumerate(pairwise(widths)):
        layer, bound = f"{path}.{2 * index}", 1 / math.sqrt(d_in)
        arrays[f"{layer}.weight"] = rng.uniform(-bound, bound, (d_out, d_in)).astype(np.float32)
        arrays[f"{layer}.bias"] = rng.uniform(-bound, bound, d_out).astype(np.float32)
    return arrays
