"""A call from the command line: `module:function`, and its arguments as JSON."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def find(name: str) -> Callable:
    """The function of "package.module:function"; of a method with dots. ValueError where there is none."""
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ValueError(f"{name!r}, needed a lesson or module:function, e.g. minift.peft.lora:forward")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name}: {module} cannot be imported ({error})") from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name}: {getattr(found, '__name__', module)} has no {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{name} is {type(found).__name__}, needed a function")
    return found


def read_arguments(path: Path) -> tuple[list[Any], dict[str, Any], Any]:
    """Positional arguments, arguments by name, and the cotangent of a JSON file:

        {"args": [[[1, 2, 0]]], "kwargs": {"scaling": 2.0}, "cotangent": [[1, 0]], "dtype": "float32"}

    or only a list of arguments. Lists of numbers become arrays: of whole numbers int64, of True and False bool, others
    of `dtype` (float64 unless it is given). ValueError, with the file's name, for anything else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}, needed a JSON file") from None
    if isinstance(found, list):
        found = {"args": found}
    if not isinstance(found, dict) or found.keys() - {"args", "kwargs", "cotangent", "dtype"}:
        raise ValueError(f"{path}: needed a list of arguments, or an object of args, kwargs, cotangent and dtype")
    args, kwargs = found.get("args", []), found.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError(f"{path}: needed args as a list and kwargs as an object")
    try:
        dtype = np.dtype(found.get("dtype", "float64"))
        converted = [as_value(value, dtype) for value in args], {k: as_value(v, dtype) for k, v in kwargs.items()}
        return *converted, as_value(found.get("cotangent"), dtype, whole=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def as_value(value: Any, dtype: np.dtype, *, whole: bool = True) -> Any:
    """A list as an array; numbers, texts and null as they are."""
    if not isinstance(value, list):
        return value
    array = np.array(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{json.dumps(value)[:60]} is no rectangle of numbers")
    return array if array.dtype.kind == "b" or (whole and array.dtype.kind in "iu") else array.astype(dtype)
