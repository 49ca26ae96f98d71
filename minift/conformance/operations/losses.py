"""Cross-entropy, alone and behind an output matrix: within its bound, and what every other library once got wrong.

Labels that do not count, a normalizer that is not their number, an upstream gradient that is not one, logits far from
0, NaN where nothing counts: each of them has been a bug of a production library.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import bounds, common
from minift.conformance.ball import Ball
from minift.conformance.operation import Operation, arithmetic, rounded, storage
from minift.nn import losses
from minift.nn.losses import IGNORE_INDEX

KINDS = ("normal", "shifted", "large", "wide", "huge", "rising")


class Labeled(NamedTuple):
    shape: tuple[int, ...]  # of the labels
    vocab: int
    kind: str = "normal"
    ignored: float = 0.3  # the share of labels that do not count
    normalizer: float | None = None
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Labeled) -> tuple[np.ndarray, np.ndarray, np.floating]:
    """Logits, labels and dloss. The first labels that count are the last tokens, where a tile may begin."""
    rng = np.random.default_rng(case.seed)
    logits = rng.standard_normal((*case.shape, case.vocab))
    if case.kind == "shifted":
        logits += 1000
    elif case.kind == "large":
        logits *= 300
    elif case.kind == "wide":
        logits *= 2.0 ** rng.integers(-8, 6, logits.shape)
    elif case.kind == "huge":
        logits = np.where(logits > 1, 1e4, -1e4) + np.rint(logits)
    elif case.kind == "rising":
        logits += np.linspace(-20, 20, case.vocab)  # every tile has a new maximum
    labels = rng.integers(0, case.vocab, case.shape)
    edges = np.array([case.vocab - 1, 0, max(case.vocab - 2, 0)])
    labels.reshape(-1)[:3] = edges[: labels.size]
    labels = np.where(rng.random(case.shape) < case.ignored, IGNORE_INDEX, labels)
    return rounded(logits, case.dtype), labels, _scalar(rng.standard_normal(), case.dtype)


def _scalar(number: float, dtype: str) -> np.floating:
    """A number that the dtype holds too, in the type of the arithmetic."""
    return arithmetic(dtype)(rounded(np.asarray(number), dtype))


def oracle(labels: np.ndarray, normalizer: float | None):
    """loss and dlogits, for these labels."""

    def both(number, dloss, logits):
        counts = (labels != IGNORE_INDEX)[..., None]
        onehot, n = _onehot(labels, logits.shape[-1]), _count(labels, normalizer)
        nll, e, total = _rows(number(logits), onehot)
        share = number(dloss) / n
        return (nll.where(counts).sum() / n).reshape(), (e * (share / total) - onehot * share).where(counts)

    return both


def linear_oracle(labels: np.ndarray, normalizer: float | None, dtype: str = "float64", scaling: float = 0.0):
    """loss, dx and dW of linear_cross_entropy; with an adapter's A and B also dA and dB, where W′ = W + scaling B A.

    With all logits at once: a sum over chunks is a sum in another order, which the radius allows. In 16 bits logits,
    dlogits and the gradient of the sum are rounded to the dtype on the way, as a matrix product on a GPU takes it."""

    def both(number, dloss, x, W, A=None, B=None):
        counts = (labels != IGNORE_INDEX)[:, None]
        onehot, n = _onehot(labels, len(W)), _count(labels, normalizer)
        x, W = number(x), number(W)
        logits = x @ W.T
        if A is not None:
            A, B = number(A), number(B)
            h = x @ A.T * scaling
            logits = logits + h @ B.T
        nll, e, total = _rows(_kept(logits, dtype), onehot)
        dlogits = _kept((e / total - onehot).where(counts), dtype)
        share = number(dloss) / n
        dx = dlogits @ W
        more: tuple[Ball, ...] = ()
        if A is not None:
            dh = dlogits @ B * scaling
            dx, more = dx + dh @ A, (dh.T @ x, dlogits.T @ h)
        cotangents = (_kept(dx, dtype), dlogits.T @ x, *more)
        return (nll.where(counts).sum() / n).reshape(), *(c * share for c in cotangents)

    return both


def _kept(ball: Ball, dtype: str) -> Ball:
    """Rounded to the dtype, and then again a number of the arithmetic."""
    return Ball(ball.value, ball.dtype, ball.stored(dtype).radius) if dtype in ("float16", "bfloat16") else ball


def _rows(logits: Ball, onehot: np.ndarray) -> tuple[Ball, Ball, Ball]:
    """Of each row −log p at the label, e = exp(x − max), and Σe."""
    shifted = logits - logits.max()
    e = shifted.exp()
    total = e.sum(-1)
    at_label = Ball((shifted.value * onehot).sum(-1, keepdims=True), shifted.dtype)
    at_label.radius = (shifted.radius * onehot).sum(-1, keepdims=True)
    return total.log() - at_label, e, total


def _onehot(labels: np.ndarray, vocab: int) -> np.ndarray:
    return (np.arange(vocab) == np.where(labels == IGNORE_INDEX, 0, labels)[..., None]) * 1.0


def _count(labels: np.ndarray, normalizer: float | None) -> float:
    return float(max((labels != IGNORE_INDEX).sum(), 1)) if normalizer is None else normalizer


# --- cross_entropy: f(logits, labels, normalizer) ---------------------------------------------------------------------


def any_layout(f, case):
    """Logits and labels; not to the bit, for what lies otherwise may be summed in another order."""
    for layout in (common.strided, common.transposed, common.misaligned, common.apart):
        try:
            is_within_its_bound(f, case, layout)
        except AssertionError as error:
            raise AssertionError(f"{layout.__name__} arguments: {error}") from error


def is_within_its_bound(f, case, layout=np.asarray):
    logits, labels, dloss = arrays(case)
    type_ = arithmetic(case.dtype)
    numbers = dloss.astype(np.float64), logits.astype(np.float64)
    loss_ball, ball = oracle(labels, case.normalizer)(lambda a: Ball(a, type_), *numbers)
    loss, vjp = f(layout(logits), layout(labels) if labels.ndim else labels, case.normalizer)
    loss_ball.check(loss, "loss")
    ball.stored(case.dtype).check(vjp(dloss), "dlogits")


def changes_nothing(f, case):
    """Nothing that was given changes, labels included, and a second call gives the same bits."""
    logits, labels, dloss = arrays(case)
    before = [a.tobytes() for a in (logits, labels)]
    (loss, vjp), (again, again_vjp) = (f(logits, labels, case.normalizer) for _ in range(2))
    common.same_bits(again, loss, "loss of a second call")
    first = np.array(vjp(dloss))
    common.same_bits(again_vjp(dloss), first, "dlogits of a second call")
    common.same_bits(vjp(dloss), first, "dlogits of a second pullback")
    assert [a.tobytes() for a in (logits, labels)] == before, "logits or labels were changed"


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64" and case.kind in ("normal", "wide"):
        logits, labels, _ = arrays(case)
        common.is_differentiated(lambda x: f(x, labels, case.normalizer), [logits], np.random.default_rng(case.seed))


def is_log_vocab_where_all_are_equal(f, case):
    logits, labels, _ = arrays(case)
    loss, _ = f(np.full_like(logits, 3), labels, case.normalizer)
    exact = math.log(case.vocab) * (labels != IGNORE_INDEX).sum() / _count(labels, case.normalizer)
    allowed = bounds.gamma(labels.size + 20 + case.vocab, arithmetic(case.dtype)) * exact
    assert abs(float(loss) - exact) <= allowed, f"loss of equal logits: {loss}, needed {exact}"


def a_shift_on_a_grid_changes_no_bit(f, case):
    """Quarters, and 8 more: the distances from the maximum are the same numbers."""
    logits, labels, dloss = arrays(case)
    grid = np.clip(np.rint(logits * 4) / 4, -20, 20)
    (loss, vjp), (moved, moved_vjp) = (f(x, labels, case.normalizer) for x in (grid, grid + logits.dtype.type(8)))
    common.same_bits(moved, loss, "loss of shifted logits")
    common.same_bits(moved_vjp(dloss), vjp(dloss), "dlogits of shifted logits")


def rows_of_the_gradient_sum_to_zero(f, case):
    """p − onehot lies between −1 and 1, is negative at the label alone, and each row sums to nothing."""
    logits, labels, _ = arrays(case)
    loss, vjp = f(logits, labels, 1.0)
    dlogits = vjp(arithmetic(case.dtype)(1)).astype(np.float64)
    assert loss >= 0, f"loss {loss}"
    type_, v = arithmetic(case.dtype), case.vocab
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case.dtype, 0.0)
    assert (np.abs(dlogits) <= 1 + bounds.gamma(v + 20, type_) + u).all()
    # e / total is p_i (1 + (v + 20 + d_i) u): d is the distance from the maximum, up to e^-d d < 1 of which counts
    allowed = bounds.gamma(3 * v + 40, type_) * (1 + v) + u * np.abs(dlogits).sum(-1) * (1 + u) + v * 2.0**-24 * (u > 0)
    assert (np.abs(dlogits.sum(-1)) <= allowed).all(), f"rows sum to {dlogits.sum(-1)}"


def what_does_not_count_is_not_seen(f, case):
    """Rows without a label have a gradient of exactly 0 and change no bit, whatever their logits are."""
    logits, labels, dloss = arrays(case)
    counts = labels != IGNORE_INDEX
    loss, vjp = f(logits, labels, case.normalizer)
    dlogits = vjp(dloss)
    assert not dlogits[~counts].any(), "a row without a label has a gradient"
    for poison in (np.nan, np.inf, -np.inf):
        with np.errstate(invalid="ignore"):
            poisoned = np.where(counts[..., None], logits, storage(case.dtype)(poison))
            other, other_vjp = f(poisoned, labels, case.normalizer)
            common.same_bits(other, loss, f"loss with {poison} where nothing counts")
            common.same_bits(other_vjp(dloss), dlogits, f"dlogits with {poison} where nothing counts")


def micro_batches_add_up(f, case):
    """Row by row with the number in the whole batch as normalizer: the same gradient, and the loss within its bound."""
    logits, labels, dloss = arrays(case)
    if not labels.ndim or not labels.size:
        return
    n = _count(labels, None)
    loss, vjp = f(logits, labels, None)
    parts = [f(logits[i : i + 1], labels[i : i + 1], n) for i in range(len(labels))]
    type_ = arithmetic(case.dtype)
    ball, _ = oracle(labels, None)(lambda a: Ball(a, type_), float(dloss), logits.astype(np.float64))
    total = sum(float(part) for part, _ in parts)
    assert abs(total - float(loss)) <= 2 * ball.radius, f"parts add up to {total}, the whole is {loss}"
    pieces = np.concatenate([part_vjp(dloss) for _, part_vjp in parts])
    common.same_bits(pieces + 0, vjp(dloss) + 0, "dlogits of the parts")


def refuses_labels_outside(f, case):
    """With a ValueError or, where nobody can wait to look, with a loss that is NaN: never with a number."""
    logits, labels, _ = arrays(case)
    if labels.size:
        for label in (-1, -99, case.vocab, 10**6):
            wrong = labels.copy()
            wrong.reshape(-1)[-1] = label
            try:
                loss, _ = f(logits, wrong, case.normalizer)
            except ValueError as error:
                assert str(case.vocab - 1) in str(error), f"label {label}: the error does not say what is needed"
            else:
                assert np.isnan(loss), f"label {label} was accepted, with the loss {loss}"


def cases(dtypes):
    return st.builds(
        Labeled,
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.integers(1, 300),
        st.sampled_from(KINDS),
        st.floats(0, 1),
        st.none() | st.floats(0.5, 1000),
        st.sampled_from(sorted(dtypes)),
        st.integers(0, 99),
    )


FIXED = (
    Labeled((2, 5), 7, "normal", 0.4, seed=1),
    Labeled((6,), 5, "shifted", 0.2, 17.0, seed=2),
    Labeled((2, 3), 3, "large", 0.5, seed=3),
    Labeled((), 6, "normal", 0.0),
    Labeled((2, 2), 4, "normal", 1.0),
    Labeled((3, 1, 2), 9, "wide", 0.3, 2.5),
    Labeled((0, 4), 3),
    Labeled((3,), 1),
    Labeled((4,), 2, "huge", 0.0, 3.0),
    Labeled((5,), 37, "rising", 0.2, 7.0),
    *(Labeled((4,), 17, kind, 0.3, 2.5, dtype) for kind in KINDS for dtype in ("float16", "bfloat16")),
    *(Labeled((2, 3), 11, kind, 0.3, normalizer, "float64", 4) for kind in KINDS for normalizer in (None, 5.0)),
)

# --- linear_cross_entropy: f(x, weight, labels, normalizer) -----------------------------------------------------------


class Head(NamedTuple):
    rows: int
    vocab: int
    d: int
    ignored: tuple[int, ...] = ()  # rows that do not count
    normalizer: float | None = None
    dtype: str = "float32"
    seed: int = 0


def head_arrays(case: Head) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.floating]:
    """x, weight, labels and dloss."""
    rng = np.random.default_rng(case.seed)
    x, W = (rounded(rng.standard_normal(s), case.dtype) for s in ((case.rows, case.d), (case.vocab, case.d)))
    labels = rng.integers(0, case.vocab, case.rows)
    labels[list(case.ignored)] = IGNORE_INDEX
    return x, W, labels, _scalar(rng.standard_normal(), case.dtype)


def the_head_is_within_its_bound(f, case):
    for layout in (np.asarray, common.strided, common.transposed, common.misaligned, common.apart):
        x, W, labels, dloss = head_arrays(case)
        number = functools.partial(Ball, dtype=arithmetic(case.dtype))
        numbers = (a.astype(np.float64) for a in (dloss, x, W))
        balls = linear_oracle(labels, case.normalizer, case.dtype)(number, *numbers)
        loss, vjp = f(layout(x), layout(W), layout(labels), case.normalizer)
        balls[0].check(loss, "loss")
        for what, found, ball in zip(("dx", "dweight"), vjp(dloss), balls[1:], strict=True):
            ball.stored(case.dtype).check(found, f"{what} of {layout.__name__} arguments")


def the_head_changes_nothing(f, case):
    x, W, labels, dloss = head_arrays(case)
    before = [a.tobytes() for a in (x, W, labels)]
    loss, vjp = f(x, W, labels, case.normalizer)
    first = [np.array(c) for c in vjp(dloss)]
    again, again_vjp = f(x, W, labels, case.normalizer)
    common.same_bits(again, loss, "loss of a second call")
    for pullback in (vjp, again_vjp):
        for a, b in zip(pullback(dloss), first, strict=True):
            common.same_bits(a, b, "a cotangent of a second call")
    assert [a.tobytes() for a in (x, W, labels)] == before, "an argument was changed"


def the_heads_pullback_is_the_transpose(f, case):
    if case.dtype == "float64" and case.rows:
        x, W, labels, _ = head_arrays(case)
        rng = np.random.default_rng(case.seed)
        common.is_differentiated(lambda x, W: f(x, W, labels, case.normalizer), [x, W], rng)


def head_cases(dtypes):
    size = st.integers(1, 9)
    normalizer, dtype = st.none() | st.floats(0.5, 1000), st.sampled_from(sorted(dtypes))
    return st.builds(Head, st.integers(0, 9), size, size, st.just(()), normalizer, dtype, st.integers(0, 99))


HEADS = (
    Head(5, 7, 5),
    Head(5, 7, 4, (1, 2), 17.0),  # on both sides of a border, if there are two rows at a time
    Head(6, 3, 9, (2, 3), 2.5, "float16"),  # a whole chunk
    Head(2, 7, 5, (0, 1)),  # nothing counts
    Head(0, 7, 5),
    Head(1, 1, 1),
    Head(7, 5, 6, (0, 6), 4.0, "float64", 1),
    Head(3, 8, 2, (), None, "bfloat16"),
)

OPERATIONS = (
    Operation(
        "losses.cross_entropy",
        losses.cross_entropy,
        "f(logits (..., vocab), labels (...), normalizer) -> loss, vjp; vjp(dloss) -> dlogits",
        cases,
        FIXED,
        (
            is_within_its_bound,
            changes_nothing,
            any_layout,
            pullback_is_the_transpose_of_the_derivative,
            is_log_vocab_where_all_are_equal,
            a_shift_on_a_grid_changes_no_bit,
            rows_of_the_gradient_sum_to_zero,
            what_does_not_count_is_not_seen,
            micro_batches_add_up,
            refuses_labels_outside,
        ),
    ),
    Operation(
        "losses.linear_cross_entropy",
        losses.linear_cross_entropy,
        "f(x (n, d), weight (vocab, d), labels (n,), normalizer) -> loss, vjp; vjp(dloss) -> dx, dweight",
        head_cases,
        HEADS,
        (the_head_is_within_its_bound, the_head_changes_nothing, the_heads_pullback_is_the_transpose),
    ),
)
