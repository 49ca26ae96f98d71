"""QLoRA: a LoRA whose base is stored in 4 bits.                         (Dettmers et al. 2023, arXiv 2305.14314, eq. 5)

    y = x dequantize(W_nf4)ᵀ + s (x Aᵀ) Bᵀ                                                              (1)

There is nothing else to it: the frozen matrices become `NF4Tensor`s, which multiply by dequantizing themselves, and
`lora.attach` puts adapters on them. The gradient flows *through* the quantized weights into A and B; the weights
themselves never change, so their bytes do not either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from minift.nn.weight import Frozen, Params, dense
from minift.peft import lora
from minift.quant import double_quant, nf4
from minift.quant.sixteen import SixteenBitTensor


def quantize(
    params: Params,
    target_modules: str | Iterable[str] = "all-linear",
    block_size: int = 64,
    use_double_quant: bool = True,
) -> dict[str, Any]:
    """The same parameters with the linear layers in NF4; embeddings, norms and the head stay as they are.

    Layers that are 4-bit already are left alone. ValueError for NaN or infinity in a weight (with its name), or for a
    layer that carries an adapter: merge or detach it first."""
    quantized = dict(params)
    for name in lora.targets(params, target_modules):
        weight = params[name]
        if isinstance(weight, nf4.NF4Tensor):
            continue
        if not isinstance(weight, np.ndarray | Frozen | SixteenBitTensor):
            raise ValueError(f"{name} is {weight!r}: merge or detach the adapter before quantizing")
        try:
            q = nf4.quantize(dense(weight), block_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        quantized[name] = double_quant.compress(q) if use_double_quant else q
    return quantized


def attach(
    params: Params,
    target_modules: str | Iterable[str] = "all-linear",
    r: int = 8,
    lora_alpha: float = 16,
    *,
    rng: np.random.Generator,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    block_size: int = 64,
    use_double_quant: bool = True,
) -> dict[str, Any]:
    """Quantize every linear layer, then attach adapters to the targets (by default the same layers)."""
    quantized = quantize(params, "all-linear", block_size, use_double_quant)
    return lora.attach(
        quantized, target_modules, r, lora_alpha, rng=rng, use_rslora=use_rslora, lora_dropout=lora_dropout
    )
