"""One vector for a text on torch tensors: the twin of `minift.nn.pooling`, where the equations are.

In every backend it is PyTorch's own operations: a pooled batch is read once and is small. 16-bit numbers are summed in
float32 and rounded once. Behind `lengths` padding may hold NaN, and gets a gradient of exactly zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from minift_kernels import backend as backends


def mean_pool(x: Float[Tensor, "batch tokens d"], lengths: Integer[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
    """The mean over each row's real tokens: y_b = (1/n_b) Σ_{t < n_b} x_bt.

    ValueError for a row without a token, or with more than there are columns: lengths on a GPU are waited for."""
    real = _real(x, lengths)[..., None]  # (B, T, 1)
    wide = backends.widened(x)
    n = lengths.to(wide)[:, None]
    return (torch.where(real, wide, 0).sum(dim=1) / n).to(x.dtype)  # where: padding may hold NaN


def last_token(x: Float[Tensor, "batch tokens d"], lengths: Integer[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
    """Each row's last real token: y_b = x_b,n−1, n = lengths_b. ValueError as `mean_pool`."""
    _real(x, lengths)
    return x[torch.arange(len(x), device=x.device), lengths.to(x.device) - 1]


def unit_length(x: Float[Tensor, "*rows d"], eps: float = 1e-12) -> Float[Tensor, "*rows d"]:
    """Scale each row to length 1: y = x / max(|x|, ε). Below ε the gradient is dy / ε, also for a row of zeros."""
    wide = backends.widened(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
    return (wide / torch.where(norm > eps, norm, eps)).to(x.dtype)


def _real(x: Tensor, lengths: Tensor) -> Tensor:
    """Which columns hold a token of the text, (B, T)."""
    outside = (lengths < 1) | (lengths > x.shape[1])
    if outside.any():
        row = int(outside.int().argmax())
        raise ValueError(f"row {row} has {lengths[row]} tokens, needed 1 to {x.shape[1]}")
    return torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
