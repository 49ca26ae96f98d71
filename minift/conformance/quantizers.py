"""What a block-wise quantizer must satisfy: codes one number at a time, scales exact, blocks that know of no other.

The rule (minift.quant.blockwise), every operation rounded to float32: a = max |w| of the block, s = w · (1/a), and the
code is how many midpoints of the table lie strictly below s. Here it is written as a loop over numbers, in Python.
NF4 is this with one table and two codes a byte, so one function makes the properties of both.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import NamedTuple

import numpy as np

from minift.conformance import common, strategies
from minift.conformance.operation import Property
from minift.conformance.strategies import MANY, Numbers

f32 = np.float32
U = 2.0**-24  # unit roundoff of float32
SUBNORMAL = 2.0**-150  # half the spacing of subnormal numbers: the rounding error of what underflows
TINY = 1e-38  # a smaller absmax is replaced by it in 1/a, which would be infinite


class Expected(NamedTuple):
    """Of every element: which kind of place it lies at, its scaled number s, and its code."""

    kind: np.ndarray
    scaled: np.ndarray
    codes: np.ndarray


@lru_cache(maxsize=256)
def thresholds_of(table: bytes) -> tuple[float, ...]:
    """fl((c_i + c_(i+1)) / 2), one at a time."""
    return tuple(float(f32((float(a) + float(b)) / 2)) for a, b in itertools.pairwise(np.frombuffer(table, f32)))


def scales(w: np.ndarray, block_size: int) -> np.ndarray:
    """max |w| a block, in float32, one number at a time."""
    flat = [f32(v) for v in np.asarray(w).ravel().tolist()]
    return np.array([max(abs(v) for v in flat[i : i + block_size]) for i in range(0, len(flat), block_size)], f32)


@lru_cache(maxsize=256)
def expected(case: Numbers, table: bytes) -> Expected:
    levels = thresholds_of(table)
    flat, absmax = [f32(v) for v in case.w], scales(np.array(case.w), case.block_size)
    inverse = [f32(1) / max(a, f32(TINY)) for a in absmax]
    scaled = np.array([v * inverse[i // case.block_size] for i, v in enumerate(flat)], f32)
    codes = np.array([bisect_left(levels, float(s)) for s in scaled], int)
    up, down = np.nextafter(scaled, f32(np.inf)), np.nextafter(scaled, f32(-np.inf))
    kind = np.full(scaled.size, "elsewhere", dtype="<U9")
    kind[np.isin(up, levels) | np.isin(down, levels)] = "beside"
    kind[np.isin(scaled, levels)] = "tie"
    kind[np.repeat(absmax, case.block_size)[: scaled.size] < f32(TINY)] = "tiny"
    kind[np.array(flat, f32) == 0] = "zero"
    return Expected(kind, scaled, codes)


def half_gaps(table: np.ndarray) -> np.ndarray:
    """For each code how far a number in [−1, 1] with this code can be from its entry."""
    gaps = np.diff(table.astype(np.float64)) / 2
    h = np.maximum(np.append(0, gaps), np.append(gaps, 0))
    h[0], h[-1] = max(h[0], table[0] + 1), max(h[-1], 1 - table[-1])
    return h


def results(found, *names: str) -> list[np.ndarray]:
    """The parts of a result: a tuple of arrays, or an object with them under these names."""
    if all(hasattr(found, name) for name in names):
        return [np.asarray(getattr(found, name)) for name in names]
    if not isinstance(found, tuple | list) or len(found) != len(names):
        raise TypeError(f"needed ({', '.join(names)})")
    return [np.asarray(part) for part in found]


def unpacked(codes: np.ndarray, n: int) -> np.ndarray:
    """Two codes a byte, the first in the high nibble."""
    return np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]


def of_few(prop: Property) -> Property:
    """Of very many numbers only statistics are taken."""

    @wraps(prop)
    def held(f, case):
        if len(case.w) <= MANY:
            prop(f, case)

    return held


def quantizer(call: Callable, table_of: Callable[[Numbers], np.ndarray], packed: bool) -> tuple:
    """Properties of a function that `call(f, w, case)` gives its arguments; `packed`: two codes a byte."""

    def encoded(f, case, w=None):
        """One code an element, and the scales."""
        w = case.array() if w is None else w
        codes, absmax = results(call(f, w, case), "codes", "absmax")
        n, blocks = (w.size + 1) // 2 if packed else w.size, -(-w.size // case.block_size)
        assert codes.size == n, f"{codes.size} codes, needed {n}" + " bytes, two codes each" * packed
        assert absmax.size == blocks, f"{absmax.size} scales, needed {blocks}"
        codes = codes.reshape(-1).astype(np.uint8)  # of another type: one property says so, once
        return (unpacked(codes, w.size) if packed else codes).astype(int), absmax.reshape(-1).astype(f32)

    def decoded(case, codes, absmax):
        table = table_of(case)
        assert codes.max(initial=0) < table.size, f"code {codes.max()}, the table has {table.size} entries"
        with np.errstate(all="ignore"):
            return table[codes] * np.repeat(absmax, case.block_size)[: codes.size]

    def named(case, code):
        table = table_of(case)
        return f"{code} ({float(f'{table[code]:.3g}') if code < table.size else 'not in the table'})"

    def compare(f, case, kind, why: Callable[[np.float32, int], str] = lambda s, code: ""):
        wanted = expected(case, table_of(case).tobytes())
        if (wanted.kind == kind).any():
            codes, _ = encoded(f, case)
            for i in np.flatnonzero((wanted.kind == kind) & (codes != wanted.codes))[:1]:
                reason = why(wanted.scaled[i], wanted.codes[i])
                found, needed = named(case, codes[i]), named(case, wanted.codes[i])
                raise AssertionError(f"code of element {i} is {found}, needed {needed}{reason}")

    def results_have_their_types_and_sizes(f, case):
        """codes are a uint8 vector, absmax is a float32 vector with one number for every block, short ones too."""
        w = case.array()
        found = call(f, w, case)
        shape = getattr(found, "shape", w.shape)
        assert tuple(shape) == w.shape, f"the result's shape: {shape}, needed {w.shape}"
        codes, absmax = results(found, "codes", "absmax")
        n, blocks = (w.size + 1) // 2 if packed else w.size, -(-w.size // case.block_size)
        for name, part, kind, size in (("codes", codes, np.uint8, n), ("absmax", absmax, f32, blocks)):
            assert part.dtype == kind, f"{name}: {part.dtype}, needed {np.dtype(kind)}"
            assert part.shape == (size,), f"{name}: shape {part.shape}, needed ({size},)"

    def the_first_of_two_codes_is_in_the_high_nibble(f, case):
        """A byte is 16 · first + second; an odd last code is paired with that of 0.0. Here all codes are clear ones."""
        codes = np.arange(len(case.w)) * 7 % 16
        codes[:: case.block_size] = 15  # the scale of each block is 1
        found, _ = results(call(f, table_of(case)[codes], case), "codes", "absmax")
        zero = int(np.flatnonzero(table_of(case) == 0)[0])
        assert found.size == (codes.size + 1) // 2, f"{found.size} codes, needed {(codes.size + 1) // 2} bytes"
        both = np.append(codes, [zero] * (codes.size % 2)).reshape(-1, 2)
        for i, (byte, (first, second)) in enumerate(zip(found.reshape(-1).tolist(), both.tolist(), strict=True)):
            wanted = 16 * first + second
            assert byte == wanted, f"of table[{first}], table[{second}] byte {i} is {byte:#04x}, needed {wanted:#04x}"

    def absmax_is_the_largest_magnitude(f, case):
        """Each block's scale is its largest |w|, the same bits; that of a block of zeros is 0."""
        _, absmax = encoded(f, case)
        wanted = scales(np.array(case.w), case.block_size)
        for i in np.flatnonzero(absmax.view(np.uint32) != wanted.view(np.uint32))[:1]:
            raise AssertionError(f"absmax of block {i} is {absmax[i]}, needed {wanted[i]}")

    def zero_is_exactly_zero(f, case):
        """0.0 gets the code of 0.0: beside any number, and in a block of zeros, where 0 / 0 waits."""
        compare(f, case, "zero")

    def codes_are_the_nearest(f, case):
        """Every number gets the code of the nearest entry of the table, times the block's largest magnitude."""
        compare(f, case, "elsewhere")

    def ties_go_to_the_lower_code(f, case):
        """A number halfway between two entries gets the lower code: a code counts the midpoints *below* the number."""
        compare(f, case, "tie", lambda s, code: f": {s!s} is the midpoint between codes {code} and {code + 1}")

    def one_ulp_beside_a_tie_decides(f, case):
        """Next to a midpoint float32 decides: w · (1/a), each rounded. Not w / a, not float64, not a rounded table."""
        compare(f, case, "beside", lambda s, code: f": w · (1 / a) in float32 is {s!s}, next to a midpoint")

    def tiny_blocks_do_not_overflow(f, case):
        """Where 1/a would be infinite, in blocks below 1e-38, a is replaced by 1e-38: never NaN."""
        compare(f, case, "tiny")

    def the_largest_comes_back_exactly(f, case):
        """What gave its block the scale decodes to itself, if the table ends in its sign's 1."""
        codes, absmax = encoded(f, case)
        table, w = table_of(case), case.array().ravel().astype(f32)
        a = np.repeat(absmax, case.block_size)[: w.size]
        top = (np.abs(w) == a) & (a >= f32(TINY)) & np.where(w > 0, table[-1] == 1, table[0] == -1)
        w_hat = decoded(case, codes, absmax)
        for i in np.flatnonzero(top & (w_hat != w))[:1]:
            raise AssertionError(f"element {i} = {w[i]} is ± its block's absmax, but decodes to {w_hat[i]}")

    def error_is_bounded(f, case):
        """|ŵ − w| ≤ a (h + 3u) + underflow, h half the wider gap of the table beside the code.

        One u each for the reciprocal, its product with w and the product c · a, and half a unit for the midpoint, all
        relative to numbers ≤ 1, of which a code's own entries leave less than 3 together. 1/a loses 2^-150 more where
        it is subnormal (a > 2^126), ŵ where it is. Below a = 1e-38 only |ŵ − w| ≤ a is promised."""
        codes, absmax = encoded(f, case)
        w, table = case.array().ravel().astype(f32).astype(np.float64), table_of(case)
        blocks = [slice(i, i + case.block_size) for i in range(0, w.size, case.block_size)]
        exact = np.array([np.abs(w[b]).max() for b in blocks])
        a, h = np.repeat(exact, case.block_size)[: w.size], half_gaps(table)
        w_hat = decoded(case, codes, absmax).astype(np.float64)
        bound = np.where(a >= TINY, a * (h[codes] + 3 * U + a * SUBNORMAL) + SUBNORMAL, a)
        for i in np.flatnonzero(~(np.abs(w_hat - w) <= bound))[:1]:
            raise AssertionError(f"element {i} = {w[i]:.9g} decodes to {w_hat[i]:.9g}, allowed ± {bound[i]:.3g}")

    def order_is_kept(f, case):
        """Of two numbers of one block the larger never gets the lower code."""
        (codes, _), w = encoded(f, case), case.array().ravel().astype(f32)
        for start in range(0, w.size, case.block_size):
            order = start + np.argsort(w[start : start + case.block_size], kind="stable")
            for k in np.flatnonzero(np.diff(codes[order]) < 0)[:1]:
                i, j = order[k], order[k + 1]
                raise AssertionError(f"{w[i]} gets code {codes[i]}, {w[j]} in the same block {codes[j]}")

    def blocks_do_not_mix(f, case):
        """A block gets the same codes and the same scale alone as among others."""
        codes, absmax = encoded(f, case)
        w, size = case.array().ravel(), case.block_size
        for block, start in enumerate(range(0, min(w.size, 8 * size), size)):
            part = w[start : start + size]
            alone, scale = encoded(f, case, part)
            assert scale[0] == absmax[block], f"absmax of block {block}: {absmax[block]}, alone {scale[0]}"
            for i in np.flatnonzero(alone != codes[start : start + size])[:1]:
                raise AssertionError(f"code of element {start + i} is {codes[start + i]}, its block alone: {alone[i]}")

    def blocks_can_trade_places(f, case):
        """Whole blocks in reverse order get the same codes and scales, in reverse order."""
        w, size = case.array().ravel(), case.block_size
        whole = w.size // size
        if whole > 1:
            turned = np.concatenate([w[: whole * size].reshape(whole, size)[::-1].ravel(), w[whole * size :]])
            (codes, absmax), (found, scale) = encoded(f, case), encoded(f, case, turned)
            wanted = np.concatenate([codes[: whole * size].reshape(whole, size)[::-1].ravel(), codes[whole * size :]])
            assert np.array_equal(found, wanted), f"other codes for {int((found != wanted).sum())} numbers"
            assert np.array_equal(scale, np.append(absmax[:whole][::-1], absmax[whole:])), "other scales"

    def any_layout(f, case):
        """Strided, transposed and misaligned views (NaN in the gaps) give what a plain copy gives."""
        w = case.array()
        layouts = [common.strided, common.misaligned, common.apart, common.transposed] * (w.ndim > 0 and w.size > 0)
        for layout in layouts:
            (codes, absmax), (found, scale) = encoded(f, case), encoded(f, case, layout(w))
            for i in np.flatnonzero(found != codes)[:1]:
                raise AssertionError(f"{layout.__name__}: code of element {i} is {found[i]}, of a copy {codes[i]}")
            assert np.array_equal(scale, absmax), f"{layout.__name__}: other scales than those of a copy"

    def quantizing_again_changes_nothing(f, case):
        """What was decoded has the same codes and the same scales. (Not promised below 1e-37, nor without ±1.)"""
        table = table_of(case)
        if case.dtype == "float32" and table[0] == -1 and table[-1] == 1:
            w = case.array()
            codes, absmax = encoded(f, case, np.where(np.abs(w) < 1e-37, f32(0), w))
            w_hat = decoded(case, codes, absmax)
            assert np.isfinite(w_hat).all(), "finite numbers decode to what is not finite"
            again, scale = encoded(f, case, w_hat)
            assert np.array_equal(again, codes), "other codes for what was decoded"
            assert np.array_equal(scale, absmax), "other scales for what was decoded"

    def powers_of_two_scale_through(f, case):
        """w · 2ᵏ has the same codes, and scales · 2ᵏ, unless something under- or overflows."""
        if case.dtype in ("float32", "float64"):
            w = case.array()
            w = np.where((np.abs(w) < 2.0**-90) | (np.abs(w) > 2.0**90), 0, w).astype(w.dtype)
            codes, absmax = encoded(f, case, w.copy())
            for factor in (f32(2.0**-12), f32(2.0**12)):
                found, scale = encoded(f, case, np.asarray(w * factor))
                assert np.array_equal(found, codes), f"other codes for {factor} w"
                assert np.array_equal(scale, absmax * factor), f"scales of {factor} w are not {factor} times as large"

    def nothing_is_changed(f, case):
        """The argument keeps its bytes, and a second call gives the same."""
        w = case.array()
        before, first = w.tobytes(), [np.array(part) for part in encoded(f, case, w)]
        assert w.tobytes() == before, f"the argument is changed: now {strategies.written(w.ravel(), case.dtype)}"
        assert all(map(np.array_equal, first, encoded(f, case, w))), "a second call gives something else"

    def refuses_what_is_not_finite(f, case):
        """NaN and ±inf raise an error: one of them would destroy its block in silence."""
        for bad in (np.nan, np.inf, -np.inf) if case.w else ():
            w = case.array()
            w.reshape(-1)[len(case.w) // 2] = bad
            try:
                _, absmax = encoded(f, case, w)
            except NotImplementedError:
                raise
            except Exception:
                continue
            block = len(case.w) // 2 // case.block_size
            raise AssertionError(f"{bad} in place of element {len(case.w) // 2} is not refused: absmax {absmax[block]}")

    found = (
        results_have_their_types_and_sizes,
        the_first_of_two_codes_is_in_the_high_nibble,
        absmax_is_the_largest_magnitude,
        zero_is_exactly_zero,
        codes_are_the_nearest,
        ties_go_to_the_lower_code,
        one_ulp_beside_a_tie_decides,
        tiny_blocks_do_not_overflow,
        the_largest_comes_back_exactly,
        error_is_bounded,
        order_is_kept,
        blocks_do_not_mix,
        blocks_can_trade_places,
        any_layout,
        quantizing_again_changes_nothing,
        powers_of_two_scale_through,
        nothing_is_changed,
        refuses_what_is_not_finite,
    )
    return tuple(of_few(p) for p in found if packed or p is not the_first_of_two_codes_is_in_the_high_nibble)
