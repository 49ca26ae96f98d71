"""A function against another one: the same results on whatever is drawn. For what has no operation of its own.

    from hypothesis import strategies as st

    size = st.integers(1, 4096)
    check(lora.trainable_parameters, my_count, inputs={"d_out": size, "d_in": size, "r": st.integers(1, 64)})
    # d_out = 1, d_in = 1, r = 1: 1, needed 2

An operation knows how exact float32 can be. Nothing is known of two functions, so numbers agree here if they differ by
at most a millionth of the largest that was needed: it is the formula that is compared, not the rounding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from minift.conformance.operation import Operation

TOLERANCE = 1e-6


def matrices(*shape: int, largest: int = 3) -> st.SearchStrategy[np.ndarray]:
    """Arrays of this shape of small whole numbers, as float32: a counterexample that can be computed by hand."""
    elements = st.integers(-largest, largest).map(float)
    return hypothesis_numpy.arrays(np.float32, shape, elements=elements)


def agreement(reference: Callable, inputs: Mapping[str, st.SearchStrategy]) -> Operation:
    """`f(*inputs)` must give what `reference(*inputs)` gives: as an operation with one property."""
    named = functools.partial(_agrees, reference)
    named.__name__ = "agrees with the reference"  # type: ignore[attr-defined]
    return Operation(
        f"{reference.__module__.rpartition('.')[2]}.{reference.__name__}",
        reference,
        f"f({', '.join(inputs)})",
        lambda dtypes: st.tuples(*inputs.values()).map(lambda drawn: Arguments(zip(inputs, drawn, strict=True))),
        (),
        (named,),
    )


class Arguments(dict):
    """name -> value, in the order of the call. Its text is what a counterexample begins with."""

    def __str__(self) -> str:
        return ", ".join(f"{name} = {_text(value)}" for name, value in self.items())


def _agrees(reference: Callable, f: Callable, case: Arguments) -> None:
    """On everything that is drawn."""
    needed = reference(*copy.deepcopy(list(case.values())))
    _same(f(*copy.deepcopy(list(case.values()))), needed)


def _same(found: Any, needed: Any) -> None:
    if isinstance(needed, tuple | list):
        assert isinstance(found, tuple | list), f"{_text(found)}, needed {len(needed)} results"
        assert len(found) == len(needed), f"{len(found)} results, needed {len(needed)}"
        for one, other in zip(found, needed, strict=True):
            _same(one, other)
        return
    assert found is not None, f"None, needed {_text(needed)}"
    one, other = np.asarray(found), np.asarray(needed)
    assert one.shape == other.shape, f"shape {one.shape}, needed {other.shape}"
    difference = f"{_text(found)}, needed {_text(needed)}"
    if other.dtype.kind in "fc":
        allowed = TOLERANCE * np.max(np.abs(other), initial=0, where=np.isfinite(other))
        assert np.all((np.abs(one - other) <= allowed) | (one == other) | (np.isnan(one) & np.isnan(other))), difference
    else:
        assert np.array_equal(one, other), difference


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return np.array2string(value, separator=", ", threshold=40, precision=6).replace("\n", "")
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)
