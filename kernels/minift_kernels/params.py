"""A model's parameters from NumPy to torch and back: every kind of weight, by name.

What learns is float32 (or float64, if it was), on any device: these are the master weights to which small steps are
added, and 16 bits would swallow most of them. It asks for a gradient. What is frozen is only multiplied with, and takes
`dtype`, 16 bits on a GPU. Codes and scales keep their bytes: they are what the model is.

Nothing shares memory with what it was made from, so a step of an optimizer on one side is not seen on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minift.nn import weight as reference
from minift.peft import lora as reference_lora
from minift.peft import tuned as reference_tuned
from minift.quant import double_quant as reference_double_quant
from minift.quant import int8_vectorwise as reference_int8
from minift.quant import nf4 as reference_nf4
from minift.quant.sixteen import SixteenBitTensor
from minift_kernels.nn.weight import Frozen, Params
from minift_kernels.peft.lora import LoRA
from minift_kernels.peft.tuned import Tuned
from minift_kernels.quant.double_quant import DoubleQuantizedScales
from minift_kernels.quant.int8_vectorwise import Int8Tensor
from minift_kernels.quant.nf4 import NF4Tensor


def from_numpy(
    params: Mapping[str, Any], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The reference's parameters as tensors on a device; what is frozen takes `dtype`, what learns stays as it is.

    TypeError for a value that is no weight."""
    return {name: _tensors(weight, name, torch.device(device), dtype) for name, weight in params.items()}


def _tensors(w: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    def copy(array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=device)  # copies, also on the CPU

    def learning(array: np.ndarray) -> Tensor:
        return copy(array.astype(np.promote_types(array.dtype, np.float32))).requires_grad_()

    def scales(s: Any) -> Tensor | DoubleQuantizedScales:
        if isinstance(s, np.ndarray):
            return copy(s)
        codes, absmax, offset, code = map(copy, (s.codes, s.absmax, s.offset, s.code))
        return DoubleQuantizedScales(codes, absmax, offset, s.block_size, code)

    def kept(base: Any) -> Any:
        return _tensors(base, name, device, dtype)

    match w:
        case np.ndarray():
            return learning(w)
        case reference.Frozen():
            return Frozen(copy(w.array).to(dtype))
        case SixteenBitTensor():
            return Frozen(copy(w.dense()).to(dtype))
        case reference_nf4.NF4Tensor():
            return NF4Tensor(copy(w.codes), scales(w.absmax), w.shape, w.block_size)
        case reference_int8.Int8Tensor():
            return Int8Tensor(copy(w.codes), copy(w.absmax), w.threshold)
        case reference_lora.LoRA():
            A, B = learning(w.A), learning(w.B)
            return LoRA(kept(w.base), A, B, w.lora_alpha, w.use_rslora, w.lora_dropout)
        case reference_tuned.Tuned():
            return Tuned(kept(w.base), learning(w.array))
    raise TypeError(
        f"{name}: {type(w).__name__}, needed an ndarray, Frozen, SixteenBitTensor, NF4Tensor, LoRA, Tuned or Int8Tensor"
    )


def to_numpy(params: Params) -> dict[str, Any]:
    """The same parameters as the reference's: the inverse. 16-bit numbers become float32, which holds them exactly.

    TypeError for a value that is no weight."""
    return {name: _arrays(weight, name) for name, weight in params.items()}


def _arrays(w: Any, name: str) -> Any:
    def copy(tensor: Tensor) -> np.ndarray:
        tensor = tensor.detach()
        wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        return wide.cpu().numpy().copy()

    def scales(s: Any) -> np.ndarray | reference_double_quant.DoubleQuantizedScales:
        if isinstance(s, Tensor):
            return copy(s)
        codes, absmax, code = map(copy, (s.codes, s.absmax, s.code))
        offset = np.float32(s.offset.item())
        return reference_double_quant.DoubleQuantizedScales(codes, absmax, offset, s.block_size, code)

    match w:
        case Tensor():
            return copy(w)
        case Frozen():
            return reference.Frozen(copy(w.array))
        case NF4Tensor():
            return reference_nf4.NF4Tensor(copy(w.codes), scales(w.absmax), w.shape, w.block_size)
        case Int8Tensor():
            return reference_int8.Int8Tensor(copy(w.codes), copy(w.absmax), w.threshold)
        case LoRA():
            A, B = copy(w.A), copy(w.B)
            return reference_lora.LoRA(_arrays(w.base, name), A, B, w.lora_alpha, w.use_rslora, w.lora_dropout)
        case Tuned():
            return reference_tuned.Tuned(_arrays(w.base, name), copy(w.array))
    raise TypeError(f"{name}: {type(w).__name__}, needed a Tensor, Frozen, NF4Tensor, LoRA, Tuned or Int8Tensor")
