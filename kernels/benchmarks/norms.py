"""RMSNorm and LayerNorm on a GPU beside PyTorch, torch.compile and Liger; `timing.py` says how, `run.py` runs it.

Bytes: x and y forward; backward dy and x again, and dx. Gains and statistics are small beside them.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import Machine, Row, both, compare, compiled, forward, in_float32
from torch.nn import functional

from minift_kernels.nn import norms

SHAPES = ((2048, 2048), (8192, 4096), (8192, 8192))  # tokens, features
DTYPE = torch.bfloat16
EPS = 1e-5
WITHIN = 2**-6  # of the largest number: Liger multiplies by the gain after rounding to 16 bits


def rows(on: Machine, replays: int) -> list[Row]:
    """Of each norm the forward pass alone, and both passes."""
    found = []
    for name in PLAIN:
        for n, d in SHAPES:
            size = DTYPE.itemsize * n * d
            # the cotangent first, then what the function is given
            inputs = [
                (
                    on.random(n, d, dtype=DTYPE),
                    on.random(n, d, dtype=DTYPE, learns=True),
                    *(on.random(d, dtype=DTYPE, learns=True) for _ in range(1 if name == "rms_norm" else 2)),
                )
                for _ in on.sets(size)
            ]
            about, functions = f"{name}, {n} x {d}", contenders(name, on.backend)
            given = [args for _, *args in inputs]
            wanted = in_float32(forward(PLAIN[name]), *given[0])
            values = {what: forward(f) for what, f in functions.items()}
            found += compare(on, about, 2 * size, 0, values, given, replays, wanted, WITHIN)
            wanted = in_float32(both(PLAIN[name]), *inputs[0])
            gradients = {what: both(f) for what, f in functions.items()}
            found += compare(on, f"{about}, both passes", 5 * size, 0, gradients, inputs, replays, wanted, WITHIN)
    return found


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, gain.shape, gain, EPS)


def layer_norm(x: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, gain.shape, gain, shift, EPS)


PLAIN: dict[str, Callable] = {"rms_norm": rms_norm, "layer_norm": layer_norm}


def contenders(name: str, backend: str) -> dict[str, Callable]:
    """Functions of x, the gain and the shift, ours first; Liger's if it is installed."""
    ours = partial(getattr(norms, name), eps=EPS, backend=backend)
    found = {"minift": ours, "torch": PLAIN[name], "torch.compile": compiled(PLAIN[name])}
    try:
        from liger_kernel.transformers.functional import liger_layer_norm, liger_rms_norm
    except ImportError:
        return found
    theirs = (
        partial(liger_rms_norm, eps=EPS, in_place=False) if name == "rms_norm" else partial(liger_layer_norm, eps=EPS)
    )
    return found | {"liger": theirs}
