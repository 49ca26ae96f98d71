"""Merging an adapter into the weights that it was trained on: three ways, and what each of them loses.

An adapter trained over 4-bit weights (QLoRA) belongs to these. Besides what it was taught it has learned to mend what
quantization did to them:

    W_q = dequantize(quantize(W))        W_trained = W_q + s B A                                          (1)

So there are three models that one may call "merged":

    dequantized    W_q + s B A               what was trained, in 16 or 32 bits: exact up to rounding     (2)
    original       W + s B A                 off by W − W_q: the adapter mends what is not broken         (3)
    requantized    quantize(W_q + s B A)     4 bits again: what moves a weight by less than half a gap
                                             between two values of its block moves it not at all          (4)

An adapter trained over plain weights has W in the place of W_q in (1) and (4): for it (3) is exact, and (2) is off by
W_q − W. How far off a way is, is measured in units of the adapter's own contribution, over all adapted layers:

    error = √( Σ ‖W_merged − W_trained‖² ) / √( Σ ‖s B A‖² )                                              (5)

At 1 the merged weights are as far from the trained ones as the base without any adapter. NF4 loses 9 % of a normal
matrix, and what an adapter adds is often less. If it adds 10 %, the error of (3) is 0.92 and that of (4) 0.79; if it
adds 50 %, they are 0.18 and 0.21.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from minift.nn.weight import Frozen, Params, dense
from minift.peft import lora, qlora
from minift.peft.lora import LoRA
from minift.peft.tuned import Tuned
from minift.quant import double_quant
from minift.quant.nf4 import NF4Tensor

Way = Literal["dequantized", "original", "requantized"]


def exact_way(trained: Params) -> Way:
    """The way that gives the trained model: "dequantized" if the adapter lies over NF4 weights, else "original"."""
    over_nf4 = any(isinstance(w, LoRA) and isinstance(w.base, NF4Tensor) for w in trained.values())
    return "dequantized" if over_nf4 else "original"


def merge_dequantized(trained: Params) -> dict[str, Any]:
    """W_q + s B A, every weight dense: equation (2).

    A base that is not quantized is quantized and dequantized first, as `qlora.attach` would have done. ValueError where
    there is no adapter."""
    if exact_way(trained) != "dequantized":
        trained = _over(qlora.quantize(_base(trained)), trained)
    return _all_dense(lora.merge(trained))


def merge_original(trained: Params, original: Params) -> dict[str, Any]:
    """W + s B A, every weight dense: equation (3). `original` holds the W that the base was made from, by name.

    ValueError where there is no adapter."""
    return _all_dense(lora.merge(_over(original, trained)))


def merge_requantized(trained: Params, block_size: int = 64, use_double_quant: bool = False) -> dict[str, Any]:
    """quantize(W_trained) in every linear layer, W_trained in the head if that is adapted: equation (4).

    For each element of a block with the largest magnitude a, and with the scale â that a is stored as,

        |Ŵ − W_trained| ≤ a (max_i (c_(i+1) − c_i) / 2 + 4u) + |â − a|        c the NF4 table, u = 2⁻²⁴   (6)

    up to the rounding of W_trained itself (`conformance.bounds.nf4`). Layers that are 4-bit already and carry no
    adapter keep every bit, their scales apart from `use_double_quant`. ValueError where there is no adapter."""
    merged = lora.merge(trained)
    quantized = qlora.quantize(merged, "all-linear", block_size, use_double_quant)
    return {name: _scales_as_asked(w, use_double_quant) for name, w in quantized.items()}


def merge_error(merged: Params, trained: Params) -> float:
    """√(Σ ‖W_merged − W_trained‖²) / √(Σ ‖s B A‖²) over the adapted layers, in float64: equation (5).

    0.0 where nothing is lost, also of an adapter that does nothing yet (B = 0); infinity where that one is off."""
    lost = contributed = 0.0
    for name, w in trained.items():
        if isinstance(w, LoRA):
            delta = w.scaling * (w.B.astype(np.float64) @ w.A.astype(np.float64))
            contributed += squares(delta)
            lost += squares(delta + dense(w.base) - dense(merged[name]))
    return math.sqrt(lost) / math.sqrt(contributed) if contributed else math.inf if lost else 0.0


def squares(x: np.ndarray) -> float:
    """‖x‖², in float64. Those of several layers add up."""
    flat = np.asarray(x, np.float64).ravel()
    return float(flat @ flat)


def _base(trained: Params) -> dict[str, Any]:
    return {name: w.base if isinstance(w, LoRA | Tuned) else w for name, w in trained.items()}


def _over(base: Params, trained: Params) -> dict[str, Any]:
    """The same adapters, and weights trained in full, over other weights."""
    other = {name: Frozen(w) if isinstance(w, np.ndarray) else w for name, w in base.items()}
    return {
        name: dataclasses.replace(w, base=other[name]) if isinstance(w, LoRA | Tuned) else other[name]
        for name, w in trained.items()
    }


def _all_dense(params: Params) -> dict[str, Any]:
    return {name: Frozen(dense(w)) for name, w in params.items()}


def _scales_as_asked(w: Any, use_double_quant: bool) -> Any:
    if not isinstance(w, NF4Tensor) or isinstance(w.absmax, np.ndarray) is not use_double_quant:
        return w
    return double_quant.compress(w) if use_double_quant else double_quant.decompress(w)
