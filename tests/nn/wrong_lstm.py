"""LSTM layers, wrong in the ways they have been wrong in published code: each version must be rejected by a property.

One loop with switches, as in `wrong_nn`; a wrong version has one of them turned.
"""

import numpy as np
from wrong_nn import variants

from minift.nn.linear import rows
from minift.nn.lstm import lstm
from minift.nn.mlp import sigmoid


def _lstm(
    x,
    W_ih,
    W_hh,
    b_ih,
    b_hh,
    *,
    order="ifgo",
    bias="both",
    squash="tanh",
    memory="kept",
    through_time="both",
    before="zero",
    dW_hh="before",
    alias=False,
    f_slope="right",
    single=False,
):
    batch, tokens, d = len(x), x.shape[1], W_hh.shape[1]
    a = x @ W_ih.T + {"both": b_ih + b_hh, "twice": 2 * b_ih, "one": b_ih}[bias]
    h = np.zeros((batch, d), x.dtype)
    c = np.ones_like(h) if before == "one" else np.zeros_like(h)
    kept, states, hs, y = [], [c], [h], np.empty((batch, tokens, d), np.float32 if single else x.dtype)
    for t in range(tokens):
        quarter = dict(zip(order, np.split(a[:, t] + h @ W_hh.T, 4, axis=-1), strict=True))
        i, f, o = (sigmoid(quarter[k]) for k in "ifo")
        g = np.tanh(quarter["g"])
        c = (f * c if memory == "kept" else (1 - i) * c) + i * g
        h = o * (np.tanh(c) if squash == "tanh" else c)
        kept.append((i, f, g, o))
        states.append(c)
        hs.append(h)
        y[:, t] = h

    def vjp(dy):
        da = np.empty((batch, tokens, 4 * d), x.dtype)
        dh, dc = np.zeros((2, batch, d), x.dtype)
        for t in reversed(range(tokens)):
            (i, f, g, o), c, shown = kept[t], states[t], np.tanh(states[t + 1])
            dh = dy[:, t] + (dh if through_time != "memory" else 0)
            dc = (dc if through_time != "output" else 0) + dh * o * (1 - shown * shown)
            df = dc * c * (f * (1 - f) if f_slope == "right" else 1 - f * f)
            parts = {"i": dc * g * i * (1 - i), "f": df, "g": dc * i * (1 - g * g), "o": dh * shown * o * (1 - o)}
            da[:, t] = np.concatenate([parts[k] for k in order], axis=-1)
            dh, dc = da[:, t] @ W_hh, dc * f
        at = np.stack(hs[1:] if dW_hh == "after" else hs[:-1], axis=1) if tokens else y
        db = rows(da).sum(axis=0)
        return da @ W_ih, rows(da).T @ rows(x), rows(da).T @ rows(at), db, db if alias else db.copy()

    return y, vjp


LSTM = variants(
    _lstm,
    order=("ifog", "iofg", "figo"),
    bias=("twice", "one"),
    squash="none",
    memory="coupled",
    through_time=("output", "memory"),
    before="one",
    dW_hh="after",
    alias=True,
    f_slope="tanh's",
    single=True,
)


def _bidirectional(x, ahead, back, *, back_reads="reversed", back_writes="reversed", halves="ahead first", dx="both"):
    """Both directions, each mistake of which leaves the shapes right."""
    y_a, a_vjp = lstm(x, *ahead)
    flip = slice(None, None, -1)
    read = flip if back_reads == "reversed" else slice(None)
    write = flip if back_writes == "reversed" else slice(None)
    y_b, b_vjp = lstm(x[:, read], *back)
    d = y_a.shape[2]
    swap = halves != "ahead first"
    y = np.concatenate([y_b[:, write], y_a] if swap else [y_a, y_b[:, write]], axis=2)

    def vjp(dy):
        dy_a, dy_b = (dy[..., d:], dy[..., :d]) if swap else (dy[..., :d], dy[..., d:])
        dx_a, *da = a_vjp(dy_a)
        dx_b, *db = b_vjp(dy_b[:, write])
        return (dx_a if dx == "ahead" else dx_a + dx_b[:, read]), tuple(da), tuple(db)

    return y, vjp


BIDIRECTIONAL = variants(_bidirectional, back_reads="ahead", back_writes="as read", halves="back first", dx="ahead")
