"""AdamW with 8-bit moments: AdamW on what the codes stand for, moments rounded to the nearest code, zeros kept.

A step has two forms, `adamw8bit_1`, which returns everything anew, and `adamw8bit_2`, which overwrites its arguments;
the properties are the same. Moments are codes over bitsandbytes' dynamic maps, m's signed and v's unsigned, with one
scale a block. Parameters and gradients have the case's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.bounds import gamma
from minift.conformance.operation import Operation, rounded
from minift.conformance.operations.adamw import BETA1, BETA2, DECAY, EPS, RATE, balls_of, shrunk
from minift.optim import adamw8bit
from minift.quant import blockwise
from minift.quant.blockwise import BlockwiseTensor
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED

MAPS = {"m": DYNAMIC, "v": DYNAMIC_UNSIGNED}
REST = (RATE, BETA1, BETA2, EPS, DECAY)
PARTS = ("θ", "codes of m", "scales of m", "codes of v", "scales of v")


class Step(NamedTuple):
    shape: tuple[int, ...]
    block_size: int = 16
    step: int = 3
    dtype: str = "float32"
    seed: int = 0


def given(case: Step) -> list[np.ndarray]:
    """θ, g, and codes and scales of m and v.

    Gradients over seven decades in a block, so that v has numbers far below its smallest code (in float16 over four,
    whose squares are not all zero). Every fifth parameter and one whole block have had no gradient so far, and have
    none now; others have none now. From step 2 on, moments are those of a run under way."""
    rng = np.random.default_rng(case.seed)
    theta = rng.standard_normal(case.shape) + 0.5
    decades = 3 if case.dtype == "float16" else 6
    g = np.asarray(rng.standard_normal(case.shape) * 10.0 ** rng.uniform(-decades, 1, case.shape))
    m, v = np.asarray(rng.standard_normal(case.shape) * np.abs(g)), np.asarray(rng.uniform(0.1, 1, case.shape) * g * g)
    index = np.arange(g.size)
    for a in (g, m, v):
        a.reshape(-1)[(index % 5 == 3) | (index // case.block_size == 1)] = 0
    g.reshape(-1)[::7] = 0
    if case.step == 1:
        m, v = 0 * m, 0 * v
    first = blockwise.quantize(m, DYNAMIC, case.block_size)
    second = adamw8bit.quantize_second(v, case.block_size)
    return [*(rounded(a, case.dtype) for a in (theta, g)), first.codes, first.absmax, second.codes, second.absmax]


def opened(what: str, block_size: int, codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """fl(c · a), exactly as float64."""
    each = absmax[np.arange(codes.size) // block_size]
    return (MAPS[what].take(codes) * each).astype(np.float64)


def balls(arrays, case: Step, rest: tuple) -> list:
    """θ′ as it is stored, m′ and v′ before they are rounded to codes."""
    theta, g, *moments = arrays
    m, v = (opened(what, case.block_size, *moments[i : i + 2]) for i, what in ((0, "m"), (2, "v")))
    wide = [np.asarray(a, np.float64) for a in (theta, g, m.reshape(theta.shape), v.reshape(theta.shape))]
    return balls_of(wide, case.dtype, case.step, *rest)


def returned(f: Callable, arrays, case: Step, rest: tuple = REST) -> tuple:
    return f(*arrays, case.block_size, case.step, *rest)


def overwritten(f: Callable, arrays, case: Step, rest: tuple = REST) -> tuple:
    """An in-place step in the form of the other."""
    theta, g, *moments = arrays
    theta, moments = np.array(theta), [a.copy() for a in moments]
    assert f(theta, g, *moments, case.block_size, case.step, *rest) is None, "an in-place step returns nothing"
    return theta, *moments


def same(found, expected, what: str) -> None:
    for name, a, b in zip(PARTS, found, expected, strict=True):
        common.same_bits(a, b, f"{name} {what}")


def _properties(run: Callable) -> tuple:
    def theta_is_adamw_on_what_the_codes_stand_for(f, case):
        arrays = given(case)
        balls(arrays, case, REST)[0].check(run(f, arrays, case)[0], "θ")

    def moments_are_rounded_to_the_nearest_code(f, case):
        """A scale is its block's largest; no other code is nearer; but v of a positive number is at least code 1."""
        arrays = given(case)
        found = run(f, arrays, case)
        u = gamma(4, np.float32)
        for (what, code), ball, codes, absmax in zip(
            MAPS.items(), balls(arrays, case, REST)[1:], found[1::2], found[2::2], strict=True
        ):
            assert (codes.dtype, absmax.dtype) == (np.uint8, np.float32), f"{what}: {codes.dtype}, {absmax.dtype}"
            value, radius = ball.value.reshape(-1), ball.radius.reshape(-1)
            for b, a in enumerate(absmax):
                block = slice(b * case.block_size, (b + 1) * case.block_size)
                largest = np.abs(value[block]).max()
                slack = radius[block].max() + u * largest
                assert abs(a - largest) <= slack, f"{what}: the scale of block {b} is {a}, needed {largest}"
                stands_for = code.astype(float)[:, None] * a
                error = np.abs(stands_for - value[block])
                of_found = error[codes[block], np.arange(error.shape[1])]
                allowed = error.min(axis=0) + 2 * radius[block] + 2 * u * a
                raised = (value[block] > 0) & (value[block] < code[1] * a / 2) if what == "v" else value[block] > np.inf
                worse = np.flatnonzero((of_found > allowed) & ~raised | raised & (codes[block] != 1))
                assert not worse.size, (
                    f"{what}: {value[block][worse[0]]} became code {codes[block][worse[0]]} where the scale is {a}"
                )

    def nothing_but_zero_becomes_zero(f, case):
        """A moment that was and stays zero is zero exactly, wherever it is; a positive v never is."""
        arrays = given(case)
        found = run(f, arrays, case)
        asleep = (arrays[1].reshape(-1) == 0) & (opened("v", case.block_size, *arrays[4:]) == 0)
        for what, codes, absmax in zip("mv", found[1::2], found[2::2], strict=True):
            now = opened(what, case.block_size, codes, absmax)
            assert not now[asleep].any(), f"{what} of a parameter without gradients is not zero"
        assert (now[~asleep] > 0).all(), "a positive v became zero"

    def without_gradients_there_is_only_decay(f, case):
        """fl(1 − ηλ) each step, bit for bit, for parameters whose gradient is always zero, beside others."""
        theta, g, *moments = given(case._replace(step=1))
        now, asleep, rng = (theta, *moments), g == 0, np.random.default_rng(case.seed)
        for step in (1, 2, 3):
            now = run(f, (now[0], g, *now[1:]), case._replace(step=step))
            g = rounded(np.where(asleep, 0, g * rng.uniform(-2, 2, g.shape)), case.dtype)
        common.same_bits(now[0][asleep], shrunk(theta, case.dtype, 3)[asleep], "θ without gradients")

    def the_first_step_has_no_scale(f, case):
        """From zero moments at step 1: θ′ = (1 − ηλ) θ − η g / (|g| + ε). Nothing has been rounded to 8 bits yet."""
        case = case._replace(step=1)
        arrays = given(case)
        theta, g = (np.asarray(a, np.float64) for a in arrays[:2])
        exact = (1 - RATE * DECAY) * theta - RATE * g / (np.abs(g) + EPS)
        radius = balls(arrays, case, REST)[0].radius + 1e-14 * (1 + np.abs(theta))  # + float64's own
        found = np.asarray(run(f, arrays, case)[0], np.float64)
        assert (np.abs(found - exact) <= radius).all(), "θ after the first step is not −η times the sign"

    def no_step_is_longer_than_k(f, case):
        """Large gradients once, then hardly any: m is there, and v beside larger ones is below its smallest code."""
        if case.dtype not in ("float32", "float64"):
            return  # where rounding θ is longer
        theta, g, *moments = given(case._replace(step=1))
        now = theta, *moments
        for step in range(1, 7):
            before, slope = now[0], (g if step == 1 else g * 1e-9).astype(g.dtype)
            now = run(f, (before, slope, *now[1:]), case._replace(step=step), (RATE, BETA1, BETA2, 1e-8, 0.0))
            limit = RATE * adamw8bit.largest_step(step, BETA1, BETA2) * (1 + 1e-5)
            longest = np.abs(now[0] - before).max(initial=0)
            assert longest <= limit, f"step {step} moved by {longest / RATE:.3g} η, at most {limit / RATE:.3g}"

    def decay_is_apart_from_the_gradient(f, case):
        """The moments do not know of the decay."""
        arrays = given(case)
        one, other = (run(f, arrays, case, (*REST[:4], decay)) for decay in (DECAY, 0.9))
        same((arrays[0], *one[1:]), (arrays[0], *other[1:]), "with another decay")

    def blocks_do_not_see_each_other(f, case):
        """Another gradient in the last block: it has an effect there, and none before it."""
        theta, g, *moments = arrays = given(case)
        last = max(0, g.size - 1) // case.block_size
        other = g.copy()
        other.reshape(-1)[last * case.block_size :] = 17
        pairs = run(f, arrays, case), run(f, (theta, other, *moments), case)
        for name, a, b in zip(PARTS, *pairs, strict=True):
            end = last if "scales" in name else last * case.block_size
            a, b = a.reshape(-1), b.reshape(-1)
            common.same_bits(b[:end], a[:end], f"{name} before the last block")
            assert not g.size or name[0] == "c" or a.tobytes() != b.tobytes(), f"{name}: the last block has no effect"

    def any_layout_of_the_gradient(f, case):
        theta, g, *moments = given(case)
        expected = run(f, (theta, g, *moments), case)
        for layout in (common.strided, common.transposed, common.misaligned, common.apart) if g.ndim else ():
            same(run(f, (theta, layout(g), *moments), case), expected, f"where the gradient is {layout.__name__}")

    def refuses_what_has_no_finite_square(f, case):
        """Before anything moves."""
        for value in (np.nan, np.inf, -np.inf, *((2e19, -2e19) if case.dtype != "float16" else ())):
            arrays = given(case)
            if not arrays[1].size:
                continue
            arrays[1].reshape(-1)[-1] = value
            before = [a.tobytes() for a in arrays]
            try:
                run(f, arrays, case)
            except ValueError:
                assert [a.tobytes() for a in arrays] == before, "something moved before the refusal"
            else:
                raise AssertionError(f"a gradient of {value} was accepted")

    def changes_only_what_it_should(f, case):
        """The gradient keeps its bytes (the others too, where they are returned); a second call gives the same bits."""
        arrays = given(case)
        before = [a.tobytes() for a in arrays]
        first = run(f, arrays, case)
        assert [a.tobytes() for a in arrays] == before, "the gradient, or an argument that is returned, was changed"
        same(run(f, arrays, case), first, "of a second call")

    return (
        theta_is_adamw_on_what_the_codes_stand_for,
        moments_are_rounded_to_the_nearest_code,
        nothing_but_zero_becomes_zero,
        without_gradients_there_is_only_decay,
        the_first_step_has_no_scale,
        no_step_is_longer_than_k,
        decay_is_apart_from_the_gradient,
        blocks_do_not_see_each_other,
        any_layout_of_the_gradient,
        refuses_what_has_no_finite_square,
        changes_only_what_it_should,
    )


def _moments(theta, m_codes, m_absmax, v_codes, v_absmax, block_size) -> tuple[BlockwiseTensor, BlockwiseTensor]:
    parts = ((m_codes, m_absmax, DYNAMIC), (v_codes, v_absmax, DYNAMIC_UNSIGNED))
    m, v = (BlockwiseTensor(*part, theta.shape, block_size) for part in parts)
    return m, v


def _reference_1(theta, gradient, *rest):
    moments = _moments(theta, *rest[:5])
    theta, m, v = adamw8bit.adamw8bit_1(theta, gradient, *moments, *rest[5:])
    return theta, m.codes, m.absmax, v.codes, v.absmax


def _reference_2(theta, gradient, *rest):
    return adamw8bit.adamw8bit_2(theta, gradient, *_moments(theta, *rest[:5]), *rest[5:])


def cases(dtypes):
    shapes = st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple)
    sizes = st.sampled_from([1, 7, 16, 64, 256])
    return st.builds(Step, shapes, sizes, st.integers(1, 10_000), st.sampled_from(sorted(dtypes)), st.integers(0, 99))


FIXED = (
    Step((5, 7), 8, 1, seed=1),
    Step((2, 3, 11), 16, 3, seed=2),
    Step((3, 31), 256, 1000, seed=3),
    Step((0, 4), 8, 2, seed=4),
    Step((9, 9), 1, 4, seed=5),
    Step((21, 20), 100, 5, seed=6),
    Step((40, 52), 256, 2, seed=7),
    Step((5, 7), 8, 3, "float64", 8),
    Step((40, 20), 64, 5, "float64", 9),
    Step((7, 11), 16, 2, "float16", 10),
    Step((600,), 256, 6, "float16", 11),
    Step((7, 11), 16, 2, "bfloat16", 12),
)
TAKES = (
    "f(theta, gradient, m_codes, m_absmax, v_codes, v_absmax, block_size, step, learning_rate, beta1, beta2, eps, "
    "weight_decay)"
)
MEANING = (
    "codes: uint8 (n,), indices into the signed dynamic map for m and the unsigned one for v; absmax: float32 "
    "(ceil(n / block_size),)"
)

OPERATIONS = (
    Operation(
        "adamw8bit.adamw8bit_1",
        _reference_1,
        f"{TAKES} -> theta, m_codes, m_absmax, v_codes, v_absmax, new arrays. {MEANING}",
        cases,
        FIXED,
        _properties(returned),
    ),
    Operation(
        "adamw8bit.adamw8bit_2",
        _reference_2,
        f"{TAKES} -> None; all but the gradient are overwritten. {MEANING}",
        cases,
        FIXED,
        _properties(overwritten),
    ),
)
