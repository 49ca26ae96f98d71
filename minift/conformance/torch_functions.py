"""A function on torch tensors, as the suite wants it: NumPy arrays in, arrays or `y, vjp` out.

The pullback is autograd's. Floating arguments ask for a gradient; what is no array (a number, a string) is handed on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def tensor(x: Any, device: str = "cpu", dtype: str | None = None) -> Any:
    """A view of the array's memory on the CPU, in its layout, so that strides reach the function; a copy elsewhere.

    `dtype` "bfloat16" converts floating arrays. What is no array is handed on."""
    import torch

    if not isinstance(x, np.ndarray | np.generic):
        return x
    x = np.asarray(x)
    if any(s < 0 or s % x.itemsize for s in x.strides):
        x = np.ascontiguousarray(x)
    made = torch.from_numpy(x if x.flags.writeable else x.copy()).to(device)
    return made.to(torch.bfloat16) if dtype == "bfloat16" and made.is_floating_point() else made


def array(x: Any) -> Any:
    """A tensor's numbers, bfloat16 as float32. What is no tensor is handed on."""
    import torch

    if not torch.is_tensor(x):
        return x
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()


def differentiable(f: Callable, device: str = "cpu", dtype: str | None = None) -> Callable:
    """`f(*tensors) -> tensor` as a function of arrays that returns `y, vjp`; a frozen argument's cotangent is None.

    `dtype` "bfloat16" converts floating arrays on the way in and out; by default tensors have the arrays' types."""

    def function(*args):
        import torch

        tensors = [tensor(a, device, dtype) for a in args]
        learning = [t.requires_grad_() for t in tensors if torch.is_tensor(t) and t.is_floating_point()]
        y = f(*tensors)

        def vjp(dy):
            upstream = tensor(dy, device, dtype)
            cotangents = torch.autograd.grad(y, learning, upstream, retain_graph=True, allow_unused=True)
            return tuple(map(array, cotangents)) if len(cotangents) > 1 else array(cotangents[0])

        return array(y), vjp

    return function


def plain(f: Callable, device: str = "cpu", dtype: str | None = None) -> Callable:
    """`f(*tensors)` as a function of arrays, where nothing is differentiated: a tensor, a tuple of them, or an object
    with `.codes` and the like becomes an array or a tuple."""

    def function(*args):
        found = f(*(tensor(a, device, dtype) for a in args))
        parts = [getattr(found, name) for name in ("codes", "absmax", "offset") if hasattr(found, name)] or found
        return tuple(map(array, parts)) if isinstance(parts, tuple | list) else array(parts)

    return function
