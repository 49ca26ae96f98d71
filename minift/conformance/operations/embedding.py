"""The embedding table: rows out to the bit, cotangents of equal tokens added up."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.operation import Operation, rounded, storage
from minift.nn import embedding


class Lookup(NamedTuple):
    shape: tuple[int, ...]  # of the tokens
    vocab: int
    d: int
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Lookup) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, table, dy. Few different tokens: most are repeated, the last one never occurs."""
    rng = np.random.default_rng(case.seed)
    tokens = rng.integers(0, max(case.vocab - 1, 1), case.shape)
    return tokens, rng.standard_normal((case.vocab, case.d)), rng.standard_normal((*case.shape, case.d))


def oracle(tokens: np.ndarray):
    """Products with one-hot vectors: one term of each of y's sums is not zero."""

    def both(number, dy, table):
        onehot = (tokens.reshape(-1, 1) == np.arange(len(table))).astype(float)  # (N, vocab)
        flat = dy.reshape(-1, dy.shape[-1])
        sums = number(onehot.T) @ flat
        sums.radius = np.where(onehot.sum(0)[:, None] > 1, sums.radius, 0.0)  # one term, or none, does not round
        return number((onehot @ table).reshape(dy.shape)), sums

    return both


def rows_and_sums_by_a_loop(f, case):
    """In whole numbers, which are exact in every order: every bit."""
    tokens, table, dy = arrays(case)
    table, dy = (np.rint(4 * a).astype(storage(case.dtype)) + 0 for a in (table, dy))
    y, vjp = f(tokens, table)
    wanted = np.zeros_like(table)
    for index in np.ndindex(tokens.shape):
        assert np.array_equal(y[index], table[tokens[index]]), f"row {index} is not that of token {tokens[index]}"
        wanted[tokens[index]] += dy[index]
    common.same_bits(vjp(dy), wanted, "dweight")


def is_within_its_bound_in_any_layout(f, case):
    tokens, table, dy = arrays(case)
    for layout in (np.asarray, common.strided, common.transposed, common.misaligned, common.apart):
        placed = layout(tokens) if tokens.ndim else tokens
        common.within(lambda table, placed=placed: f(placed, table), oracle(tokens), [table], dy, case.dtype, layout)


def changes_nothing(f, case):
    tokens, table, dy = arrays(case)
    common.changes_nothing(lambda table: f(tokens, table), [table], dy, case.dtype)


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64":
        tokens, table, _ = arrays(case)
        common.is_differentiated(lambda table: f(tokens, table), [table], np.random.default_rng(case.seed))


def refuses_tokens_outside(f, case):
    _, table, _ = arrays(case)
    table = rounded(table, case.dtype)
    for token in (-1, len(table), -len(table)):
        try:
            f(np.array([0, token]), table)
        except IndexError as error:
            assert "token" in str(error), f"token {token}: the error does not say so"
        else:
            raise AssertionError(f"token {token} was accepted")


def cases(dtypes):
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    sizes = st.integers(1, 20)
    return st.builds(Lookup, shapes, sizes, sizes, st.sampled_from(sorted(dtypes)), st.integers(0, 99))


FIXED = (
    Lookup((2, 3), 5, 4),
    Lookup((7,), 3, 2),
    Lookup((), 6, 3),
    Lookup((3, 0), 2, 5),
    Lookup((2, 2, 5), 3, 1, "float16"),
    Lookup((9,), 4, 1025),
    Lookup((4,), 3, 2049, "float16", 1),
    Lookup((3, 4), 5, 3, "float64", 2),
    Lookup((3, 4), 2, 6, "bfloat16", 3),
)

OPERATIONS = (
    Operation(
        "embedding.embedding",
        embedding.embedding,
        "f(tokens (...), weight (vocab, d)) -> y (..., d), vjp; vjp(dy) -> dweight",
        cases,
        FIXED,
        (
            rows_and_sums_by_a_loop,
            is_within_its_bound_in_any_layout,
            changes_nothing,
            pullback_is_the_transpose_of_the_derivative,
            refuses_tokens_outside,
        ),
    ),
)
