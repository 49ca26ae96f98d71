"""A weight knows how to multiply, and which of its numbers learn: the twin of `minift.nn.weight`, which explains it.

Parameters are the same flat dictionary, of torch tensors. Two things are different, because autograd does the work of
the pullbacks. A weight's `linear` returns y alone. And what learns must ask for a gradient: `params.from_numpy` sees to
it for a whole model, and a tensor that is made by hand needs `requires_grad_()`.

    params = from_numpy(numpy_params, "cuda", torch.bfloat16)
    loss(params).backward()
    gradients = {name: tensor.grad for name, tensor in trainable(params).items()}

Names, order and shapes are the reference's, so `trainable`, files and optimizers mean the same by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@runtime_checkable
class Weight(Protocol):
    """What `linear` and the optimizers ask of a weight that is not a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), as if it were a tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""

    def linear(self, x: Tensor, dropout_key: int | None = None, *, backend: str | None = None) -> Tensor:
        """y = x Wᵀ."""

    def arrays(self) -> Tensors:
        """The parts that learn, e.g. {"lora_A.weight": A, "lora_B.weight": B}; nothing where it is frozen."""

    def with_arrays(self, arrays: Tensors) -> Weight:
        """The same weight with other values in the parts that learn."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix that this weight stands for."""


Params = Mapping[str, "Tensor | Weight"]


@dataclass(frozen=True, repr=False, eq=False)
class Frozen:
    """A tensor that does not learn: no gradient is formed for it. ValueError for one that asks for a gradient."""

    array: Tensor

    def __post_init__(self):
        if self.array.requires_grad:
            raise ValueError("a tensor that requires a gradient is not frozen: detach it")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def linear(self, x: Tensor, dropout_key: int | None = None, *, backend: str | None = None) -> Tensor:
        return x @ self.array.to(x.dtype).T  # (..., out)

    def arrays(self) -> Tensors:
        return {}

    def with_arrays(self, arrays: Tensors) -> Frozen:
        return self

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.array if dtype is None else self.array.to(dtype)

    def __repr__(self) -> str:
        return f"Frozen({self.array.dtype} {self.shape}, {self.nbytes:,} bytes)"


def dense(weight: Tensor | Weight) -> Tensor:
    """The matrix that any weight stands for."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def unwrap(weight: Tensor | Weight) -> tuple[Tensor, bool]:
    """The tensor behind a table or a gain, and whether it learns, then as a whole. TypeError for one that carries an
    adapter: adapters are for what multiplies."""
    if isinstance(weight, Tensor):
        return weight, True
    if weight.arrays().keys() - {"weight"}:
        raise TypeError(f"{weight!r} is used as a table or gain, where an adapter has no meaning")
    return weight.dense(), learns(weight)


def freeze(params: Params) -> dict[str, Any]:
    """The same parameters, none of which learns. A LoRA keeps its adapter, as arrays that do not learn are not a
    LoRA any more: merge or detach it first (ValueError)."""
    for name, weight in params.items():
        if not isinstance(weight, Tensor) and weight.arrays():
            raise ValueError(f"{name} is {weight!r}, which learns: merge or detach its adapter before freezing")
    return {name: Frozen(w.detach()) if isinstance(w, Tensor) else w for name, w in params.items()}


def thaw(params: Params) -> dict[str, Any]:
    """The same parameters with every `Frozen` tensor free to learn again; quantized weights stay as they are."""
    return {name: w.array.detach().requires_grad_() if isinstance(w, Frozen) else w for name, w in params.items()}


def learns(weight: Tensor | Weight) -> bool:
    return isinstance(weight, Tensor) or bool(weight.arrays())


def trainable(params: Params) -> Tensors:
    """Everything that learns: {"….q_proj.weight": W} for a tensor, {"….q_proj.lora_A.weight": A, …} for a LoRA."""
    return {
        full: array
        for name, weight in params.items()
        for full, array in _named(name, weight if isinstance(weight, Tensor) else weight.arrays()).items()
    }


def replace(params: Params, arrays: Tensors) -> dict[str, Any]:
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
        if isinstance(weight, Tensor):
            replaced[name] = arrays.get(name, weight)
        else:
            parts = weight.arrays()
            new = {part: arrays.get(_full(name, part), array) for part, array in parts.items()}
            replaced[name] = weight.with_arrays(new) if parts else weight
    return replaced


def _named(name: str, parts: Tensor | Tensors) -> Tensors:
    if isinstance(parts, Tensor):
        return {name: parts}
    return {_full(name, part): array for part, array in parts.items()}


def _full(name: str, part: str) -> str:
    return name.removesuffix("weight") + part
