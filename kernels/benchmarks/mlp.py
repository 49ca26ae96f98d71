"""SwiGLU and GELU on a GPU beside PyTorch, torch.compile and Liger; `timing.py` says how, `run.py` runs it.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from timing import Machine, Row, row, sets
from torch.nn import functional

from minift_kernels.nn import mlp

SHAPES = ((2048, 8192), (8192, 14336))  # tokens, features between the two halves of the block
DTYPE = torch.bfloat16


def rows(on: Machine, replays: int) -> list[Row]:
    """Of each activation the forward pass alone, and both passes."""
    found = []
    for name, n_inputs in (("swiglu", 2), ("gelu", 1), ("gelu_tanh", 1)):
        for shape in SHAPES:
            size = DTYPE.itemsize * shape[0] * shape[1]
            inputs = [
                [torch.randn(shape, dtype=DTYPE, device="cuda", requires_grad=True) for _ in range(n_inputs + 1)]
                for _ in range(sets(4 * on.l2_bytes, size))
            ]
            about = f"{name}, {shape[0]} x {shape[1]}"
            for what, f in contenders(name).items():
                calls = [functools.partial(_forward, f, *args) for *args, _ in inputs]
                found.append(row(on, what, about, (n_inputs + 1) * size, 0, calls, replays))
            for what, f in contenders(name).items():
                calls = [functools.partial(_both, f, dy.detach(), *args) for *args, dy in inputs]
                moved = (n_inputs + 1) * size + (2 * n_inputs + 1) * size
                found.append(row(on, what, f"{about}, both passes", moved, 0, calls, replays))
    return found


def contenders(name: str) -> dict[str, Callable]:
    """Functions of the inputs, ours first; Liger's if it is installed."""
    plain: dict[str, Callable] = {
        "swiglu": lambda gate, up: functional.silu(gate) * up,
        "gelu": functional.gelu,
        "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    }
    found = {"minift": getattr(mlp, name), "torch": plain[name], "torch.compile": torch.compile(plain[name])}
    if name == "swiglu":
        try:
            from liger_kernel.transformers.functional import liger_swiglu
        except ImportError:
            return found
        found["liger"] = liger_swiglu
    return found


def _forward(f: Callable, *args: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return f(*args)


def _both(f: Callable, dy: torch.Tensor, *args: torch.Tensor) -> tuple:
    return torch.autograd.grad(f(*args), args, dy)
