"""Generalized advantage estimation: the closed form with its bound, episodes that do not mix, and poison outside.

What other libraries got wrong: values behind the end, an end that was only a cut, rewards that leak into the answer
before, padding that is multiplied by 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.ball import Ball
from minift.conformance.bounds import gamma as gamma_n
from minift.conformance.operation import Operation, arithmetic, rounded
from minift.rlhf import advantages

KINDS = ("answers", "full", "episodes", "one", "none")
POISON = (1e4, -np.inf, np.nan)


class Episodes(NamedTuple):
    shape: tuple[int, int]
    kind: str = "answers"  # what the mask is like
    decay: tuple[float, float] = (0.9, 0.7)  # γ and λ
    bootstrap: bool = False
    dtype: str = "float32"
    seed: int = 0


def mask_of(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Answers behind prompts of some length; whole rows; several episodes in a row; single tokens; nothing."""
    rows, width = shape
    t = np.arange(width)
    if kind == "full":
        return np.ones(shape, bool)
    if kind == "one":
        return t == rng.integers(0, max(width, 1), (rows, 1))
    if kind == "none":
        return np.zeros(shape, bool)
    if kind == "episodes":
        return (rng.random(shape) < 0.8) | (t == 0)
    start = rng.integers(0, max(width, 1), (rows, 1))
    return (t >= start) & (t <= start + rng.integers(0, max(width, 1), (rows, 1)))


def arrays(case: Episodes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Rewards, values, mask and what stands behind the end, or None."""
    rng = np.random.default_rng(case.seed)
    mask = mask_of(case.kind, case.shape, rng)
    rewards, values = rounded(rng.standard_normal((2, *case.shape)), case.dtype)
    end = rounded(2 + rng.standard_normal(case.shape[0]), case.dtype)
    return rewards, values, mask, end if case.bootstrap else None


def oracle(case: Episodes) -> Ball:
    """Â_t = Σ_{s ≥ t} (γλ)^{s−t} δ_s over the tokens s of the same episode: a matrix times δ.

    A power has s − t factors γλ, each rounded once, and s − t products, in any order: 2(s − t) + 1 roundings."""
    rewards, values, mask, end = arrays(case)
    gamma, lam = case.decay
    type_, width = arithmetic(case.dtype), case.shape[1]
    r, v = (Ball(np.where(mask, x, 0), type_) for x in (rewards, values))
    following = np.zeros(case.shape)
    following[:, :-1] = np.where(mask, values, 0)[:, 1:]
    if end is not None:
        for row in np.flatnonzero(mask.any(axis=1)):
            following[row, np.flatnonzero(mask[row])[-1]] = end[row]
    delta = (r + Ball(following, type_) * gamma - v).where(mask)
    ahead = np.arange(width) - np.arange(width)[:, None]  # s − t
    gaps = np.cumsum(~mask, axis=1)
    same = (gaps[:, :, None] == gaps[:, None, :]) & mask[:, :, None] & mask[:, None, :] & (ahead >= 0)
    power = np.where(same, (gamma * lam) ** np.maximum(ahead, 0), 0.0)
    spread = power * np.vectorize(lambda n: gamma_n(2 * max(n, 0) + 1, type_), otypes=[float])(ahead)
    return (Ball(power, type_, spread) @ delta.reshape(*case.shape, 1)).reshape(*case.shape)


def called(f, case, given=None):
    rewards, values, mask, end = arrays(case) if given is None else given
    return f(rewards, values, mask, *case.decay, end)


def is_the_closed_form(f, case, layout=np.asarray):
    rewards, values, mask, end = arrays(case)
    given = *map(layout, (rewards, values, mask)), None if end is None else layout(end)
    oracle(case).stored(case.dtype).check(called(f, case, given), "advantages")


def any_layout(f, case):
    """Strided, transposed and misaligned arguments; not to the bit."""
    for layout in (common.strided, common.transposed, common.misaligned, common.apart):
        try:
            is_the_closed_form(f, case, layout)
        except AssertionError as error:
            raise AssertionError(f"{layout.__name__} arguments: {error}") from error


def changes_nothing(f, case):
    """Arguments keep their bytes, and a second call gives the same bits."""
    given = arrays(case)
    before = [None if a is None else a.tobytes() for a in given]
    first = np.array(called(f, case, given))
    common.same_bits(called(f, case, given), first, "advantages of a second call")
    assert [None if a is None else a.tobytes() for a in given] == before, "an argument was changed"


def what_does_not_count_is_not_seen(f, case):
    """Exactly 0 there, and no other bit anywhere, whatever stands outside the mask."""
    rewards, values, mask, end = arrays(case)
    expected = called(f, case)
    assert not expected[~mask].any(), "an advantage where nothing counts"
    for poison in POISON:
        poisoned = (np.where(mask, x, x.dtype.type(poison)) for x in (rewards, values))
        common.same_bits(called(f, case, (*poisoned, mask, end)) + 0, expected + 0, f"{poison} outside the mask")


def episodes_are_on_their_own(f, case):
    """What happens behind a gap moves no bit of what was before it."""
    rewards, values, mask, _ = arrays(case)
    if mask.size and case.kind == "episodes":
        expected = called(f, case, (rewards, values, mask, None))
        for row in range(len(mask)):
            gap = int(np.argmin(mask[row]))
            if not mask[row, gap]:
                moved_rewards, moved_values = (x.copy() for x in (rewards, values))
                moved_rewards[row, gap:] += 1
                moved_values[row, gap:] -= 2
                found = called(f, case, (moved_rewards, moved_values, mask, None))
                common.same_bits(found[row, :gap], expected[row, :gap], f"row {row}, before the gap at {gap}")


def cut_off_is_not_ended(f, case):
    """On eighths and with γ = λ = ½ exactly: a bootstrap b adds γ b (γλ)^{s−t}, s the last token, to its episode."""
    _, _, mask, _ = arrays(case)
    widest = {"float32": 8, "float64": 16}.get(case.dtype, 0)  # so far sums of eighths times 4⁻ᵏ are exact
    if not mask.any(axis=1).all() or case.shape[1] > widest:
        return
    rng = np.random.default_rng(case.seed)
    rewards, values = rounded(rng.integers(-16, 17, (2, *case.shape)) / 8, case.dtype)
    b = rounded(1 + rng.integers(0, 9, len(mask)) / 8, case.dtype)
    ended, cut = (f(rewards, values, mask, 0.5, 0.5, end) for end in (None, b))
    expected = np.zeros(case.shape)
    for row in range(len(mask)):
        t = int(np.flatnonzero(mask[row])[-1])
        share = 0.5 * float(b[row])
        while t >= 0 and mask[row, t]:
            expected[row, t], share, t = share, share / 4, t - 1
    difference = cut.astype(np.float64) - ended.astype(np.float64)
    assert np.array_equal(difference, expected), f"the bootstrap adds {difference}, needed {expected}"


def without_lambda_the_residual(f, case):
    """λ = 0: Â = δ. On eighths and with γ = ½, to the bit."""
    _, _, mask, _ = arrays(case)
    rng = np.random.default_rng(case.seed)
    rewards, values = rounded(rng.integers(-16, 17, (2, *case.shape)) / 8, case.dtype)
    v = np.where(mask, values, 0)
    following = np.concatenate([v[:, 1:], np.zeros_like(v[:, :1])], axis=1)
    expected = np.where(mask, rewards + v.dtype.type(0.5) * following - v, 0)
    common.same_bits(f(rewards, values, mask, 0.5, 0.0, None) + 0, expected.astype(v.dtype) + 0, "δ")


def cases(dtypes):
    return st.builds(
        Episodes,
        st.tuples(st.integers(0, 4), st.integers(1, 40)),
        st.sampled_from(KINDS),
        st.sampled_from(((0.9, 0.7), (1.0, 0.95), (0.5, 0.5), (1.0, 1.0), (0.99, 0.0))),
        st.booleans(),
        st.sampled_from(sorted(dtypes)),
        st.integers(0, 99),
    )


FIXED = (
    Episodes((3, 7), "answers", bootstrap=True, seed=1),
    Episodes((2, 5), "full", (1.0, 0.95)),
    Episodes((1, 1), "full", bootstrap=True),
    Episodes((4, 9), "episodes", bootstrap=True, seed=4),
    Episodes((5, 4), "one", (1.0, 1.0), bootstrap=True),
    Episodes((2, 37), "full", (1.0, 0.95), bootstrap=True),
    Episodes((2, 37), "episodes", (0.99, 0.97), seed=3),
    Episodes((3, 40), "answers", (1.0, 0.95), bootstrap=True, seed=2),
    Episodes((0, 5), "full"),
    Episodes((2, 3), "none", bootstrap=True),
    *(Episodes((3, 19), kind, (0.98, 0.95), True, dtype, 5) for kind in KINDS[:3] for dtype in ("float16", "bfloat16")),
    *(Episodes((2, 11), kind, (0.98, 0.95), bootstrap, "float64", 6) for kind in KINDS for bootstrap in (False, True)),
)

OPERATIONS = (
    Operation(
        "advantages.gae_1",
        advantages.gae_1,
        "f(rewards (batch, width), values (batch, width), mask (batch, width), gamma, lam, bootstrap (batch,) or None)"
        " -> advantages (batch, width)",
        cases,
        FIXED,
        (
            is_the_closed_form,
            changes_nothing,
            any_layout,
            what_does_not_count_is_not_seen,
            episodes_are_on_their_own,
            cut_off_is_not_ended,
            without_lambda_the_residual,
        ),
    ),
)
