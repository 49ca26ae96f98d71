"""The GPT-2 architecture on torch tensors: the twin of `minift.models.gpt2`, where the equations are.

The same names, the same parameter dictionary (matrices are (out, in), whatever a file holds), the same order of
operations; autograd walks back. A model moves over by `minift_kernels.params.from_numpy`, as in `llama`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minift.models.gpt2 import (
    EMBEDDING,
    HEAD,
    LINEAR_MODULES,
    POSITIONS,
    Config,
    block_name,
    head_name,
    require_positions,
)
from minift_kernels.models import generation
from minift_kernels.models.layout import slots_and_positions
from minift_kernels.nn.attention import KVCache, attention, causal_mask, tile_map
from minift_kernels.nn.dropout import fold_in
from minift_kernels.nn.embedding import embedding
from minift_kernels.nn.linear import linear
from minift_kernels.nn.mlp import gelu_tanh
from minift_kernels.nn.norms import layer_norm
from minift_kernels.nn.weight import Frozen, Params, dense

__all__ = ["EMBEDDING", "HEAD", "LINEAR_MODULES", "POSITIONS", "Config", "backbone", "block", "block_name", "forward"]
__all__ += ["fuse", "generate", "head_name", "require_positions", "stream"]


# --- one block --------------------------------------------------------------------------------------------------------


def _linear(params, name, x, key, backend):
    """y = x Wᵀ + b."""
    return linear(x, params[f"{name}.weight"], params[f"{name}.bias"], dropout_key=key, backend=backend)


def _norm(params, name, x, config, backend):
    """y = LayerNorm(x)."""
    return layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"], config.layer_norm_epsilon, backend=backend)


def _self_attention(params, name, x, visible, config, layer, cache, key, tiles, backend):
    """Attention(x) = concat_h(attention(q_h, k_h, v_h)) W_projᵀ + b, q, k, v the thirds of x W_attnᵀ + b."""

    def split(x):  # (B, T, d) -> (B, heads, T, d / heads)
        return x.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)

    q, k, v = map(split, _linear(params, f"{name}c_attn", x, key(0), backend).chunk(3, dim=-1))
    if cache is not None:
        k, v = cache.write(layer, k, v)
    context = attention(q, k, v, visible, tiles=tiles, backend=backend)
    return _linear(params, f"{name}c_proj", context.transpose(1, 2).flatten(2), key(1), backend)


def _mlp(params, name, x, key, backend):
    """MLP(x) = gelu(x W_fcᵀ + b) W_projᵀ + b."""
    h = gelu_tanh(_linear(params, f"{name}c_fc", x, key(2), backend), backend=backend)
    return _linear(params, f"{name}c_proj", h, key(3), backend)


def block(params, x, visible, config, layer, cache=None, dropout_key=None, *, tiles=None, backend=None):
    """Attention, then the MLP, each added to the running sum. `tiles`: what `tile_map` made of `visible`."""
    name = block_name(layer)
    layer_key = None if dropout_key is None else fold_in(dropout_key, layer)

    def key(module):
        return None if layer_key is None else fold_in(layer_key, module)

    attended = _norm(params, f"{name}ln_1", x, config, backend)
    x = x + _self_attention(params, f"{name}attn.", attended, visible, config, layer, cache, key, tiles, backend)
    return x + _mlp(params, f"{name}mlp.", _norm(params, f"{name}ln_2", x, config, backend), key, backend)


# --- the trunk --------------------------------------------------------------------------------------------------------


def backbone(
    params: Params,
    inputs: Integer[Tensor, "batch tokens"] | Float[Tensor, "batch tokens d"],
    config: Config,
    *,
    lengths: Integer[Tensor, " batch"] | None = None,
    segments: Integer[Tensor, "batch tokens"] | None = None,
    cache: KVCache | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch tokens d"]:
    """The model without its head: tokens, or embeddings of them without their positions, to hidden states.

    The options are the reference's; `dtype` is the type of the activations, by default that of the embeddings, and a
    pass with a cache is run under `torch.no_grad()`, both as in `llama.backbone`. ValueError and IndexError as in the
    reference (on a GPU, IndexError as in `nn.embedding`)."""
    from_tokens = not inputs.is_floating_point()
    if inputs.ndim != (2 if from_tokens else 3) or inputs.numel() == 0:
        needed = "(batch, tokens)" if from_tokens else "(batch, tokens, hidden_size)"
        raise ValueError(f"the input has shape {tuple(inputs.shape)}, needed {needed} with at least one token")
    batch, tokens = inputs.shape[:2]
    before = torch.zeros(batch, dtype=torch.int64) if cache is None else cache.lengths  # on the CPU
    keys = int(before.max()) + tokens
    slots, positions = slots_and_positions(before.to(inputs.device), tokens, segments)
    if keys > config.max_position_embeddings:  # otherwise no text can be too long, and nobody waits for the GPU to look
        require_positions(config, int(positions.max()) + 1)
    visible = causal_mask(slots, keys, segments)
    words = embedding(inputs, params[EMBEDDING], backend=backend) if from_tokens else inputs
    x = words + embedding(positions, params[POSITIONS], backend=backend)  # (B, T, d)
    x = x if dtype is None else x.to(dtype)
    tiles = tile_map(visible, config.head_dim, x.dtype, backend=backend)
    for layer in range(config.num_hidden_layers):
        rest = visible, config, layer, cache, dropout_key
        how: dict[str, Any] = {"tiles": tiles, "backend": backend}
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, params, x, *rest, **how, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(params, x, *rest, **how)
    hidden = _norm(params, "transformer.ln_f", x, config, backend)
    if cache is not None:
        cache.advance(torch.full((batch,), tokens) if lengths is None else lengths)
    return hidden


def forward(
    params: Params,
    inputs: Integer[Tensor, "batch tokens"] | Float[Tensor, "batch tokens d"],
    config: Config,
    **options: Any,
) -> Float[Tensor, "batch tokens vocab"]:
    """The language model: the trunk and its head. `options` are those of `backbone`."""
    hidden = backbone(params, inputs, config, **options)
    return linear(hidden, params[head_name(config)], backend=options.get("backend"))


def fuse(params: Params) -> dict[str, Any]:
    """The same model to generate with: nothing learns and every weight is dense. (`c_attn` is one matrix already.)"""
    return {name: Frozen(dense(weight).detach()) for name, weight in params.items()}


def stream(
    params: Params,
    tokens: Integer[Tensor, "batch tokens"],
    config: Config,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    *,
    backend: str | None = None,
    **options: Any,
) -> Iterator[Integer[Tensor, " batch"]]:
    """The continuation of each prompt, one token a row at a time. `options` are those of `generation.stream`.

    ValueError where prompt and continuation do not fit the table of positions."""
    capacity = tokens.shape[1] + max_new_tokens
    require_positions(config, tokens.shape[1] + max(max_new_tokens - 1, 0))  # the last token is not read
    table = dense(params[EMBEDDING])
    shape = config.num_hidden_layers, len(tokens), config.num_attention_heads, capacity, config.head_dim
    cache = KVCache(*shape, table.dtype, device=table.device)

    def next_logits(text, lengths):
        hidden = backbone(params, text.to(table.device), config, lengths=lengths, cache=cache, backend=backend)
        last = hidden[torch.arange(len(text)), lengths - 1]  # one row a text reaches the head, not the whole prompt
        return linear(last, params[head_name(config)], backend=backend)

    return generation.stream(next_logits, tokens, max_new_tokens, temperature, rng, **options)


def generate(
    params: Params,
    tokens: Integer[Tensor, "batch tokens"],
    config: Config,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Integer[Tensor, "batch longer"]:
    """The prompts, each followed by its continuation: (B, T + new). `options` are those of `stream`."""
    new = stream(params, tokens, config, max_new_tokens, temperature, rng, **options)
    return torch.cat([tokens, *(column[:, None].to(tokens.dtype) for column in new)], dim=1)
