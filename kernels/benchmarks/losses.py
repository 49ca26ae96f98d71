"""Cross-entropy on a GPU beside PyTorch, torch.compile and Liger; `timing.py` says how, `run.py` runs it.

Each figure is of both passes. Behind an output matrix, `torch` is what one writes first: all logits at once, where they
fit into memory. Liger writes the gradient over the logits that it is given, so it comes last. It also waits for a
number from the GPU, the count of labels, which no graph can hold: so all calls follow each other without one.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import Machine, Row, both, compare, compiled, in_float32
from torch.nn import functional

from minift_kernels.nn import losses

LOGITS = ((4096, 32000), (4096, 128256))  # tokens, vocabulary
HEADS = ((4096, 32000, 4096), (4096, 128256, 2048))  # tokens, vocabulary, features
DTYPE = torch.bfloat16
WITHIN = 2**-6  # of the largest gradient: logits of 16 bits are off by 2⁻⁸ of themselves, and exp follows them


def rows(on: Machine, replays: int) -> list[Row]:
    """The loss of given logits, and of an output matrix."""
    found = []
    for n, vocab in LOGITS:
        size = DTYPE.itemsize * n * vocab
        inputs = [(None, on.random(n, vocab, dtype=DTYPE, learns=True), _labels(on, n, vocab)) for _ in on.sets(size)]
        contenders = {what: both(f) for what, f in of_logits(on.backend).items()}
        wanted = in_float32(both(functional.cross_entropy), *inputs[0])
        # read in both passes, and the gradient written
        found += compare(
            on,
            f"cross-entropy, {n} x {vocab}",
            3 * size,
            0,
            contenders,
            inputs,
            replays,
            wanted,
            WITHIN,
            captured=False,
        )
    for n, vocab, d in HEADS:
        size = DTYPE.itemsize * (n * d + vocab * d)
        inputs = [
            (
                None,
                on.random(n, d, dtype=DTYPE, learns=True),
                on.random(vocab, d, dtype=DTYPE, learns=True, scale=d**-0.5),
                _labels(on, n, vocab),
            )
            for _ in on.sets(size)
        ]
        operations = 3 * 2 * n * vocab * d  # logits, dx, dW
        contenders = {what: both(f) for what, f in of_matrix(on.backend).items()}
        wanted = in_float32(both(at_once), *inputs[0])
        about = f"output matrix and cross-entropy, {n} x {d} to {vocab}"
        found += compare(on, about, 2 * size, operations, contenders, inputs, replays, wanted, WITHIN, captured=False)
    return found


def of_logits(backend: str) -> dict[str, Callable]:
    """Functions of logits and labels, ours first; Liger's if it is installed."""
    found = {
        "minift": partial(losses.cross_entropy, backend=backend),
        "torch": functional.cross_entropy,
        "torch.compile": compiled(functional.cross_entropy),
    }
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return found
    return found | {"liger": liger_cross_entropy}


def of_matrix(backend: str) -> dict[str, Callable]:
    """Functions of x, W and labels."""
    found = {
        "minift": partial(losses.linear_cross_entropy, backend=backend),
        "torch": at_once,
        "torch.compile": compiled(at_once),
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return found
    return found | {"liger": liger_fused_linear_cross_entropy}


def at_once(x: torch.Tensor, W: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(x @ W.T, labels)


def _labels(on: Machine, n: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (n,), device=on.device)
