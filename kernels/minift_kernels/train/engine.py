"""Training in torch: the other engine of `minift.train.engine`.

Frozen weights are kept in 16 bits on a GPU, in float32 on a CPU; what learns, its gradients and the optimizer's moments
are float32 on both, or codes of 8 bits, which a checkpoint holds alike whichever engine wrote it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from minift.quant.blockwise import BlockwiseTensor as ReferenceBlockwise
from minift.train.engine import Engine
from minift_kernels.nn.weight import trainable
from minift_kernels.optim.adamw import AdamW, clip_by_global_norm
from minift_kernels.optim.adamw8bit import AdamW8bit
from minift_kernels.optim.paged import PagedAdamW
from minift_kernels.optim.pager import Pager
from minift_kernels.params import from_numpy
from minift_kernels.quant.blockwise import BlockwiseTensor
from minift_kernels.quant.codebooks import on_device
from minift_kernels.train import sft


def on(device: str) -> Engine:
    """An engine on "cpu", "cuda" or "cuda:1". ValueError where torch sees no such device."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no GPU here; use --device cpu")
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32

    def send(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: _moment(array, place) for name, array in arrays.items()}

    def value(params, batch, config, normalizer) -> float:
        with torch.no_grad():
            return float(loss(params, batch, config, normalizer)[0])

    def optimizer(name, page_budget, folder, **state) -> AdamW | AdamW8bit | PagedAdamW:
        """What does not fit the page budget lies in the host's memory: no file is needed."""
        if name == "adamw":
            return AdamW(**state)
        if name == "adamw8bit":
            return AdamW8bit(**state)
        return PagedAdamW(AdamW8bit(**state), Pager(page_budget, place))

    there, loss = partial(from_numpy, device=place, dtype=dtype), partial(sft.loss, dtype=dtype)
    return Engine(there, trainable, send, fetch, optimizer, clip_by_global_norm, loss, value)


def fetch(arrays: dict[str, Any]) -> dict[str, Any]:
    """Copies in NumPy, of tensors and of moments in 8 bits."""
    return {name: _array(tensor) for name, tensor in arrays.items()}


def _moment(array: Any, place: torch.device) -> Any:
    """A tensor of an array; of a moment in 8 bits one whose maps the optimizer knows for its own."""
    if not isinstance(array, ReferenceBlockwise):
        return torch.tensor(array, device=place)
    codes, absmax = (torch.tensor(part, device=place) for part in (array.codes, array.absmax))
    return BlockwiseTensor(codes, absmax, on_device(array.code, place), array.shape, array.block_size)


def _array(tensor: Any) -> Any:
    if not isinstance(tensor, BlockwiseTensor):
        return tensor.detach().cpu().numpy().copy()
    codes, absmax, code = (part.cpu().numpy().copy() for part in (tensor.codes, tensor.absmax, tensor.code))
    return ReferenceBlockwise(codes, absmax, code, tensor.shape, tensor.block_size)
