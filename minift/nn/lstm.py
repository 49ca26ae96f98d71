"""Long short-term memory: a recurrent layer whose memory is added to, not overwritten.

    a = x W_ihᵀ + b_ih + h W_hhᵀ + b_hh        (i, f, g, o) = the four quarters of a                    (1)
    i, f, o ← σ(i), σ(f), σ(o)                 g ← tanh(g)                                              (2)
    c′ = f c + i g                             h′ = o tanh(c′)                                          (3)

                                      (Hochreiter & Schmidhuber 1997; with the forget gate f: Gers et al. 2000)
The input gate i says what of the new content g is written, f what of the memory c is kept, o what of it is shown. This
is the order of the gates in PyTorch's and cuDNN's weights, W_ih (4H, in) and W_hh (4H, H); Keras has the same, other
libraries (i, o, f, g) or (i, g, f, o). The two biases are one too many, and are kept because checkpoints have both.

Backwards, one step of time costs the products of (1) again, transposed:

    dc = dc′ + dh′ o (1 − tanh²(c′))           dc_before = dc f                                         (4)
    da = (dc g i(1 − i), dc c f(1 − f), dc i (1 − g²), dh′ tanh(c′) o(1 − o))                           (5)
    dx = da W_ih        dh = da W_hh        dW_ih = Σ daᵀ x        dW_hh = Σ daᵀ h        db = Σ da         (6)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from minift.nn.linear import rows
from minift.nn.mlp import sigmoid


def lstm_cell(
    x: Float[np.ndarray, "batch d_in"],
    h: Float[np.ndarray, "batch d"],
    c: Float[np.ndarray, "batch d"],
    W_ih: Float[np.ndarray, "gates d_in"],
    W_hh: Float[np.ndarray, "gates d"],
    b_ih: Float[np.ndarray, " gates"],
    b_hh: Float[np.ndarray, " gates"],
) -> tuple[tuple[Float[np.ndarray, "batch d"], Float[np.ndarray, "batch d"]], Callable]:
    """One step of time, equations (1) to (3): (h′, c′).

    `vjp(dh′, dc′) -> dx, dh, dc, dW_ih, dW_hh, db_ih, db_hh`, equations (4) to (6)."""
    i, f, g, o = _gates(x @ W_ih.T + b_ih + h @ W_hh.T + b_hh)
    c_next = f * c + i * g
    h_next = o * np.tanh(c_next)

    def vjp(dh_next, dc_next):
        dc, da = _step_vjp(dh_next, dc_next, (i, f, g, o), c, c_next)
        db = da.sum(axis=0)
        return da @ W_ih, da @ W_hh, dc, da.T @ x, da.T @ h, db, db.copy()

    return (h_next, c_next), vjp


def lstm_1(x, W_ih, W_hh, b_ih, b_hh):
    """The same as `lstm_2`, a cell after the other: the form to read first."""
    h, c = np.zeros((2, len(x), W_hh.shape[1]), x.dtype)
    y, pullbacks = np.empty((*x.shape[:2], W_hh.shape[1]), x.dtype), []
    for t in range(x.shape[1]):
        (h, c), cell_vjp = lstm_cell(x[:, t], h, c, W_ih, W_hh, b_ih, b_hh)
        y[:, t] = h
        pullbacks.append(cell_vjp)

    def vjp(dy):
        dx = np.empty_like(x)
        dweights = [np.zeros_like(w) for w in (W_ih, W_hh, b_ih, b_hh)]
        dh, dc = np.zeros((2, len(x), W_hh.shape[1]), x.dtype)
        for t in reversed(range(x.shape[1])):
            dx[:, t], dh, dc, *parts = pullbacks[t](dy[:, t] + dh, dc)  # h goes to the output and to the next step
            for total, part in zip(dweights, parts, strict=True):
                total += part
        return dx, *dweights

    return y, vjp


def lstm_2(
    x: Float[np.ndarray, "batch tokens d_in"],
    W_ih: Float[np.ndarray, "gates d_in"],
    W_hh: Float[np.ndarray, "gates d"],
    b_ih: Float[np.ndarray, " gates"],
    b_hh: Float[np.ndarray, " gates"],
) -> tuple[Float[np.ndarray, "batch tokens d"], Callable]:
    """A layer: the cell along the text, from h = c = 0; y holds every h′.

    `vjp(dy) -> dx, dW_ih, dW_hh, db_ih, db_hh`. Only h W_hhᵀ has to wait for the step before. The products with x, and
    in (6) all but da W_hh, are formed for all steps at once."""
    batch, tokens, d = len(x), x.shape[1], W_hh.shape[1]
    a = x @ W_ih.T + (b_ih + b_hh)  # (B, T, 4H)
    y = np.empty((batch, tokens, d), x.dtype)
    h, c = np.zeros((2, batch, d), x.dtype)
    memory, gates = [c], []  # c before and after each step, and its i, f, g, o
    for t in range(tokens):
        gates.append(_gates(a[:, t] + h @ W_hh.T))
        i, f, g, o = gates[t]
        c = f * c + i * g
        h = o * np.tanh(c)
        memory.append(c)
        y[:, t] = h

    def vjp(dy):
        da = np.empty((batch, tokens, 4 * d), x.dtype)
        dh, dc = np.zeros((2, batch, d), x.dtype)
        for t in reversed(range(tokens)):
            dc, da[:, t] = _step_vjp(dy[:, t] + dh, dc, gates[t], memory[t], memory[t + 1])
            dh = da[:, t] @ W_hh
        before = np.zeros_like(y)  # the h that each step began with
        before[:, 1:] = y[:, :-1]
        db = rows(da).sum(axis=0)
        return da @ W_ih, rows(da).T @ rows(x), rows(da).T @ rows(before), db, db.copy()

    return y, vjp


lstm = lstm_2


def bidirectional_lstm(
    x: Float[np.ndarray, "batch tokens d_in"],
    ahead: tuple[np.ndarray, ...],
    back: tuple[np.ndarray, ...],
) -> tuple[Float[np.ndarray, "batch tokens twice_d"], Callable]:
    """Two layers side by side, one that reads the text from its end.             (Schuster & Paliwal 1997)

        y = [lstm(x), reversed lstm(reversed x)]                                                        (7)

    `vjp(dy) -> dx, dahead, dback`. `ahead` and `back` are (W_ih, W_hh, b_ih, b_hh), in their cotangents too."""
    y_ahead, ahead_vjp = lstm(x, *ahead)
    y_back, back_vjp = lstm(x[:, ::-1], *back)
    d = y_ahead.shape[2]

    def vjp(dy):
        dx_ahead, *dahead = ahead_vjp(dy[..., :d])
        dx_back, *dback = back_vjp(dy[:, ::-1, d:])
        return dx_ahead + dx_back[:, ::-1], tuple(dahead), tuple(dback)

    return np.concatenate([y_ahead, y_back[:, ::-1]], axis=2), vjp


def _gates(a):
    """Equation (2)."""
    i, f, g, o = np.split(a, 4, axis=-1)
    return sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)


def _step_vjp(dh, dc, gates, c, c_next):
    """Equations (4) and (5): dc_before, da."""
    (i, f, g, o), shown = gates, np.tanh(c_next)
    dc = dc + dh * o * (1 - shown * shown)
    da = (dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * shown * o * (1 - o))
    return dc * f, np.concatenate(da, axis=-1)
