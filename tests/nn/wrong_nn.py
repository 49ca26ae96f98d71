"""Operations, wrong in the ways they have been wrong in published code: each version must be rejected by a property.

Each maker is the right operation with switches; a wrong version is the maker with one switch turned.
"""

import functools
import math

import numpy as np

from minift.nn.dropout import philox, uniform
from minift.nn.linear import linear, rows
from minift.nn.losses import IGNORE_INDEX, cross_entropy
from minift.nn.mlp import erf, sigmoid
from minift.nn.rope import frequencies
from minift.nn.weight import add, times, unwrap


def variants(maker, **switches):
    """One wrong version for each switch (or each of its values)."""
    found = []
    for name, values in switches.items():
        for value in values if isinstance(values, tuple) else (values,):
            wrong = functools.partial(maker, **{name: value})
            wrong.__name__ = f"{name}={value}"
            found.append(wrong)
    return tuple(found)


# --- linear -----------------------------------------------------------------------------------------------------------


def _linear(
    x,
    W,
    b=None,
    *,
    transpose=False,
    bias="once",
    dx_transposed=False,
    dW="sum",
    db="sum",
    upcast=False,
    reshape_order="C",
    in_place=False,
    scribbles=False,
):
    square = W.shape[0] == W.shape[1]
    y = x @ (W if transpose and square else W.T)
    if b is not None and bias != "none":
        y = y + b * (2 if bias == "twice" else 1)
    if upcast:
        y = y.astype(np.float64)
    if in_place:
        x *= 0.5

    def vjp(dy):
        if scribbles:
            dy *= 2
        dx = dy @ (W.T if dx_transposed and square else W)
        flat_dy = dy.reshape(-1, dy.shape[-1], order=reshape_order)
        grad = flat_dy.T @ rows(x)
        if dW == "mean":
            grad = grad / len(rows(x))
        if dW == "transposed" and square:
            grad = grad.T
        if dW == "last row" and x.ndim > 1:
            grad = rows(dy)[-1:].T @ rows(x)[-1:]
        if b is None:
            return dx, grad, None
        over = {
            "sum": rows(dy).sum(0),
            "mean": rows(dy).mean(0),
            "first axis": dy.reshape(len(dy), -1, len(b))[:, 0].sum(0),
        }
        return dx, grad, over[db].astype(b.dtype)

    return y, vjp


LINEAR = variants(
    _linear,
    transpose=True,
    bias=("twice", "none"),
    dx_transposed=True,
    dW=("mean", "transposed", "last row"),
    db=("mean", "first axis"),
    upcast=True,
    reshape_order="F",
    in_place=True,
    scribbles=True,
)


# --- embedding --------------------------------------------------------------------------------------------------------


def _embedding(
    tokens,
    weight,
    *,
    add="accumulate",
    checks=True,
    shift=0,
    dtype=None,
    rows_of="table",
    order="C",
    view=False,
    averages=False,
    frozen_learns=False,
):
    table, learns = unwrap(weight)
    if checks and tokens.size and (tokens.min() < 0 or tokens.max() >= len(table)):
        raise IndexError("token")
    y = table[(tokens + shift) % len(table)]
    if view and tokens.ndim == 1 and np.array_equal(tokens, np.arange(tokens.size)):
        y = table[: tokens.size]

    def vjp(dy):
        if not learns and not frozen_learns:
            return None
        flat, values = tokens.reshape(-1, order=order), rows(dy)
        n = len(table) if rows_of == "table" else flat.max(initial=-1) + 1
        out = np.zeros((n, table.shape[1]), dtype or dy.dtype)
        if add == "accumulate":
            np.add.at(out, flat, values)
        elif add == "assign":
            out[flat] = values
        else:
            out[flat] += values  # looks like accumulation, and is not for a repeated token
        if averages:
            out /= np.maximum(np.bincount(flat, minlength=n), 1)[:, None].astype(out.dtype)
        return out

    return y, vjp


EMBEDDING = variants(
    _embedding,
    add=("assign", "in place"),
    checks=False,
    shift=1,
    dtype=np.float64,
    rows_of="tokens",
    order="F",
    view=True,
    averages=True,
    frozen_learns=True,
)


# --- norms ------------------------------------------------------------------------------------------------------------


def _rms_norm(
    x,
    weight,
    eps=1e-6,
    *,
    center=False,
    eps_place="inside",
    divisor=0,
    weight_axis=-1,
    statistics=True,
    dweight="rows",
    gain_plus_one=False,
    dx_gain=True,
    half=False,
    upcast=False,
    eps_default=False,
    fixed_n=False,
    in_place=False,
):
    g = unwrap(weight)[0] + (1 if gain_plus_one else 0)
    if eps_default:
        eps = 1e-6
    n = max(x.shape[-1] - divisor, 1)
    z = x - x.mean(-1, keepdims=True) if center else x
    square = (z * z).sum(-1, keepdims=True) / x.dtype.type(n)
    if eps_place == "inside":
        inv = 1 / np.sqrt(square + x.dtype.type(eps))
    elif eps_place == "outside":
        inv = 1 / (np.sqrt(square) + x.dtype.type(eps))
    else:
        inv = 1 / np.sqrt(np.maximum(square, np.finfo(x.dtype).tiny))
    x_hat = z * inv
    by_row = weight_axis == -2 and x.ndim > 1 and x.shape[-2] == x.shape[-1]
    y = x_hat * (g[:, None] if by_row else g)
    if half:
        y = y.astype(np.float16).astype(x.dtype)
    if upcast:
        y = y.astype(np.float64)
    if in_place:
        x += 0 * x + 1

    def vjp(dy):
        dx_hat = dy * g if dx_gain else dy
        dx = inv * (dx_hat - (x_hat * np.mean(dx_hat * x_hat, -1, keepdims=True) if statistics else 0))
        products = dy * x_hat
        if dweight == "no x_hat":
            products = dy * z
        if dweight == "mean":
            return dx, rows(products).mean(0)
        if dweight == "first axis" and x.ndim > 2:
            return dx, products[:, 0].sum(0)
        if dweight == "last axis" and x.shape[-1] == rows(x).shape[0]:
            return dx, rows(products).sum(1)
        return dx, rows(products).sum(0)

    return y, vjp


RMS_NORM = variants(
    _rms_norm,
    center=True,
    eps_place=("outside", "none"),
    divisor=1,
    weight_axis=-2,
    statistics=False,
    dweight=("mean", "first axis", "last axis", "no x_hat"),
    gain_plus_one=True,
    dx_gain=False,
    half=True,
    upcast=True,
    eps_default=True,
    in_place=True,
)


def _layer_norm(
    x,
    weight,
    bias,
    eps=1e-5,
    *,
    center=True,
    unbiased=False,
    one_pass=False,
    eps_outside=False,
    mean_term=True,
    statistics=True,
    dbias="sum",
    bias_before_gain=False,
    swapped=False,
    upcast=False,
):
    g, b = unwrap(weight)[0], unwrap(bias)[0]
    n = x.shape[-1]
    mean = x.mean(-1, keepdims=True)
    c = x - mean if center else x
    var = (c * c).mean(-1, keepdims=True)
    if one_pass:
        var = np.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0)  # cancels where the mean is large
    if unbiased:
        var = var * x.dtype.type(n / max(n - 1, 1))
    eps = x.dtype.type(eps)
    inv = 1 / (np.sqrt(var) + eps) if eps_outside else 1 / np.sqrt(var + eps)
    x_hat = c * inv
    y = (x_hat + b) * g if bias_before_gain else x_hat * g + b
    y = y.astype(np.float64) if upcast else y

    def vjp(dy):
        dh = dy * g
        dx = inv * (
            dh
            - (dh.mean(-1, keepdims=True) if mean_term else 0)
            - (x_hat * (dh * x_hat).mean(-1, keepdims=True) if statistics else 0)
        )
        dg = rows(dy * x_hat).sum(0)
        db = rows(dy).sum(0) if dbias == "sum" else rows(dy).mean(0) if dbias == "mean" else rows(dy * g).sum(0)
        return (dx, db, dg) if swapped else (dx, dg, db)

    return y, vjp


LAYER_NORM = variants(
    _layer_norm,
    center=False,
    unbiased=True,
    one_pass=True,
    eps_outside=True,
    mean_term=False,
    statistics=False,
    dbias=("mean", "times gain"),
    bias_before_gain=True,
    swapped=True,
    upcast=True,
)


# --- rope: (x, positions, theta) -> y, vjp ----------------------------------------------------------------------------


def _rope(
    x,
    positions,
    theta,
    *,
    interleaved=False,
    backward="transpose",
    shift=0,
    position_dtype=None,
    angle32=False,
    direction=1,
    exponent=2,
    turn="both",
    upcast=False,
    in_place=False,
    row_shared=False,
):
    d = x.shape[-1]
    omega = frequencies(d, theta) if exponent == 2 else theta ** (-np.arange(d // 2) / d)
    if position_dtype is not None:
        positions = positions.astype(position_dtype)
    if row_shared:
        positions = np.broadcast_to(positions[:1], positions.shape)
    phi = (positions + shift)[..., None] * omega
    if angle32:
        phi = (positions.astype(np.float32))[..., None] * omega.astype(np.float32)
    phi = phi.astype(np.float64)[:, None] * direction

    def rotate(x, phi):
        cos, sin = np.cos(phi).astype(x.dtype), np.sin(phi).astype(x.dtype)
        y = np.empty_like(x)
        first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, d // 2), slice(d // 2, d))
        x1, x2 = x[..., first], x[..., second]
        y[..., first] = x1 * cos - x2 * sin
        y[..., second] = x2 * cos + x1 * sin if turn == "both" else x2
        return y.astype(np.float64) if upcast else y

    y = rotate(x, phi)
    if in_place:
        x[...] = y

    def vjp(dy):
        return rotate(dy, {"transpose": -phi, "same": phi, "none": 0 * phi}[backward])

    return y, vjp


ROPE = variants(
    _rope,
    interleaved=True,
    backward=("same", "none"),
    shift=1,
    position_dtype=np.float16,
    angle32=True,
    direction=-1,
    exponent=1,
    turn="first",
    upcast=True,
    in_place=True,
    row_shared=True,
)


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(
    q,
    k,
    v,
    visible,
    *,
    mask="-inf",
    look=0,
    scale="d",
    shifted=True,
    drop_key=False,
    grouping="h // (H/G)",
    empty="zeros",
    softmax_backward=True,
    dq_scaled=True,
    dk_scaled=True,
    dv="sum",
    dk_swapped=False,
    value_index="group",
    upcast=False,
    first_mask=False,
    axis=-1,
    key_order="same",
    in_place=False,
    low=False,
):
    H, G, d = q.shape[1], k.shape[1], q.shape[-1]
    T, S = q.shape[2], k.shape[2]
    head = np.arange(H)
    group = head // (H // G) if grouping == "h // (H/G)" else head % G
    s = {"d": 1 / math.sqrt(d), "1": 1.0, "1/d": 1 / d, "H d": 1 / math.sqrt(H * d), "double": 1 / math.sqrt(2 * d)}[
        scale
    ]
    see = np.broadcast_to(visible, (len(q), T, S)).copy()
    if first_mask:
        see = np.broadcast_to(see[:1], see.shape).copy()
    if look:
        see |= np.roll(see, look, axis=-1) & (np.arange(S) > 0)
    if drop_key:
        see[..., -1] = False
    see = see[:, None]
    kk, vv = k[:, group], v[:, group]
    if value_index == "other":
        vv = v[:, (group + 1) % G]
    if key_order == "reversed":
        kk = kk[:, :, ::-1]
    if low:
        q, kk = q.astype(np.float16).astype(q.dtype), kk.astype(np.float16).astype(q.dtype)
    scores = q @ kk.swapaxes(-1, -2) * q.dtype.type(s)
    if mask == "-inf":
        masked = np.where(see, scores, -np.inf)
    elif mask == "0":
        masked = np.where(see, scores, 0)
    elif mask == "-10":
        masked = np.where(see, scores, -10)
    else:
        masked = scores
    masked = masked.astype(q.dtype)
    with np.errstate(all="ignore"):
        top = masked.max(axis, keepdims=True)
        e = np.exp(masked - (np.where(np.isneginf(top), 0, top) if shifted else 0))
        total = e.sum(axis, keepdims=True)
        p = e / (np.where(total == 0, 1, total) if empty == "zeros" else total)
    if mask == "after":
        p = np.where(see, p, 0).astype(q.dtype)
    if empty == "uniform":
        p = np.where(see.any(-1, keepdims=True), p, 1 / S).astype(q.dtype)
    y = p @ vv
    y = y.astype(np.float64) if upcast else y
    if in_place:
        q *= q.dtype.type(s)

    def gather(x):
        out = np.zeros(k.shape, q.dtype)
        for h in range(H):
            if dv == "sum":
                out[:, group[h]] += x[:, h]
            else:
                out[:, group[h]] = x[:, h]
        return out

    def vjp(dy):
        dV = p.swapaxes(-1, -2) @ dy
        dp = dy @ vv.swapaxes(-1, -2)
        ds = p * (dp - (np.sum(p * dp, -1, keepdims=True) if softmax_backward else 0))
        dq = ds @ kk * q.dtype.type(s if dq_scaled else 1)
        dk = ds.swapaxes(-1, -2) @ q * q.dtype.type(s if dk_scaled else 1)
        dV, dk = gather(dV), gather(dk)
        return (dq, dV, dk) if dk_swapped else (dq, dk, dV)

    return y, vjp


ATTENTION = variants(
    _attention,
    mask=("0", "-10", "none", "after"),
    look=1,
    scale=("1", "1/d", "H d", "double"),
    shifted=False,
    drop_key=True,
    grouping="h % G",
    empty=("nan", "uniform"),
    softmax_backward=False,
    dq_scaled=False,
    dk_scaled=False,
    dv="last head",
    dk_swapped=True,
    value_index="other",
    upcast=True,
    first_mask=True,
    axis=-2,
    key_order="reversed",
    in_place=True,
    low=True,
)


def _attention_in_tiles(
    q,
    k,
    v,
    visible,
    *,
    rows=2,
    last_tile=True,
    accumulate=True,
    blank=0.0,
    first_key=0,
    last_key=0,
    reach="all",
    mask="own",
    delta="y",
    dy_by_total=True,
    dv_by_total=True,
    dq_scale=1,
    dk_scale=0,
    group="stacked",
):
    (B, H, T, d), G = q.shape, k.shape[1]
    s, y, tiles = q.dtype.type(1 / math.sqrt(d)), np.zeros_like(q), []
    starts = range(0, T, rows)
    for first in starts if last_tile else starts[:-1]:
        queries = slice(first, min(first + rows, T))
        looks = {
            "all": visible[:, queries].any((0, 1)),
            "first row": visible[0, queries].any(0),
            "first query": visible[:, queries][:, 0].any(0),
            "last query": visible[:, queries][:, -1].any(0),
        }
        seen = np.flatnonzero(looks[reach])
        start, stop = (seen[0], seen[-1] + 1) if seen.size else (0, 1)
        keys = slice(min(start + first_key, stop - 1), max(stop - last_key, start + 1))
        tall = (B, G, -1, d)
        qs = q[:, :, queries].reshape(tall) * s
        own = visible[:, queries, keys] if mask == "own" else visible[:, : queries.stop - first, keys]
        see = np.broadcast_to(own[:, None, None], (B, G, H // G, *own.shape[1:]))
        see = see.reshape(B, G, -1, own.shape[2]) if group == "stacked" else np.repeat(own[:, None], H // G, 2)
        scores = np.where(see, qs @ k[:, :, keys].swapaxes(-1, -2), -np.inf).astype(q.dtype)
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        e = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = e.sum(-1, keepdims=True)
        total = np.where(total == 0, 1, total)
        raw = e @ v[:, :, keys]
        y[:, :, queries] = (raw / total).reshape(B, H, -1, d)
        tiles.append((queries, keys, qs, e, total, raw))

    def vjp(dy):
        dq, dk, dv = np.zeros_like(q), np.full_like(k, blank), np.full_like(v, blank)
        for queries, keys, qs, e, total, raw in tiles:
            g = dy[:, :, queries].reshape(qs.shape)
            plain, g = g, g / (total if dy_by_total else 1)
            inner = {"y": g * (raw / total), "raw": g * raw, "plain": plain * (raw / total), "none": 0 * g}[delta]
            ds = e * (g @ v[:, :, keys].swapaxes(-1, -2) - inner.sum(-1, keepdims=True))
            dq[:, :, queries] = (ds @ k[:, :, keys] * s**dq_scale).reshape(B, H, -1, d)
            parts = ds.swapaxes(-1, -2) @ qs * s**dk_scale, e.swapaxes(-1, -2) @ (g if dv_by_total else plain)
            for whole, part in zip((dk, dv), parts, strict=True):
                whole[:, :, keys] = whole[:, :, keys] + part if accumulate else part
        return dq, dk, dv

    return y, vjp


ATTENTION_IN_TILES = variants(
    _attention_in_tiles,
    last_tile=False,
    accumulate=False,
    blank=1e-3,  # what happens to lie in memory
    first_key=1,
    last_key=1,
    reach=("first row", "first query", "last query"),
    mask="first tile's",
    delta=("raw", "plain", "none"),
    dy_by_total=False,
    dv_by_total=False,
    dq_scale=(0, 2),
    dk_scale=(1, -1),
    group="interleaved",
)


# --- the feed-forward block -------------------------------------------------------------------------------------------


def _swiglu(
    gate,
    up,
    *,
    slope=True,
    swapped=False,
    dup="silu",
    gate_of="gate",
    naive=False,
    relu=False,
    upcast=False,
    dgate_up=True,
):
    g, u = (up, gate) if gate_of == "up" else (gate, up)
    s = 1 / (1 + np.exp(-g)) if naive else sigmoid(g)
    if naive:
        s = np.exp(g) / (1 + np.exp(g))  # inf / inf
    if relu:
        s = (g > 0).astype(g.dtype)
    y = g * s * u
    y = y.astype(np.float64) if upcast else y

    def vjp(dy):
        dg = dy * (u if dgate_up else 1) * (s + (g * s * (1 - s) if slope else 0))
        du = dy * {"silu": g * s, "gate": g, "sigmoid": s}[dup]
        return (du, dg) if swapped != (gate_of == "up") else (dg, du)

    return y, vjp


SWIGLU = variants(
    _swiglu,
    slope=False,
    swapped=True,
    dup=("gate", "sigmoid"),
    gate_of="up",
    naive=True,
    relu=True,
    upcast=True,
    dgate_up=False,
)


def _gelu(x, *, root=True, pdf=True, cdf=True, tanh=False, norm=True, sign=-0.5, upcast=False, quick=False):
    c = 0.5 * (1 + erf(x / (math.sqrt(2) if root else 1)))
    if tanh:
        c = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if quick:
        c = sigmoid(x.dtype.type(1.702) * x)
    c = c.astype(x.dtype)
    y = x * c
    y = y.astype(np.float64) if upcast else y

    def vjp(dy):
        density = np.exp(sign * x * x) * (1 / math.sqrt(2 * math.pi) if norm else 1)
        return (dy * ((c if cdf else 0) + (x * density if pdf else 0))).astype(x.dtype)

    return y, vjp


GELU = variants(_gelu, root=False, pdf=False, cdf=False, tanh=True, norm=False, sign=-1.0, upcast=True, quick=True)


def _gelu_tanh(x, *, cubic=0.044715, dcubic=3, root=2 / math.pi, slope=True, square=True, exact=False, upcast=False):
    c = math.sqrt(root)
    t = np.tanh(c * (x + cubic * x * x * x))
    if exact:
        t = erf(x / math.sqrt(2)).astype(x.dtype)
    y = 0.5 * x * (1 + t)
    y = y.astype(np.float64) if upcast else y

    def vjp(dy):
        dz = c * (1 + dcubic * cubic * x * x)
        return dy * (0.5 * (1 + t) + (0.5 * x * (1 - (t * t if square else t)) * dz if slope else 0))

    return y, vjp


GELU_TANH = variants(
    _gelu_tanh,
    cubic=(0.0, 0.04471),
    dcubic=(0, 1),
    root=1 / math.pi,
    slope=False,
    square=False,
    exact=True,
    upcast=True,
)


# --- losses -----------------------------------------------------------------------------------------------------------


def _cross_entropy(
    logits,
    labels,
    normalizer=None,
    *,
    count="labels",
    ignored="nothing",
    shifted=True,
    onehot=True,
    upstream=True,
    in_place=False,
    checks=True,
    normalizer_used="both",
    ignored_gradient="nothing",
    natural=True,
    empty="zero",
    upcast=False,
    next_row=False,
    times_mask=False,
    divided=True,
    scaled_label=True,
):
    counts = labels != IGNORE_INDEX
    target = np.where(counts, labels, 0)
    if checks and target.size and (target.min() < 0 or target.max() >= logits.shape[-1]):
        raise ValueError("label")
    target = target % logits.shape[-1]
    if next_row and target.ndim > 1:
        target = np.roll(target, 1, axis=-1)
    n = counts.sum() if count == "labels" else labels.size
    n = n if empty == "nan" else max(n, 1)
    own = n
    if normalizer is not None:
        n = normalizer
    n = logits.dtype.type(n)
    with np.errstate(all="ignore"):
        moved = logits - (logits.max(-1, keepdims=True) if shifted else 0)
        e = np.exp(moved)
        total = e.sum(-1, keepdims=True)
        nll = (np.log(total) - np.take_along_axis(moved, target[..., None], -1))[..., 0]
        if not natural:
            nll = nll / logits.dtype.type(math.log(2))
        kept = nll if ignored == "contribute" else np.where(counts, nll, 0)
        loss = (kept.sum() / n).astype(np.float64 if upcast else logits.dtype)
    out = logits if in_place else np.empty_like(logits)

    def vjp(dloss):
        g = logits.dtype.type(dloss) if upstream else logits.dtype.type(1)
        m = logits.dtype.type(own) if normalizer_used == "forward" else n
        share = g / m
        out[...] = e * (share / (total if divided else 1))
        if onehot:
            np.put_along_axis(out, target[..., None], np.take_along_axis(out, target[..., None], -1) - share, -1)
        if not scaled_label:
            np.put_along_axis(out, target[..., None], np.take_along_axis(out, target[..., None], -1) + share - 1, -1)
        mask = np.ones_like(counts) if ignored_gradient == "contribute" else counts
        return out * mask[..., None] if times_mask else np.where(mask[..., None], out, 0).astype(logits.dtype)

    return loss, vjp


CROSS_ENTROPY = variants(
    _cross_entropy,
    count="rows",
    ignored="contribute",
    shifted=False,
    onehot=False,
    upstream=False,
    in_place=True,
    checks=False,
    normalizer_used="forward",
    ignored_gradient="contribute",
    natural=False,
    empty="nan",
    upcast=True,
    next_row=True,
    times_mask=True,
    divided=False,
    scaled_label=False,
)


def _linear_cross_entropy(
    x,
    weight,
    labels,
    normalizer=None,
    *,
    recompute=False,
    rows_at_once=2,
    count="labels",
    short="kept",
    empty="zeros",
    dweight="sum",
    dx="all",
    value="sum",
    dloss_in="both",
    labels_of="chunk",
    copies=True,
    recomputed="the same",
    upcast=False,
    reuses=False,
):
    n = len(x) if count == "rows" else max(int((labels != IGNORE_INDEX).sum()), 1)
    n = float(n) if normalizer is None or count == "ignored" else normalizer
    starts = range(0, max(len(x), 1) if empty == "zeros" else len(x), rows_at_once)
    if short == "dropped" and len(x) % rows_at_once:
        starts = starts[:-1]

    def gradient(in_pullback=False):
        total, dx_, dw = x.dtype.type(0), np.zeros_like(x), None
        for start in starts:
            part = slice(start, start + rows_at_once)
            own = labels[part] if labels_of == "chunk" else labels[: len(x[part])]
            logits, linear_vjp = linear(x[part], weight)
            divisor = None if count == "chunk" or (in_pullback and recomputed == "chunk") else n
            loss, loss_vjp = cross_entropy(logits, own, divisor)
            total = loss if value == "last" else total + loss
            dx_part, dw_part, _ = linear_vjp(loss_vjp(1.0))
            dx_[: len(dx_part)] = dx_part if dx == "first rows" else dx_[: len(dx_part)]
            dx_[part] = dx_[part] if dx == "first rows" else dx_part
            dw = dw_part if dweight == "last" or dw is None else add(dw, dw_part)
        return total / (len(starts) or 1) if value == "mean" else total, dx_, dw

    loss, dx_, dw = gradient()
    loss = np.float64(loss) if upcast else loss

    def vjp(dloss):
        g = x.dtype.type(dloss)
        found_dx, found_dw = (dx_, dw) if not recompute else gradient(in_pullback=True)[1:]
        if recompute and recomputed == "nothing":
            found_dw = times(0.0, found_dw)
        if not copies and g == 1:
            return found_dx, found_dw
        if reuses:
            found_dx *= g
            return found_dx, times(g, found_dw)
        one = x.dtype.type(1)
        factor = {"both": (g, g), "none": (one, one), "dx": (g, one), "dweight": (one, g)}[dloss_in]
        return found_dx * factor[0], times(factor[1], found_dw)

    return loss, vjp


LINEAR_CROSS_ENTROPY = variants(
    _linear_cross_entropy,
    count=("rows", "chunk", "ignored"),
    short="dropped",
    empty="none",
    dweight="last",
    dx="first rows",
    value=("last", "mean"),
    dloss_in=("none", "dx", "dweight"),
    labels_of="the first chunk",
    copies=False,
    recomputed=("chunk", "nothing"),
    upcast=True,
    reuses=True,
)


# --- dropout ----------------------------------------------------------------------------------------------------------


def _dropout(
    x, p, key, offset=0, *, use_offset=True, scaled=True, backward="same", keep_below=False, word=0, checks=True,
    order="C", upcast=False, use_key=True, unsigned=False, in_place=False, scale_by_p=False,
):  # fmt: skip
    if checks and not 0 <= p < 1:
        raise ValueError("p")

    def mask(offset):
        counter = np.arange(x.size, dtype=np.uint64) + np.uint64(offset if use_offset else 0)
        u = uniform(key if use_key else 0, counter)
        if word:
            w = philox(key, counter)[word].view(np.int32)
            u = np.where(w < 0, ~w, w).astype(np.float32) * np.float32(4.6566127342e-10)
        if unsigned:
            u = (philox(key, counter)[0] * np.float64(2.0**-32)).astype(np.float32)
        u = u.reshape(x.shape, order=order)
        return (u <= np.float32(p)) if keep_below else (u > np.float32(p))

    scale = x.dtype.type((1 / p if p else 1) if scale_by_p else 1 / (1 - p) if scaled and p < 1 else 1)
    keep = mask(offset)
    y = x * (keep * scale)
    y = y.astype(np.float64) if upcast else y
    if in_place:
        x *= keep

    def vjp(dy):
        if backward == "new":
            return dy * (mask(offset + x.size) * scale)
        return dy * (keep * (scale if backward == "same" else x.dtype.type(1))) if backward != "none" else dy

    return y, vjp


DROPOUT = variants(
    _dropout, use_offset=False, scaled=False, backward=("new", "unscaled", "none"), keep_below=True, word=1,
    checks=False, order="F", upcast=True, use_key=False, unsigned=True, in_place=True, scale_by_p=True,
)  # fmt: skip
