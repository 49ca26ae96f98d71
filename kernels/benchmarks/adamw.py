"""A step of AdamW on a GPU, over all parameters of a model, beside PyTorch's fused one; `timing.py` says how.

Steps follow each other as in a training loop, without a graph: Python, the table of addresses and the launch are in the
time, which is what counts for a few small tensors (adapters); for many bytes they hide behind the kernel of the step
before. A graph would also keep the number of the step.

**The same work?** In float32 both move the same bytes, and parameters are compared after the first step, within a
bound: PyTorch's roots and quotients are not always the nearest numbers. With bfloat16 parameters its moments are
bfloat16 too: it moves 14 bytes a parameter where ours moves 22.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Machine, Row, agreement, row

from minift_kernels.optim.adamw import AdamW

DTYPES = (torch.float32, torch.bfloat16)
LAYERS, WIDTH, INNER, RANK = 16, 2048, 8192, 16
STEPS = 20  # between two events
WITHIN = {torch.float32: 2**-18, torch.bfloat16: 2**-7}  # of the largest parameter
RATE, DECAY = 1e-3, 0.1


def adapters() -> list[tuple[int, ...]]:
    """LoRA on the seven matrices of each layer: many small tensors."""
    inputs = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
    return [shape for _ in range(LAYERS) for out, in_ in inputs for shape in ((RANK, in_), (out, RANK))]


def layers() -> list[tuple[int, ...]]:
    """All weights of the layers: a thousand million parameters, and small gains among them."""
    of_one = [(WIDTH,)] * 2 + [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
    return of_one * LAYERS


MODELS = {"adapters": adapters, "layers": layers}


def rows(on: Machine, replays: int) -> list[Row]:
    """Both optimizers on the same parameters and gradients."""
    found = []
    for model, shapes in MODELS.items():
        for dtype in DTYPES:
            arrays = {f"p{i}": on.random(*shape, dtype=dtype) for i, shape in enumerate(shapes())}
            gradients = {name: torch.randn_like(a) * 1e-3 for name, a in arrays.items()}
            leaves = {name: a.clone().requires_grad_() for name, a in arrays.items()}
            steps = contenders(on, arrays, leaves, gradients)
            for step in steps.values():
                step()
            agreed = agreement(list(arrays.values()), [leaf.detach() for leaf in leaves.values()])
            assert agreed["difference"] <= WITHIN[dtype], f"{model}: off by {agreed['difference']:.2g} from PyTorch's"
            n, size = sum(a.numel() for a in arrays.values()), dtype.itemsize
            about = f"{model} in {str(dtype).removeprefix('torch.')}: {n:,} numbers in {len(arrays)} tensors"
            moved = {"minift": 3 * size + 16, "torch, fused": 7 * size}  # bytes a parameter
            for what, step in steps.items():
                found.append(row(on, what, about, n * moved[what], 0, [step] * STEPS, replays, captured=False) | agreed)
    return found


def contenders(on: Machine, arrays: dict, leaves: dict, gradients: dict) -> dict[str, Callable]:
    """A step of ours on `arrays`, a step of theirs on `leaves`."""
    ours = AdamW(weight_decay=DECAY)
    for name, leaf in leaves.items():
        leaf.grad = gradients[name]
    groups = [  # matrices decay, vectors do not
        {"params": [x for x in leaves.values() if (x.dim() >= 2) == decays], "weight_decay": DECAY * decays}
        for decays in (True, False)
    ]
    theirs = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE, eps=ours.eps, fused=True)
    return {"minift": lambda: ours.update(arrays, gradients, RATE, backend=on.backend), "torch, fused": theirs.step}
