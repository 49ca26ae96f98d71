"""A weight knows how to multiply, and which of its numbers learn: the twin of `minift.nn.weight`, which explains it.

Parameters are the same flat dictionary, of torch tensors. Two things are different, because autograd does the work of
the pullbacks. A weight's `linear` returns y alone. And what learns must ask for a gradient: `params.from_numpy` sees to
it for a whole model, and a tensor that is made by hand needs `requires_grad_()`.

    params = from_numpy(numpy_params, "cuda", torch.bfloat16)
    loss(params).backward()
    gradients = {name: tensor.grad for name, tensor in trainable(params).items()}

Names, order and shapes are the reference's, so files and optimizers mean the same by them, and what only asks a weight
for its parts (`trainable`, `replace`, `unwrap`, …) is the reference's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from minift.nn.weight import dense, is_array, learns, refuse_adapters, replace, trainable, unwrap

__all__ = ["Frozen", "Params", "Tensors", "Weight", "dense", "freeze", "is_array", "learns", "refuse_adapters"]
__all__ += ["replace", "thaw", "trainable", "unwrap"]

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


def freeze(params: Params) -> dict[str, Any]:
    """The same parameters, none of which learns. A LoRA keeps its adapter, as arrays that do not learn are not a
    LoRA any more: merge or detach it first (ValueError)."""
    refuse_adapters(params)
    return {name: Frozen(w.detach()) if isinstance(w, Tensor) else w for name, w in params.items()}


def thaw(params: Params) -> dict[str, Any]:
    """The same parameters with every `Frozen` tensor free to learn again; quantized weights stay as they are."""
    return {name: w.array.detach().requires_grad_() if isinstance(w, Frozen) else w for name, w in params.items()}
