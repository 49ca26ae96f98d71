"""Scales in 8 bits: their mean taken off, the rest block-wise in the dynamic map, and none that decodes to less than 0.

â = fl( fl(table[code] · absmax) + offset )        two roundings, not one
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common, strategies
from minift.conformance.bounds import gamma
from minift.conformance.operation import Operation
from minift.conformance.quantizers import expected, results
from minift.conformance.strategies import Codes, Numbers
from minift.quant import double_quant
from minift.quant.codebooks import DYNAMIC
from minift.quant.double_quant import DoubleQuantizedScales

f32 = np.float32
U = 2.0**-24
HALF_GAP = 0.00703126  # half the widest gap of the map


def compressed(f, case: Numbers, w=None) -> tuple[Any, ...]:
    codes, absmax, offset = results(f(case.array() if w is None else w, case.block_size), "codes", "absmax", "offset")
    n, groups = len(case.w), -(-len(case.w) // case.block_size)
    assert codes.size == n, f"{codes.size} codes, needed {n}"
    assert absmax.size == groups, f"{absmax.size} nested scales, needed {groups}"
    return codes.reshape(-1).astype(int), absmax.reshape(-1).astype(f32), f32(offset.item())


def decoded(codes: np.ndarray, absmax: np.ndarray, offset: np.float32, block_size: int) -> np.ndarray:
    """Two roundings, in float32."""
    with np.errstate(over="ignore"):
        return DYNAMIC[codes] * np.repeat(absmax, block_size)[: codes.size] + offset


@lru_cache(maxsize=64)
def nearest(case: Numbers, offset: float) -> np.ndarray:
    """The codes of what is left of the scales, one at a time."""
    centered = case.array() - f32(offset)
    return expected(case._replace(w=tuple(centered.tolist())), DYNAMIC.tobytes()).codes


def results_have_their_types_and_sizes(f, case):
    """codes: a byte for every scale; absmax: a float32 for every group, short ones too; offset: one float32."""
    codes, absmax, offset = results(f(case.array(), case.block_size), "codes", "absmax", "offset")
    n, groups = len(case.w), -(-len(case.w) // case.block_size)
    wanted = (("codes", codes, np.uint8, (n,)), ("absmax", absmax, f32, (groups,)), ("offset", offset, f32, ()))
    for name, found, kind, shape in wanted:
        assert found.dtype == kind, f"{name}: {found.dtype}, needed {np.dtype(kind)}"
        assert found.shape == shape, f"{name}: shape {found.shape}, needed {shape}"


def offset_is_the_mean(f, case):
    """The offset is the scales' mean, within what float32 sums in any order can be off."""
    _, _, offset = compressed(f, case)
    w = np.array(case.w, np.float64)
    mean = float(w.mean()) if w.size else 0.0
    bound = gamma(w.size + 2, f32) * mean + 2.0**-149
    assert abs(float(offset) - mean) <= bound, f"offset {offset}, needed {mean:.9g} ± {bound:.2g}"


def absmax_is_the_largest_difference(f, case):
    """Each group's nested scale is its largest |scale − offset|, in float32, the same bits."""
    _, absmax, offset = compressed(f, case)
    centered = np.abs(case.array() - offset)
    for i, found in enumerate(absmax):
        wanted = centered[i * case.block_size : (i + 1) * case.block_size].max()
        assert found == wanted, f"absmax of group {i} is {found}, needed {wanted}, with the offset {offset}"


def codes_are_the_nearest(f, case):
    """Every scale gets the nearest entry of the dynamic map, unless that would decode to less than 0."""
    codes, absmax, offset = compressed(f, case)
    wanted = nearest(case, float(offset))
    positive = decoded(wanted, absmax, offset, case.block_size) >= 0
    for i in np.flatnonzero(positive & (codes != wanted))[:1]:
        raise AssertionError(f"code of scale {i} is {codes[i]}, needed {wanted[i]}, with the offset {offset}")


def no_scale_decodes_to_less_than_zero(f, case):
    """A scale far below the mean must not come back negative: its block would change its sign."""
    codes, absmax, offset = compressed(f, case)
    found = decoded(codes, absmax, offset, case.block_size)
    for i in np.flatnonzero(found < 0)[:1]:
        raise AssertionError(f"scale {i} decodes to {found[i]}")


def a_code_is_raised_no_further_than_to_zero(f, case):
    """Where the nearest entry decodes to less than 0, the first that does not is taken."""
    codes, absmax, offset = compressed(f, case)
    lower = decoded(np.maximum(codes - 1, 0), absmax, offset, case.block_size)
    negative = decoded(nearest(case, float(offset)), absmax, offset, case.block_size) < 0
    for i in np.flatnonzero(negative & (lower >= 0))[:1]:
        raise AssertionError(f"code of scale {i} is {codes[i]}, and {codes[i] - 1} decodes to {lower[i]} already")


def error_is_bounded(f, case):
    """|â − a| ≤ h a₂ + 4u (a₂ + ā + a), h half the widest gap of the map; a raised code: at most twice that.

    Raising a code to the first that is not negative keeps it: a ≥ 0 lies between the two entries then, and the higher
    is at most a whole gap, 2 h a₂, away."""
    codes, absmax, offset = compressed(f, case)
    a2 = np.repeat(absmax.astype(np.float64), case.block_size)[: codes.size]
    a = np.array(case.w, np.float64)
    found = decoded(codes, absmax, offset, case.block_size).astype(np.float64)
    raised = (found > a + HALF_GAP * a2) & (found < 2 * HALF_GAP * a2)
    bound = np.where(raised, 2, 1) * HALF_GAP * a2 + 4 * U * (a2 + abs(float(offset)) + a)
    for i in np.flatnonzero(~(np.abs(found - a) <= bound))[:1]:
        raise AssertionError(f"scale {i} = {a[i]:.9g} decodes to {found[i]:.9g}, allowed ± {bound[i]:.3g}")


def agree(parts, others) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(parts, others, strict=True))


def any_layout(f, case):
    """Strided and misaligned scales (NaN in the gaps) give what a plain copy gives."""
    for layout in (common.strided, common.misaligned) * bool(case.w):
        found = compressed(f, case, layout(case.array()))
        assert agree(found, compressed(f, case)), f"{layout.__name__}: another result than for a copy"


def nothing_is_changed(f, case):
    """The argument keeps its bytes, and a second call gives the same."""
    w = case.array()
    before, first = w.tobytes(), [np.array(part) for part in compressed(f, case, w)]
    assert w.tobytes() == before, f"the argument is changed: now {strategies.written(w, 'float32')}"
    assert agree(first, compressed(f, case, w)), "a second call gives something else"


def refuses_what_is_no_scale(f, case):
    """NaN, infinity and negative numbers raise an error: an absmax is finite and >= 0."""
    for bad in (np.nan, np.inf, -1.0) if case.w else ():
        w = case.array()
        w[-1] = bad
        try:
            compressed(f, case, w)
        except NotImplementedError:
            raise
        except Exception:
            continue
        raise AssertionError(f"{bad} in place of the last scale is not refused")


# Decoding.


def scales_of(f, case: Codes, *given) -> np.ndarray:
    codes, absmax = given or case.arrays()
    found = np.asarray(f(codes, absmax, f32(case.offset), case.block_size))
    assert found.size == len(case.codes), f"{found.size} scales, needed {len(case.codes)}"
    return found.reshape(-1)


def decodes_with_two_roundings(f, case):
    """fl(fl(table[code] · absmax) + offset): a fused multiply-add gives other scales. Nothing is clamped."""
    found = scales_of(f, case)
    assert found.dtype == f32, f"{found.dtype}, needed float32"
    for i, code in enumerate(case.codes):
        wanted = f32(f32(DYNAMIC[code] * f32(case.absmax[i // case.block_size])) + f32(case.offset))
        assert found[i] == wanted, f"scale {i} is {found[i]}, needed {wanted}"


def any_layout_decodes(f, case):
    """Strided and misaligned codes and scales decode to the same."""
    for layout in (common.strided, common.misaligned) * bool(case.codes):
        found = scales_of(f, case, *map(layout, case.arrays()))
        assert np.array_equal(found, scales_of(f, case)), f"{layout.__name__}: other scales"


def decoding_changes_nothing(f, case):
    """The arguments keep their bytes, and a second call gives the same."""
    given = case.arrays()
    before, first = [part.tobytes() for part in given], scales_of(f, case, *given).copy()
    assert [part.tobytes() for part in given] == before, "an argument is changed"
    assert np.array_equal(scales_of(f, case, *given), first), "a second call gives something else"


# ā = −c_1 and a₂ = 1 exactly, so that the nearest entry to the zero decodes to exactly zero, which is not negative
TO_ZERO = [0.0, 1.978906273841858, 0.9683594107627869, 0.9683594107627869]


def battery() -> list[np.ndarray]:
    """Scales far below the mean, groups of other sizes, zeros, a short last group."""
    rng = np.random.default_rng(3)
    normal = np.abs(rng.standard_normal((700, 64))).max(1)
    small = normal.copy()
    small[::97] *= 1e-4
    lists: tuple[Any, ...] = (
        [],
        [1.5],
        normal[:2],
        normal[:256],
        normal[:257],
        normal,
        small,
        normal * np.repeat([1, 1e-3, 50], [256, 256, 188]),
        rng.lognormal(0, 3, 600),
        np.where(np.arange(300) % 5, normal[:300], 0),
        np.append(np.full(60, 1e-30), 1.0),
        TO_ZERO,
        np.full(100, 0.3),
        np.zeros(20),
        normal[:100] * 1e37,
    )
    return [np.asarray(scales, f32) for scales in lists]


FIXED = tuple(Numbers.of(scales, block_size, name="scales") for block_size in (256, 64, 7) for scales in battery())


@st.composite
def cases(draw, dtypes):
    scale = st.sampled_from(np.array([1, 0, 2, 1e-4, 0.3], f32).tolist()) | st.floats(0, 2.0**60, width=32)
    first, filling = draw(st.lists(scale, max_size=8)), draw(scale)
    w = np.array([*first, *[filling] * draw(st.sampled_from((0, 3, 60, 300)))], f32)
    return Numbers.of(w, draw(st.sampled_from((256, 64))), name="scales")


def _codes(n: int, block_size: int, offset: float) -> Codes:
    rng = np.random.default_rng(n)
    absmax = np.exp(rng.standard_normal(-(-n // block_size))).astype(f32)
    return Codes(tuple(rng.integers(0, 256, n).tolist()), tuple(absmax.tolist()), block_size, offset=float(f32(offset)))


COMPRESSED = tuple(_codes(n, b, offset) for n in (0, 1, 7, 300, 1000) for b in (256, 64) for offset in (1.1, 0.01))


@st.composite
def compressed_cases(draw, dtypes):
    case = draw(strategies.codes(256, (256, 64), ("float32",)))
    offset = draw(st.sampled_from(np.array([0, 1, 0.1], f32).tolist()) | st.floats(0, 2.0**15, width=32))
    return case._replace(shape=None, offset=offset)


def _reference(codes, absmax, offset, block_size):
    return DoubleQuantizedScales(codes, absmax, offset, block_size).decode()


OPERATIONS = (
    Operation(
        "double_quant.compress",
        double_quant.compress_scales,
        "f(scales, block_size) -> (codes, absmax, offset), or an object with .codes, .absmax and .offset. scales: "
        "float32 (n,), >= 0; codes: uint8 (n,), indices into the signed dynamic map; absmax: float32, one for every "
        "block_size scales; offset: float32, their mean",
        cases,
        FIXED,
        (
            results_have_their_types_and_sizes,
            offset_is_the_mean,
            absmax_is_the_largest_difference,
            codes_are_the_nearest,
            no_scale_decodes_to_less_than_zero,
            a_code_is_raised_no_further_than_to_zero,
            error_is_bounded,
            any_layout,
            nothing_is_changed,
            refuses_what_is_no_scale,
        ),
    ),
    Operation(
        "double_quant.decode",
        _reference,
        "f(codes, absmax, offset, block_size) -> scales, float32 (n,), from what compress gives",
        compressed_cases,
        COMPRESSED,
        (decodes_with_two_roundings, any_layout_decodes, decoding_changes_nothing),
    ),
)
