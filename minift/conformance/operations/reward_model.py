"""The pairwise loss of reward models: stable on both sides, antisymmetric, and blind to what is added to both rewards.

The plain form −log σ(d) is infinite from d = −104 on in float32, and log(1 + e^−d) is 0 where it should be e^−d.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import bounds, common
from minift.conformance.ball import Ball
from minift.conformance.operation import Operation, arithmetic, rounded
from minift.rlhf import reward_model

KINDS = ("normal", "decided", "hopeless", "ties", "far")


class Compared(NamedTuple):
    pairs: int
    kind: str = "normal"
    margin: bool = False
    normalizer: float | None = None
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Compared) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.floating]:
    """Chosen and rejected rewards, the margin or None, and dloss."""
    rng = np.random.default_rng(case.seed)
    chosen, rejected = rng.standard_normal((2, case.pairs))
    if case.kind == "decided":
        chosen += rng.uniform(10, 70, case.pairs)
    elif case.kind == "hopeless":
        chosen -= rng.uniform(10, 110, case.pairs)  # e^89 is infinite in float32
    elif case.kind == "ties":
        chosen = rejected
    elif case.kind == "far":
        chosen, rejected = chosen + 100, rejected + 100
    margin = rounded(rng.exponential(1.0, case.pairs), case.dtype) if case.margin else None
    dloss = arithmetic(case.dtype)(rounded(np.asarray(rng.standard_normal()), case.dtype))
    return rounded(chosen, case.dtype), rounded(rejected, case.dtype), margin, dloss


def oracle(case: Compared) -> tuple[Ball, Ball]:
    """loss and dchosen; drejected is −dchosen."""
    chosen, rejected, margin, dloss = arrays(case)
    type_ = arithmetic(case.dtype)
    d = Ball(chosen, type_) - Ball(rejected, type_)
    if margin is not None:
        d = d - Ball(margin, type_)
    n = float(max(case.pairs, 1)) if case.normalizer is None else case.normalizer
    return ((-d).softplus().sum() / n).reshape(), -((-d).sigmoid() * (Ball(dloss, type_) / n))


def is_within_its_bound(f, case, layout=np.asarray):
    *given, dloss = arrays(case)
    chosen, rejected, margin = (None if x is None else layout(x) for x in given)
    of_loss, slope = oracle(case)
    loss, vjp = f(chosen, rejected, margin, case.normalizer)
    dchosen, drejected = vjp(dloss)[:2]
    of_loss.check(loss, "loss")
    slope.stored(case.dtype).check(dchosen, "dchosen")
    (-slope).stored(case.dtype).check(drejected, "drejected")


def any_layout(f, case):
    """Strided and misaligned arguments; not to the bit."""
    for layout in (common.strided, common.misaligned):
        try:
            is_within_its_bound(f, case, layout)
        except AssertionError as error:
            raise AssertionError(f"{layout.__name__} arguments: {error}") from error


def changes_nothing(f, case):
    """Arguments keep their bytes, and a second call gives the same bits."""
    *given, dloss = arrays(case)
    before = [None if x is None else x.tobytes() for x in given]
    (loss, vjp), (again, again_vjp) = (f(*given, case.normalizer) for _ in range(2))
    first = [np.array(c) for c in vjp(dloss)[:2]]
    common.same_bits(again, loss, "loss of a second call")
    for pullback in (vjp, again_vjp):
        for a, b in zip(pullback(dloss)[:2], first, strict=True):
            common.same_bits(a, b, "a cotangent of a second call")
    assert [None if x is None else x.tobytes() for x in given] == before, "an argument was changed"


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64" and case.kind in ("normal", "ties") and case.pairs:
        chosen, rejected, margin, _ = arrays(case)

        def loss(*rewards):
            value, vjp = f(*rewards, margin, case.normalizer)
            return value, lambda dloss: tuple(vjp(dloss)[:2])

        common.is_differentiated(loss, [chosen, rejected], np.random.default_rng(case.seed))


def a_tie_costs_log_2(f, case):
    """Equal rewards without a margin: the mean is ln 2, and both gradients are ½ of a pair's share."""
    chosen, _, _, _ = arrays(case)
    loss, vjp = f(chosen, chosen.copy(), None, None)
    exact = math.log(2) if case.pairs else 0.0
    type_ = arithmetic(case.dtype)
    assert abs(float(loss) - exact) <= bounds.gamma(case.pairs + 20, type_), f"{loss}, needed {exact}"
    found = vjp(type_(max(case.pairs, 1)))[0].astype(np.float64)
    assert (np.abs(found + 0.5) <= 1e-6 + 2.0**-9 * (case.dtype == "bfloat16")).all(), f"{found}, needed -0.5"


def exchanged_rewards_differ_by_the_difference(f, case):
    """L(w, l) − L(l, w) = −d, and no gradient leaves the pair: what the chosen gains the rejected loses, to the bit."""
    chosen, rejected, _, dloss = arrays(case)
    (loss, vjp), (other, _) = f(chosen, rejected, None, 1.0), f(rejected, chosen, None, 1.0)
    d = chosen.astype(np.float64) - rejected.astype(np.float64)
    one = case._replace(margin=False, normalizer=1.0)
    radius = 2 * float(oracle(one)[0].radius) + bounds.gamma(case.pairs + 20, arithmetic(case.dtype)) * np.abs(d).sum()
    assert abs(float(loss) - float(other) + d.sum()) <= 2 * radius, f"{loss} − {other}, needed {-d.sum()}"
    dchosen, drejected = vjp(dloss)[:2]
    common.same_bits(-drejected + 0, dchosen + 0, "−drejected")


def what_is_added_to_both_is_not_seen(f, case):
    """Rewards on eighths, and 64 more: the same bits."""
    chosen, rejected, margin, dloss = arrays(case)
    chosen, rejected = (np.rint(np.clip(x, -30, 30) * 8).astype(x.dtype) / x.dtype.type(8) for x in (chosen, rejected))
    if case.dtype == "bfloat16":
        return
    (loss, vjp), (moved, moved_vjp) = (
        f(chosen + by, rejected + by, margin, case.normalizer) for by in (chosen.dtype.type(0), chosen.dtype.type(64))
    )
    common.same_bits(moved, loss, "loss of rewards that are 64 higher")
    common.same_bits(moved_vjp(dloss)[0], vjp(dloss)[0], "dchosen of rewards that are 64 higher")


def cases(dtypes):
    return st.builds(
        Compared,
        st.integers(0, 40),
        st.sampled_from(KINDS),
        st.booleans(),
        st.none() | st.floats(0.5, 1000),
        st.sampled_from(sorted(dtypes)),
        st.integers(0, 99),
    )


FIXED = (
    Compared(7, margin=True, seed=1),
    Compared(5, "decided", normalizer=11.0),
    Compared(6, "hopeless", True, 3.0, seed=2),
    Compared(4, "ties"),
    Compared(1, "far"),
    Compared(0),
    Compared(37, "far", True, 40.0),
    *(
        Compared(9, kind, margin, 12.0, dtype, 5)
        for kind in KINDS
        for margin, dtype in ((True, "float16"), (False, "bfloat16"))
    ),
    *(Compared(8, kind, margin, None, "float64", 6) for kind in KINDS for margin in (False, True)),
)

OPERATIONS = (
    Operation(
        "reward_model.pairwise_loss",
        reward_model.pairwise_loss,
        "f(chosen (pairs,), rejected (pairs,), margin (pairs,) or None, normalizer) -> loss, vjp; "
        "vjp(dloss) -> dchosen, drejected",
        cases,
        FIXED,
        (
            is_within_its_bound,
            changes_nothing,
            any_layout,
            pullback_is_the_transpose_of_the_derivative,
            a_tie_costs_log_2,
            exchanged_rewards_differ_by_the_difference,
            what_is_added_to_both_is_not_seen,
        ),
    ),
)
