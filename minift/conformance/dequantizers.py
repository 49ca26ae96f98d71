"""What decoding must satisfy: entry times scale in float32, rounded once; the shape; each block its own scale."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minift.conformance import common
from minift.conformance.operation import rounded, storage
from minift.conformance.strategies import Codes

f32 = np.float32


def dequantizer(
    call: Callable, table_of: Callable[[Codes], np.ndarray], arrays: Callable[[Codes], tuple] = Codes.arrays
) -> tuple:
    """Properties of a function that `call(f, codes, absmax, case)` gives its arguments, which `arrays(case)` makes."""

    def decoded(f, case, *given):
        found = np.asarray(call(f, *(given or arrays(case)), case))
        assert found.size == len(case.codes), f"{found.size} numbers, needed {len(case.codes)}"
        return found

    def products(case):
        """fl(c · a), one number at a time."""
        table, a = table_of(case), np.array(case.absmax, f32)
        with np.errstate(all="ignore"):
            return np.array([table[c] * a[i // case.block_size] for i, c in enumerate(case.codes)], f32)

    def differ(found, wanted, what):
        for i in np.flatnonzero(found != wanted)[:1]:
            raise AssertionError(f"{what} {i} is {found[i]}, needed {wanted[i]}")

    def decodes_to_entry_times_absmax(f, case):
        """Every number is table[code] · absmax of its block, rounded to float32 once."""
        if case.dtype == "float32":
            differ(decoded(f, case).ravel(), products(case), "element")

    def other_types_are_rounded_once_more(f, case):
        """float16 and float64 are the float32 product, rounded: nothing is computed in them."""
        if case.dtype != "float32":
            with np.errstate(all="ignore"):
                wanted = rounded(products(case), case.dtype)
            differ(decoded(f, case).ravel(), wanted, "element")

    def shape_and_type_come_back(f, case):
        """The result has the shape that was quantized, a vector too, and the type that was asked for."""
        found = decoded(f, case)
        assert found.shape == case.size(), f"shape {found.shape}, needed {case.size()}"
        kind = np.dtype(storage(case.dtype))
        assert found.dtype == kind, f"{found.dtype}, needed {kind}"

    def zero_is_plus_zero(f, case):
        """The code of 0.0 decodes to +0.0, whatever the scale."""
        zero = table_of(case)[list(case.codes)] == 0 if case.codes else np.zeros(0, bool)
        if zero.any():
            found = decoded(f, case).ravel()
            for i in np.flatnonzero(zero & ((found != 0) | np.signbit(found)))[:1]:
                raise AssertionError(f"element {i} is {found[i]}, needed 0.0")

    def blocks_do_not_mix(f, case):
        """Another scale changes its own block only."""
        if len(case.absmax) > 1:
            first, doubled = decoded(f, case).ravel(), np.array(case.absmax, f32)
            doubled[1] = 2 * doubled[1] + 1
            found = decoded(f, case, arrays(case)[0], doubled).ravel()
            others = np.arange(first.size) // case.block_size != 1
            for i in np.flatnonzero(others & (found != first))[:1]:
                raise AssertionError(f"element {i} of block {i // case.block_size} follows the scale of block 1")

    def any_layout(f, case):
        """Codes and scales that are strided views decode to the same."""
        first = decoded(f, case)
        for layout in (common.strided, common.misaligned) * bool(case.codes):
            found = decoded(f, case, *map(layout, arrays(case)))
            assert np.array_equal(found, first), f"{layout.__name__} codes and scales decode to something else"

    def nothing_is_changed(f, case):
        """The arguments keep their bytes, and a second call gives the same."""
        given = arrays(case)
        before = [part.tobytes() for part in given]
        first = decoded(f, case, *given).copy()
        assert [part.tobytes() for part in given] == before, "an argument is changed"
        assert np.array_equal(decoded(f, case, *given), first), "a second call gives something else"

    return (
        decodes_to_entry_times_absmax,
        other_types_are_rounded_once_more,
        shape_and_type_come_back,
        zero_is_plus_zero,
        blocks_do_not_mix,
        any_layout,
        nothing_is_changed,
    )
