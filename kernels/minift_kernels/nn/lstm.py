"""Long short-term memory on torch tensors: the twin of `minift.nn.lstm`, where the equations are.

Plain PyTorch operations everywhere, which autograd walks back: an encoder of a soft prompt is run once a batch, over
some twenty virtual tokens. 16-bit numbers are raised to float32 and rounded once, at the end.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from minift_kernels import backend as backends
from minift_kernels.nn.mlp import sigmoid


def lstm_cell(
    x: Float[Tensor, "batch d_in"],
    h: Float[Tensor, "batch d"],
    c: Float[Tensor, "batch d"],
    W_ih: Float[Tensor, "gates d_in"],
    W_hh: Float[Tensor, "gates d"],
    b_ih: Float[Tensor, " gates"],
    b_hh: Float[Tensor, " gates"],
) -> tuple[Float[Tensor, "batch d"], Float[Tensor, "batch d"]]:
    """One step of time, equations (1) to (3): (h′, c′)."""
    dtype = x.dtype
    x, h, c, W_ih, W_hh, b_ih, b_hh = map(backends.widened, (x, h, c, W_ih, W_hh, b_ih, b_hh))
    h, c = _step(x @ W_ih.T + b_ih + h @ W_hh.T + b_hh, c)
    return h.to(dtype), c.to(dtype)


def lstm(
    x: Float[Tensor, "batch tokens d_in"],
    W_ih: Float[Tensor, "gates d_in"],
    W_hh: Float[Tensor, "gates d"],
    b_ih: Float[Tensor, " gates"],
    b_hh: Float[Tensor, " gates"],
) -> Float[Tensor, "batch tokens d"]:
    """A layer: the cell along the text, from h = c = 0; y holds every h′. Products with x are formed all at once."""
    wide, W_ih, W_hh, b_ih, b_hh = map(backends.widened, (x, W_ih, W_hh, b_ih, b_hh))
    a = wide @ W_ih.T + (b_ih + b_hh)  # (B, T, 4H)
    h = c = wide.new_zeros(len(x), W_hh.shape[1])
    y = [(a[:, :0] + (h @ W_hh.T)[:, None][:, :0])[..., : W_hh.shape[1]]]  # of no text: gradients are 0, not None
    for t in range(x.shape[1]):
        h, c = _step(a[:, t] + h @ W_hh.T, c)
        y.append(h[:, None])
    return torch.cat(y, dim=1).to(x.dtype)


def bidirectional_lstm(
    x: Float[Tensor, "batch tokens d_in"],
    ahead: tuple[Tensor, ...],
    back: tuple[Tensor, ...],
) -> Float[Tensor, "batch tokens twice_d"]:
    """Two layers side by side, one that reads the text from its end.             (Schuster & Paliwal 1997)

    y = [lstm(x), reversed lstm(reversed x)]                                                            (7)"""
    wide, ahead, back = backends.widened(x), tuple(map(backends.widened, ahead)), tuple(map(backends.widened, back))
    return torch.cat([lstm(wide, *ahead), lstm(wide.flip(1), *back).flip(1)], dim=2).to(x.dtype)


def _step(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Equations (2) and (3): h′, c′."""
    i, f, g, o = a.chunk(4, dim=-1)
    c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
    return sigmoid(o) * torch.tanh(c), c
