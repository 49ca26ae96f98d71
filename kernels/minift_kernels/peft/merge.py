"""Merging an adapter into the weights it was trained on, on torch tensors: the twin of `minift.peft.merge`, which says
what each of the three ways loses. Nothing here learns, and no gradient passes through it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from minift.peft.merge import Way
from minift_kernels.nn.weight import Frozen, Params, dense, freeze
from minift_kernels.peft import lora, qlora
from minift_kernels.peft.lora import LoRA
from minift_kernels.peft.tuned import Tuned
from minift_kernels.quant import double_quant
from minift_kernels.quant.nf4 import NF4Tensor


def exact_way(trained: Params) -> Way:
    """The way that gives the trained model: "dequantized" if the adapter lies over NF4 weights, else "original"."""
    over_nf4 = any(isinstance(w, LoRA) and isinstance(w.base, NF4Tensor) for w in trained.values())
    return "dequantized" if over_nf4 else "original"


def merge_dequantized(trained: Params) -> dict[str, Any]:
    """W_q + s B A, every weight dense. A base that is not quantized is quantized and dequantized first, as
    `qlora.attach` would have done. ValueError where there is no adapter."""
    if exact_way(trained) != "dequantized":
        trained = _over(qlora.quantize(lora.bare(trained)), trained)
    return _all_dense(lora.merge(trained))


def merge_original(trained: Params, original: Params) -> dict[str, Any]:
    """W + s B A, every weight dense. `original` holds the W that the base was made from, by name.

    ValueError where there is no adapter."""
    return _all_dense(lora.merge(_over(original, trained)))


def merge_requantized(trained: Params, block_size: int = 64, use_double_quant: bool = False) -> dict[str, Any]:
    """quantize(W_trained) in every linear layer, W_trained in the head if that is adapted.

    Layers that are 4-bit already and carry no adapter keep every bit, their scales apart from `use_double_quant`.
    ValueError where there is no adapter."""
    quantized = qlora.quantize(lora.merge(trained), "all-linear", block_size, use_double_quant)
    return {name: _scales_as_asked(w, use_double_quant) for name, w in quantized.items()}


def merge_error(merged: Params, trained: Params) -> float:
    """√(Σ ‖W_merged − W_trained‖²) / √(Σ ‖s B A‖²) over the adapted layers, in float64.

    0.0 where nothing is lost, also of an adapter that does nothing yet (B = 0); infinity where that one is off."""
    lost = contributed = 0.0
    for name, w in trained.items():
        if isinstance(w, LoRA):
            delta = w.scaling * (w.B.detach().double() @ w.A.detach().double())
            contributed += squares(delta)
            lost += squares(delta + dense(w.base) - dense(merged[name]))
    return math.sqrt(lost) / math.sqrt(contributed) if contributed else math.inf if lost else 0.0


def squares(x: Tensor) -> float:
    """‖x‖², in float64. Those of several layers add up."""
    flat = x.detach().reshape(-1).to(torch.float64)
    return float(flat @ flat)


def _over(base: Params, trained: Params) -> dict[str, Any]:
    """The same adapters, and weights trained in full, over other weights."""
    other = freeze(base)
    return {
        name: dataclasses.replace(w, base=other[name]) if isinstance(w, LoRA | Tuned) else other[name]
        for name, w in trained.items()
    }


def _all_dense(params: Params) -> dict[str, Any]:
    return {name: Frozen(dense(w).detach()) for name, w in params.items()}


def _scales_as_asked(w: Any, use_double_quant: bool) -> Any:
    if not isinstance(w, NF4Tensor) or isinstance(w.absmax, Tensor) is not use_double_quant:
        return w
    return double_quant.compress(w) if use_double_quant else double_quant.decompress(w)
