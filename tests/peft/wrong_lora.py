"""LoRA, wrong in the ways it has been wrong in published code: each version must be rejected by a property."""

import numpy as np

from minift.nn.dropout import dropout
from minift.nn.linear import rows
from minift.peft.lora import Adapter, forward, scaling


def _forward(
    x, W, A, B, s, key=None, p=0.0, *, scale_h=None, drop_base=False, dx_detour=True, dA_scaled=True, learn_W=False
):
    h_in, drop_vjp = dropout(x, p, key) if p and key is not None else (x, lambda d: d)
    base_in = h_in if drop_base else x
    h = h_in @ A.T
    y = base_in @ W.T + (s if scale_h is None else scale_h) * h @ B.T

    def vjp(dy):
        dh = s * (dy @ B)
        dx = dy @ W + (drop_vjp(dh @ A) if dx_detour else 0)
        dA = rows(dh if dA_scaled else dy @ B).T @ rows(h_in)
        dB = s * rows(dy).T @ rows(h)
        return dx, (rows(dy).T @ rows(x) if learn_W else None), dA, dB

    return y, vjp


def unscaled(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
    """Forgets α / r: invisible where α = r."""
    return _forward(x, W, A, B, 1.0, dropout_key, p)


def gradient_unscaled(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
    return _forward(x, W, A, B, scaling, dropout_key, p, dA_scaled=False)


def dropout_on_the_base(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
    return _forward(x, W, A, B, scaling, dropout_key, p, drop_base=True)


def no_dropout(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
    return _forward(x, W, A, B, scaling)


def detour_without_dx(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
    """The cotangent of x misses the way through the adapter: only deeper layers suffer."""
    return _forward(x, W, A, B, scaling, dropout_key, p, dx_detour=False)


def scale_squared(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
    return _forward(x, W, A, B, scaling, dropout_key, p, scale_h=scaling * scaling)


def base_learns(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
    """Forms the gradient of the frozen weight: right numbers, twice the work."""
    return _forward(x, W, A, B, scaling, dropout_key, p, learn_W=True)


def swapped(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
    """Gives dB in the place of dA: the shapes of a square layer do not show it."""
    y, vjp = forward(x, W, A, B, scaling, p, dropout_key)

    def wrong(dy):
        dx, dW, dA, dB = vjp(dy)
        return dx, dW, dB.T.copy(), dA.T.copy()

    return y, wrong


FORWARD = (
    unscaled,
    gradient_unscaled,
    dropout_on_the_base,
    no_dropout,
    detour_without_dx,
    scale_squared,
    base_learns,
    swapped,
)


def average_the_factors(adapters):
    """PEFT's "linear": mixes A and B apart, which adds cross terms."""
    parts = list(adapters)
    arrays = {}
    for full in parts[0][0].arrays:
        arrays[full] = sum(
            (w * scaling(a.lora_alpha, a.r) if full.endswith("lora_B.weight") else 1) * a.arrays[full] for a, w in parts
        )
    return Adapter(arrays, parts[0][0].r, float(parts[0][0].r), parts[0][0].target_modules)


def forget_the_scales(adapters):
    parts = list(adapters)
    r = sum(a.r for a, _ in parts)
    arrays = {}
    for full in parts[0][0].arrays:
        is_b = full.endswith("lora_B.weight")
        arrays[full] = np.concatenate([(w if is_b else 1) * a.arrays[full] for a, w in parts], axis=1 if is_b else 0)
    return Adapter(arrays, r, float(r), parts[0][0].target_modules)


def forget_the_weights(adapters):
    from minift.peft.lora import mix

    return mix([(adapter, 1.0) for adapter, _ in adapters])


MIX = (average_the_factors, forget_the_scales, forget_the_weights)
