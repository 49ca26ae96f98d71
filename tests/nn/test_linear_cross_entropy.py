"""The head and its loss, a few rows at a time: the numbers of all logits at once, in a fraction of the memory.

Runs with two rows at a time, so that a handful of rows has several chunks, the last one short.
"""

import functools
import tracemalloc
from unittest.mock import patch

import numpy as np
import pytest
import wrong_nn

from minift.conformance.gradients import check_vjp
from minift.conformance.operations.losses import linear_oracle
from minift.nn import losses
from minift.nn.linear import linear
from minift.nn.losses import IGNORE_INDEX, cross_entropy, linear_cross_entropy
from minift.nn.weight import Frozen, add
from minift.peft.lora import A_NAME, B_NAME, LoRA
from minift.peft.tuned import Tuned
from minift.quant import nf4
from nn import checks

LEARNED = {"array": 1, "tuned": 1, "frozen": 0, "nf4": 0, "lora": 2, "qlora": 2}  # arrays of each kind that learn
VOCAB, D, ALPHA = 7, 5, 3

# seed, rows, kind of weight, rows that do not count, normalizer
CASES = [
    (1, 5, "array", (), None),
    (2, 5, "lora", (1, 2), 17.0),  # on both sides of a border
    (3, 6, "frozen", (2, 3), None),  # a whole chunk
    (4, 7, "qlora", (0, 6), 2.5),  # the first and the last one
    (5, 4, "nf4", (3,), None),
    (6, 3, "tuned", (0, 1), 4.0),
    (7, 2, "array", (0, 1), None),  # nothing counts
    (8, 0, "array", (), None),
    (9, 0, "lora", (), 3.0),
    (10, 1, "qlora", (), None),
]


def in_twos(*args, **kwargs):
    with patch.object(losses, "ROWS", 2):
        loss, vjp = linear_cross_entropy(*args, **kwargs)

    def vjp_in_twos(dloss):
        with patch.object(losses, "ROWS", 2):
            return vjp(dloss)

    return loss, vjp_in_twos


def make(case):
    """x, labels, normalizer, what the weight is made of (numbers of float32 in float64), dloss."""
    seed, n, kind, ignored, normalizer = case
    rng = np.random.default_rng(seed)
    x, W, A, B = (rng.standard_normal(s, np.float32).astype(float) for s in ((n, D), (VOCAB, D), (2, D), (VOCAB, 2)))
    labels = rng.integers(0, VOCAB, n)
    labels[list(ignored)] = IGNORE_INDEX
    if kind in ("nf4", "qlora"):
        W = nf4.quantize(W).dense(np.float64)
    return x, labels, normalizer, (W, A, B), np.float64(rng.standard_normal()), rng


@functools.cache
def in_four_bits(numbers):
    return nf4.quantize(np.frombuffer(numbers, np.float32).reshape(VOCAB, D))


def weight_of(kind, parts, dtype):
    """The weight, in this dtype; quantizing what was quantized gives the same numbers."""
    W, A, B = (part.astype(dtype) for part in parts)
    base = in_four_bits(W.astype(np.float32).tobytes()) if kind in ("nf4", "qlora") else Frozen(W)
    return {
        "array": lambda: W,
        "tuned": lambda: Tuned(Frozen(np.zeros_like(W)), W),
        "frozen": lambda: base,
        "nf4": lambda: base,
        "lora": lambda: LoRA(base, A, B, ALPHA),
        "qlora": lambda: LoRA(base, A, B, ALPHA),
    }[kind]()


def learned(kind, parts):
    """The arrays that learn."""
    return {0: [], 1: [parts[0]], 2: list(parts[1:])}[LEARNED[kind]]


def on_arrays(op, kind, parts, labels, normalizer):
    """(x, *arrays that learn) -> loss, vjp(dloss) -> dx, *their cotangents; None stands for nothing."""

    def run(x, *arrays):
        own = {0: parts, 1: (*arrays, *parts[1:]), 2: (parts[0], *arrays)}[LEARNED[kind]]
        loss, vjp = op(x, weight_of(kind, own, x.dtype), labels, normalizer)

        def flat(dloss):
            dx, dweight = vjp(dloss)
            names = {"tuned": ("weight",), "lora": (A_NAME, B_NAME), "qlora": (A_NAME, B_NAME)}.get(kind)
            if names is None:
                assert (dweight is not None) == (kind == "array"), "a cotangent where nothing learns, or none"
                return (dx, dweight) if kind == "array" else dx
            return dx, *(dweight[name] for name in names)

        return loss, flat

    return run


def oracle_for(kind, parts, labels, normalizer):
    """The suite's, for the cotangents of what learns in this kind of weight."""
    learning = LEARNED[kind]

    def oracle(dtype, dloss, x, *_):
        numbers = parts if learning == 2 else parts[:1]
        both = checks.in_dtype(linear_oracle(labels, normalizer, scaling=ALPHA / 2))
        loss, dx, dW, *adapter = both(dtype, dloss, x, *numbers)
        return loss, dx, *([dW] if learning == 1 else adapter)

    return oracle


# --- properties: op(x, weight, labels, normalizer, recompute=...) -----------------------------------------------------


def within_the_bound(op, case):
    x, labels, normalizer, parts, dloss, _ = make(case)
    kind = case[2]
    run, oracle = (f(kind, parts, labels, normalizer) for f in (lambda *a: on_arrays(op, *a), oracle_for))
    for dtype in checks.DTYPES:
        checks.inside(run, oracle, [x, *learned(kind, parts)], dloss, dtype)
    for layout in checks.LAYOUTS:
        checks.inside(run, oracle, [x, *learned(kind, parts)], dloss, np.float32, layout)


def the_same_as_from_all_logits(op, case):
    """`linear` and `cross_entropy` in float64: to float32 that is the truth, which its own ball must hold."""
    x, labels, normalizer, parts, dloss, _ = make(case)
    kind = case[2]

    def at_once(x, weight, labels, normalizer):
        logits, linear_vjp = linear(x, weight)
        loss, loss_vjp = cross_entropy(logits, labels, normalizer)
        return loss, lambda dloss: linear_vjp(loss_vjp(dloss))[:2]

    low = np.float32(dloss)
    balls = oracle_for(kind, parts, labels, normalizer)(np.float32, float(low), x)
    expected, expected_vjp = on_arrays(at_once, kind, parts, labels, normalizer)(x, *learned(kind, parts))
    given = [a.astype(np.float32) for a in (x, *learned(kind, parts))]
    found, vjp = on_arrays(op, kind, parts, labels, normalizer)(*given)
    pairs = (found, *checks.tuple_of(vjp(low))), (expected, *checks.tuple_of(expected_vjp(float(low))))
    for a, b, ball in zip(*pairs, balls, strict=True):
        assert a.dtype == np.float32
        assert (np.abs(a - b) <= ball.radius).all()


def right_gradients(op, case):
    x, labels, normalizer, parts, _, rng = make(case)
    kind = case[2]
    if len(x):
        arrays = learned(kind, parts)
        check_vjp(on_arrays(op, kind, parts, labels, normalizer), x, *arrays, rng=rng, directions=1)


def recomputation_changes_no_bit(op, case):
    x, labels, normalizer, parts, dloss, _ = make(case)
    kind = case[2]
    given = [x, *learned(kind, parts)]
    (loss, vjp), (again, again_vjp) = (
        on_arrays(lambda *a, r=r: op(*a, recompute=r), kind, parts, labels, normalizer)(*given) for r in (False, True)
    )
    checks.same_bits(again, loss, "loss")
    for a, b in zip(checks.tuple_of(again_vjp(dloss)), checks.tuple_of(vjp(dloss)), strict=True):
        checks.same_bits(a, b, "cotangent")


def changes_nothing(op, case):
    """The gradient is kept between calls, so whoever adds to what one call gave must not reach the next."""
    x, labels, normalizer, parts, dloss, _ = make(case)
    kind = case[2]
    for recompute in (False, True):
        run = on_arrays(lambda *a, r=recompute: op(*a, recompute=r), kind, parts, labels, normalizer)
        before = labels.tobytes(), [part.tobytes() for part in parts]
        checks.pure(run, [x, *learned(kind, parts)], dloss)
        _, vjp = run(x, *learned(kind, parts))
        first = checks.tuple_of(vjp(1.0))
        kept = [c.copy() for c in first]
        for cotangent in first:
            cotangent += 1
        for a, b in zip(checks.tuple_of(vjp(1.0)), kept, strict=True):
            checks.same_bits(a, b, "cotangent of a second call")
        assert (labels.tobytes(), [part.tobytes() for part in parts]) == before


PROPERTIES = (
    within_the_bound,
    the_same_as_from_all_logits,
    right_gradients,
    recomputation_changes_no_bit,
    changes_nothing,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_linear_cross_entropy(holds, case):
    holds(in_twos, case)


def test_linear_cross_entropy_kill_matrix():
    killed = checks.kill_matrix(PROPERTIES, wrong_nn.LINEAR_CROSS_ENTROPY, [CASES[i] for i in (0, 1, 7)])
    assert ("recomputation_changes_no_bit", "recomputed=chunk") in killed
    assert ("changes_nothing", "copies=False") in killed
    assert ("changes_nothing", "reuses=True") in killed


def test_no_rows_give_a_weight_that_learns_zeros(rng):
    """Not None: a part of a batch in which nothing counts is added to parts in which something does."""
    W = rng.standard_normal((VOCAB, D)).astype(np.float32)
    for recompute in (False, True):
        loss, vjp = linear_cross_entropy(np.zeros((0, D), np.float32), W, np.zeros(0, int), recompute=recompute)
        dx, dweight = vjp(1.0)
        checks.same_bits(loss, np.float32(0), "loss")
        checks.same_bits(dx, np.zeros((0, D), np.float32), "dx")
        checks.same_bits(add(dweight, W.copy()), W, "what is added to it")


def test_a_label_outside_the_vocabulary_in_the_last_chunk(rng):
    x, labels = rng.standard_normal((5, D)), np.array([0, 1, 2, 3, VOCAB])
    for recompute in (False, True):
        with pytest.raises(ValueError, match=r"labels span 7\.\.7, needed 0\.\.6 or -100"):
            in_twos(x, rng.standard_normal((VOCAB, D)), labels, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_logits_never_exist_all_at_once(recompute, rng):
    """300 rows, ten at a time: at most four arrays of ten rows of logits (of a chunk its logits, exponentials and
    gradient, and the logits of the one before until they are replaced), and between the passes none of them."""
    rows, vocab, d = 300, 8000, 4
    x, labels = rng.standard_normal((rows, d), np.float32), rng.integers(0, vocab, rows)
    weight = Frozen(rng.standard_normal((vocab, d), np.float32))
    chunk = 10 * vocab * 4
    with patch.object(losses, "ROWS", 10):
        linear_cross_entropy(x[:20], weight, labels[:20])[1](1.0)  # what a first call leaves behind
        tracemalloc.start()
        _, vjp = linear_cross_entropy(x, weight, labels, recompute=recompute)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        vjp(1.0)
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert kept < chunk / 2  # dx, and what Python itself has allocated
    assert peak < 4 * chunk + chunk / 2
