"""The embedding table: a row for each token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer

from minift.nn.linear import rows
from minift.nn.weight import Weight, unwrap


def embedding(
    tokens: Integer[np.ndarray, "*shape"], weight: Float[np.ndarray, "vocab d"] | Weight
) -> tuple[Float[np.ndarray, "*shape d"], Callable]:
    """Row t of the table for token t: the product of one-hot vectors and the table, without forming them.

        y_n = W[t_n]                  dW[v] = Σ_{n : t_n = v} dy_n                                      (1)

    `vjp(dy) -> dweight`. IndexError for a token outside [0, vocab): NumPy would wrap a negative one around.
    """
    table, table_learns = unwrap(weight)
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < len(table)):
        raise IndexError(f"token ids span {tokens.min()}..{tokens.max()}, the vocabulary is 0..{len(table) - 1}")
    y, shape = table[tokens], table.shape  # the pullback keeps no table that was decoded for this

    def vjp(dy):
        return scatter_add_2(tokens.reshape(-1), rows(dy), shape) if table_learns else None

    return y, vjp


def scatter_add_1(index: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """out[v] = Σ_{n : index_n = v} values_n, as it is written; one row after the other."""
    out = np.zeros(shape, values.dtype)
    np.add.at(out, index, values)
    return out


def scatter_add_2(index: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The same: sort equal tokens together, then add up each run. Several times faster where d is large."""
    out = np.zeros(shape, values.dtype)
    if index.size:
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # where a new token's run begins
        out[ordered[starts]] = np.add.reduceat(values[order], starts, axis=0)
    return out
