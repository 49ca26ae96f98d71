"""The Llama architecture on torch tensors: the twin of `minift.models.llama`, where the equations are.

The same names, the same parameter dictionary, the same order of operations; autograd walks back. A model moves over by

    params = minift_kernels.params.from_numpy(params, "cuda", torch.bfloat16)
    logits = llama.forward(params, tokens, config)

In plain PyTorch it runs anywhere; on a GPU every operation is a kernel of this package. 16-bit activations are rounded
where they are written to memory, and nowhere else: inside of each kernel arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minift.models.llama import EMBEDDING, FUSED, HEAD, LINEAR_MODULES, Config, head_name
from minift_kernels import backend as backends
from minift_kernels.models import generation
from minift_kernels.models.layout import slots_and_positions
from minift_kernels.nn.attention import KVCache, Tiles, attention, causal_mask, tile_map
from minift_kernels.nn.dropout import fold_in
from minift_kernels.nn.embedding import embedding
from minift_kernels.nn.linear import linear
from minift_kernels.nn.mlp import swiglu
from minift_kernels.nn.norms import rms_norm
from minift_kernels.nn.rope import frequencies, rope, rotations
from minift_kernels.nn.weight import Frozen, Params, dense
from minift_kernels.peft import soft_prompt

__all__ = ["EMBEDDING", "HEAD", "LINEAR_MODULES", "Config", "backbone", "block", "forward", "fuse", "generate"]
__all__ += ["head_name", "stream"]


@dataclass(frozen=True)
class _Pass:
    """What is the same for every layer of one pass: where tokens stand, what they may see, what computes."""

    cos: Float[Tensor, "batch tokens half"]
    sin: Float[Tensor, "batch tokens half"]
    visible: Bool[Tensor, "batch tokens keys"]
    tiles: Tiles | None  # of `visible`, for the attention kernel; None in plain PyTorch
    backend: str | None


def _self_attention(params, name, x, layout, config, layer, prefix, cache, key):
    """Attention(x) = concat_h(attention(rope(q_h), rope(k_h), v_h)) W_oᵀ."""
    batch, how = x.shape[0], layout.backend

    def split(x):  # (B, T, heads · d) -> (B, heads, T, d)
        return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *2 * [config.num_key_value_heads])]
    q, k, v = map(split, _linears(params, name, "qkv_proj", sizes, x, (key(0), key(1), key(2)), how))
    q = rope(q, layout.cos, layout.sin, backend=how)  # (B, H, T, d)
    k = rope(k, layout.cos, layout.sin, backend=how)  # (B, G, T, d)
    if prefix is not None:  # (2, G, P, d): keys and values that stand before the text, not rotated
        before = prefix.to(x.dtype)[:, None].expand(-1, batch, -1, -1, -1)
        k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
    if cache is not None:
        k, v = cache.write(layer, k, v)
    context = attention(q, k, v, layout.visible, tiles=layout.tiles, backend=how)
    return linear(context.transpose(1, 2).flatten(2), params[name + "o_proj.weight"], dropout_key=key(3), backend=how)


def _mlp(params, name, x, layout, config, key):
    """MLP(x) = swiglu(x W_gateᵀ, x W_upᵀ) W_downᵀ."""
    how, sizes = layout.backend, 2 * [config.intermediate_size]
    gate, up = _linears(params, name, "gate_up_proj", sizes, x, (key(4), key(5)), how)
    return linear(swiglu(gate, up, backend=how), params[name + "down_proj.weight"], dropout_key=key(6), backend=how)


def _linears(params, name, fused, sizes, x, keys, backend):
    """y_i = x W_iᵀ for several weights that read the same x: one product where `fuse` has stacked them."""
    if f"{name}{fused}.weight" in params:
        y = linear(x, params[f"{name}{fused}.weight"], backend=backend)
        return [y[..., first:last] for first, last in pairwise(accumulate(sizes, initial=0))]
    weights = [params[f"{name}{module}.weight"] for module in FUSED[fused]]
    return [linear(x, w, dropout_key=key, backend=backend) for w, key in zip(weights, keys, strict=True)]


def block(params, x, layout, config, layer, prefix=None, cache=None, dropout_key=None):
    """Attention, then the MLP, each added to the running sum."""
    name = f"model.layers.{layer}."
    layer_key = None if dropout_key is None else fold_in(dropout_key, layer)

    def key(module):
        return None if layer_key is None else fold_in(layer_key, module)

    def normed(x, norm):
        return rms_norm(x, params[name + norm], config.rms_norm_eps, backend=layout.backend)

    attended = normed(x, "input_layernorm.weight")
    x = x + _self_attention(params, name + "self_attn.", attended, layout, config, layer, prefix, cache, key)
    return x + _mlp(params, name + "mlp.", normed(x, "post_attention_layernorm.weight"), layout, config, key)


def backbone(
    params: Params,
    inputs: Integer[Tensor, "batch tokens"] | Float[Tensor, "batch tokens d"],
    config: Config,
    *,
    lengths: Integer[Tensor, " batch"] | None = None,
    segments: Integer[Tensor, "batch tokens"] | None = None,
    prefix: Float[Tensor, "layers 2 kv_heads prefix head_dim"] | None = None,
    cache: KVCache | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch tokens d"]:
    """The model without its head: tokens, or embeddings, to hidden states. A soft prompt among the parameters
    (`minift_kernels.peft.soft_prompt`) stands before every text; hidden states are the text's.

    The options are the reference's. `recompute` keeps each block's input only and runs it again in the backward pass,
    with the same dropout, which has no state. `dtype` is the type of the activations, by default that of the
    embeddings: weights that learn in float32 can multiply in 16 bits. A pass with a cache is for generation: run it
    under `torch.no_grad()`. ValueError and IndexError as in the reference."""
    if prefix is not None and cache is not None:
        raise ValueError("a prefix and a cache: put the prefix into the cache instead, `cache.put_prefix(prefix)`")
    from_tokens = not inputs.is_floating_point()
    if inputs.ndim != (2 if from_tokens else 3) or inputs.numel() == 0:
        needed = "(batch, tokens)" if from_tokens else "(batch, tokens, hidden_size)"
        raise ValueError(f"the input has shape {tuple(inputs.shape)}, needed {needed} with at least one token")
    x = embedding(inputs, params[EMBEDDING]) if from_tokens else inputs  # (B, T, d)
    x = x if dtype is None else x.to(dtype)
    x, lengths, prefix = soft_prompt.prepend(
        params,
        x,
        config.num_key_value_heads,
        config.head_dim,
        lengths=lengths,
        segments=segments,
        prefix=prefix,
        cache=cache,
    )
    ahead = x.shape[1] - inputs.shape[1]  # positions of a soft prompt, which predict nothing
    layout = _layout(x, config, segments, prefix, cache, backend)
    for layer in range(config.num_hidden_layers):
        rest = layout, config, layer, None if prefix is None else prefix[layer], cache, dropout_key
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, params, x, *rest, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(params, x, *rest)
    hidden = rms_norm(x, params["model.norm.weight"], config.rms_norm_eps, backend=backend)
    if cache is not None:
        cache.advance(torch.full((len(x),), x.shape[1]) if lengths is None else lengths)
    return hidden[:, ahead:]


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
    """The same model to generate with: nothing learns, and weights that read the same input are stacked.

    All weights become dense. A quantized model that would not fit then generates as it is, four bits a weight."""
    fused = {name: dense(weight).detach() for name, weight in params.items()}
    for name in params:
        for module, parts in FUSED.items():
            path = name.removesuffix(f"{parts[0]}.weight")
            if path != name:
                fused[f"{path}{module}.weight"] = torch.cat([fused.pop(f"{path}{part}.weight") for part in parts])
    return {name: Frozen(array) for name, array in fused.items()}


def stream(
    params: Params,
    tokens: Integer[Tensor, "batch tokens"],
    config: Config,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    *,
    prefix: Float[Tensor, "layers 2 kv_heads prefix head_dim"] | None = None,
    backend: str | None = None,
    **options: Any,
) -> Iterator[Integer[Tensor, " batch"]]:
    """The continuation of each prompt, one token a row at a time. `options` are those of `generation.stream`."""
    before = soft_prompt.length(params) if prefix is None else prefix.shape[3]
    capacity = before + tokens.shape[1] + max_new_tokens
    gain = dense(params["model.norm.weight"])
    shape = config.num_hidden_layers, len(tokens), config.num_key_value_heads, capacity, config.head_dim
    dtype = dense(params[EMBEDDING]).dtype
    cache = KVCache(*shape, dtype, device=gain.device)
    if prefix is not None:
        if soft_prompt.length(params):
            raise ValueError("a prefix, and a soft prompt in the parameters: needed one of the two")
        cache.put_prefix(prefix)

    def next_logits(text, lengths):
        hidden = backbone(params, text.to(gain.device), config, lengths=lengths, cache=cache, backend=backend)
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


def _layout(x, config, segments, prefix, cache, backend) -> _Pass:
    tokens = x.shape[1]
    before = torch.full((len(x),), 0 if prefix is None else prefix.shape[3])  # on the CPU, as the cache's lengths are
    if cache is not None:
        before = before + cache.lengths
    keys = int(before.max()) + tokens
    slots, positions = slots_and_positions(before.to(x.device), tokens, segments)
    omega = frequencies(config.head_dim, config.rope_theta, config.rope_scaling).to(x.device)
    cos, sin = rotations(positions, omega, backends.widened(x[:0]).dtype)  # 16-bit angles would be 16-bit rotations
    visible = causal_mask(slots, keys, segments)
    return _Pass(cos, sin, visible, tile_map(visible, config.head_dim, x.dtype, backend=backend), backend)
