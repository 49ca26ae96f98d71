"""The BERT architecture on torch tensors: the twin of `minift.models.bert`, where the equations are.

The same names, the same parameter dictionary, the same order of operations; autograd walks back. An encoder moves over
by `minift_kernels.params.from_numpy`, as in `llama`. Real tokens see real tokens: padding takes part in no sum.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minift.models.bert import EMBEDDING_NORM, POOLER, POSITIONS, TYPES, WORDS, Config
from minift_kernels.nn.attention import attention, tile_map
from minift_kernels.nn.dropout import fold_in
from minift_kernels.nn.embedding import embedding
from minift_kernels.nn.linear import linear
from minift_kernels.nn.mlp import gelu
from minift_kernels.nn.norms import layer_norm
from minift_kernels.nn.pooling import mean_pool, unit_length
from minift_kernels.nn.weight import Params

__all__ = ["EMBEDDING_NORM", "POOLER", "POSITIONS", "TYPES", "WORDS", "Config", "backbone", "block", "embed", "pool"]


# --- one block --------------------------------------------------------------------------------------------------------


def _linear(params, name, x, key, backend):
    """y = x Wᵀ + b."""
    return linear(x, params[f"{name}.weight"], params[f"{name}.bias"], dropout_key=key, backend=backend)


def _norm(params, name, x, config, backend):
    """y = LayerNorm(x)."""
    return layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"], config.layer_norm_eps, backend=backend)


def _self_attention(params, name, x, visible, config, key, tiles, backend):
    """Attention(x) = concat_h(attention(q_h, k_h, v_h)) W_oᵀ + b_o."""

    def head(module, number):  # (B, T, d) -> (B, heads, T, d / heads)
        y = _linear(params, f"{name}self.{module}", x, key(number), backend)
        return y.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)

    q, k, v = head("query", 0), head("key", 1), head("value", 2)
    context = attention(q, k, v, visible, tiles=tiles, backend=backend)
    return _linear(params, f"{name}output.dense", context.transpose(1, 2).flatten(2), key(3), backend)


def _mlp(params, name, x, key, backend):
    """MLP(x) = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂."""
    h = gelu(_linear(params, f"{name}intermediate.dense", x, key(4), backend), backend=backend)  # (B, T, f)
    return _linear(params, f"{name}output.dense", h, key(5), backend)


def block(params, x, visible, config, layer, dropout_key=None, *, tiles=None, backend=None):
    """Attention, then the MLP, each added and then normalized. `tiles`: what `tile_map` made of `visible`."""
    name = f"encoder.layer.{layer}."
    layer_key = None if dropout_key is None else fold_in(dropout_key, layer)

    def key(module):
        return None if layer_key is None else fold_in(layer_key, module)

    a = _self_attention(params, f"{name}attention.", x, visible, config, key, tiles, backend)
    x = _norm(params, f"{name}attention.output.LayerNorm", x + a, config, backend)
    return _norm(params, f"{name}output.LayerNorm", x + _mlp(params, name, x, key, backend), config, backend)


# --- the trunk --------------------------------------------------------------------------------------------------------


def backbone(
    params: Params,
    tokens: Integer[Tensor, "batch tokens"],
    config: Config,
    *,
    lengths: Integer[Tensor, " batch"] | None = None,
    token_types: Integer[Tensor, "batch tokens"] | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch tokens d"]:
    """The encoder: tokens to hidden states; those of padding mean nothing.

    The options are the reference's. `dtype` is the type of the activations, by default that of the embeddings, as in
    `llama.backbone`. ValueError and IndexError as in the reference (on a GPU, IndexError as in `nn.embedding`)."""
    batch, width = tokens.shape
    if not tokens.numel() or width > config.max_position_embeddings:
        found = f"the input has shape {tuple(tokens.shape)}, needed (batch, tokens) with 1 to"
        raise ValueError(f"{found} {config.max_position_embeddings} tokens: cut the text")
    x = _embeddings(params, tokens, token_types, config, dtype, backend)
    index = torch.arange(width, device=tokens.device)
    real = index[None] < (
        width if lengths is None else lengths.to(tokens.device)[:, None]
    )  # (B, T), or the same for all
    visible = real[:, None, :].expand(batch, width, width)
    tiles = tile_map(visible, config.hidden_size // config.num_attention_heads, x.dtype, backend=backend)
    for layer in range(config.num_hidden_layers):
        rest = visible, config, layer, dropout_key
        how: dict[str, Any] = {"tiles": tiles, "backend": backend}
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, params, x, *rest, **how, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(params, x, *rest, **how)
    return x


def pool(
    params: Params, hidden: Float[Tensor, "batch tokens d"], *, backend: str | None = None
) -> Float[Tensor, "batch d"]:
    """What a classifier reads: tanh(hidden of [CLS] W_pᵀ + b_p)."""
    return torch.tanh(_linear(params, POOLER, hidden[:, 0], None, backend))


def embed(
    params: Params,
    tokens: Integer[Tensor, "batch tokens"],
    config: Config,
    lengths: Integer[Tensor, " batch"],
    *,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch d"]:
    """A vector of length 1 for each text: the mean of its hidden states, scaled. Errors as `backbone`, and as
    `mean_pool` for lengths."""
    options: dict[str, Any] = {"dropout_key": dropout_key, "recompute": recompute, "dtype": dtype, "backend": backend}
    hidden = backbone(params, tokens, config, lengths=lengths, **options)
    return unit_length(mean_pool(hidden, lengths))


def _embeddings(params, tokens, token_types, config, dtype, backend):
    """LayerNorm(E[tokens] + P[0, 1, …] + S[token types])."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    words = embedding(tokens, params[WORDS], backend=backend)  # (B, T, d)
    places = embedding(positions, params[POSITIONS], backend=backend)  # (T, d)
    kinds = embedding(torch.zeros_like(tokens) if token_types is None else token_types, params[TYPES], backend=backend)
    x = words + places + kinds
    return _norm(params, EMBEDDING_NORM, x if dtype is None else x.to(dtype), config, backend)
