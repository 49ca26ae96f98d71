"""Whole models that are wrong in where tokens stand, in what they may see, and in how a block is put together."""

import numpy as np

from minift.models import llama
from minift.nn.attention import causal_mask
from minift.nn.rope import frequencies, rotations
from nn.wrong_nn import variants


def _layout(
    x,
    config,
    segments,
    prefix,
    cache,
    *,
    prefix_counts=True,
    cache_counts=True,
    restart=True,
    segments_seen=True,
    one_length=False,
    sees=0,
    scale=1.0,
    interpolated=False,
    positions_for="slots",
):
    tokens, before = x.shape[1], np.zeros(len(x), np.int64)
    if prefix is not None:
        before = before + prefix.shape[3]
    if cache is not None:
        before = before + (cache.lengths.max() if one_length else cache.lengths)
    slots = before[:, None] + np.arange(tokens)
    positions = slots.copy()
    if not prefix_counts and prefix is not None:
        positions -= prefix.shape[3]
    if not cache_counts and cache is not None:
        positions -= cache.lengths[:, None]
    if segments is not None and restart:
        starts = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
        positions = positions - np.maximum.accumulate(np.where(starts, np.arange(tokens), 0), axis=1)
    omega = frequencies(config.head_dim, config.rope_theta * (2 if interpolated else 1), config.rope_scaling)
    cos, sin = rotations((positions * scale).astype(np.int64), omega, x.dtype)
    keys = int(before.max(initial=0)) + tokens
    return llama._Layout(cos, sin, causal_mask(slots + sees, keys, segments if segments_seen else None))


LAYOUT = variants(
    _layout,
    prefix_counts=False,
    cache_counts=False,
    restart=False,
    segments_seen=False,
    one_length=True,
    sees=(1, -1),
    scale=0.5,
    interpolated=True,
)


def _block(
    params,
    x,
    layout,
    config,
    layer,
    prefix=None,
    cache=None,
    dropout_key=None,
    *,
    original=llama.block,
    residual=True,
    gradient_residual=True,
    swapped=False,
    first_layer=False,
    drop_prefix=False,
    exchanged=False,
    half=1.0,
):
    name = f"model.layers.{layer}."
    if swapped:
        gate, up = name + "mlp.gate_proj.weight", name + "mlp.up_proj.weight"
        params = dict(params) | {gate: params[up], up: params[gate]}
    if first_layer:
        params = dict(params) | {
            n.replace("layers.0.", f"layers.{layer}."): w for n, w in params.items() if "layers.0." in n
        }
    y, vjp = original(params, x, layout, config, layer, None if drop_prefix else prefix, cache, dropout_key)
    if not residual:
        y = y - x
    y = y * half

    def wrong(dy):
        dx, dprefix, contributions = vjp(half * dy)
        if not residual or not gradient_residual:
            dx = dx - half * dy
        if exchanged:
            mapping = {name + "mlp.gate_proj.weight": name + "mlp.up_proj.weight"}
            mapping |= {b: a for a, b in mapping.items()}
            contributions = [(mapping.get(n, n), c) for n, c in contributions]
        return dx, dprefix, contributions

    return y, wrong


BLOCK = variants(
    _block,
    residual=False,
    gradient_residual=False,
    swapped=True,
    first_layer=True,
    drop_prefix=True,
    exchanged=True,
    half=0.5,
)
