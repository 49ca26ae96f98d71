"""PEFT's LoRA layer, over given weights: the same call as `minift.peft.lora.forward`."""

from __future__ import annotations

from functools import cache
from typing import Any

from minift.conformance import torch_functions
from minift.conformance.implementations.quiet import absent
from minift.conformance.operation import Implementation


def implementations() -> list[Implementation]:
    try:
        import torch
        from peft.tuners.lora import layer as lora

        from peft import LoraConfig
    except ImportError as error:
        return [Implementation("peft", missing=absent(error))]

    @cache
    def layer(d_out: int, d_in: int, r: int) -> Any:
        return lora.Linear(torch.nn.Linear(d_in, d_out, bias=False), "default", LoraConfig(r=r), r=r, lora_alpha=1)

    def forward(x, W, A, B, scaling=1.0, p=0.0, dropout_key=None):
        if p and dropout_key is not None:
            raise NotImplementedError("dropout draws other numbers")
        module = layer(*W.shape, len(A))
        module.scaling["default"] = scaling
        weights = {"base_layer.weight": W.detach(), "lora_A.default.weight": A, "lora_B.default.weight": B}
        return torch.func.functional_call(module, weights, (x,))

    return [Implementation("peft", {"lora.forward": torch_functions.differentiable(forward)})]
