"""Encoders that are wrong in one place each: what `minift.models.bert` is replaced by, {its name there: the wrong one}.

The switches stand for what people do get wrong: pre-norm for post-norm, the other GELU, a causal mask, padding that is
looked at, positions from 1, a term of the backward pass that is forgotten.
"""

import functools

import numpy as np

from minift.models import bert
from minift.nn import attention as real_attention
from minift.nn.mlp import gelu, gelu_tanh
from minift.nn.norms import layer_norm
from minift.nn.pooling import mean_pool


def _block(
    params,
    x,
    visible,
    config,
    layer,
    dropout_key=None,
    *,
    order="post",
    residual=True,
    skip_backward=False,
    one_norm=False,
    always_first=False,
):
    name = f"encoder.layer.{0 if always_first else layer}."

    def key(module):
        return None

    first, second = f"{name}attention.output.LayerNorm", f"{name}{'attention.' if one_norm else ''}output.LayerNorm"
    if order == "pre":
        normed, first_vjp = bert._norm(params, first, x, config)
        a, attention_vjp = bert._self_attention(params, f"{name}attention.", normed, visible, config, key)
        middle = x + a
        normed, second_vjp = bert._norm(params, second, middle, config)
        m, mlp_vjp = bert._mlp(params, name, normed, key)

        def vjp(dy):
            dnormed, dmlp = mlp_vjp(dy)
            dmiddle, dsecond = second_vjp(dnormed)
            dmiddle = dy + dmiddle
            dnormed, dattention = attention_vjp(dmiddle)
            dx, dfirst = first_vjp(dnormed)
            return dmiddle + dx, [*dattention, *dfirst, *dmlp, *dsecond]

        return middle + m, vjp

    a, attention_vjp = bert._self_attention(params, f"{name}attention.", x, visible, config, key)
    middle, first_vjp = bert._norm(params, first, x + a if residual else a, config)
    m, mlp_vjp = bert._mlp(params, name, middle, key)
    y, second_vjp = bert._norm(params, second, middle + m, config)

    def vjp(dy):
        dsum, dsecond = second_vjp(dy)
        dmiddle, dmlp = mlp_vjp(dsum)
        dsum, dfirst = first_vjp(dmiddle if skip_backward else dsum + dmiddle)
        dx, dattention = attention_vjp(dsum)
        return dsum + dx, [*dattention, *dfirst, *dmlp, *dsecond]

    return y, vjp


def _embeddings(params, tokens, token_types, config, *, shift=0, types=True, normed=True, sum_over_batch=True):
    positions = np.arange(tokens.shape[1]) + shift
    words, words_vjp = bert.embedding(tokens, params[bert.WORDS])
    places, places_vjp = bert.embedding(positions, params[bert.POSITIONS])
    kinds = np.zeros_like(tokens) if token_types is None or not types else token_types
    kinds, kinds_vjp = bert.embedding(kinds, params[bert.TYPES])
    x, norm_vjp = words + places + kinds, lambda dy: (dy, [])
    if normed:
        x, norm_vjp = bert._norm(params, bert.EMBEDDING_NORM, x, config)

    def vjp(dy):
        dsum, contributions = norm_vjp(dy)
        by_position = dsum.sum(axis=0) if sum_over_batch else dsum[0]
        tables = [
            (bert.WORDS, words_vjp(dsum)),
            (bert.POSITIONS, places_vjp(by_position)),
            (bert.TYPES, kinds_vjp(dsum)),
        ]
        return [*tables, *contributions]

    return x, vjp


def _linear(params, name, x, key=None, *, bias_learns=True, bias=True):
    y, vjp = bert.linear(x, params[f"{name}.weight"], params[f"{name}.bias"] if bias else None)

    def pullback(dy):
        dx, dweight, dbias = vjp(dy)
        return dx, [(f"{name}.weight", dweight), (f"{name}.bias", dbias if bias_learns else None)]

    return y, pullback


def _attention(q, k, v, visible, *, looks="both", padding=True, scaled=True):
    tokens = q.shape[2]
    if not padding:
        visible = np.ones_like(visible)
    if looks == "back":
        visible = visible & np.tri(tokens, dtype=bool)
    if looks == "others":
        visible = visible & ~np.eye(tokens, dtype=bool)
    factor = 1 if scaled else q.shape[-1] ** 0.5
    y, vjp = real_attention.attention(q * factor, k, v, visible)

    def pullback(dy):
        dq, dk, dv = vjp(dy)
        return dq * factor, dk, dv

    return y, pullback


def _pool(params, hidden, *, token=0, squashed=True, slope=True):
    z, dense_vjp = bert._linear(params, bert.POOLER, hidden[:, token])
    pooled = np.tanh(z) if squashed else z

    def vjp(dpooled):
        dfirst, contributions = dense_vjp(dpooled * (1 - pooled * pooled) if slope else dpooled)
        dhidden = np.zeros_like(hidden)
        dhidden[:, token] = dfirst
        return dhidden, bert.gradients(contributions)

    return pooled, vjp


def _gelu_by_tanh(x):
    return gelu_tanh(x)


def _relu(x):
    return np.maximum(x, 0), lambda dy: dy * (x > 0)


def _gelu_without_its_slope(x):
    return gelu(x)[0], lambda dy: dy


def _other_eps(x, weight, bias, eps):
    return layer_norm(x, weight, bias, 1e-12)


def _over_padding(x, lengths):
    return mean_pool(x, np.full_like(lengths, x.shape[1]))


def _as_long_as_it_is(x):
    return x, lambda dy: dy


def _one(attribute, maker, **switch):
    ((name, value),) = switch.items()
    return f"{attribute}: {name}={value}", {attribute: functools.partial(maker, **switch)}


VERSIONS = dict(
    [
        _one("block", _block, order="pre"),
        _one("block", _block, residual=False),
        _one("block", _block, skip_backward=True),
        _one("block", _block, one_norm=True),
        _one("block", _block, always_first=True),
        _one("_embeddings", _embeddings, shift=1),
        _one("_embeddings", _embeddings, types=False),
        _one("_embeddings", _embeddings, normed=False),
        _one("_embeddings", _embeddings, sum_over_batch=False),
        _one("_linear", _linear, bias_learns=False),
        _one("_linear", _linear, bias=False),
        _one("attention", _attention, looks="back"),
        _one("attention", _attention, looks="others"),
        _one("attention", _attention, padding=False),
        _one("attention", _attention, scaled=False),
        _one("pool", _pool, token=1),
        _one("pool", _pool, squashed=False),
        _one("pool", _pool, slope=False),
        ("gelu by tanh", {"gelu": _gelu_by_tanh}),
        ("relu", {"gelu": _relu}),
        ("gelu without its slope", {"gelu": _gelu_without_its_slope}),
        ("another ε", {"layer_norm": _other_eps}),
        ("a mean over padding", {"mean_pool": _over_padding}),
        ("embeddings of any length", {"unit_length": _as_long_as_it_is}),
    ]
)
