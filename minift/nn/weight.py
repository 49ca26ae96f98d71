"""A weight knows how to multiply, and which of its numbers learn.

Parameters are a flat `dict[str, Weight]` under Hugging Face's state-dict names. A weight is one of

    ndarray                 it learns
    Frozen(array)           it does not
    SixteenBitTensor        16 bits a number, does not learn                           (minift.quant.sixteen)
    NF4Tensor               4 bits a number, does not learn                            (minift.quant.nf4)
    LoRA(base, A, B, ...)   the base does not learn, A and B do                        (minift.peft.lora)
    Tuned(base, array)      the array learns, the base is kept to come back to         (minift.peft.tuned)

An ndarray multiplies by itself; every other kind brings the members of `Weight`. So `linear` needs to know
none of them, and QLoRA is nothing but a LoRA whose base is an NF4Tensor.

Optimizers, clipping and checkpoints want arrays only: `trainable(params)` lists what learns under PEFT's names,
`replace(params, arrays)` is its inverse, and `gradients(...)` gives the cotangents the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

Arrays = dict[str, np.ndarray]
Cotangent = np.ndarray | Arrays | None  # of an ndarray, of a weight with named parts, of what does not learn


@runtime_checkable
class Weight(Protocol):
    """What `linear` and the optimizers ask of a weight that is not an ndarray."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), as if it were an array."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""

    def linear(self, x: np.ndarray, dropout_key: int | None = None) -> tuple[np.ndarray, Callable]:
        """y = x Wᵀ and its pullback `vjp(dy) -> dx, dweight`."""

    def arrays(self) -> Arrays:
        """The parts that learn, e.g. {"lora_A.weight": A, "lora_B.weight": B}; nothing where it is frozen."""

    def with_arrays(self, arrays: Arrays) -> Weight:
        """The same weight with other values in the parts that learn."""

    def dense(self, dtype: np.dtype | None = None) -> np.ndarray:
        """The matrix that this weight stands for."""


Params = Mapping[str, "np.ndarray | Weight"]


@dataclass(frozen=True, repr=False)
class Frozen:
    """An array that does not learn: no gradient is formed for it, which halves the work of the backward pass."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def linear(self, x, dropout_key=None):
        y = x @ self.array.T  # (..., out)

        def vjp(dy):
            return dy @ self.array, None

        return y, vjp

    def arrays(self) -> Arrays:
        return {}

    def with_arrays(self, arrays: Arrays) -> Frozen:
        return self

    def dense(self, dtype=None) -> np.ndarray:
        return self.array if dtype is None else self.array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"Frozen({self.array.dtype} {self.array.shape}, {self.array.nbytes:,} bytes)"


def freeze(params: Params) -> dict[str, Any]:
    """The same parameters, none of which learns. A LoRA keeps its adapter, as arrays that do not learn are not a
    LoRA any more: merge or detach it first (ValueError)."""
    refuse_adapters(params)
    return {name: Frozen(w) if isinstance(w, np.ndarray) else w for name, w in params.items()}


def thaw(params: Params) -> dict[str, Any]:
    """The same parameters with every `Frozen` array free to learn again; quantized weights stay as they are."""
    return {name: w.array if isinstance(w, Frozen) else w for name, w in params.items()}


# From here on a weight may also be a torch tensor, or one of the twins' weights: what follows asks for members only.


def is_array(weight: Any) -> bool:
    """Whether this is an array, all of which learns, and no weight with members of its own."""
    return not hasattr(weight, "with_arrays")


def dense(weight: Any) -> Any:
    """The matrix that any weight stands for."""
    return weight if is_array(weight) else weight.dense()


def unwrap(weight: Any) -> tuple[Any, bool]:
    """The array behind a table or a gain, and whether it learns, then as a whole. TypeError for one that carries an
    adapter: adapters are for what multiplies."""
    if is_array(weight):
        return weight, True
    if weight.arrays().keys() - {"weight"}:
        raise TypeError(f"{weight!r} is used as a table or gain, where an adapter has no meaning")
    return weight.dense(), learns(weight)


def learns(weight: Any) -> bool:
    return is_array(weight) or bool(weight.arrays())


def refuse_adapters(params: Mapping[str, Any]) -> None:
    """ValueError for a weight in which something learns beside a base that does not."""
    for name, weight in params.items():
        if not is_array(weight) and weight.arrays():
            raise ValueError(f"{name} is {weight!r}, which learns: merge or detach its adapter before freezing")


def trainable(params: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that learns: {"….q_proj.weight": W} for an ndarray, {"….q_proj.lora_A.weight": A, …} for a LoRA."""
    return {
        full: array
        for name, weight in params.items()
        for full, array in _named(name, weight if is_array(weight) else weight.arrays()).items()
    }


def replace(params: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `trainable`: the same parameters with these values in what learns.

    Raises KeyError for a name that does not learn, ValueError for another shape."""
    found = trainable(params)
    for full, array in arrays.items():
        if full not in found:
            raise KeyError(f"{full!r} is not a trainable array of these parameters")
        if array.shape != found[full].shape:
            raise ValueError(f"{full!r}: shape {tuple(array.shape)}, needed {tuple(found[full].shape)}")
    replaced: dict[str, Any] = {}
    for name, weight in params.items():
        if is_array(weight):
            replaced[name] = arrays.get(name, weight)
        else:
            parts = weight.arrays()
            new = {part: arrays.get(_full(name, part), array) for part, array in parts.items()}
            replaced[name] = weight.with_arrays(new) if parts else weight
    return replaced


def add(total: Cotangent, part: Cotangent) -> Cotangent:
    """total + part, in place where there is a total; None is nothing, and so is a name that a dictionary lacks."""
    if isinstance(total, np.ndarray) and isinstance(part, np.ndarray):
        total += part
    elif isinstance(total, dict) and isinstance(part, dict):
        for name, array in part.items():
            if name in total:
                total[name] += array
            else:
                total[name] = array
    return part if total is None else total


def times(factor: float | np.floating, cotangent: Cotangent) -> Cotangent:
    """factor · cotangent, in the cotangent's own type."""
    if cotangent is None or isinstance(cotangent, np.ndarray):
        return None if cotangent is None else cotangent * cotangent.dtype.type(factor)
    return {name: array * array.dtype.type(factor) for name, array in cotangent.items()}


def gradients(contributions: Iterable[tuple[str, Cotangent]]) -> Arrays:
    """One array a name from (weight's name, cotangent) pairs; several contributions to one name add up.

    A tied embedding is used twice, as input table and as output matrix, and gets the sum of both."""
    total: Arrays = {}
    for name, cotangent in contributions:
        for full, array in _named(name, cotangent).items():
            total[full] = total[full] + array if full in total else array
    return total


def _named(name: str, parts: Any) -> dict[str, Any]:
    if parts is None:
        return {}
    if isinstance(parts, dict):
        return {_full(name, part): array for part, array in parts.items()}
    return {name: parts}


def _full(name: str, part: str) -> str:
    """A part's name beside its weight's; the part "weight" is the parameter itself, also where that is a bias."""
    return name if part == "weight" else name.removesuffix("weight") + part
