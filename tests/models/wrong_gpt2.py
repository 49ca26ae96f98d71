"""GPT-2, wrong in the usual ways: each version must be rejected by a property."""

import numpy as np

from minift.models import gpt2
from minift.models.layout import slots_and_positions
from minift.nn.attention import causal_mask
from minift.nn.mlp import gelu, sigmoid
from minift.nn.norms import layer_norm, rms_norm
from nn.wrong_nn import variants

_embedding, _linear = gpt2.embedding, gpt2._linear


def _positions(before, tokens, segments=None, *, shift=0, cache_counts=True, restart=True, one_length=False):
    counted = np.full_like(before, before.max()) if one_length else before
    slots, positions = slots_and_positions(counted, tokens, segments if restart else None)
    if not cache_counts:
        positions = positions - before[:, None]
    return slots, positions + shift


def _mask(positions, keys, segments=None, *, sees=0, segments_seen=True):
    return causal_mask(positions + sees, keys, segments if segments_seen else None)


def _activation(x, *, form):
    if form == "exact":
        return gelu(x)
    if form == "relu":
        return np.maximum(x, 0), lambda dy: dy * (x > 0)
    s = sigmoid(1.702 * x)  # "quick" GELU
    return x * s, lambda dy: dy * (s + 1.702 * x * s * (1 - s))


def _layer_norm(x, weight, bias, eps=1e-5, *, kind):
    if kind == "no bias":
        y, vjp = layer_norm(x, weight, np.zeros_like(bias), eps)
        return y, lambda dy: (*vjp(dy)[:2], np.zeros_like(bias))
    if kind == "rms":
        y, vjp = rms_norm(x, weight, eps)
        return y + bias, lambda dy: (*vjp(dy), dy.reshape(-1, len(bias)).sum(0))
    if kind == "unbiased":
        d = x.shape[-1]
        y, vjp = layer_norm(x, weight, np.zeros_like(bias), eps * d / (d - 1))
        s = np.sqrt((d - 1) / d)
        return y * s + bias, lambda dy: (vjp(dy)[0] * s, vjp(dy)[1] * s, vjp(dy)[2])
    return layer_norm(x, weight, bias, 1e-12)


def _untransposed(params, name, x, key, *, only=None):
    """The numbers of a (in, out) matrix read as if they were (out, in), as files hold them."""
    weight = params[f"{name}.weight"]
    if only is not None and not name.endswith(only):
        return _linear(params, name, x, key)
    return _linear(params | {f"{name}.weight": weight.T.reshape(weight.shape)}, name, x, key)


def _no_bias(params, name, x, key):
    y, vjp = _linear(params, name, x, key)
    bias = params[f"{name}.bias"]
    return y - bias, lambda dy: (vjp(dy)[0], [*vjp(dy)[1][:1], (f"{name}.bias", np.zeros_like(bias))])


def _no_bias_gradient(params, name, x, key):
    y, vjp = _linear(params, name, x, key)
    return y, lambda dy: (vjp(dy)[0], [vjp(dy)[1][0], (f"{name}.bias", 0 * params[f"{name}.bias"])])


def _order_of_qkv(params, name, x, key):
    """q, k, v in each head's turn (as GPT-NeoX has it) instead of one after the other."""
    y, vjp = _linear(params, name, x, key)
    if not name.endswith("c_attn"):
        return y, vjp
    d = y.shape[-1] // 3
    order = np.arange(3 * d).reshape(-1, 3, d // 3).swapaxes(0, 1).reshape(-1)  # three heads in the tests' model
    back = np.argsort(order)
    return y[..., order], lambda dy: vjp(dy[..., back])


def _block(params, x, visible, config, layer, cache=None, dropout_key=None, *, kind):
    """`gpt2.block` put together in another way."""
    name = gpt2.block_name(layer)

    def key(module):
        return None

    def norm(part, x):
        return gpt2._norm(params, name + part, x, config)

    def attention(x):
        at = 0 if kind == "one layer's cache" and cache is not None else layer
        return gpt2._self_attention(params, f"{name}attn.", x, visible, config, at, cache, key)

    def mlp(x):
        return gpt2._mlp(params, f"{name}mlp.", x, key)

    if kind == "post-norm":
        a, a_vjp = attention(x)
        middle, first_vjp = norm("ln_1", x + a)
        m, m_vjp = mlp(middle)
        y, second_vjp = norm("ln_2", middle + m)

        def vjp(dy):
            dsum, second = second_vjp(dy)
            dm, mlp_ = m_vjp(dsum)
            dsum, first = first_vjp(dsum + dm)
            da, attn = a_vjp(dsum)
            return dsum + da, [*first, *attn, *second, *mlp_]

        return y, vjp

    one, two = ("ln_2", "ln_1") if kind == "norms exchanged" else ("ln_1", "ln_2")
    normed, first_vjp = norm(one, x)
    a, a_vjp = attention(normed)
    middle = x + a
    normed, second_vjp = norm(two, x if kind == "parallel" else middle)
    m, m_vjp = mlp(normed)
    y = m if kind == "no residual" else middle + m

    def vjp(dy):
        dnormed, mlp_ = m_vjp(dy)
        dsecond, second = second_vjp(dnormed)
        if kind == "no residual":
            dmiddle = dsecond
        elif kind in ("parallel", "pullback without the sum"):
            dmiddle = dy
        else:
            dmiddle = dy + dsecond
        dnormed, attn = a_vjp(dmiddle)
        dx, first = first_vjp(dnormed)
        dx = dmiddle + dx + (dsecond if kind == "parallel" else 0)
        return dx, [*first, *attn, *second, *mlp_]

    return y, vjp


def _table(tokens, weight, *, kind):
    y, vjp = _embedding(tokens, weight)
    places = len(weight) == 40  # of the tests' model: 40 positions, 29 tokens
    if kind == "positions left out" and places:
        return 0 * y, lambda dy: 0 * vjp(dy)
    if kind == "positions do not learn" and places:
        return y, lambda dy: 0 * vjp(dy)
    if kind == "embeddings scaled" and not places:
        s = np.sqrt(y.shape[-1])
        return s * y, lambda dy: s * vjp(dy)
    return y, vjp


def _tied_once(config):
    """The head reads another matrix than the table: here, the table read backwards."""
    return gpt2.POSITIONS


VERSIONS = {
    "slots_and_positions": variants(_positions, shift=(1, 2), cache_counts=False, restart=False, one_length=True),
    "causal_mask": variants(_mask, sees=(1, -1), segments_seen=False),
    "gelu_tanh": variants(_activation, form=("exact", "relu", "quick")),
    "layer_norm": variants(_layer_norm, kind=("no bias", "rms", "unbiased", "eps")),
    "_linear": [
        *variants(_untransposed, only=("c_attn", "c_fc", "attn.c_proj", "mlp.c_proj")),
        _no_bias,
        _no_bias_gradient,
        _order_of_qkv,
    ],
    "block": variants(
        _block,
        kind=(
            "post-norm",
            "norms exchanged",
            "parallel",
            "no residual",
            "pullback without the sum",
            "one layer's cache",
        ),
    ),
    "embedding": variants(_table, kind=("positions left out", "positions do not learn", "embeddings scaled")),
    "head_name": [_tied_once],
}
NEEDED_FOR = {  # property: a version that it must reject
    "transformers_agrees": "gelu_tanh form=exact",
    "no_token_looks_ahead": "causal_mask sees=1",
    "any_cut_of_the_text_through_the_cache": "slots_and_positions cache_counts=False",
    "rows_of_different_lengths_through_the_cache": "slots_and_positions one_length=True",
    "packed_texts_do_not_see_each_other": "slots_and_positions restart=False",
    "greedy_text_is_transformers": "_linear only=c_fc",
}
