"""Copies of values as they are at one moment, and whether two of them are equal to the bit.

References write in place and use views, so to keep a value is to copy it; and views of one array must be views of one
copy, or the copies would no longer show that writing to one writes to the other.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

WHOLE = 1 << 20  # elements; of larger arrays a summary is kept


@dataclass(frozen=True)
class Summary:
    """What is kept of a large array: enough to see whether it changed, and how large its numbers are."""

    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    low: float
    high: float
    digest: bytes


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """The same value, which nothing that happens later can change. Functions are kept as they are."""
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][0]
    made = _copy(value, memo)
    memo[id(value)] = made, value  # the value too: as long as it lives no other has its id
    return made


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, np.ndarray):
        return _array(value, memo)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(copied(part, memo) for part in value)
    if isinstance(value, list):
        return [copied(part, memo) for part in value]
    if isinstance(value, dict):
        return {name: copied(part, memo) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = object.__new__(type(value))
        for name, part in vars(value).items():
            object.__setattr__(made, name, copied(part, memo))
        return made
    return copy.deepcopy(value) if isinstance(value, np.random.Generator) else value


def _array(x: np.ndarray, memo: dict[int, Any]) -> np.ndarray | Summary:
    if x.size > WHOLE:
        return summary(x)
    owner = x
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if owner is x or owner.size > WHOLE or owner.dtype.hasobject or not x.size:
        return x.copy(order="K")
    made = copied(owner, memo)
    offset = x.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    if made.strides != owner.strides or not (made.flags.c_contiguous or made.flags.f_contiguous):
        return x.copy(order="K")
    flat = made.reshape(-1, order="A").view(np.uint8)
    return np.ndarray(x.shape, x.dtype, flat, offset, x.strides)


def summary(x: np.ndarray) -> Summary:
    numbers = x[np.isfinite(x)] if x.dtype.kind == "f" else x
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (np.nan, np.nan)
    digest = hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=16).digest()
    return Summary(x.shape, x.dtype, x.nbytes, low, high, digest)


def same(a: Any, b: Any) -> bool:
    """Equal in type, shape and every bit; functions if they are the same one, or made in the same place."""
    if isinstance(a, np.ndarray | np.generic) and isinstance(b, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, Summary):
        return a == b
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return same(vars(a), vars(b))
    if callable(a) and hasattr(a, "__code__"):
        return a.__code__ is b.__code__
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, np.random.Generator):
        return repr(a.bit_generator.state) == repr(b.bit_generator.state)
    try:
        return a is b or bool(a == b)
    except Exception:  # whatever compares in another way is taken for changed
        return False


def changed(now: np.ndarray, before: Any) -> np.ndarray | None:
    """(shape) which cells differ in a bit from what was there before; None where there was nothing to compare."""
    if not isinstance(before, np.ndarray) or before.shape != now.shape or before.dtype != now.dtype or now.ndim == 0:
        return None
    bits = [np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, -1) for x in (now, before)]
    return (bits[0] != bits[1]).any(axis=-1)
