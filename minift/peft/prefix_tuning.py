"""Prefix tuning: learned keys and values before the text, in every layer.    (Li & Liang 2021, arXiv 2101.00190, §4.2)

    attention of layer l:  keys [K_l; k], values [V_l; v]        K_l, V_l (kv heads, p, head_dim) learn  (1)

There are no virtual tokens whose hidden states would be computed: each layer finds p more slots in its cache, as if the
text before had just been read. So a prefix costs no feed-forward work, and says to every layer something else than
what the layer below would have computed; 2·L·p·d numbers learn (d: kv heads · head_dim, less than the model's width
where query heads share them). Keys are stored as the cache holds them, which is after RoPE: they are not rotated again.
A prefix of zeros is not nothing: a zero key takes its share of the attention.

The paper trains (1) through a network, table = W₂ tanh(W₁ E + b₁) + b₂, with E (p, d), and drops it afterwards
(`minift.peft.reparameterization`); PEFT's switch for it is `prefix_projection`.

How this differs from its two neighbors, see `minift.peft.soft_prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from minift.nn.weight import Arrays, Params, freeze
from minift.peft.prompt_tuning import check_count
from minift.peft.reparameterization import EMBEDDING, ENCODER, feed_forward, fresh_layers

TABLE = "prefix_embeddings"  # (p, L · 2 · kv heads · head_dim), laid out as PEFT's files
TRANSFORM = f"{ENCODER}transform"
STD = 0.02  # of a fresh table; PEFT's 1 is more than most real keys and values


def attach(
    params: Params,
    num_virtual_tokens: int,
    *,
    rng: np.random.Generator,
    encoder_hidden_size: int | None = None,
) -> dict[str, Any]:
    """The same parameters, frozen, with a prefix that learns: a table from N(0, STD²), or, with `encoder_hidden_size`,
    the network of that width which makes the table. (To start from a text, put `table(prefix)` of its cache there.)

    ValueError for a negative number of tokens, a width below 1, or parameters of which some learn behind an adapter."""
    check_count(num_virtual_tokens)
    layers, d = sizes(params)
    if encoder_hidden_size is None:
        fresh = {TABLE: (STD * rng.standard_normal((num_virtual_tokens, layers * 2 * d))).astype(np.float32)}
    elif encoder_hidden_size < 1:
        raise ValueError(f"encoder_hidden_size is {encoder_hidden_size}, needed 1 or more")
    else:
        words = rng.standard_normal((num_virtual_tokens, d)).astype(np.float32)
        fresh = {EMBEDDING: words} | fresh_layers(TRANSFORM, (d, encoder_hidden_size, layers * 2 * d), rng)
    return freeze(params) | fresh


def encode(arrays: Arrays) -> tuple[Float[np.ndarray, "prefix numbers"], Callable]:
    """The table that the network makes;  `vjp(dtable) -> {name: gradient}`."""
    made, layers_vjp = feed_forward(arrays, TRANSFORM, arrays[EMBEDDING], "tanh")

    def vjp(dtable):
        dwords, gradients = layers_vjp(dtable)
        return {EMBEDDING: dwords} | gradients

    return made, vjp


def split(
    table: Float[np.ndarray, "prefix numbers"], kv_heads: int, head_dim: int
) -> Float[np.ndarray, "layers 2 kv_heads prefix head_dim"]:
    """PEFT's table as the keys and values that `llama.backbone` takes; a row is layer after layer, key, then value."""
    layers = table.shape[1] // (2 * kv_heads * head_dim)
    return table.reshape(len(table), layers, 2, kv_heads, head_dim).transpose(1, 2, 3, 0, 4)


def table(
    prefix: Float[np.ndarray, "layers 2 kv_heads prefix head_dim"],
) -> Float[np.ndarray, "prefix numbers"]:
    """The inverse of `split`: of a real text's cache, `np.stack([cache.keys[:, 0], cache.values[:, 0]], axis=1)`."""
    layers, _, kv_heads, p, head_dim = prefix.shape
    return prefix.transpose(3, 0, 1, 2, 4).reshape(p, layers * 2 * kv_heads * head_dim)


def trainable_parameters(num_virtual_tokens: int, num_layers: int, d: int) -> int:
    """2·L·p·d, with d = kv heads · head_dim; without the network, which is not kept."""
    return 2 * num_layers * num_virtual_tokens * d


def width(params: Mapping[str, Any]) -> int:
    """Numbers of one virtual token: 2 · L · kv heads · head_dim. ValueError where the model has no key projections."""
    layers, d = sizes(params)
    return layers * 2 * d


def sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """Number of layers, and numbers of one layer's key."""
    keys = [weight.shape[0] for name, weight in params.items() if name.endswith("self_attn.k_proj.weight")]
    if not keys:
        raise ValueError("the model has no self_attn.k_proj.weight, whose shape says how long a key is")
    return len(keys), keys[0]
