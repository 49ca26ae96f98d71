"""What is known about each operation: its cases, its oracle with a bound, its laws. One file for each of minift's."""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from functools import cache

from minift.conformance.operation import Operation


@cache
def every() -> dict[str, Operation]:
    """name -> operation, of all files in this folder: each has a tuple OPERATIONS."""
    files = sorted(found.name for found in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{file}") for file in files]
    return {operation.name: operation for module in modules for operation in module.OPERATIONS}


def find(name: str) -> Operation:
    """The operation of this name; ValueError that names the nearest."""
    if name not in every():
        near = get_close_matches(name, every(), 1, 0.0)[0]
        raise ValueError(f"operation: {name!r}, did you mean {near!r}? There are {', '.join(every())}")
    return every()[name]
