"""An encoder in place of a table, on torch tensors: the twin of `minift.peft.reparameterization`, which explains it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minift.peft import reparameterization as reference
from minift.peft.reparameterization import EMBEDDING, ENCODER, Activation
from minift_kernels.nn.linear import linear
from minift_kernels.nn.weight import Tensors

__all__ = ["EMBEDDING", "ENCODER", "Activation", "feed_forward", "fresh_layers", "learning"]


def feed_forward(
    arrays: Tensors, path: str, x: Float[Tensor, "*rows d_in"], activation: Activation
) -> Float[Tensor, "*rows d_out"]:
    """Equation (1) for the layers {path}.0, .2, .4, … (the odd ones are the activations)."""
    layers = [f"{path}.{i}" for i in range(0, len(arrays), 2) if f"{path}.{i}.weight" in arrays]
    for index, layer in enumerate(layers):
        if index:
            x = torch.relu(x) if activation == "relu" else torch.tanh(x)
        x = linear(x, arrays[f"{layer}.weight"], arrays[f"{layer}.bias"])
    return x


def fresh_layers(path: str, widths: Sequence[int], rng: np.random.Generator) -> Tensors:
    """Weights and biases of layers of these widths, the reference's numbers, in float32 on the CPU."""
    return {name: learning(array) for name, array in reference.fresh_layers(path, widths, rng).items()}


def learning(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """A copy that asks for a gradient."""
    return torch.tensor(array, device=device).requires_grad_()
