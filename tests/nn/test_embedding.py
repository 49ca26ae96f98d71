"""The embedding table: rows out, cotangents of equal tokens added up."""

import numpy as np
import pytest
import wrong_nn
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance.bounds import gamma
from minift.conformance.gradients import check_vjp
from minift.conformance.operations import embedding as known
from minift.nn.embedding import embedding, scatter_add_1, scatter_add_2
from minift.nn.weight import Frozen
from minift.peft.lora import LoRA
from nn import checks

CASES = [(1, (2, 3), 5, 4), (2, (7,), 3, 2), (3, (), 6, 3), (4, (3, 0), 2, 5), (5, (2, 2, 5), 3, 1)]


def make(case):
    """Few different tokens: most are repeated, some rows of the table are never used."""
    seed, shape, vocab, d = case
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, max(vocab - 1, 1), shape)
    return tokens, rng.standard_normal((vocab, d)), rng.standard_normal((*shape, d)), rng


def rows_and_sums_by_a_loop(op, case):
    """In integers: exact in float32, in every order."""
    tokens, table, dy, _ = make(case)
    table, dy = np.rint(4 * table).astype(np.float32), np.rint(4 * dy).astype(np.float32)
    y, vjp = op(tokens, table)
    expected = np.zeros_like(table)
    for index in np.ndindex(tokens.shape):
        assert y[index].tolist() == table[int(tokens[index])].tolist(), f"row {index}"
        for j in range(table.shape[1]):
            expected[int(tokens[index]), j] += dy[(*index, j)]
    checks.same_bits(vjp(dy), expected, "dweight")


def gradient(op, case):
    tokens, table, _, rng = make(case)
    if tokens.size:
        check_vjp(lambda table: op(tokens, table), table, rng=rng)


def within_the_bound_in_any_layout(op, case):
    tokens, table, dy, _ = make(case)
    oracle = checks.in_dtype(known.oracle(tokens))
    for layout in (checks.contiguous, *checks.LAYOUTS):
        for dtype in checks.DTYPES:
            placed = layout(tokens) if tokens.ndim else tokens
            checks.inside(lambda table, placed=placed: op(placed, table), oracle, [table], dy, dtype, layout)


def refuses_tokens_outside(op, case):
    _, table, _, _ = make(case)
    for token in (-1, len(table), -len(table)):
        try:
            op(np.array([0, token]), table)
        except IndexError as error:
            assert "token" in str(error)
        else:
            raise AssertionError(f"token {token} was accepted")


def changes_nothing(op, case):
    tokens, table, dy, _ = make(case)
    checks.pure(op, (tokens, table), dy)


def the_result_is_a_copy(op, case):
    _, table, _, _ = make(case)
    for tokens in (np.arange(len(table)), np.arange(len(table))[:1]):
        assert not np.shares_memory(op(tokens, table)[0], table), "writing into y would change the table"


def nothing_for_a_frozen_table(op, case):
    tokens, table, dy, _ = make(case)
    y, vjp = op(tokens, Frozen(table))
    checks.same_bits(y, op(tokens, table)[0], "y")
    assert vjp(dy) is None


PROPERTIES = (
    rows_and_sums_by_a_loop,
    gradient,
    within_the_bound_in_any_layout,
    refuses_tokens_outside,
    changes_nothing,
    the_result_is_a_copy,
    nothing_for_a_frozen_table,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_embedding(holds, case):
    holds(embedding, case)


def test_embedding_kill_matrix():
    def mutates_the_cotangent(tokens, weight):
        y, vjp = embedding(tokens, weight)

        def wrong(dy):
            found = vjp(dy)
            dy *= 0
            return found

        return y, wrong

    checks.kill_matrix(PROPERTIES, (*wrong_nn.EMBEDDING, mutates_the_cotangent), CASES)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@given(
    seed=st.integers(0, 9999),
    n=st.integers(0, 400),
    vocab=st.integers(1, 30),
    d=st.integers(1, 9),
    integer=st.sampled_from((np.int64, np.int32, np.uint8)),
)
def test_both_ways_to_scatter_agree(dtype, seed, n, vocab, d, integer):
    """Exactly in integers; else each is within γ of the number of terms, so they are within twice of each other."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, vocab, n).astype(integer)
    values = rng.standard_normal((n, d)).astype(dtype)
    one, two = (scatter(index, values, (vocab, d)) for scatter in (scatter_add_1, scatter_add_2))
    assert one.dtype == two.dtype == dtype
    size = scatter_add_1(index, np.abs(values).astype(float), (vocab, d))
    count = np.bincount(index, minlength=vocab)[:, None]
    assert (np.abs(one.astype(float) - two) <= 2 * gamma(max(n, 1), dtype) * size).all()
    assert (np.abs(one - two)[count[:, 0] <= 1] == 0).all()  # nothing to add, nothing to round
    whole = np.rint(8 * values) + 0  # no −0: 0 + −0 is 0
    checks.same_bits(scatter_add_2(index, whole, (vocab, d)), scatter_add_1(index, whole, (vocab, d)), "integers")


def test_no_tokens_at_all(rng):
    y, vjp = embedding(np.zeros((2, 0), int), rng.standard_normal((3, 4)))
    assert y.shape == (2, 0, 4)
    assert np.array_equal(vjp(y), np.zeros((3, 4)))


def test_an_adapter_on_a_table_is_refused(rng):
    adapted = LoRA(Frozen(rng.standard_normal((5, 4))), np.ones((2, 4)), np.ones((5, 2)), 3)
    with pytest.raises(TypeError, match="an adapter has no meaning"):
        embedding(np.array([1]), adapted)


def test_the_error_says_what_spans_what(rng):
    with pytest.raises(IndexError, match=r"token ids span -1\.\.7, the vocabulary is 0\.\.4"):
        embedding(np.array([-1, 7]), rng.standard_normal((5, 4)))
