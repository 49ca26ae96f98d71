"""Values as a person reads them: what it is, and its numbers in rows and columns, shortened where there are many.

Both faces, terminal and page, show what is found here. Tuples, dictionaries and small dataclasses come apart into their
parts, each under the name by which code would reach it: q.absmax, params['head.weight'].A.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from minift.step.snapshot import Summary, changed

ROWS, COLUMNS, SLICES, PARTS = 10, 16, 4, 6  # more than that is shortened for show
NOTHING: Any = object()  # where there was no value before


@dataclass(frozen=True)
class Unwritten:
    """An array that there is only room for yet."""

    facts: str

    def __repr__(self) -> str:
        return f"{self.facts}, not written yet"


@dataclass(frozen=True)
class Leaf:
    """One array, number or object, and what of it is new."""

    name: str
    text: str  # "float64 (4, 1), 32 bytes"; "2.0"
    array: np.ndarray | None = None
    changed: np.ndarray | None = None  # which cells; None where all of it is new


@dataclass(frozen=True)
class Grid:
    """A piece of an array as rows of cells; None stands for those left out."""

    label: str  # "[0, 1]" of a stack of matrices
    rows: list[list[tuple[int, ...] | None]]  # where in the array each cell is


def leaves(name: str, value: Any, before: Any = NOTHING) -> Iterator[Leaf]:
    """The parts of a value, those that can be told apart by name."""
    if isinstance(value, np.ndarray) and value.ndim:
        yield Leaf(name, facts(value), value, changed(value, before))
    elif isinstance(value, Summary):
        text = f"{facts(value)}; from {value.low:.4g} to {value.high:.4g}, too large to keep"
        yield Leaf(name, text)
    elif isinstance(value, tuple | list) and any(_has_arrays(part) for part in value):
        for index, part in enumerate(value[:PARTS]):
            earlier = before[index] if isinstance(before, tuple | list) and index < len(before) else NOTHING
            yield from leaves(f"{name}[{index}]", part, earlier)
        if len(value) > PARTS:
            yield Leaf(name, f"and {len(value) - PARTS:,} more")
    elif isinstance(value, dict) and value:
        for key, part in [*value.items()][:PARTS]:
            earlier = before.get(key, NOTHING) if isinstance(before, dict) else NOTHING
            yield from leaves(f"{name}[{key!r}]", part, earlier)
        if len(value) > PARTS:
            yield Leaf(name, f"and {len(value) - PARTS:,} more")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type) and _has_arrays(value):
        yield Leaf(name, repr(value))
        for field in dataclasses.fields(value):
            part, earlier = getattr(value, field.name), getattr(before, field.name, NOTHING)
            if _has_arrays(part) and not _is_codebook(part):
                yield from leaves(f"{name}.{field.name}", part, earlier)
    else:
        yield Leaf(name, said(value))


def facts(value: np.ndarray | Summary) -> str:
    """Type, shape and bytes."""
    return f"{value.dtype} {value.shape}, {value.nbytes:,} bytes"


def said(value: Any) -> str:
    """A number, a text, a function or another object in one line."""
    if isinstance(value, np.generic | np.ndarray):
        return f"{number(value)}  ({value.dtype})"
    if isinstance(value, float):
        return number(value)
    if inspect.isfunction(value):
        return _function(value)
    if isinstance(value, tuple | list):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(map(said, value)) + right
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= 90 else text[:87] + "…"


def number(value: Any) -> str:
    """Enough digits to check by hand."""
    if isinstance(value, bool | np.bool_):
        return "●" if value else "·"
    if isinstance(value, int | np.integer) or getattr(value, "dtype", np.dtype(float)).kind in "iu":
        return f"{int(value)}"
    text = f"{float(value):.4g}".replace("e-0", "e-").replace("e+0", "e+")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def cell(array: np.ndarray, at: tuple[int, ...], *, hexadecimal: bool = False) -> str:
    return f"{int(array[at]):02x}" if hexadecimal else number(array[at])


def grids(array: np.ndarray) -> list[Grid]:
    """The array as matrices, with `None` where rows, columns or whole matrices are left out."""
    if not array.size:
        return []
    lead = array.shape[:-2] if array.ndim > 2 else ()
    found = []
    for at in _few_of([*np.ndindex(*lead)], SLICES):
        if at is None:
            found.append(Grid("…", []))
            continue
        rows = _few_of([*range(array.shape[-2])], ROWS) if array.ndim > 1 else [()]
        columns = _few_of([*range(array.shape[-1])], COLUMNS)
        cells = [[_place(at, row, column) for column in columns] for row in rows]
        found.append(Grid(str([*at]) if lead else "", cells))
    return found


def signature(value: Any) -> str:
    """How a function is called; of a lambda, its arguments."""
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):
        return "(…)"


def _place(lead: tuple[int, ...], row: Any, column: Any) -> tuple[int, ...] | None:
    if row is None or column is None:
        return None
    return (*lead, *(() if row == () else (row,)), column)


def _few_of(items: list, most: int) -> list:
    if len(items) <= most:
        return items
    return [*items[: most - 2], None, items[-1]]


def _has_arrays(value: Any) -> bool:
    if isinstance(value, np.ndarray | Summary):
        return True
    if isinstance(value, tuple | list):
        return any(map(_has_arrays, value))
    if isinstance(value, dict):
        return any(map(_has_arrays, value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_has_arrays(part) for part in vars(value).values())
    return False


def _is_codebook(value: Any) -> bool:
    """A table that all tensors of a kind share says nothing about one of them."""
    return isinstance(value, np.ndarray) and value.shape == (256,) and value.dtype == np.float32


def _function(value: Any) -> str:
    """Of a closure also what it keeps: for a pullback that is the activation memory."""
    arrays = {}
    for name, closed in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell: the branch that sets it was not taken
            if isinstance(closed.cell_contents, np.ndarray):
                arrays[name] = closed.cell_contents
    name = "a function" if value.__name__ == "<lambda>" else value.__name__
    keeps = f", which keeps {', '.join(arrays)}: {sum(a.nbytes for a in arrays.values()):,} bytes" if arrays else ""
    return f"{name}{signature(value)}{keeps}"
