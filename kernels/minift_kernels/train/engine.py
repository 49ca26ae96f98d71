"""Training in torch: the other engine of `minift.train.engine`.

Frozen weights are kept in 16 bits on a GPU, in float32 on a CPU; what learns, its gradients and the optimizer's moments
are float32 on both.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from minift.train.engine import Engine
from minift_kernels.nn.weight import trainable
from minift_kernels.optim.adamw import AdamW, clip_by_global_norm
from minift_kernels.params import from_numpy
from minift_kernels.train import sft


def on(device: str) -> Engine:
    """An engine on "cpu", "cuda" or "cuda:1". ValueError where torch sees no such device."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no GPU here; use --device cpu")
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32

    def send(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: torch.tensor(array, device=place) for name, array in arrays.items()}

    def value(params, batch, config, normalizer) -> float:
        with torch.no_grad():
            return float(loss(params, batch, config, normalizer)[0])

    def optimizer(name, page_budget, folder, **state) -> AdamW:
        if name != "adamw":
            raise ValueError(f"--optimizer {name}: has no form for torch tensors yet; use --device cpu, or adamw")
        return AdamW(**state)

    there, loss = partial(from_numpy, device=place, dtype=dtype), partial(sft.loss, dtype=dtype)
    return Engine(there, trainable, send, fetch, optimizer, clip_by_global_norm, loss, value)


def fetch(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies in NumPy."""
    return {name: array.detach().cpu().numpy().copy() for name, array in arrays.items()}
