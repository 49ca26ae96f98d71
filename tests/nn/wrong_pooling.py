"""Pooling, wrong in the ways that sentence embeddings are: padding counted, the wrong token, half of a derivative."""

import numpy as np
from wrong_nn import variants


def _mean_pool(x, lengths, *, counts="own", over="text", share="own", padding="zero", upcast=False, in_place=False):
    real = (np.arange(x.shape[1]) < lengths[:, None])[..., None]
    real = np.ones_like(real) if over == "all" else real
    n = {"own": lengths[:, None], "width": x.shape[1], "first": lengths[0]}[counts]
    n = np.asarray(n, np.float64 if upcast else x.dtype)
    y = (np.where(real, x, 0) if padding == "zero" else x * real).sum(axis=1) / n
    if in_place:
        x[...] = np.where(real, x, 0)

    def vjp(dy):
        spread = dy / n if share == "own" else dy
        dx = np.broadcast_to(spread[:, None], x.shape)
        return (dx * real if padding != "spread" else dx.copy()).astype(dy.dtype)

    return y, vjp


def _last_token(x, lengths, *, behind=1, aligned=True, fill=False, upcast=False):
    at = np.arange(len(x)), (lengths if aligned else np.full_like(lengths, x.shape[1])) - behind
    y = x[at]

    def vjp(dy):
        dx = np.full(x.shape, fill, np.float64 if upcast else dy.dtype)
        dx[at] = dy
        return dx

    return y, vjp


def _unit_length(x, eps=1e-12, *, square=True, along=True, divided=True, guard=True, scale=False, below=True):
    norm = np.sqrt(np.vecdot(x, x))[..., None]
    norm = norm if square else norm * norm
    longer = norm > eps
    length = np.maximum(norm, x.dtype.type(eps)) if guard else norm
    with np.errstate(all="ignore"):
        y = x / length * (x.dtype.type(x.shape[-1]) ** x.dtype.type(0.5) if scale else 1)

    def vjp(dy):
        shift = np.where(longer | (not below), np.vecdot(dy, y)[..., None], 0) if along else 0
        dx = dy - y * shift
        return dx / length if divided else dx

    return y, vjp


MEAN_POOL = variants(
    _mean_pool, counts=("width", "first"), over="all", share="none", padding=("times", "spread"), upcast=True,
    in_place=True,
)  # fmt: skip
LAST_TOKEN = variants(_last_token, behind=2, aligned=False, fill=True, upcast=True)
UNIT_LENGTH = variants(_unit_length, square=False, along=False, divided=False, guard=False, scale=True, below=False)
