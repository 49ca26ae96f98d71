"""A step of AdamW on a GPU, over all parameters of a model: ours, PyTorch's fused one, and a copy of as many bytes.

    python kernels/benchmarks/adamw.py                  prints a table, writes runs/adamw_<device>.json

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.

**What is timed.** `steps` updates as a training loop calls them, between two events: Python, the table of addresses and
the launch are in it, which is what counts for a few small tensors (adapters); for many bytes they hide behind the
kernel of the step before. The figure is the median of `repeats` such runs, with the fastest and the slowest.

**The same work?** In float32 PyTorch's fused AdamW moves the same bytes, and its parameters are compared with ours
after the first step: relatively within 1e-5, since its roots and quotients are not always the nearest numbers. With
bfloat16 parameters its moments are bfloat16 too: it moves 14 bytes a parameter where ours moves 22, as `bytes` says.
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
import tyro
from rich.console import Console
from rich.table import Table

from minift_kernels.optim.adamw import AdamW

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LAYERS, WIDTH, INNER = 16, 2048, 8192

Row = dict[str, Any]


def adapters(rank: int = 16) -> list[tuple[int, ...]]:
    """LoRA on the seven matrices of each layer: many small tensors."""
    inputs = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
    return [shape for _ in range(LAYERS) for out, in_ in inputs for shape in ((rank, in_), (out, rank))]


def layers() -> list[tuple[int, ...]]:
    """All weights of the layers: a thousand million parameters, and small gains among them."""
    of_one = [(WIDTH,)] * 2 + [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
    return of_one * LAYERS


MODELS = {"adapters": adapters, "layers": layers}


@dataclass
class Benchmark:
    """Time a step of AdamW beside PyTorch's fused one and a copy."""

    dtype: tuple[str, ...] = ("float32", "bfloat16")
    """Types of parameters and gradients: float32, bfloat16."""
    steps: int = 20
    """Steps between two events."""
    repeats: int = 10
    """How often that is timed."""
    out: Path | None = None
    """Where the results go; runs/adamw_<device>.json if not given."""

    def run(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("kernels/benchmarks/adamw.py needs a CUDA device")
        device = torch.cuda.get_device_name(0)
        rows = [row for model in MODELS for dtype in self.dtype for row in self.model(model, DTYPES[dtype])]
        self.show(rows, device)
        out = self.out or Path(f"runs/adamw_{re.sub(r'[^A-Za-z0-9]+', '_', device).strip('_')}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"device": device, "rows": rows}, indent=2) + "\n", encoding="utf-8")

    def model(self, model: str, dtype: torch.dtype) -> list[Row]:
        """Both optimizers on the same parameters and gradients."""
        arrays = {f"p{i}": torch.randn(s, device="cuda").to(dtype) for i, s in enumerate(MODELS[model]())}
        gradients = {name: torch.randn_like(a) * 1e-3 for name, a in arrays.items()}
        leaves = {name: a.clone().requires_grad_() for name, a in arrays.items()}
        for name, leaf in leaves.items():
            leaf.grad = gradients[name]
        groups = [  # matrices decay, vectors do not
            {"params": [x for x in leaves.values() if (x.dim() >= 2) == decays], "weight_decay": 0.1 * decays}
            for decays in (True, False)
        ]
        theirs = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3, eps=1e-8, fused=True)
        ours = AdamW(weight_decay=0.1)
        ours.update(arrays, gradients, 1e-3)
        theirs.step()
        if dtype == torch.float32:
            for name, leaf in leaves.items():
                assert torch.allclose(arrays[name], leaf, rtol=1e-5, atol=1e-8), f"{name}: another step than PyTorch's"
        n, size = sum(a.numel() for a in arrays.values()), dtype.itemsize
        about = {"model": model, "dtype": str(dtype).removeprefix("torch."), "tensors": len(arrays), "parameters": n}
        pair = torch.empty(2, n * (3 * size + 16) // 2, dtype=torch.uint8, device="cuda")
        contenders: dict[str, tuple[int, Callable[[], Any]]] = {
            "ours": (3 * size + 16, lambda: ours.update(arrays, gradients, 1e-3)),
            "torch, fused": (7 * size, theirs.step),
            "copy": (3 * size + 16, lambda: pair[1].copy_(pair[0])),
        }
        return [about | {"what": w, "bytes": n * b} | self.timed(step) for w, (b, step) in contenders.items()]

    def timed(self, step: Callable[[], Any]) -> Row:
        """Seconds a step: median, fastest and slowest run."""
        step()
        torch.cuda.synchronize()
        times = []
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(self.steps):
                step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / self.steps)
        return {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}

    def show(self, rows: list[Row], device: str) -> None:
        table = Table(title=f"A step of AdamW on {device}")
        for heading in ("parameters", "", "ms", "GB/s"):
            table.add_column(heading, justify="left" if heading in ("parameters", "") else "right")
        for row in rows:
            table.add_row(
                f"{row['model']} {row['dtype']}: {row['parameters']:,} in {row['tensors']} tensors",
                row["what"],
                f"{row['seconds'] * 1e3:.3f}",
                f"{row['bytes'] / row['seconds'] / 1e9:,.0f}",
            )
        Console().print(table)


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
