"""QLoRA's linear layer on a GPU, forward and backward, beside PEFT on bitsandbytes; `timing.py` says how.

The base is in NF4 with double-quantized scales: `minift_kernels.modules.QLoRALinear`, and PEFT's layer over
`bitsandbytes.nn.Linear4bit` with the same A and B and the same x. Calls follow each other without a graph, so that time
contains what Python and launching take where the GPU would wait for them, as in a training step. Dropout is timed with
and without, as PEFT's mask is stored and ours is not; results are compared without.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from timing import Machine, Row, agreement, forward, row

from minift_kernels.modules import QLoRALinear

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # (out, in): attention, and the two sides of an MLP
ROWS = (1, 16, 512, 8192)  # a token, a batch of them, a short and a long batch of training
DROPOUT = (0.0, 0.1)
R = 16
DTYPE = torch.bfloat16
WITHIN = 2**-5  # of the largest number: theirs rounds to 16 bits after every product
KEY = 12345

# How a layer is called.
CALLS: dict[str, Callable] = {
    "minift": lambda layer, x: layer(x, KEY),
    "PEFT, bitsandbytes": lambda layer, x: layer(x),
}


def rows(on: Machine, replays: int) -> list[Row]:
    """The forward pass alone, and both passes; x, A and B learn."""
    found = []
    for d_out, d_in in SHAPES:
        linear = torch.nn.Linear(d_in, d_out, bias=False, device=on.device)
        for p in DROPOUT:
            ours = QLoRALinear.from_linear(linear, R, 2 * R, lora_dropout=p, backend=on.backend)
            torch.nn.init.normal_(ours.lora_B.weight, std=0.02)
            theirs = peft_layer(linear, ours, p)
            kept = sum(part.nbytes for part in (*ours.buffers(), *ours.parameters()))
            copies = {
                what: [deepcopy(layer) for _ in on.sets(kept)]
                for what, layer in zip(CALLS, (ours, theirs), strict=True)
            }
            for n in ROWS:
                moved = kept + DTYPE.itemsize * n * (d_in + d_out)
                operations = 2 * n * (d_in * d_out + R * (d_in + d_out))
                about = f"{n} rows, {d_in} to {d_out}, dropout {p:g}"
                data = [
                    (on.random(n, d_out, dtype=DTYPE), on.random(n, d_in, dtype=DTYPE, learns=True))
                    for _ in on.sets(moved)
                ]
                for passes, f, products in (("", value, 1), (", both passes", gradients, 2)):
                    agreed = [f(CALLS[what], *data[0], copies[what][0].eval()) for what in CALLS]
                    off = agreement(*agreed)["difference"]
                    assert off <= WITHIN, f"{about}: off by {off:.2g} from PEFT's"
                    for what in CALLS:
                        calls = [
                            partial(f, CALLS[what], *one, layer.train())
                            for one, layer in zip(data, copies[what], strict=False)
                        ]
                        about_both, floor = about + passes, (products * moved, products * operations)
                        timed = row(on, what, about_both, *floor, calls, replays, captured=False)
                        found.append(timed | {"difference": off})
    return found


def value(call: Callable, dy: torch.Tensor, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    return forward(call)(layer, x)


def gradients(call: Callable, dy: torch.Tensor, x: torch.Tensor, layer: torch.nn.Module) -> Any:
    """Of x, A and B."""
    learning = [t for t in layer.parameters() if t.requires_grad]
    return torch.autograd.grad(call(layer, x), [x, *learning], dy)


def peft_layer(linear: torch.nn.Linear, ours: QLoRALinear, p: float) -> torch.nn.Module:
    """PEFT's layer over bitsandbytes', with the weight and the adapter of ours, on the device of `linear`."""
    import bitsandbytes

    import peft

    base = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=DTYPE,
        compress_statistics=True,
        quant_type="nf4",
    )
    base.weight = bitsandbytes.nn.Params4bit(linear.weight.detach().cpu(), quant_type="nf4", requires_grad=False)
    config = peft.LoraConfig(
        target_modules=["0"], r=len(ours.lora_A.weight), lora_alpha=ours.lora_alpha, lora_dropout=p
    )
    layer = peft.get_peft_model(torch.nn.Sequential(base.to(linear.weight.device)), config).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.lora_A.weight)
        layer.lora_B["default"].weight.copy_(ours.lora_B.weight)
    return layer.to(linear.weight.device)
