"""Softmax cross-entropy: one number at a time, torch, bounds, labels that do not count, and wrong versions."""

import math

import numpy as np
import pytest
import torch
import wrong_nn
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance import bounds
from minift.conformance.ball import ELEMENTARY, Ball
from minift.conformance.gradients import check_vjp
from minift.conformance.operations import losses as known
from minift.nn.losses import IGNORE_INDEX, cross_entropy, log_softmax
from nn import checks

# seed, rows, vocab, kind, share of labels that do not count, normalizer
CASES = [
    (1, (2, 5), 7, "normal", 0.4, None),
    (2, (6,), 5, "shifted", 0.2, 17.0),
    (3, (2, 3), 3, "large", 0.5, None),
    (4, (), 6, "normal", 0.0, None),
    (5, (2, 2), 4, "normal", 1.0, None),
    (6, (3, 1, 2), 9, "wide", 0.3, 2.5),
    (7, (0, 4), 3, "normal", 0.0, None),
    (8, (3,), 1, "normal", 0.5, None),
]


def make(case):
    seed, shape, vocab, kind, ignored, normalizer = case
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((*shape, vocab))
    if kind == "shifted":
        logits += 1000
    elif kind == "large":
        logits *= 300
    elif kind == "wide":
        logits *= 2.0 ** rng.integers(-8, 6, logits.shape)
    labels = np.where(rng.random(shape) < ignored, IGNORE_INDEX, rng.integers(0, vocab, shape))
    return logits, labels, normalizer, np.float64(rng.standard_normal()), rng


def oracle_for(labels, normalizer):
    return checks.in_dtype(known.oracle(labels, normalizer))


def one_number_at_a_time(op, case):
    logits, labels, normalizer, dloss, _ = make(case)
    loss, vjp = op(logits, labels, normalizer)
    dlogits = vjp(dloss)
    ball, dball = oracle_for(labels, normalizer)(np.float64, dloss, logits)
    counting = [i for i in np.ndindex(labels.shape) if labels[i] != -100]
    n = normalizer or max(len(counting), 1)
    total = []
    for i in np.ndindex(labels.shape):
        row = logits[i].tolist()
        if i not in counting:
            assert not dlogits[i].any(), f"row {i} does not count"
            continue
        top = max(row)
        lse = top + math.log(math.fsum(math.exp(t - top) for t in row))
        total.append(lse - row[labels[i]])
        for j, t in enumerate(row):
            exact = float(dloss) * (math.exp(t - lse) - (j == labels[i])) / n
            # top + log … rounds at the size of the logits, which the shifted form under test does not
            slack = 2 * dball.radius[(*i, j)] + 4 * 2.0**-53 * abs(lse) * abs(float(dloss)) / n
            assert abs(dlogits[(*i, j)] - exact) <= slack, f"{i, j}: {dlogits[(*i, j)]}, needed {exact}"
    exact = math.fsum(total) / n
    slack = 2 * ball.radius + 4 * 2.0**-53 * np.abs(logits).max(initial=0)
    assert abs(loss - exact) <= slack, f"loss {loss}, needed {exact}"


def gradients(op, case):
    logits, labels, normalizer, _, rng = make(case)
    if logits.size and case[3] in ("normal", "wide"):
        check_vjp(lambda x: op(x, labels, normalizer), logits, rng=rng)


def torch_agrees(op, case):
    logits, labels, normalizer, dloss, _ = make(case)
    counts = (labels != IGNORE_INDEX).sum()
    if not counts:
        return
    leaf = torch.tensor(logits.reshape(-1, logits.shape[-1]), requires_grad=True)
    loss = torch.nn.functional.cross_entropy(leaf, torch.tensor(labels.reshape(-1)), reduction="sum")
    loss = loss / (normalizer or float(counts))
    loss.backward(torch.tensor(dloss))
    found, vjp = op(logits, labels, normalizer)
    ball, dball = oracle_for(labels, normalizer)(np.float64, dloss, logits)
    assert abs(found - loss.item()) <= 2 * ball.radius
    assert (np.abs(vjp(dloss) - leaf.grad.numpy().reshape(logits.shape)) <= 2 * dball.radius).all()


def within_the_bound(op, case):
    logits, labels, normalizer, dloss, _ = make(case)
    for dtype in checks.DTYPES:
        checks.inside(lambda x: op(x, labels, normalizer), oracle_for(labels, normalizer), [logits], dloss, dtype)


def in_any_layout(op, case):
    logits, labels, normalizer, dloss, _ = make(case)
    for layout in checks.LAYOUTS:
        placed = layout(labels) if labels.ndim else labels
        oracle = oracle_for(labels, normalizer)
        checks.inside(lambda x, p=placed: op(x, p, normalizer), oracle, [logits], dloss, np.float32, layout)


def changes_nothing(op, case):
    logits, labels, normalizer, dloss, _ = make(case)
    checks.pure(lambda x, labels: op(x, labels, normalizer), (logits, labels), dloss)


def a_shift_changes_no_bit_on_a_grid(op, case):
    logits, labels, normalizer, dloss, _ = make(case)
    grid = np.rint(logits * 4) / 4
    (loss, vjp), (moved, moved_vjp) = (op(x, labels, normalizer) for x in (grid, grid + 8))
    checks.same_bits(moved, loss, "loss")
    checks.same_bits(moved_vjp(dloss), vjp(dloss), "dlogits")
    equal, _ = op(0 * logits + 3, labels, normalizer)
    counts = (labels != IGNORE_INDEX).sum()
    exact = math.log(logits.shape[-1]) * counts / (normalizer or max(counts, 1))
    assert abs(equal - exact) <= bounds.gamma(labels.size + 20, np.float64) * exact, "log V where all are equal"


def rows_sum_to_zero_and_stay_small(op, case):
    """p − onehot: between −1 and 1, and nothing in all; ignored rows exactly nothing, whatever stands there."""
    logits, labels, _, _, _ = make(case)
    loss, vjp = op(logits, labels, 1.0)
    dlogits = vjp(1.0)
    v = logits.shape[-1]
    assert loss >= 0
    assert (np.abs(dlogits) <= 1 + bounds.gamma(v + 20, np.float64)).all()
    # e / total is p_i (1 + (v + 20 + d_i) u): d is the distance from the maximum, up to e^-d d < 1 of which counts
    allowed = bounds.gamma(3 * v + 40, np.float64) * (1 + v)
    assert (np.abs(dlogits.sum(-1)) <= allowed).all()
    if (labels != IGNORE_INDEX).any():
        assert dlogits.any() == (v > 1)
    counts = labels != IGNORE_INDEX
    for poison in (1e6, np.nan, np.inf):
        with np.errstate(invalid="ignore"):
            other, other_vjp = op(np.where(counts[..., None], logits, poison), labels, 1.0)
            checks.same_bits(other, loss, f"loss with {poison} where nothing counts")
            checks.same_bits(other_vjp(1.0), dlogits, f"dlogits with {poison} where nothing counts")


def micro_batches_add_up(op, case):
    """Row by row with the number in the whole batch as normalizer: the same loss and gradient."""
    logits, labels, _, dloss, _ = make(case)
    if not labels.ndim or not labels.size:
        return
    n = float(max((labels != IGNORE_INDEX).sum(), 1))
    loss, vjp = op(logits, labels)
    parts = [op(logits[i : i + 1], labels[i : i + 1], n) for i in range(len(labels))]
    ball, _ = oracle_for(labels, None)(np.float64, dloss, logits)
    assert abs(sum(part for part, _ in parts) - loss) <= 2 * ball.radius
    checks.same_bits(np.concatenate([part_vjp(dloss) for _, part_vjp in parts]) + 0.0, vjp(dloss) + 0.0, "dlogits")


def refuses_labels_outside(op, case):
    logits, labels, _, _, _ = make(case)
    if labels.size:
        for label in (-1, -99, logits.shape[-1], 10**6):
            wrong = labels.copy()
            wrong.reshape(-1)[-1] = label
            try:
                op(logits, wrong if labels.ndim else np.array(label))
            except ValueError:
                continue
            raise AssertionError(f"label {label} was accepted")


PROPERTIES = (
    one_number_at_a_time,
    gradients,
    torch_agrees,
    within_the_bound,
    in_any_layout,
    changes_nothing,
    a_shift_changes_no_bit_on_a_grid,
    rows_sum_to_zero_and_stay_small,
    micro_batches_add_up,
    refuses_labels_outside,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_cross_entropy(holds, case):
    holds(cross_entropy, case)


def test_cross_entropy_kill_matrix():
    def ignores_the_normalizer(logits, labels, normalizer=None):
        return cross_entropy(logits, labels)

    checks.kill_matrix(PROPERTIES, (*wrong_nn.CROSS_ENTROPY, ignores_the_normalizer), CASES)


@given(
    st.tuples(
        st.integers(0, 9999),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.integers(1, 300),
        st.sampled_from(("normal", "shifted", "large", "wide")),
        st.floats(0, 1),
        st.one_of(st.none(), st.floats(0.5, 1000)),
    ),
    st.sampled_from((checks.contiguous, *checks.LAYOUTS)),
    st.sampled_from(checks.DTYPES),
)
def test_any_shape_and_layout(case, layout, dtype):
    logits, labels, normalizer, dloss, _ = make(case)
    oracle = oracle_for(layout(labels) if labels.ndim else labels, normalizer)
    checks.inside(lambda x: cross_entropy(x, labels, normalizer), oracle, [logits], dloss, dtype, layout)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@given(seed=st.integers(0, 9999), n=st.integers(1, 200), scale=st.sampled_from((1.0, 30.0, 1e-3)))
def test_softmax_is_within_its_bound(dtype, seed, n, scale):
    """exp(log_softmax): the division-free form, so u |log p| joins the bound of softmax, and one more logarithm."""
    x = (scale * np.random.default_rng(seed).standard_normal((3, n))).astype(dtype)
    found = log_softmax(x)
    assert found.dtype == dtype
    ball = Ball(x, dtype)
    shifted = ball - ball.max()
    (shifted - shifted.exp().sum(-1).log()).check(found, "log p")
    exact = np.exp(x - x.max(-1, keepdims=True).astype(float))
    exact /= exact.sum(-1, keepdims=True)
    u = bounds.unit_roundoff(dtype)
    allowed = bounds.softmax(x, dtype) + exact * u * (2 * np.abs(np.log(exact)) + ELEMENTARY * (3 + math.log(n)))
    assert (np.abs(np.exp(found) - exact) <= allowed + (dtype is np.float64) * 1e-15 * exact).all()


def test_the_error_says_what_spans_what():
    with pytest.raises(ValueError, match=r"labels span -1\.\.7, needed 0\.\.4 or -100"):
        cross_entropy(np.zeros((2, 5)), np.array([-1, 7]))


def test_nothing_counts():
    loss, vjp = cross_entropy(np.ones((2, 3), np.float32), np.array([-100, -100]))
    assert loss == 0
    assert loss.dtype == np.float32
    assert not vjp(2.0).any()


def test_narrow_labels(rng):
    """int8 labels reach the ignored one, and are not used as such in an index."""
    logits, labels = rng.standard_normal((4, 5)), np.array([0, -100, 4, 2])
    checks.same_bits(cross_entropy(logits, labels.astype(np.int8))[0], cross_entropy(logits, labels)[0], "loss")
