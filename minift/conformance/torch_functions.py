"""A function on torch tensors, as the suite wants it: NumPy arrays in, NumPy arrays out.

`differentiable` gives `y, vjp`, whose pullback is autograd's: floating arguments ask for a gradient. `plain` is for
what is not differentiated, such as a quantizer; `on_tensors` for what may overwrite its arguments, such as a step of an
optimizer, and `optimizer` for one with a state. What is no array (a number, a string) is handed on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def tensor(x: Any, device: str = "cpu", dtype: str | None = None) -> Any:
    """A view of the array's memory on the CPU, in its layout, so that strides reach the function; a copy elsewhere.

    `dtype` "bfloat16" converts floating arrays. A dictionary becomes one of tensors."""
    import torch

    if isinstance(x, dict):
        return {name: tensor(value, device, dtype) for name, value in x.items()}
    if not isinstance(x, np.ndarray | np.generic):
        return x
    x = np.asarray(x)
    if any(s < 0 or s % x.itemsize for s in x.strides):
        x = np.ascontiguousarray(x)
    made = torch.from_numpy(x if x.flags.writeable else x.copy()).to(device)
    return made.to(torch.bfloat16) if dtype == "bfloat16" and made.is_floating_point() else made


def array(x: Any) -> Any:
    """A tensor's numbers, bfloat16 as float32; of a dictionary or tuple, those of its tensors."""
    import torch

    if isinstance(x, dict):
        return {name: array(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(map(array, x))
    if not torch.is_tensor(x):
        return x
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()


def differentiable(f: Callable, device: str = "cpu", dtype: str | None = None) -> Callable:
    """`f(*tensors) -> tensor` as a function of arrays that returns `y, vjp`; a frozen argument's cotangent is None.

    Of several results, a tuple, the cotangents may be left out or None. `dtype` "bfloat16" converts floating arrays on
    the way in and out; by default tensors have the arrays' types."""

    def function(*args):
        import torch

        tensors = [tensor(a, device, dtype) for a in args]
        learning = [t.requires_grad_() for t in tensors if torch.is_tensor(t) and t.is_floating_point()]
        y = f(*tensors)

        def vjp(*dys):
            results = zip(y if isinstance(y, tuple) else (y,), dys, strict=False)
            used = [(result, tensor(dy, device, dtype)) for result, dy in results if dy is not None]
            outputs, upstream = zip(*used, strict=True)
            cotangents = torch.autograd.grad(outputs, learning, upstream, retain_graph=True, allow_unused=True)
            return tuple(map(array, cotangents)) if len(cotangents) > 1 else array(cotangents[0])

        return array(y), vjp

    return function


def plain(f: Callable, device: str = "cpu", dtype: str | None = None) -> Callable:
    """`f(*tensors)` as a function of arrays, where nothing is differentiated: a tensor, a tuple of them, or an object
    with `.codes` and the like becomes an array or a tuple."""

    def function(*args):
        found = f(*(tensor(a, device, dtype) for a in args))
        parts = tuple(getattr(found, name) for name in ("codes", "absmax", "offset") if hasattr(found, name))
        return array(parts or found)

    return function


def on_tensors(f: Callable, device: str = "cpu", bfloat16: tuple[int, ...] = ()) -> Callable:
    """`f` of arrays, and of dictionaries of arrays, which it may overwrite; tensors in what it returns become arrays.

    The arguments at the places `bfloat16` are converted on the way in and out; others have their arrays' types."""

    def write_back(x: Any, changed: Any) -> None:
        if isinstance(x, dict):
            for name in x:
                write_back(x[name], changed[name])
        elif isinstance(x, np.ndarray) and x.flags.writeable:
            x[...] = array(changed)

    def function(*args):
        tensors = [tensor(a, device, "bfloat16" if place in bfloat16 else None) for place, a in enumerate(args)]
        result = f(*tensors)
        for before, after in zip(args, tensors, strict=True):
            write_back(before, after)
        return array(result)

    return function


def optimizer(make: Callable, device: str = "cpu", bfloat16: bool = False, **options: Any) -> Callable:
    """`make(beta1, beta2, eps, weight_decay, step, m, v)`, an optimizer of tensors, as one of arrays.

    `options` go to every `update`. With `bfloat16` the parameters and gradients are converted, the moments never."""

    class OfArrays:
        def __init__(self, *settings):
            *numbers, m, v = settings
            self.inner = on_tensors(lambda m, v: [make(*numbers, m, v)], device)(m, v)[0]

        @property
        def step(self) -> int:
            return self.inner.step

        @property
        def m(self) -> dict:
            return array(self.inner.m)

        @property
        def v(self) -> dict:
            return array(self.inner.v)

        def update(self, arrays, gradients, learning_rate):
            step = on_tensors(lambda *args: self.inner.update(*args, **options), device, (0, 1) if bfloat16 else ())
            step(arrays, gradients, learning_rate)

    return OfArrays
