"""Cross-entropy on a GPU beside PyTorch, torch.compile and Liger; `timing.py` says how, `run.py` runs it.

Each figure is of both passes. Behind an output matrix, `torch` is what one writes first: all logits at once, where they
fit into memory. Liger writes the gradient over the logits that it is given; the others leave them alone.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from timing import Machine, Row, row, sets
from torch.nn import functional

from minift_kernels.nn import losses

LOGITS = ((4096, 32000), (4096, 128256))  # tokens, vocabulary
HEADS = ((4096, 32000, 4096), (4096, 128256, 2048))  # tokens, vocabulary, features
DTYPE = torch.bfloat16


def rows(on: Machine, replays: int) -> list[Row]:
    """The loss of given logits, and of an output matrix."""
    found = []
    for n, vocab in LOGITS:
        size = DTYPE.itemsize * n * vocab
        inputs = [(_random(n, vocab), _labels(n, vocab)) for _ in range(sets(4 * on.l2_bytes, size))]
        for what, f in contenders().items():
            calls = [functools.partial(_both, f, (logits,), logits, labels) for logits, labels in inputs]
            # read in both passes, and the gradient written
            found.append(row(on, what, f"cross-entropy, {n} x {vocab}", 3 * size, 0, calls, replays))
    for n, vocab, d in HEADS:
        size = DTYPE.itemsize * (n * d + vocab * d)
        inputs = [(_random(n, d), _random(vocab, d), _labels(n, vocab)) for _ in range(sets(4 * on.l2_bytes, size))]
        operations = 3 * 2 * n * vocab * d  # logits, dx, dW
        for what, f in head_contenders().items():
            calls = [functools.partial(_both, f, (x, W), x, W, labels) for x, W, labels in inputs]
            about = f"output matrix and cross-entropy, {n} x {d} to {vocab}"
            found.append(row(on, what, about, 2 * size, operations, calls, replays))
    return found


def contenders() -> dict[str, Callable]:
    """Functions of logits and labels, ours first; Liger's if it is installed."""
    found = {
        "minift": losses.cross_entropy,
        "torch": functional.cross_entropy,
        "torch.compile": torch.compile(functional.cross_entropy),
    }
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return found
    return found | {"liger": liger_cross_entropy}


def head_contenders() -> dict[str, Callable]:
    """Functions of x, W and labels."""

    def at_once(x, W, labels):
        return functional.cross_entropy(x @ W.T, labels)

    found = {"minift": losses.linear_cross_entropy, "torch": at_once, "torch.compile": torch.compile(at_once)}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return found
    return found | {"liger": liger_fused_linear_cross_entropy}


def _both(f: Callable, learning: tuple, *args: torch.Tensor) -> tuple:
    return torch.autograd.grad(f(*args), learning)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda", requires_grad=True)


def _labels(n: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (n,), device="cuda")
