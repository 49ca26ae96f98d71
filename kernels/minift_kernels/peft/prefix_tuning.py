"""Prefix tuning on torch tensors: the twin of `minift.peft.prefix_tuning`, which explains it.

attention of layer l:  keys [K_l; k], values [V_l; v]        K_l, V_l (kv heads, p, head_dim) learn     (1)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from minift.peft.prefix_tuning import STD, TABLE, TRANSFORM, sizes, trainable_parameters, width
from minift_kernels.nn.weight import Params, Tensors, freeze
from minift_kernels.peft.prompt_tuning import check_count, embeddings
from minift_kernels.peft.reparameterization import EMBEDDING, feed_forward, fresh_layers, learning

__all__ = ["STD", "TABLE", "TRANSFORM", "attach", "encode", "sizes", "split", "table", "trainable_parameters", "width"]


def attach(
    params: Params,
    num_virtual_tokens: int,
    *,
    rng: np.random.Generator,
    encoder_hidden_size: int | None = None,
) -> dict[str, Any]:
    """The same parameters, frozen, with a prefix that learns: a table from N(0, STD²), or, with `encoder_hidden_size`,
    the network of that width which makes the table. The reference's numbers, in float32.

    ValueError for a negative number of tokens, a width below 1, or parameters of which some learn behind an adapter."""
    check_count(num_virtual_tokens)
    layers, d = sizes(params)
    if encoder_hidden_size is None:
        drawn = STD * rng.standard_normal((num_virtual_tokens, layers * 2 * d))
        fresh = {TABLE: learning(drawn.astype(np.float32))}
    elif encoder_hidden_size < 1:
        raise ValueError(f"encoder_hidden_size is {encoder_hidden_size}, needed 1 or more")
    else:
        words = rng.standard_normal((num_virtual_tokens, d)).astype(np.float32)
        fresh = {EMBEDDING: learning(words)}
        fresh |= fresh_layers(TRANSFORM, (d, encoder_hidden_size, layers * 2 * d), rng)
    device = embeddings(params).device
    return freeze(params) | {name: a.detach().to(device).requires_grad_() for name, a in fresh.items()}


def encode(arrays: Tensors) -> Float[Tensor, "prefix numbers"]:
    """The table that the network makes."""
    return feed_forward(arrays, TRANSFORM, arrays[EMBEDDING], "tanh")


def split(
    table: Float[Tensor, "prefix numbers"], kv_heads: int, head_dim: int
) -> Float[Tensor, "layers 2 kv_heads prefix head_dim"]:
    """PEFT's table as the keys and values that `llama.backbone` takes; a row is layer after layer, key, then value."""
    layers = table.shape[1] // (2 * kv_heads * head_dim)
    return table.view(len(table), layers, 2, kv_heads, head_dim).permute(1, 2, 3, 0, 4)


def table(
    prefix: Float[Tensor, "layers 2 kv_heads prefix head_dim"],
) -> Float[Tensor, "prefix numbers"]:
    """The inverse of `split`: of a real text's cache, `torch.stack([cache.keys[:, 0], cache.values[:, 0]], dim=1)`."""
    layers, _, kv_heads, p, head_dim = prefix.shape
    return prefix.permute(3, 0, 1, 2, 4).reshape(p, layers * 2 * kv_heads * head_dim)
