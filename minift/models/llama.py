"""The Llama architecture: a stack of blocks, each of which adds attention and a gated MLP to a running sum.

    h⁰ = E[tokens]                                                                                      (1)
    hᵃ = hˡ + Attention(RMSNorm(hˡ))            hˡ⁺¹ = hᵃ + MLP(RMSNorm(hᵃ))                            (2)
    hidden = RMSNorm(hᴸ)                        logits = hidden Uᵀ                                      (3)

                                                                            (Touvron et al. 2023, arXiv 2302.13971)
E is `embed_tokens`, U is `lm_head` (or E again: tied embeddings). There is one trunk, `backbone`, wide enough for every
method: tokens or soft prompts in, key/value prefixes, a cache, adapters with dropout. `forward` is the trunk and the
language-model head; a reward model is the trunk and a scalar head.

Every function here returns `y, vjp`. Inside, a pullback gives (weight's name, cotangent) pairs, which
`minift.nn.weight.gradients` adds up; the public pullbacks return plain dictionaries of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from minift.models import generation
from minift.models.layout import slots_and_positions
from minift.nn.attention import KVCache, attention, causal_mask
from minift.nn.dropout import fold_in
from minift.nn.embedding import embedding
from minift.nn.linear import linear
from minift.nn.mlp import swiglu
from minift.nn.norms import rms_norm
from minift.nn.rope import RopeScaling, frequencies, rope, rotations
from minift.nn.weight import Arrays, Frozen, Params, add, dense, gradients, learns
from minift.peft import soft_prompt

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "model."  # of every name but the head's; files of the bare network leave it out
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # they read the same x


@dataclass(frozen=True)
class Config:
    """The sizes of a model, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, needed a multiple of "
                f"num_key_value_heads, which is {self.num_key_value_heads}"
            )


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter of a model of these sizes, in the order of the computation."""
    d, f = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}
    for layer in range(config.num_hidden_layers):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (d,),
                "self_attn.q_proj": (queries, d),
                "self_attn.k_proj": (keys, d),
                "self_attn.v_proj": (keys, d),
                "self_attn.o_proj": (d, queries),
                "post_attention_layernorm": (d,),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
            }.items()
        }
    found["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        found[HEAD] = (config.vocab_size, d)
    return found


def initialize(config: Config, rng: np.random.Generator, std: float = 0.02) -> Arrays:
    """Random parameters to train from scratch: matrices from N(0, std²), gains one.

    The two matrices of a block that write into the running sum start smaller by √(2 L), so that the sum of 2 L such
    terms has the size of one (Radford et al. 2019)."""
    params = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            params[name] = np.ones(shape, np.float32)
        else:
            into_sum = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * config.num_hidden_layers) if into_sum else std
            params[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return params


# --- one block --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of this pass stand and what they may see: the same for every layer."""

    cos: Float[np.ndarray, "batch tokens half"]
    sin: Float[np.ndarray, "batch tokens half"]
    visible: Bool[np.ndarray, "batch tokens keys"]


def _self_attention(params, name, x, layout, config, layer, prefix, cache, key):
    """Attention(x) = concat_h(attention(rope(q_h), rope(k_h), v_h)) W_oᵀ;  vjp(dy) -> dx, dprefix, contributions."""
    batch = x.shape[0]

    def split(x):  # (B, T, heads · d) -> (B, heads, T, d)
        return x.reshape(*x.shape[:2], -1, config.head_dim).swapaxes(1, 2)

    def join(x):  # (B, heads, T, d) -> (B, T, heads · d)
        return x.swapaxes(1, 2).reshape(batch, x.shape[2], -1)

    sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *2 * [config.num_key_value_heads])]
    (q, k, v), qkv_vjp = _linears(params, name, "qkv_proj", sizes, x, (key(0), key(1), key(2)))
    q, q_rope_vjp = rope(split(q), layout.cos, layout.sin)  # (B, H, T, d)
    k, k_rope_vjp = rope(split(k), layout.cos, layout.sin)  # (B, G, T, d)
    v = split(v)
    if prefix is not None:  # (2, G, P, d): keys and values that stand before the text, not rotated
        k, v = _behind(prefix[0], k), _behind(prefix[1], v)
    if cache is not None:
        k, v = cache.write(layer, k, v)
    context, attention_vjp = attention(q, k, v, layout.visible)
    y, o_vjp = linear(join(context), params[name + "o_proj.weight"], dropout_key=key(3))

    def vjp(dy):
        dcontext, do, _ = o_vjp(dy)
        dq, dk, dv = attention_vjp(split(dcontext))
        dprefix = None
        if prefix is not None:
            length = prefix.shape[2]
            dprefix = np.stack([dk[:, :, :length].sum(axis=0), dv[:, :, :length].sum(axis=0)])
            dk, dv = dk[:, :, length:], dv[:, :, length:]
        dx, weights = qkv_vjp(join(q_rope_vjp(dq)), join(k_rope_vjp(dk)), join(dv))
        return dx, dprefix, [*weights, (name + "o_proj.weight", do)]

    return y, vjp


def _behind(prefix, x):
    """(G, P, d) before each row of (B, G, T, d)."""
    return np.concatenate([np.broadcast_to(prefix, (len(x), *prefix.shape)), x], axis=2)


def _mlp(params, name, x, config, key):
    """MLP(x) = swiglu(x W_gateᵀ, x W_upᵀ) W_downᵀ;  vjp(dy) -> dx, contributions."""
    sizes = 2 * [config.intermediate_size]
    (gate, up), gate_up_vjp = _linears(params, name, "gate_up_proj", sizes, x, (key(4), key(5)))
    h, swiglu_vjp = swiglu(gate, up)
    y, down_vjp = linear(h, params[name + "down_proj.weight"], dropout_key=key(6))

    def vjp(dy):
        dh, ddown, _ = down_vjp(dy)
        dx, weights = gate_up_vjp(*swiglu_vjp(dh))
        return dx, [*weights, (name + "down_proj.weight", ddown)]

    return y, vjp


def _linears(params, name, fused, sizes, x, keys):
    """y_i = x W_iᵀ for several weights that read the same x;  vjp(dy_1, dy_2, …) -> dx, contributions.

    One product where `fuse` has stacked them; `sizes` are the widths of the outputs."""
    if f"{name}{fused}.weight" in params:
        y, stacked_vjp = linear(x, params[f"{name}{fused}.weight"])
        outputs = [y[..., first:last] for first, last in pairwise(accumulate(sizes, initial=0))]
        return outputs, lambda *dys: (stacked_vjp(np.concatenate(dys, axis=-1))[0], [])

    weights = [f"{name}{module}.weight" for module in FUSED[fused]]
    outputs, pullbacks = zip(
        *(linear(x, params[weight], dropout_key=key) for weight, key in zip(weights, keys, strict=True)), strict=True
    )

    def vjp(*dys):
        dxs, dweights, _ = zip(*(pullback(dy) for pullback, dy in zip(pullbacks, dys, strict=True)), strict=True)
        return reduce(add, dxs), list(zip(weights, dweights, strict=True))

    return outputs, vjp


def block(params, x, layout, config, layer, prefix=None, cache=None, dropout_key=None):
    """Equation (2);  vjp(dy) -> dx, dprefix, contributions."""
    name = f"model.layers.{layer}."
    layer_key = None if dropout_key is None else fold_in(dropout_key, layer)

    def key(module):
        return None if layer_key is None else fold_in(layer_key, module)

    normed, attention_norm_vjp = rms_norm(x, params[name + "input_layernorm.weight"], config.rms_norm_eps)
    a, attention_vjp = _self_attention(params, name + "self_attn.", normed, layout, config, layer, prefix, cache, key)
    middle = x + a
    normed, mlp_norm_vjp = rms_norm(middle, params[name + "post_attention_layernorm.weight"], config.rms_norm_eps)
    m, mlp_vjp = _mlp(params, name + "mlp.", normed, config, key)
    y = middle + m

    def vjp(dy):
        dnormed, dmlp = mlp_vjp(dy)
        dmiddle, dmlp_norm = mlp_norm_vjp(dnormed)
        dmiddle = dy + dmiddle  # from  y = middle + m
        dnormed, dprefix, dattention = attention_vjp(dmiddle)
        dx, dattention_norm = attention_norm_vjp(dnormed)
        dx = dmiddle + dx  # from  middle = x + a
        norms = [
            (name + "input_layernorm.weight", dattention_norm),
            (name + "post_attention_layernorm.weight", dmlp_norm),
        ]
        return dx, dprefix, [*dattention, *dmlp, *norms]

    return y, vjp


# --- the trunk --------------------------------------------------------------------------------------------------------


def backbone(
    params: Params,
    inputs: Integer[np.ndarray, "batch tokens"] | Float[np.ndarray, "batch tokens d"],
    config: Config,
    *,
    lengths: Integer[np.ndarray, " batch"] | None = None,
    segments: Integer[np.ndarray, "batch tokens"] | None = None,
    prefix: Float[np.ndarray, "layers 2 kv_heads prefix head_dim"] | None = None,
    cache: KVCache | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[Float[np.ndarray, "batch tokens d"], Callable]:
    """Equations (1) to (3) without the head: tokens, or embeddings such as a soft prompt, to hidden states.

    `vjp(dhidden) -> dembeddings, dprefix, gradients`; the first is None for tokens, the second without a prefix. A soft
    prompt among the parameters (`minift.peft.soft_prompt`) stands before every text; hidden states are the text's.

    lengths      real tokens of each right-padded row; only the cache needs them, since no token looks ahead
    segments     which text of a packed row each token belongs to; texts do not see each other, positions restart
    prefix       keys and values that stand before the text in every layer (prefix tuning); text starts at position P
    cache        keys and values of earlier tokens, which this pass extends; the text continues where they end
                 (to generate behind a prefix, put it into the cache: `KVCache.put_prefix`)
    dropout_key  one number a training step; None, as in evaluation and generation, turns dropout off
    recompute    keep only each block's input and run the block again in the backward pass: a third more work for
                 a fraction of the memory, and nothing at all kept while no one calls `vjp`

    Blocks below the lowest one in which something learns keep no activations and take no part in the backward pass; a
    pass with a cache keeps none at all and has no pullback. ValueError for a prefix together with a cache, and for
    inputs without a token or of another shape; IndexError for tokens outside the vocabulary.
    """
    if prefix is not None and cache is not None:
        raise ValueError("a prefix and a cache: put the prefix into the cache instead, `cache.put_prefix(prefix)`")
    from_tokens = np.issubdtype(inputs.dtype, np.integer)
    if inputs.ndim != (2 if from_tokens else 3) or inputs.size == 0:
        needed = "(batch, tokens)" if from_tokens else "(batch, tokens, hidden_size)"
        raise ValueError(f"the input has shape {inputs.shape}, needed {needed} with at least one token")
    if from_tokens:
        x, embedding_vjp = embedding(inputs, params[EMBEDDING])  # (B, T, d)
    else:
        x = inputs
    x, lengths, prefix, prompt_vjp = soft_prompt.prepend(
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
    layout = _layout(x, config, segments, prefix, cache)
    lowest = (
        _lowest_that_learns(params, config) if from_tokens and not ahead and prefix is None and cache is None else 0
    )

    def run(layer, x):
        layer_prefix = None if prefix is None else prefix[layer]
        return block(params, x, layout, config, layer, layer_prefix, cache, dropout_key)

    pullbacks: dict[int, Callable] = {}
    for layer in range(config.num_hidden_layers):
        y, block_vjp = run(layer, x)
        if layer >= lowest and cache is None:
            pullbacks[layer] = _again(run, layer, x) if recompute else block_vjp
        x = y
        del block_vjp  # where it is not kept, its activations should not wait for the next block's
    hidden, norm_vjp = rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)
    if cache is not None:
        cache.advance(np.full(len(x), x.shape[1]) if lengths is None else lengths)

    def vjp(dhidden):
        if cache is not None:
            raise ValueError("a pass that writes into a cache has no pullback: run it again without the cache")
        dx, dnorm = norm_vjp(np.pad(dhidden, ((0, 0), (ahead, 0), (0, 0))) if ahead else dhidden)
        contributions = [("model.norm.weight", dnorm)]
        dprefixes = []
        for layer in reversed(range(lowest, config.num_hidden_layers)):
            dx, dlayer_prefix, weights = pullbacks[layer](dx)
            contributions += weights
            dprefixes.append(dlayer_prefix)
        dprefix = None if prefix is None else np.stack(dprefixes[::-1])
        dx, dprefix, dprompt = prompt_vjp(dx, dprefix)
        if from_tokens and lowest == 0:
            contributions.append((EMBEDDING, embedding_vjp(dx)))
        return None if from_tokens else dx, dprefix, gradients([*contributions, *dprompt])

    return hidden[:, ahead:], vjp


def forward(
    params: Params,
    inputs: Integer[np.ndarray, "batch tokens"] | Float[np.ndarray, "batch tokens d"],
    config: Config,
    **options: Any,
) -> tuple[Float[np.ndarray, "batch tokens vocab"], Callable]:
    """The language model: the trunk and its head. `vjp(dlogits) -> {name: gradient}` for what learns.

    `options` are those of `backbone`. Tied embeddings are used twice and get the sum of both gradients."""
    hidden, backbone_vjp = backbone(params, inputs, config, **options)
    name = head_name(config)
    logits, head_vjp = linear(hidden, params[name])

    def vjp(dlogits):
        dhidden, dhead, _ = head_vjp(dlogits)
        _, _, below = backbone_vjp(dhidden)
        return gradients([*below.items(), (name, dhead)])

    return logits, vjp


def fuse(params: Params) -> dict[str, Any]:
    """The same model to generate with: nothing learns, and weights that read the same input are stacked.

        x [W_q; W_k; W_v]ᵀ = [q, k, v]        x [W_gate; W_up]ᵀ = [gate, up]                            (4)

    A token reads every weight once and does little with it, so few large products are faster than many small ones. All
    weights become dense, since a quantized one or an adapter would be computed anew for every token."""
    fused = {name: dense(weight) for name, weight in params.items()}
    for name in params:
        for module, parts in FUSED.items():
            path = name.removesuffix(f"{parts[0]}.weight")
            if path != name:
                fused[f"{path}{module}.weight"] = np.concatenate([fused.pop(f"{path}{part}.weight") for part in parts])
    return {name: Frozen(array) for name, array in fused.items()}


def stream(
    params: Params,
    tokens: Integer[np.ndarray, "batch tokens"],
    config: Config,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    *,
    prefix: Float[np.ndarray, "layers 2 kv_heads prefix head_dim"] | None = None,
    **options: Any,
) -> Iterator[Integer[np.ndarray, " batch"]]:
    """The continuation of each prompt, one token a row at a time. `options` are those of `generation.stream`:
    top_k, top_p, stop_tokens, lengths."""
    before = soft_prompt.length(params) if prefix is None else prefix.shape[3]
    capacity = before + tokens.shape[1] + max_new_tokens
    dtype = dense(params["model.norm.weight"]).dtype
    cache = KVCache(config.num_hidden_layers, len(tokens), config.num_key_value_heads, capacity, config.head_dim, dtype)
    if prefix is not None:
        if soft_prompt.length(params):
            raise ValueError("a prefix, and a soft prompt in the parameters: needed one of the two")
        cache.put_prefix(prefix)

    def next_logits(text, lengths):
        hidden, _ = backbone(params, text, config, lengths=lengths, cache=cache)
        last = hidden[
            np.arange(len(text)), lengths - 1
        ]  # (B, d): one row a text reaches the head, not the whole prompt
        return linear(last, params[head_name(config)])[0]

    return generation.stream(next_logits, tokens, max_new_tokens, temperature, rng, **options)


def generate(
    params: Params,
    tokens: Integer[np.ndarray, "batch tokens"],
    config: Config,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Integer[np.ndarray, "batch longer"]:
    """The prompts, each followed by its continuation: (B, T + new). `options` are those of `stream`.

    The new tokens stand in the last columns, also where a prompt is shorter than the widest one and padded."""
    new = stream(params, tokens, config, max_new_tokens, temperature, rng, **options)
    return np.concatenate([tokens, *(column[:, None].astype(tokens.dtype) for column in new)], axis=1)


def head_name(config: Config) -> str:
    """The name of the matrix that turns hidden states into logits."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def _layout(x, config, segments, prefix, cache) -> _Layout:
    tokens, before = x.shape[1], np.zeros(len(x), np.int64)
    if prefix is not None:
        before = before + prefix.shape[3]
    if cache is not None:
        before = before + cache.lengths
    slots, positions = slots_and_positions(before, tokens, segments)
    omega = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    cos, sin = rotations(positions, omega, x.dtype)
    return _Layout(cos, sin, causal_mask(slots, int(before.max(initial=0)) + tokens, segments))


def _lowest_that_learns(params, config) -> int:
    """The first block that the backward pass must reach."""
    if learns(params[EMBEDDING]):
        return 0
    for layer in range(config.num_hidden_layers):
        if any(learns(w) for name, w in params.items() if name.startswith(f"model.layers.{layer}.")):
            return layer
    return config.num_hidden_layers


def _again(run, layer, x):
    """A block's pullback that keeps the block's input only and runs the block again when it is called."""
    return lambda dy: run(layer, x)[1](dy)
