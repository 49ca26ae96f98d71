"""A function on torch tensors, as the suite wants it: NumPy arrays in, `y, vjp` out.

The pullback is autograd's. Floating arguments ask for a gradient; what is no array (a number, a string) is handed on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def differentiable(f: Callable, device: str = "cpu", dtype: str | None = None) -> Callable:
    """`f(*tensors) -> tensor` as a function of arrays that returns `y, vjp`.

    `dtype` "bfloat16" converts floating arrays on the way in and out; by default tensors have the arrays' types."""
    import torch

    def tensor(x: Any) -> Any:
        """A view of the array's memory on the CPU, in its layout, so that strides reach the function."""
        if not isinstance(x, np.ndarray | np.generic):
            return x
        x = np.asarray(x)
        if any(s < 0 or s % x.itemsize for s in x.strides):
            x = np.ascontiguousarray(x)
        made = torch.from_numpy(x if x.flags.writeable else x.copy()).to(device)
        return made.to(torch.bfloat16) if dtype == "bfloat16" and made.is_floating_point() else made

    def array(x: Any) -> Any:
        if x is None:
            return None  # an argument that does not learn
        return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()

    def function(*args):
        tensors = [tensor(a) for a in args]
        learning = [t.requires_grad_() for t in tensors if torch.is_tensor(t) and t.is_floating_point()]
        y = f(*tensors)

        def vjp(dy):
            cotangents = torch.autograd.grad(y, learning, tensor(dy), retain_graph=True, allow_unused=True)
            return tuple(map(array, cotangents)) if len(cotangents) > 1 else array(cotangents[0])

        return array(y), vjp

    return function
