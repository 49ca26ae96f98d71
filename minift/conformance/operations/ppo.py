"""PPO's loss of a minibatch: within its bound on both sides of every clip, a first ratio of exactly 1, and padding.

What other libraries got wrong: a ratio that is not 1 at the first step, a minimum that became a maximum for negative
advantages, values clipped the optimistic way, padding that counts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.ball import Ball
from minift.conformance.bounds import unit_roundoff
from minift.conformance.operation import Operation, arithmetic, rounded
from minift.conformance.operations.advantages import KINDS, POISON, mask_of
from minift.rlhf import ppo

APART = 1e-2  # how far a case keeps from the edges, where one rounding decides which gradient is right


class Minibatch(NamedTuple):
    shape: tuple[int, int]
    kind: str = "answers"  # what the mask is like
    cliprange: float = 0.2
    cliprange_value: float | None = 0.3
    normalizer: float | None = None
    dtype: str = "float32"
    seed: int = 0

    @property
    def settings(self) -> ppo.Settings:
        return ppo.Settings(
            cliprange=self.cliprange, cliprange_value=self.cliprange_value, vf_coef=0.7, entropy_coef=0.03
        )


def arrays(case: Minibatch) -> tuple[list[np.ndarray], np.ndarray, np.floating]:
    """logp, entropy, values, old_logp, old_values, advantages and returns; mask; dloss.

    Ratios from 0.4 to 1.9, values that moved further than their clip on either side."""
    rng = np.random.default_rng(case.seed)
    mask = mask_of(case.kind, case.shape, rng)
    old = rounded(-rng.exponential(1.0, case.shape), case.dtype)
    logp = rounded(old + np.log(rng.uniform(0.4, 1.9, case.shape)), case.dtype)
    rho = np.exp(logp.astype(np.float64) - old)
    edges = [np.abs(rho - edge) < APART for edge in (1 - case.cliprange, 1 + case.cliprange)]
    logp = np.where(edges[0] | edges[1], old, logp)
    values, old_values, returns = rounded(rng.standard_normal((3, *case.shape)) / 2, case.dtype)
    if case.cliprange_value is not None:
        error, near = _errors(values, old_values, returns, case.cliprange_value)
        values = np.where(np.abs(np.abs(near) - np.abs(error)) < APART, old_values, values)
    advantages = rounded(rng.standard_normal(case.shape), case.dtype)
    entropy = rounded(rng.exponential(1.0, case.shape), case.dtype)
    dloss = arithmetic(case.dtype)(rounded(np.asarray(rng.standard_normal()), case.dtype))
    return [logp, entropy, values, old, old_values, advantages, returns], mask, dloss


def _errors(values, old_values, returns, clip) -> tuple[np.ndarray, np.ndarray]:
    values, old_values, returns = (x.astype(np.float64) for x in (values, old_values, returns))
    return values - returns, np.clip(values, old_values - clip, old_values + clip) - returns


def oracle(case: Minibatch) -> tuple[Ball, Ball, Ball, Ball]:
    """loss, dlogp, dentropy, dvalues. Which side of a clip a token is on is clear (`APART`)."""
    given, mask, dloss = arrays(case)
    type_, clip = arithmetic(case.dtype), case.cliprange_value
    u = unit_roundoff(type_)
    logp, entropy, values, old, old_values, advantages, returns = (Ball(np.where(mask, x, 0), type_) for x in given)
    rho = (logp - old).exp()
    free = -rho * advantages
    edge = np.clip(rho.value, 1 - case.cliprange, 1 + case.cliprange)
    moved = edge != rho.value
    held = -(Ball(edge, type_, 4 * u) * advantages)  # 1 ± ε, of a rounded ε
    cut = moved & (held.value > free.value)
    policy = free.where(~cut) + held.where(cut)
    error = values - returns
    worse = np.zeros(mask.shape, bool)
    if clip is not None:
        distance, near = _errors(given[2], given[4], given[6], clip)
        worse = mask & (np.abs(near) > np.abs(distance)) & (near != distance)
    up = np.sign(values.value - old_values.value)
    held_error = old_values + Ball(up * (clip or 0.0), type_, u) - returns
    worst = error.where(~worse) + held_error.where(worse)
    each = policy + worst * worst * (0.5 * case.settings.vf_coef) - entropy * case.settings.entropy_coef
    n = float(max(mask.sum(), 1)) if case.normalizer is None else case.normalizer
    share = Ball(dloss, type_) / n
    loss = (each.where(mask).sum() / n).reshape()
    # a loss of three means has rounded each: as much again, of the sums of absolute values
    parts = [x.where(mask).sum().value.item() for x in (Ball(np.abs(policy.value), type_), worst * worst, entropy)]
    loss = Ball(loss.value, type_, loss.radius + 16 * u * sum(parts) / n)
    ones = Ball(np.ones(mask.shape), type_)
    return (
        loss,
        (free * share).where(mask & ~cut),
        (ones * (share * -case.settings.entropy_coef)).where(mask),
        (error * (share * case.settings.vf_coef)).where(mask & ~worse),
    )


NAMES = "dlogp", "dentropy", "dvalues"


def called(f, case, given=None, mask=None):
    arguments, own_mask, _ = arrays(case)
    return f(
        *(arguments if given is None else given), own_mask if mask is None else mask, case.settings, case.normalizer
    )


def is_within_its_bound(f, case, layout=np.asarray):
    given, mask, dloss = arrays(case)
    of_loss, *balls = oracle(case)
    loss, vjp = called(f, case, list(map(layout, given)), layout(mask))
    of_loss.check(loss, "loss")
    for what, found, ball in zip(NAMES, vjp(dloss), balls, strict=True):
        ball.stored(case.dtype).check(found, what)


def any_layout(f, case):
    """Strided, transposed and misaligned arguments; not to the bit."""
    for layout in (common.strided, common.transposed, common.misaligned, common.apart):
        try:
            is_within_its_bound(f, case, layout)
        except AssertionError as error:
            raise AssertionError(f"{layout.__name__} arguments: {error}") from error


def changes_nothing(f, case):
    """Arguments keep their bytes, and a second call gives the same bits."""
    given, mask, dloss = arrays(case)
    before = [a.tobytes() for a in (*given, mask)]
    (loss, vjp), (again, again_vjp) = (called(f, case, given, mask) for _ in range(2))
    first = [np.array(c) for c in vjp(dloss)]
    common.same_bits(again, loss, "loss of a second call")
    for pullback in (vjp, again_vjp):
        for what, a, b in zip(NAMES, pullback(dloss), first, strict=True):
            common.same_bits(a, b, f"{what} of a second call")
    assert [a.tobytes() for a in (*given, mask)] == before, "an argument was changed"


def what_does_not_count_is_not_seen(f, case):
    """No bit of the loss, and a gradient of exactly 0 there, whatever stands outside the mask."""
    given, mask, dloss = arrays(case)
    loss, vjp = called(f, case)
    gradients = vjp(dloss)
    assert not any(g[~mask].any() for g in gradients), "a gradient where nothing counts"
    for poison in POISON:
        poisoned = [np.where(mask, x, x.dtype.type(poison)) for x in given]
        other, other_vjp = called(f, case, poisoned, mask)
        common.same_bits(other, loss, f"loss with {poison} outside the mask")
        for what, a, b in zip(NAMES, other_vjp(dloss), gradients, strict=True):
            common.same_bits(a + 0, b + 0, f"{what} with {poison} outside the mask")


def the_first_ratio_is_one(f, case):
    """With log π_old = log π, on eighths: the policy's gradient is −Â / N to the bit, whatever the advantages' sign."""
    given, mask, _ = arrays(case)
    rng = np.random.default_rng(case.seed)
    advantages = rounded(rng.integers(-16, 17, case.shape) / 8, case.dtype)
    given[0], given[5] = given[3].copy(), advantages
    _, vjp = f(*given, mask, case.settings, 8.0)
    dlogp, _, _ = vjp(arithmetic(case.dtype)(1))
    common.same_bits(dlogp + 0, np.where(mask, -advantages / 8, 0).astype(dlogp.dtype) + 0, "dlogp at the first step")


def values_that_have_not_moved_are_not_clipped(f, case):
    """V = V_old: the loss and the gradient without a clip, to the bit."""
    given, mask, dloss = arrays(case)
    given[4] = given[2].copy()
    without = case._replace(cliprange_value=None)
    (a, a_vjp), (b, b_vjp) = (called(f, one, given, mask) for one in (case, without))
    common.same_bits(a, b, "loss")
    for what, x, y in zip(NAMES, a_vjp(dloss), b_vjp(dloss), strict=True):
        common.same_bits(x + 0, y + 0, what)


def micro_batches_add_up(f, case):
    """Row by row with the number in the whole batch as normalizer: the same gradients, and the loss in its bound."""
    given, mask, dloss = arrays(case)
    if len(mask) and case.normalizer is None:
        n = float(max(mask.sum(), 1))
        whole, vjp = called(f, case)
        parts = [f(*(x[i : i + 1] for x in given), mask[i : i + 1], case.settings, n) for i in range(len(mask))]
        total, radius = sum(float(part) for part, _ in parts), float(oracle(case)[0].radius)
        assert abs(total - float(whole)) <= 3 * radius, f"parts add up to {total}, the whole is {whole}"
        for what, *pieces, expected in zip(NAMES, *(v(dloss) for _, v in parts), vjp(dloss), strict=True):
            common.same_bits(np.concatenate(pieces) + 0, expected + 0, f"{what} of the parts")


def cases(dtypes):
    return st.builds(
        Minibatch,
        st.tuples(st.integers(0, 4), st.integers(1, 40)),
        st.sampled_from(KINDS),
        st.sampled_from((0.05, 0.2, 0.5)),
        st.sampled_from((None, 0.1, 0.5)),
        st.none() | st.floats(0.5, 1000),
        st.sampled_from(sorted(dtypes)),
        st.integers(0, 99),
    )


FIXED = (
    Minibatch((3, 7), "answers", seed=1),
    Minibatch((2, 5), "full", 0.05, None, 11.0),
    Minibatch((1, 1), "full"),
    Minibatch((4, 9), "episodes", 0.2, 0.5, seed=4),
    Minibatch((2, 21), "full", 0.5, 0.1, 40.0, seed=2),
    Minibatch((0, 5), "full"),
    Minibatch((2, 3), "none"),
    *(
        Minibatch((3, 9), kind, 0.2, clip, 30.0, dtype, 5)
        for kind, clip in (("answers", 0.3), ("full", None))
        for dtype in ("float16", "bfloat16")
    ),
    *(Minibatch((2, 11), kind, 0.2, clip, None, "float64", 6) for kind in KINDS for clip in (None, 0.3)),
)

OPERATIONS = (
    Operation(
        "ppo.minibatch_loss",
        ppo.minibatch_loss,
        "f(logp, entropy, values, old_logp, old_values, advantages, returns, mask (all (batch, width)), settings "
        "(.cliprange, .cliprange_value or None, .vf_coef, .entropy_coef), normalizer) -> loss, vjp; "
        "vjp(dloss) -> dlogp, dentropy, dvalues",
        cases,
        FIXED,
        (
            is_within_its_bound,
            changes_nothing,
            any_layout,
            what_does_not_count_is_not_seen,
            the_first_ratio_is_one,
            values_that_have_not_moved_are_not_clipped,
            micro_batches_add_up,
        ),
    ),
)
