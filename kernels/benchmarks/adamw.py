"""A step of AdamW on a GPU, over all parameters of a model, with moments of 32 and of 8 bits; `timing.py` says how.

Peers are PyTorch's fused AdamW and, for 8 bits, bitsandbytes'.

Steps follow each other as in a training loop, without a graph: Python, the table of addresses and the launch are in the
time, which is what counts for a few small tensors (adapters); for many bytes they hide behind the kernel of the step
before. A graph would also keep the number of the step.

**The same work?** In float32 both move the same bytes, and parameters are compared after the first step, within a
bound: PyTorch's roots and quotients are not always the nearest numbers. With bfloat16 parameters its moments are
bfloat16 too: it moves 14 bytes a parameter where ours moves 22.

With 8 bits both keep codes of the same two maps in blocks of 256, and 32 bits below 4,096 numbers. Ours looks at the
gradients first, for one that is not finite, which is in its time and not in its floor.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from timing import Machine, Row, agreement, installed, row

from minift_kernels.optim.adamw import AdamW
from minift_kernels.optim.adamw8bit import AdamW8bit

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
            moved = {"minift": n * (3 * size + 16), "torch, fused": n * 7 * size}
            for what, step in steps.items():
                found.append(row(on, what, about, moved[what], 0, [step] * STEPS, replays, captured=False) | agreed)
            found += rows_8bit(on, f"8 bits, {about}", arrays, gradients, replays)
    return found


def rows_8bit(on: Machine, about: str, arrays: dict, gradients: dict, replays: int) -> list[Row]:
    """The first step is that of 32 bits, in which nothing has been rounded to codes yet: by it they are compared."""
    exactly, ours, theirs = ({name: a.clone() for name, a in arrays.items()} for _ in range(3))
    AdamW(weight_decay=DECAY).update(exactly, gradients, RATE, backend=on.backend)
    optimizer, found = AdamW8bit(weight_decay=DECAY), []
    steps = {"minift": lambda: optimizer.update(ours, gradients, RATE, backend=on.backend)}
    if installed("bitsandbytes"):
        steps["bitsandbytes"] = bitsandbytes(theirs, gradients)
    for what, step in steps.items():
        step()
        moved = [a.detach() for a in (ours if what == "minift" else theirs).values()]
        agreed = agreement(moved, list(exactly.values()))
        right = agreed["difference"] <= WITHIN[moved[0].dtype] or what != "minift"
        assert right, f"{about}: off by {agreed['difference']:.2g} from 32 bits"
        size = sum(3 * a.nbytes for a in arrays.values()) + 2 * optimizer.nbytes  # moments are read and written
        found.append(row(on, what, about, size, 0, [step] * STEPS, replays, captured=False) | agreed)
    return found


def bitsandbytes(arrays: dict, gradients: dict) -> Callable:
    """A step of theirs on `arrays`, with the same decay."""
    from bitsandbytes.optim import AdamW8bit as Theirs

    for name, a in arrays.items():
        a.requires_grad_().grad = gradients[name]
    return Theirs(by_decay(arrays.values()), lr=RATE).step


def contenders(on: Machine, arrays: dict, leaves: dict, gradients: dict) -> dict[str, Callable]:
    """A step of ours on `arrays`, a step of theirs on `leaves`."""
    ours = AdamW(weight_decay=DECAY)
    for name, leaf in leaves.items():
        leaf.grad = gradients[name]
    theirs = torch.optim.AdamW(by_decay(leaves.values()), lr=RATE, eps=ours.eps, fused=True)
    return {"minift": lambda: ours.update(arrays, gradients, RATE, backend=on.backend), "torch, fused": theirs.step}


def by_decay(leaves: Iterable[torch.Tensor]) -> list[dict]:
    """Matrices decay, vectors do not."""
    decaying, others = [], []
    for leaf in leaves:
        (decaying if leaf.dim() >= 2 else others).append(leaf)
    groups = {"params": decaying, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}
    return [group for group in groups if group["params"]]
