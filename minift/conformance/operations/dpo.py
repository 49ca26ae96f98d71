"""DPO's loss, smoothed or not, and IPO's: within their bounds, ln 2 at the start, and no gradient of the reference."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import bounds, common
from minift.conformance.ball import Ball
from minift.conformance.operation import Operation, arithmetic, rounded
from minift.rlhf import dpo

KINDS = ("normal", "decided", "hopeless", "start")


class Preferred(NamedTuple):
    pairs: int
    kind: str = "normal"
    beta: float = 0.3
    label_smoothing: float = 0.0
    loss_type: dpo.LossType = "sigmoid"
    normalizer: float | None = None
    dtype: str = "float32"
    seed: int = 0

    @property
    def options(self) -> tuple:
        return self.beta, self.label_smoothing, self.loss_type, self.normalizer


def arrays(case: Preferred) -> tuple[list[np.ndarray], np.floating]:
    """Log-probabilities of chosen and rejected answers, by the policy and by the reference; dloss."""
    rng = np.random.default_rng(case.seed)
    chosen, rejected, ref_chosen, ref_rejected = -rng.exponential(20.0, (4, case.pairs))
    if case.kind == "start":
        ref_chosen, ref_rejected = chosen, rejected
    elif case.kind != "normal":
        sign = 1 if case.kind == "decided" else -1
        ref_chosen, ref_rejected = chosen - sign * 200, rejected + sign * 20
    dloss = arithmetic(case.dtype)(rounded(np.asarray(rng.standard_normal()), case.dtype))
    return [rounded(x, case.dtype) for x in (chosen, rejected, ref_chosen, ref_rejected)], dloss


def oracle(case: Preferred) -> tuple[Ball, Ball]:
    """loss and dchosen; drejected is −dchosen."""
    given, dloss = arrays(case)
    type_, eps, beta = arithmetic(case.dtype), case.label_smoothing, case.beta
    chosen, rejected, ref_chosen, ref_rejected = (Ball(x, type_) for x in given)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    n = float(max(case.pairs, 1)) if case.normalizer is None else case.normalizer
    if case.loss_type == "ipo":
        error = h - 1 / (2 * beta)
        each, slope = error * error, 2 * error
    else:
        z = h * beta
        each = (-z).softplus() * (1 - eps)
        if eps:
            each = each + ((-z).softplus() + z) * eps  # is softplus(z), and wider
        slope = (z.sigmoid() * eps - (-z).sigmoid() * (1 - eps)) * beta
    return (each.sum() / n).reshape(), slope * (Ball(dloss, type_) / n)


def is_within_its_bound(f, case, layout=np.asarray):
    given, dloss = arrays(case)
    of_loss, slope = oracle(case)
    loss, vjp = f(*map(layout, given), *case.options)
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
    given, dloss = arrays(case)
    before = [x.tobytes() for x in given]
    (loss, vjp), (again, again_vjp) = (f(*given, *case.options) for _ in range(2))
    first = [np.array(c) for c in vjp(dloss)[:2]]
    common.same_bits(again, loss, "loss of a second call")
    for pullback in (vjp, again_vjp):
        for a, b in zip(pullback(dloss)[:2], first, strict=True):
            common.same_bits(a, b, "a cotangent of a second call")
    assert [x.tobytes() for x in given] == before, "an argument was changed"


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64" and case.kind in ("normal", "start") and case.pairs:
        (chosen, rejected, *fixed), _ = arrays(case)

        def loss(*logps):
            value, vjp = f(*logps, *fixed, *case.options)
            return value, lambda dloss: tuple(vjp(dloss)[:2])

        common.is_differentiated(loss, [chosen / 10, rejected / 10], np.random.default_rng(case.seed))


def is_log_2_at_the_start(f, case):
    """The policy is its reference: h is 0 to the bit, whatever the log-probabilities, and IPO's loss is (1 / 2β)²."""
    (chosen, rejected, *_), _ = arrays(case)
    loss, vjp = f(chosen, rejected, chosen.copy(), rejected.copy(), *case.options[:3], None)
    type_ = arithmetic(case.dtype)
    exact, slope = math.log(2), -case.beta * (0.5 - case.label_smoothing)
    if case.loss_type == "ipo":
        exact, slope = 1 / (4 * case.beta**2), -1 / case.beta
    assert abs(float(loss) - exact * (case.pairs > 0)) <= bounds.gamma(case.pairs + 20, type_) * exact, f"{loss}"
    found = vjp(type_(max(case.pairs, 1)))[0].astype(np.float64)
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case.dtype, 0.0) + bounds.gamma(40, type_)
    assert (np.abs(found - slope) <= 1.01 * u * max(abs(slope), case.beta)).all(), f"{found}, needed {slope}"


def cases(dtypes):
    return st.builds(
        Preferred,
        st.integers(0, 40),
        st.sampled_from(KINDS),
        st.sampled_from((0.05, 0.1, 0.5, 1.0)),
        st.sampled_from((0.0, 0.1, 0.3)),
        st.sampled_from(("sigmoid", "ipo")),
        st.none() | st.floats(0.5, 1000),
        st.sampled_from(sorted(dtypes)),
        st.integers(0, 99),
    )


FIXED = (
    Preferred(7, seed=1),
    Preferred(5, "decided", 0.3, 0.1, normalizer=11.0),
    Preferred(6, "hopeless", 0.5, 0.2, seed=2),
    Preferred(5, "decided", 0.1),
    Preferred(4, "start", 0.1),
    Preferred(6, "normal", 0.2, 0.0, "ipo", 5.0, seed=3),
    Preferred(0),
    Preferred(37, "normal", 0.05, 0.1),
    *(
        Preferred(9, kind, 0.3, 0.1, loss_type, 12.0, "float16", 5)
        for kind in KINDS
        for loss_type in ("sigmoid", "ipo")
    ),
    *(Preferred(9, kind, 0.3, 0.1, "sigmoid", 12.0, "bfloat16", 5) for kind in KINDS),
    *(
        Preferred(8, kind, 0.4, 0.2, loss_type, None, "float64", 6)
        for kind in KINDS
        for loss_type in ("sigmoid", "ipo")
    ),
)

OPERATIONS = (
    Operation(
        "dpo.preference_loss",
        dpo.preference_loss,
        "f(chosen, rejected, ref_chosen, ref_rejected (log-probabilities (pairs,)), beta, label_smoothing, loss_type "
        '("sigmoid" or "ipo"), normalizer) -> loss, vjp; vjp(dloss) -> dchosen, drejected',
        cases,
        FIXED,
        (
            is_within_its_bound,
            changes_nothing,
            any_layout,
            pullback_is_the_transpose_of_the_derivative,
            is_log_2_at_the_start,
        ),
    ),
)
