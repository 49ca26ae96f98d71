"""A user's own functions: a Python file or an importable module.

They are found as `nf4_quantize` for the operation "nf4.quantize", or in a dict CONFORMANCE = {"nf4.quantize": f}.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from minift.conformance.operation import Implementation
from minift.conformance.operations import every, find


def implementations(name: str) -> list[Implementation]:
    """The functions of a file (`my_module.py`) or a module (`package.my_module`, also beside where you stand).

    ModuleNotFoundError if there is none, ValueError if it cannot be run or has no function of a known name."""
    module = _load(name)
    functions = {operation: _function(module, operation.replace(".", "_")) for operation in every()}
    functions |= {find(operation).name: f for operation, f in getattr(module, "CONFORMANCE", {}).items()}
    found = {operation: f for operation, f in functions.items() if f is not None}
    if not found:
        names = ", ".join(operation.replace(".", "_") for operation in list(every())[:3])
        raise ValueError(
            f"{name}: it has no function named as an operation, needed one or more such as {names}, "
            'or CONFORMANCE = {"nf4.quantize": my_function}; `minift conformance --list` has all'
        )
    return [Implementation(Path(name).stem if name.endswith(".py") else name, found, ours=True)]


def _function(module: ModuleType, name: str) -> Callable | None:
    found = getattr(module, name, None)
    return found if callable(found) else None


def _load(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"impl: found no file {name}, needed a Python file that is there")
    with _beside(path.parent if path.suffix == ".py" else Path()):
        try:
            if path.suffix != ".py":
                return importlib.import_module(name)
            spec = importlib.util.spec_from_file_location(f"conformance_of_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        except ModuleNotFoundError as error:
            if error.name is not None and name.startswith(error.name) and path.suffix != ".py":
                raise
            raise ValueError(f"{name}: it cannot be imported: {error}") from None
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(f"{name}: line {where.lineno} raised {type(error).__name__}: {error}") from None


@contextmanager
def _beside(folder: Path):
    """What lies there can be imported, as if Python had been started on the file."""
    sys.path.insert(0, os.fspath(folder.resolve()))
    try:
        yield
    finally:
        sys.path.pop(0)
