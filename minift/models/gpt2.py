"""The GPT-2 architecture: Llama's plan with older parts, and a bias wherever there is a weight.

    h⁰ = E[tokens] + P[positions]                                                                       (1)
    hᵃ = hˡ + Attention(LayerNorm(hˡ))          hˡ⁺¹ = hᵃ + MLP(LayerNorm(hᵃ))                          (2)
    hidden = LayerNorm(hᴸ)                      logits = hidden Eᵀ                                      (3)

                                                                        (Radford et al. 2019, "Language Models are
                                                                         Unsupervised Multitask Learners", §2.3)
E is `wte`, P is `wpe`: positions are learned, a row for each, so a text is never longer than P. Queries, keys and
values come from one matrix, `c_attn`; MLP(x) = gelu(x W_fcᵀ + b) W_projᵀ + b, with no gate, and the tanh form of gelu.

Files hold the matrices of the blocks transposed: Hugging Face's GPT-2 has a layer of its own, Conv1D, which computes
x W + b with W (in, out). Here they are (out, in) like every other weight, so that adapters and 4-bit weights need not
know; `minift.io` turns them around on the way in and on the way out. The names are the files'. (PEFT calls it
`fan_in_fan_out`. Its A (r, in) and B (out, r) are the same either way; only ΔW = s B A is to be transposed for W.)

Dropout is left out, but for that of adapters. Functions return `y, vjp` as in `minift.models.llama`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from minift.models import generation
from minift.models.layout import slots_and_positions
from minift.nn.attention import KVCache, attention, causal_mask
from minift.nn.dropout import fold_in
from minift.nn.embedding import embedding
from minift.nn.linear import linear
from minift.nn.mlp import gelu_tanh
from minift.nn.norms import layer_norm
from minift.nn.weight import Frozen, Params, dense, gradients, learns, unwrap

EMBEDDING, POSITIONS, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
PREFIX = "transformer."  # of every name but the head's; files of the bare network leave it out
LINEAR_MODULES = ("c_attn", "c_proj", "c_fc")  # Conv1D: transposed in files


@dataclass(frozen=True)
class Config:
    """The sizes of a model. config.json calls them n_embd, n_inner, n_layer, n_head and n_positions; these are the
    names that other models, and transformers' own aliases, have for them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, needed a multiple of "
                f"num_attention_heads, which is {self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter of a model of these sizes, in the order of the computation."""
    d, f = config.hidden_size, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, d),
        POSITIONS: (config.max_position_embeddings, d),
    }
    for layer in range(config.num_hidden_layers):
        for name, shape in {
            "ln_1": (d,),
            "attn.c_attn": (3 * d, d),
            "attn.c_proj": (d, d),
            "ln_2": (d,),
            "mlp.c_fc": (f, d),
            "mlp.c_proj": (d, f),
        }.items():
            found |= {f"{block_name(layer)}{name}.weight": shape, f"{block_name(layer)}{name}.bias": shape[:1]}
    found |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    if not config.tie_word_embeddings:
        found[HEAD] = (config.vocab_size, d)
    return found


def block_name(layer: int) -> str:
    """What the names of a block's parameters begin with."""
    return f"transformer.h.{layer}."


# --- one block --------------------------------------------------------------------------------------------------------


def _linear(params, name, x, key):
    """y = x Wᵀ + b;  vjp(dy) -> dx, contributions."""
    bias, bias_learns = unwrap(params[f"{name}.bias"])
    y, linear_vjp = linear(x, params[f"{name}.weight"], bias, dropout_key=key)

    def vjp(dy):
        dx, dweight, dbias = linear_vjp(dy)
        return dx, [(f"{name}.weight", dweight), (f"{name}.bias", dbias if bias_learns else None)]

    return y, vjp


def _norm(params, name, x, config):
    """y = LayerNorm(x);  vjp(dy) -> dx, contributions."""
    y, norm_vjp = layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"], config.layer_norm_epsilon)

    def vjp(dy):
        dx, dweight, dbias = norm_vjp(dy)
        return dx, [(f"{name}.weight", dweight), (f"{name}.bias", dbias)]

    return y, vjp


def _self_attention(params, name, x, visible, config, layer, cache, key):
    """Attention(x) = concat_h(attention(q_h, k_h, v_h)) W_projᵀ + b, q, k, v the thirds of x W_attnᵀ + b;
    vjp(dy) -> dx, contributions."""

    def split(x):  # (B, T, d) -> (B, heads, T, d / heads)
        return x.reshape(*x.shape[:2], config.num_attention_heads, -1).swapaxes(1, 2)

    def join(x):  # (B, heads, T, d / heads) -> (B, T, d)
        return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)

    qkv, qkv_vjp = _linear(params, f"{name}c_attn", x, key(0))
    q, k, v = (split(part) for part in np.split(qkv, 3, axis=-1))
    if cache is not None:
        k, v = cache.write(layer, k, v)
    context, attention_vjp = attention(q, k, v, visible)
    y, proj_vjp = _linear(params, f"{name}c_proj", join(context), key(1))

    def vjp(dy):
        dcontext, proj = proj_vjp(dy)
        dqkv = np.concatenate([join(part) for part in attention_vjp(split(dcontext))], axis=-1)
        dx, attn = qkv_vjp(dqkv)
        return dx, [*attn, *proj]

    return y, vjp


def _mlp(params, name, x, key):
    """MLP(x) = gelu(x W_fcᵀ + b) W_projᵀ + b;  vjp(dy) -> dx, contributions."""
    up, fc_vjp = _linear(params, f"{name}c_fc", x, key(2))
    h, gelu_vjp = gelu_tanh(up)
    y, proj_vjp = _linear(params, f"{name}c_proj", h, key(3))

    def vjp(dy):
        dh, proj = proj_vjp(dy)
        dx, fc = fc_vjp(gelu_vjp(dh))
        return dx, [*fc, *proj]

    return y, vjp


def block(params, x, visible, config, layer, cache=None, dropout_key=None):
    """Equation (2);  vjp(dy) -> dx, contributions."""
    name = block_name(layer)
    layer_key = None if dropout_key is None else fold_in(dropout_key, layer)

    def key(module):
        return None if layer_key is None else fold_in(layer_key, module)

    normed, attention_norm_vjp = _norm(params, f"{name}ln_1", x, config)
    a, attention_vjp = _self_attention(params, f"{name}attn.", normed, visible, config, layer, cache, key)
    middle = x + a
    normed, mlp_norm_vjp = _norm(params, f"{name}ln_2", middle, config)
    m, mlp_vjp = _mlp(params, f"{name}mlp.", normed, key)
    y = middle + m

    def vjp(dy):
        dnormed, mlp = mlp_vjp(dy)
        dmiddle, mlp_norm = mlp_norm_vjp(dnormed)
        dmiddle = dy + dmiddle  # from  y = middle + m
        dnormed, attn = attention_vjp(dmiddle)
        dx, attention_norm = attention_norm_vjp(dnormed)
        return dmiddle + dx, [*attention_norm, *attn, *mlp_norm, *mlp]  # from  middle = x + a

    return y, vjp


# --- the trunk --------------------------------------------------------------------------------------------------------


def backbone(
    params: Params,
    inputs: Integer[np.ndarray, "batch tokens"] | Float[np.ndarray, "batch tokens d"],
    config: Config,
    *,
    lengths: Integer[np.ndarray, " batch"] | None = None,
    segments: Integer[np.ndarray, "batch tokens"] | None = None,
    cache: KVCache | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[Float[np.ndarray, "batch tokens d"], Callable]:
    """Equations (1) to (3) without the head: tokens, or embeddings of them without their positions, to hidden states.

    `vjp(dhidden) -> dembeddings, None, gradients`; the first is None for tokens. The second is what `llama.backbone`
    has for prefixes, which this model does not take. All options are those of `llama.backbone`.

    Blocks below the lowest one in which something learns keep no activations and take no part in the backward pass.
    ValueError for a text longer than the table of positions, and for inputs without a token or of another shape;
    IndexError for tokens outside the vocabulary.
    """
    from_tokens = np.issubdtype(inputs.dtype, np.integer)
    if inputs.ndim != (2 if from_tokens else 3) or inputs.size == 0:
        needed = "(batch, tokens)" if from_tokens else "(batch, tokens, hidden_size)"
        raise ValueError(f"the input has shape {inputs.shape}, needed {needed} with at least one token")
    batch, tokens = inputs.shape[:2]
    before = np.zeros(batch, np.int64) if cache is None else cache.lengths
    slots, positions = slots_and_positions(before, tokens, segments)
    require_positions(config, int(positions.max()) + 1)
    visible = causal_mask(slots, int(before.max()) + tokens, segments)
    words, words_vjp = embedding(inputs, params[EMBEDDING]) if from_tokens else (inputs, None)
    places, places_vjp = embedding(positions, params[POSITIONS])
    x = words + places  # (B, T, d)
    lowest = _lowest_that_learns(params, config) if from_tokens and cache is None else 0

    def run(layer, x):
        return block(params, x, visible, config, layer, cache, dropout_key)

    def again(layer, x):
        """A block's pullback that keeps the block's input only, and runs the block again when it is called."""
        return lambda dy: run(layer, x)[1](dy)

    pullbacks: dict[int, Callable] = {}
    for layer in range(config.num_hidden_layers):
        y, block_vjp = run(layer, x)
        if layer >= lowest and cache is None:
            pullbacks[layer] = again(layer, x) if recompute else block_vjp
        x = y
        del block_vjp  # where it is not kept, its activations should not wait for the next block's
    hidden, norm_vjp = _norm(params, "transformer.ln_f", x, config)
    if cache is not None:
        cache.advance(np.full(batch, tokens) if lengths is None else lengths)

    def vjp(dhidden):
        if cache is not None:
            raise ValueError("a pass that writes into a cache has no pullback: run it again without the cache")
        dx, contributions = norm_vjp(dhidden)
        for layer in reversed(range(lowest, config.num_hidden_layers)):
            dx, weights = pullbacks[layer](dx)
            contributions += weights
        contributions.append((POSITIONS, places_vjp(dx)))  # both tables are frozen where a block has been left out
        if words_vjp is None:
            return dx, None, gradients(contributions)
        contributions.append((EMBEDDING, words_vjp(dx)))
        return None, None, gradients(contributions)

    return hidden, vjp


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
    """The same model to generate with: nothing learns and every weight is dense. (`c_attn` is one matrix already.)"""
    return {name: Frozen(dense(weight)) for name, weight in params.items()}


def stream(
    params: Params,
    tokens: Integer[np.ndarray, "batch tokens"],
    config: Config,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Iterator[Integer[np.ndarray, " batch"]]:
    """The continuation of each prompt, one token a row at a time. `options` are those of `generation.stream`:
    top_k, top_p, stop_tokens, lengths. ValueError where prompt and continuation do not fit the table of positions."""
    capacity = tokens.shape[1] + max_new_tokens
    require_positions(config, tokens.shape[1] + max(max_new_tokens - 1, 0))  # the last token is not read
    heads, dtype = config.num_attention_heads, dense(params["transformer.ln_f.weight"]).dtype
    cache = KVCache(config.num_hidden_layers, len(tokens), heads, capacity, config.head_dim, dtype)

    def next_logits(text, lengths):
        hidden, _ = backbone(params, text, config, lengths=lengths, cache=cache)
        last = hidden[np.arange(len(text)), lengths - 1]  # (B, d)
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
    """The prompts, each followed by its continuation: (B, T + new). `options` are those of `stream`."""
    new = stream(params, tokens, config, max_new_tokens, temperature, rng, **options)
    return np.concatenate([tokens, *(column[:, None].astype(tokens.dtype) for column in new)], axis=1)


def head_name(config: Config) -> str:
    """The name of the matrix that turns hidden states into logits."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def require_positions(config: Config, tokens: int) -> None:
    """ValueError for a text that is longer than the table of positions."""
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"a text of {tokens:,} tokens, and the model has learned {config.max_position_embeddings:,} positions: "
            "needed a shorter text, or fewer new tokens"
        )


def _lowest_that_learns(params, config) -> int:
    """The first block that the backward pass must reach."""
    if learns(params[EMBEDDING]) or learns(params[POSITIONS]):
        return 0
    for layer in range(config.num_hidden_layers):
        if any(learns(w) for name, w in params.items() if name.startswith(block_name(layer))):
            return layer
    return config.num_hidden_layers
