"""SwiGLU and GELU on a GPU beside PyTorch, torch.compile and Liger; `timing.py` says how, `run.py` runs it.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import Machine, Row, both, compare, compiled, forward, in_float32
from torch.nn import functional

from minift_kernels.nn import mlp

SHAPES = ((2048, 8192), (8192, 14336))  # tokens, features between the two halves of the block
DTYPE = torch.bfloat16
WITHIN = 2**-6  # of the largest number: PyTorch rounds to 16 bits between its operations, ours and Liger at the end

PLAIN: dict[str, Callable] = {
    "swiglu": lambda gate, up: functional.silu(gate) * up,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def rows(on: Machine, replays: int) -> list[Row]:
    """Of each activation the forward pass alone, and both passes."""
    found = []
    for name, n_inputs in (("swiglu", 2), ("gelu", 1), ("gelu_tanh", 1)):
        for shape in SHAPES:
            size = DTYPE.itemsize * shape[0] * shape[1]
            # the cotangent first, then what the function is given
            inputs = [
                [on.random(*shape, dtype=DTYPE, learns=i > 0) for i in range(1 + n_inputs)] for _ in on.sets(size)
            ]
            about, once = f"{name}, {shape[0]} x {shape[1]}", (n_inputs + 1) * size
            functions = contenders(name, on.backend)
            given = [args for _, *args in inputs]
            wanted = in_float32(forward(PLAIN[name]), *given[0])
            values = {what: forward(f) for what, f in functions.items()}
            found += compare(on, about, once, 0, values, given, replays, wanted, WITHIN)
            moved = once + (2 * n_inputs + 1) * size
            wanted = in_float32(both(PLAIN[name]), *inputs[0])
            gradients = {what: both(f) for what, f in functions.items()}
            found += compare(on, f"{about}, both passes", moved, 0, gradients, inputs, replays, wanted, WITHIN)
    return found


def contenders(name: str, backend: str) -> dict[str, Callable]:
    """Functions of the inputs, ours first; Liger's if it is installed."""
    found = {
        "minift": partial(getattr(mlp, name), backend=backend),
        "torch": PLAIN[name],
        "torch.compile": compiled(PLAIN[name]),
    }
    if name == "swiglu":
        try:
            from liger_kernel.transformers.functional import liger_swiglu
        except ImportError:
            return found
        found["liger"] = liger_swiglu
    return found
