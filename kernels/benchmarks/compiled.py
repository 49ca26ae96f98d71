"""What each step of the NF4 ladder compiles to, on three GPUs that need not be there.

    python kernels/benchmarks/compiled.py

One row a step and target, for a 4096 × 4096 matrix with scales in blocks of 64: registers of a lane, how many of them
were spilled, bytes of shared memory of a program, loads a weight, bits that a lane stores at once. Nothing is timed:
this is what the predictions in nf4_kernels.py were made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from minift_kernels import aot
from minift_kernels.quant import nf4, nf4_kernels

STEPS = range(1, nf4_kernels.LAST + 1)
HEADINGS = ("kernel", "target", "registers", "spilled", "shared", "loads a weight", "bits a store")


@dataclass
class Report:
    """Compile the ladder ahead of time and print a table."""

    target: tuple[Literal["sm_80", "sm_90", "gfx942"], ...] = ("sm_80", "sm_90", "gfx942")
    """The GPUs to compile for."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The type of the decoded matrix."""

    def run(self) -> None:
        dtype = getattr(torch, self.dtype)
        table = Table(title=f"NF4 to {self.dtype}, 4096 x 4096")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in ("kernel", "target") else "right")
        for target in self.target:
            for step in STEPS:
                table.add_row(*self.row(step, target, dtype))
            table.add_row(*self.row(nf4_kernels.LAST, target, dtype, nested=256), end_section=True)
        Console().print(table)

    def row(self, step: int, target: str, dtype: torch.dtype, nested: int = 0) -> list[str]:
        weights, warps = nf4_kernels.default_tile(step, dtype.itemsize)
        launch = nf4.meta_launch(4096 * 4096, dtype, nested_block_size=nested, step=step, tile=(weights, warps))
        found = aot.compile_launch(launch, target)
        lanes = warps * aot.TARGETS[target].warp_size
        stores = sorted(set(found.widths("store")))
        return [
            f"dequantize_{step}{', double-quantized' if nested else ''}",
            target,
            str(found.registers),
            str(found.spilled),
            str(found.shared),
            f"{len(found.widths('load')) * lanes / weights:.2f}",
            ", ".join(map(str, stores)),
        ]


if __name__ == "__main__":
    tyro.cli(Report).run()
