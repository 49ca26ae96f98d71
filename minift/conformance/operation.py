"""An operation, what is known about it, and whoever claims to compute it.

An *implementation* of an operation is a function that takes and returns what the reference does: NumPy arrays, and
`y, vjp` where there is a gradient. A *case* is a hashable description of one input, small enough to print; a *property*
is a function `(implementation, case) -> None` that fails with an AssertionError which a person can read.

The same properties run on the reference, on the twins in each of their backends, on other libraries and on what a user
wrote; over fixed cases where time counts, and over those that hypothesis draws and shrinks where a counterexample does.

A case has a `dtype`: the type of the floating arguments and results. "bfloat16", which NumPy lacks, is float32 that
holds such numbers: the one adapter that needs it converts. Arithmetic on 16-bit numbers is promised in float32, with
one rounding at the end; so `arithmetic` gives the type that a bound is computed for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis.strategies import SearchStrategy

Property = Callable[[Callable, Any], None]


@dataclass(frozen=True)
class Operation:
    """What `check` knows of one function of the reference. `fixed` cases are enough to reject every known mistake."""

    name: str  # "norms.rms_norm": file and function of the reference
    reference: Callable
    takes: str  # for a person: what the function is given and what it returns
    cases: Callable[[Sequence[str]], SearchStrategy]  # of inputs in one of these dtypes
    fixed: tuple[Any, ...]
    properties: tuple[Property, ...]

    @property
    def has_pullback(self) -> bool:
        """Whether it returns `y, vjp`."""
        return "vjp" in self.takes


@dataclass(frozen=True)
class Implementation:
    """Functions under the names of operations, and the dtypes that they promise.

    `ours`: a failure is ours to mend, minift's or in the user's own file; of others it is a finding.
    A function may raise NotImplementedError for a case that it does not promise.
    `missing` says why there is nothing to run here, for instance that a package is not installed."""

    name: str
    functions: Mapping[str, Callable] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)
    ours: bool = False
    missing: str = ""


def arithmetic(dtype: str) -> type:
    """The type in which an operation on numbers of this dtype is computed."""
    return np.float64 if dtype == "float64" else np.float32


def storage(dtype: str) -> type:
    """The NumPy type that holds numbers of this dtype."""
    return np.float32 if dtype == "bfloat16" else np.dtype(dtype).type


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to this dtype, to the nearest and halves to even, in its `storage`."""
    if dtype != "bfloat16":
        return np.asarray(x, storage(dtype))
    word = np.asarray(x, np.float32).view(np.uint32)
    even = (word >> np.uint32(16)) & np.uint32(1)
    return ((word + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)).view(np.float32)
