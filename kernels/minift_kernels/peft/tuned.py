"""A weight that is trained in full beside an adapter, on torch tensors: the twin of `minift.peft.tuned`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.peft.tuned import UNTIE, tied
from minift_kernels.nn.weight import Tensors, Weight, learns

__all__ = ["UNTIE", "Tuned", "tied"]


@dataclass(frozen=True, eq=False)
class Tuned:
    """A tensor that learns, in place of a frozen `base` of the same shape. ValueError for another shape."""

    base: Weight
    array: Tensor

    def __post_init__(self):
        if self.shape != tuple(self.base.shape):
            raise ValueError(f"a tensor of shape {self.shape} cannot replace a weight of shape {self.base.shape}")
        if learns(self.base):
            raise ValueError(f"{self.base!r} learns itself, and cannot be trained in full as well")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.array.nbytes

    def linear(self, x: Tensor, dropout_key: int | None = None, *, backend: str | None = None) -> Tensor:
        return x @ self.array.to(x.dtype).T  # (..., out)

    def arrays(self) -> Tensors:
        return {"weight": self.array}

    def with_arrays(self, arrays: Tensors) -> Tuned:
        return dataclasses.replace(self, array=arrays["weight"])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.array if dtype is None else self.array.to(dtype)

    def __repr__(self) -> str:
        return f"Tuned({self.array.dtype} {self.shape} in place of {self.base!r})"
