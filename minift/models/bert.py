"""The BERT architecture: an encoder, in which every token sees every other one, left and right.

    h⁰ = LayerNorm(E[tokens] + P[0, 1, …] + S[token types])                                             (1)
    hᵃ = LayerNorm(hˡ + Attention(hˡ))          hˡ⁺¹ = LayerNorm(hᵃ + MLP(hᵃ))                          (2)
    MLP(x) = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂          hidden = hᴸ                                             (3)

                                                                              (Devlin et al. 2019, arXiv 1810.04805)
Beside Llama: the norm comes after the sum (post-norm), positions are a table that is added once, every linear map has a
bias, and nothing is causal. Such a model predicts no next token; it makes vectors of texts:

    pooled = tanh(hidden of [CLS] W_pᵀ + b_p)                  for a classifier on top                  (4)
    embedding = y / |y|,  y = mean of hidden over the text     for a search by cosine                   (5)

                                                                        (Reimers & Gurevych 2019, arXiv 1908.10084)
Every function here returns `y, vjp`; inside, a pullback gives (weight's name, cotangent) pairs, as in `llama`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from minift.nn.attention import attention
from minift.nn.dropout import fold_in
from minift.nn.embedding import embedding
from minift.nn.linear import linear
from minift.nn.mlp import gelu
from minift.nn.norms import layer_norm
from minift.nn.pooling import mean_pool, unit_length
from minift.nn.weight import Arrays, Params, gradients, learns

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
EMBEDDING_NORM = "embeddings.LayerNorm"
POOLER = "pooler.dense"


@dataclass(frozen=True)
class Config:
    """The sizes of a model, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, needed a multiple of "
                f"num_attention_heads, which is {self.num_attention_heads}"
            )


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter of a model of these sizes, in the order of the computation."""
    d, f = config.hidden_size, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {
        WORDS: (config.vocab_size, d),
        POSITIONS: (config.max_position_embeddings, d),
        TYPES: (config.type_vocab_size, d),
        f"{EMBEDDING_NORM}.weight": (d,),
        f"{EMBEDDING_NORM}.bias": (d,),
    }
    for layer in range(config.num_hidden_layers):
        for module, shape in {
            "attention.self.query": (d, d),
            "attention.self.key": (d, d),
            "attention.self.value": (d, d),
            "attention.output.dense": (d, d),
            "attention.output.LayerNorm": (d,),
            "intermediate.dense": (f, d),
            "output.dense": (d, f),
            "output.LayerNorm": (d,),
        }.items():
            found[f"encoder.layer.{layer}.{module}.weight"] = shape
            found[f"encoder.layer.{layer}.{module}.bias"] = shape[:1]
    return found | {f"{POOLER}.weight": (d, d), f"{POOLER}.bias": (d,)}


def initialize(config: Config, rng: np.random.Generator, std: float = 0.02) -> Arrays:
    """Random parameters to train from scratch: matrices from N(0, std²), gains one, biases zero."""
    params = {}
    for name, shape in shapes(config).items():
        if len(shape) == 2:
            params[name] = (std * rng.standard_normal(shape)).astype(np.float32)
        else:
            params[name] = np.full(shape, name.endswith("LayerNorm.weight"), np.float32)
    return params


# --- one block --------------------------------------------------------------------------------------------------------


def _linear(params, name, x, key=None):
    """y = x Wᵀ + b;  vjp(dy) -> dx, contributions."""
    y, linear_vjp = linear(x, params[f"{name}.weight"], params[f"{name}.bias"], dropout_key=key)

    def vjp(dy):
        dx, dweight, dbias = linear_vjp(dy)
        return dx, [(f"{name}.weight", dweight), (f"{name}.bias", dbias)]

    return y, vjp


def _norm(params, name, x, config):
    """y = LayerNorm(x);  vjp(dy) -> dx, contributions."""
    y, norm_vjp = layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"], config.layer_norm_eps)

    def vjp(dy):
        dx, dweight, dbias = norm_vjp(dy)
        return dx, [(f"{name}.weight", dweight), (f"{name}.bias", dbias)]

    return y, vjp


def _self_attention(params, name, x, visible, config, key):
    """Attention(x) = concat_h(attention(q_h, k_h, v_h)) W_oᵀ + b_o;  vjp(dy) -> dx, contributions."""
    batch, tokens, d = x.shape

    def split(x):  # (B, T, d) -> (B, heads, T, d / heads)
        return x.reshape(batch, tokens, config.num_attention_heads, -1).swapaxes(1, 2)

    def join(x):  # and back
        return x.swapaxes(1, 2).reshape(batch, tokens, d)

    q, q_vjp = _linear(params, f"{name}self.query", x, key(0))
    k, k_vjp = _linear(params, f"{name}self.key", x, key(1))
    v, v_vjp = _linear(params, f"{name}self.value", x, key(2))
    context, attention_vjp = attention(split(q), split(k), split(v), visible)
    y, o_vjp = _linear(params, f"{name}output.dense", join(context), key(3))

    def vjp(dy):
        dcontext, do = o_vjp(dy)
        dq, dk, dv = attention_vjp(split(dcontext))
        dx_q, query = q_vjp(join(dq))
        dx_k, key_ = k_vjp(join(dk))
        dx_v, value = v_vjp(join(dv))
        return dx_q + dx_k + dx_v, [*query, *key_, *value, *do]

    return y, vjp


def _mlp(params, name, x, key):
    """Equation (3);  vjp(dy) -> dx, contributions."""
    h, in_vjp = _linear(params, f"{name}intermediate.dense", x, key(4))  # (B, T, f)
    a, gelu_vjp = gelu(h)
    y, out_vjp = _linear(params, f"{name}output.dense", a, key(5))

    def vjp(dy):
        da, dout = out_vjp(dy)
        dx, din = in_vjp(gelu_vjp(da))
        return dx, [*din, *dout]

    return y, vjp


def block(params, x, visible, config, layer, dropout_key=None):
    """Equation (2);  vjp(dy) -> dx, contributions."""
    name = f"encoder.layer.{layer}."
    layer_key = None if dropout_key is None else fold_in(dropout_key, layer)

    def key(module):
        return None if layer_key is None else fold_in(layer_key, module)

    a, attention_vjp = _self_attention(params, f"{name}attention.", x, visible, config, key)
    middle, attention_norm_vjp = _norm(params, f"{name}attention.output.LayerNorm", x + a, config)
    m, mlp_vjp = _mlp(params, name, middle, key)
    y, output_norm_vjp = _norm(params, f"{name}output.LayerNorm", middle + m, config)

    def vjp(dy):
        dsum, doutput_norm = output_norm_vjp(dy)
        dmiddle, dmlp = mlp_vjp(dsum)
        dmiddle = dsum + dmiddle  # from  middle + m
        dsum, dattention_norm = attention_norm_vjp(dmiddle)
        dx, dattention = attention_vjp(dsum)
        dx = dsum + dx  # from  x + a
        return dx, [*dattention, *dattention_norm, *dmlp, *doutput_norm]

    return y, vjp


# --- the trunk --------------------------------------------------------------------------------------------------------


def backbone(
    params: Params,
    tokens: Integer[np.ndarray, "batch tokens"],
    config: Config,
    *,
    lengths: Integer[np.ndarray, " batch"] | None = None,
    token_types: Integer[np.ndarray, "batch tokens"] | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[Float[np.ndarray, "batch tokens d"], Callable]:
    """Equations (1) and (2): tokens to hidden states;  `vjp(dhidden) -> {name: gradient}`.

    lengths      real tokens of each right-padded row, all by default: nobody looks at padding, whose own hidden states
                 mean nothing
    token_types  0 for the first text of a pair, 1 for the second; by default one text, all 0
    dropout_key  one number a training step, for the dropout of adapters; None, as in evaluation, turns it off
    recompute    keep only each block's input and run the block again in the backward pass

    Blocks below the lowest one in which something learns keep no activations and take no part in the backward pass.
    ValueError for more tokens than there are positions, and for inputs without a token; IndexError for tokens or token
    types outside their tables.
    """
    batch, width = tokens.shape
    if not tokens.size or width > config.max_position_embeddings:
        found = f"the input has shape {tokens.shape}, needed (batch, tokens) with 1 to"
        raise ValueError(f"{found} {config.max_position_embeddings} tokens: cut the text")
    x, embeddings_vjp = _embeddings(params, tokens, token_types, config)
    real = np.arange(width) < (np.full(batch, width) if lengths is None else lengths)[:, None]  # (B, T)
    visible = np.broadcast_to(real[:, None, :], (batch, width, width))
    lowest = _lowest_that_learns(params, config)

    def run(layer, x):
        return block(params, x, visible, config, layer, dropout_key)

    pullbacks: dict[int, Callable] = {}
    for layer in range(config.num_hidden_layers):
        y, block_vjp = run(layer, x)
        if layer >= lowest:
            pullbacks[layer] = _again(run, layer, x) if recompute else block_vjp
        x = y
        del block_vjp  # where it is not kept, its activations should not wait for the next block's

    def vjp(dhidden):
        dx, contributions = dhidden, []
        for layer in reversed(range(max(lowest, 0), config.num_hidden_layers)):
            dx, weights = pullbacks[layer](dx)
            contributions += weights
        if lowest < 0:
            contributions += embeddings_vjp(dx)
        return gradients(contributions)

    return x, vjp


def pool(params: Params, hidden: Float[np.ndarray, "batch tokens d"]) -> tuple[Float[np.ndarray, "batch d"], Callable]:
    """Equation (4): what a classifier reads;  `vjp(dpooled) -> dhidden, gradients`."""
    z, dense_vjp = _linear(params, POOLER, hidden[:, 0])
    pooled = np.tanh(z)

    def vjp(dpooled):
        dfirst, contributions = dense_vjp(dpooled * (1 - pooled * pooled))
        dhidden = np.zeros_like(hidden)
        dhidden[:, 0] = dfirst
        return dhidden, gradients(contributions)

    return pooled, vjp


def embed(
    params: Params,
    tokens: Integer[np.ndarray, "batch tokens"],
    config: Config,
    lengths: Integer[np.ndarray, " batch"],
    *,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[Float[np.ndarray, "batch d"], Callable]:
    """Equation (5): a vector of length 1 for each text;  `vjp(dy) -> {name: gradient}`. Errors as `backbone`, and as
    `mean_pool` for lengths."""
    hidden, backbone_vjp = backbone(
        params, tokens, config, lengths=lengths, dropout_key=dropout_key, recompute=recompute
    )
    mean, mean_vjp = mean_pool(hidden, lengths)
    y, unit_vjp = unit_length(mean)

    def vjp(dy):
        return backbone_vjp(mean_vjp(unit_vjp(dy)))

    return y, vjp


def _embeddings(params, tokens, token_types, config):
    """Equation (1);  vjp(dy) -> contributions."""
    positions = np.arange(tokens.shape[1])
    words, words_vjp = embedding(tokens, params[WORDS])  # (B, T, d)
    places, places_vjp = embedding(positions, params[POSITIONS])  # (T, d)
    kinds, kinds_vjp = embedding(np.zeros_like(tokens) if token_types is None else token_types, params[TYPES])
    x, norm_vjp = _norm(params, EMBEDDING_NORM, words + places + kinds, config)

    def vjp(dy):
        dsum, contributions = norm_vjp(dy)
        tables = [(WORDS, words_vjp(dsum)), (POSITIONS, places_vjp(dsum.sum(axis=0))), (TYPES, kinds_vjp(dsum))]
        return [*tables, *contributions]

    return x, vjp


def _lowest_that_learns(params, config) -> int:
    """The first block that the backward pass must reach; −1 for the embeddings, the number of blocks for none."""
    if any(learns(w) for name, w in params.items() if name.startswith("embeddings.")):
        return -1
    for layer in range(config.num_hidden_layers):
        if any(learns(w) for name, w in params.items() if name.startswith(f"encoder.layer.{layer}.")):
            return layer
    return config.num_hidden_layers


def _again(run, layer, x):
    """A block's pullback that keeps the block's input only and runs the block again when it is called."""
    return lambda dy: run(layer, x)[1](dy)
