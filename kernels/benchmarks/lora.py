"""QLoRA's linear layer on a GPU, forward and backward, beside PEFT on bitsandbytes, in one run.

    python kernels/benchmarks/lora.py                   prints a table, writes runs/lora_<device>.json

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.

**What is timed.** y = layer(x), and y with the gradients of x, A and B, for one linear layer whose base is in NF4 with
double-quantized scales: `minift_kernels.modules.QLoRALinear`, and PEFT's layer over `bitsandbytes.nn.Linear4bit` with
the same A and B and the same x. Without dropout their results are compared; `difference` is the largest one of y,
divided by the largest y.

A figure is the median over the repeats of a CUDA event before and after, with the fastest and the slowest; between
repeats the L2 cache is overwritten. It contains what Python and launching take where the GPU would wait for them, as
in a training step without graphs. Dropout is timed with and without, as PEFT's mask is stored and ours is not. `peak`
is the memory that forward and backward allocated on top of what was there.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from rich.console import Console
from rich.table import Table

from minift_kernels.modules import QLoRALinear

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # (out, in): attention, and the two sides of an MLP
KEY = 12345

Row = dict[str, Any]
Call = Callable[[], Any]


@dataclass
class Benchmark:
    """Time QLoRA's linear layer beside PEFT and bitsandbytes."""

    rows: tuple[int, ...] = (1, 16, 512, 8192)
    """Rows of x: a token, a batch of them, a short and a long batch of training."""
    r: int = 16
    """The rank."""
    lora_dropout: tuple[float, ...] = (0.0, 0.1)
    """Probabilities to time."""
    repeats: int = 50
    """How often each call is timed."""
    out: Path | None = None
    """Where the results go; runs/lora_<device>.json if not given."""

    def run(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("kernels/benchmarks/lora.py needs a CUDA device")
        import bitsandbytes

        import peft

        properties = torch.cuda.get_device_properties(0)
        self.flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
        rows = [
            row
            for shape in SHAPES
            for p in self.lora_dropout
            for n_rows in self.rows
            for row in self.layer(shape, n_rows, p)
        ]
        machine = {
            "device": properties.name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "peft": peft.__version__,
            "bitsandbytes": bitsandbytes.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
        }
        self.show(rows, properties.name)
        name = re.sub(r"\W+", "_", properties.name).strip("_")
        out = self.out or Path(f"runs/lora_{name}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")

    def layer(self, shape: tuple[int, int], n_rows: int, p: float) -> list[Row]:
        """All contenders for one layer, on the same numbers, in bfloat16 with A and B in float32."""
        d_out, d_in = shape
        linear = torch.nn.Linear(d_in, d_out, bias=False, device="cuda")
        ours = QLoRALinear.from_linear(linear, self.r, 2 * self.r, lora_dropout=p)
        torch.nn.init.normal_(ours.lora_B.weight, std=0.02)
        theirs = peft_layer(linear, ours, p)
        x = torch.randn(n_rows, d_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(n_rows, d_out, device="cuda", dtype=torch.bfloat16)
        A, B = ours.lora_A.weight, ours.lora_B.weight
        contenders: dict[str, tuple[Callable, list[torch.Tensor]]] = {
            "minift_kernels": (lambda: ours(x, KEY), [x, A, B]),
            "PEFT, bitsandbytes": (lambda: theirs(x), [x, *(t for t in theirs.parameters() if t.requires_grad)]),
        }
        about = {"shape": [d_out, d_in], "rows": n_rows, "r": self.r, "lora_dropout": p}
        wanted, found = theirs.eval()(x), ours.eval()(x)
        difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
        ours.train()
        theirs.train()
        results = []
        for name, (forward, learning) in contenders.items():

            def both(forward=forward, learning=learning):
                return torch.autograd.grad(forward(), learning, dy)

            row = about | {"what": name, "forward": self.timed(forward), "both": self.timed(both)}
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            row["peak"] = torch.cuda.max_memory_allocated() - before
            results.append(row | {"difference": difference})
        return results

    def timed(self, call: Call) -> Row:
        """Seconds of a call: median, fastest and slowest."""
        for _ in range(3):
            call()
        times = []
        for _ in range(self.repeats):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}

    def show(self, rows: list[Row], device: str) -> None:
        table = Table(title=f"QLoRA's linear layer on {device}, r = {self.r}, bfloat16")
        for heading in ("layer", "rows", "dropout", "", "forward, µs", "and backward, µs", "peak, MB"):
            table.add_column(heading, justify="left" if heading in ("layer", "") else "right")
        for row in rows:
            table.add_row(
                f"{row['shape'][0]} x {row['shape'][1]}",
                str(row["rows"]),
                f"{row['lora_dropout']:g}",
                row["what"],
                f"{row['forward']['seconds'] * 1e6:.1f}",
                f"{row['both']['seconds'] * 1e6:.1f}",
                f"{row['peak'] / 1e6:.1f}",
            )
        Console().print(table)


def peft_layer(linear: torch.nn.Linear, ours: QLoRALinear, p: float) -> torch.nn.Module:
    """PEFT's layer over bitsandbytes', with the weight and the adapter of ours, on the device of `linear`."""
    import bitsandbytes

    import peft

    base = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
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


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
