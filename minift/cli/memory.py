"""`minift memory`: what a method costs, before it is paid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from minift.cli.common import check_page_budget, console, emit, llama_only, modules
from minift.io import load_model
from minift.models import llama
from minift.train.engine import Optimizer
from minift.train.loop import at_least
from minift.train.memory import LORA_PAPER, SIZES, bill, lora_paper
from minift.train.methods import Method


@dataclass
class Memory:
    """Print the bill of a method: weights, constants, gradients, optimizer states, activations.

    minift memory --model 7B --method qlora          minift memory --model 65B --method full --weight-bits 16
    """

    model: str = "7B"
    """7B, 13B, 33B or 65B (LLaMA, of the QLoRA paper), tiny, a folder, a .gguf file; or lora-paper for its table."""
    method: Method = "qlora"
    """full, head, lora or qlora."""
    r: int = 8
    """Rank of the adapters."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Which layers get an adapter: names, all-linear, or a regular expression, as in finetune."""
    batch_size: int = 1
    """Sequences in one pass."""
    seq_len: int = 512
    """Tokens in each."""
    weight_bits: Literal[16, 32] = 16
    """Precision of what is not quantized; minift itself computes in 32."""
    compute_bits: Literal[16, 32] | None = None
    """Precision of activations, and of weights that learn, where it is another: --weight-bits 16 --compute-bits 32 is
    the bill of finetune --dtype bfloat16."""
    recompute: bool = False
    """Keep one block's activations at a time."""
    optimizer: Optimizer = "adamw"
    """adamw: moments of 32 bits. adamw8bit: of 8. paged-adamw8bit: these in pages, of which --page-budget bytes stay in
    memory."""
    page_budget: int = 1_000_000
    """Bytes of moments that paged-adamw8bit keeps in memory, as in finetune."""
    out: Path | None = None
    """A folder for summary.json, which holds the same as --json."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        at_least(1, r=self.r, batch_size=self.batch_size, seq_len=self.seq_len)
        check_page_budget(self.optimizer, self.page_budget)
        if self.model == "lora-paper" or self.model in LORA_PAPER:
            return self._paper()
        if self.model in SIZES:
            config = SIZES[self.model]
        else:
            config = llama_only(load_model(self.model)[0], self.model, "this estimate")
        items = bill(
            config,
            self.method,
            r=self.r,
            target_modules=modules(self.target_modules),
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            weight_bits=self.weight_bits,
            compute_bits=self.compute_bits,
            recompute=self.recompute,
            optimizer=self.optimizer,
            page_budget=self.page_budget,
        )
        total, without = sum(i.nbytes for i in items), sum(i.nbytes for i in items if i.name != "activations")
        table = Table(title=f"{self.method} on {self.model}", box=None, padding=(0, 2, 0, 0))
        for heading, side in (("", "left"), ("GB", "right"), ("how", "left")):
            table.add_column(heading, justify=side)  # type: ignore[arg-type]
        for item in items:
            table.add_row(item.name, _gb(item.nbytes), item.how)
        table.add_row(Text("total", "bold"), Text(_gb(total), "bold"), f"{_gb(without)} without activations")
        console.print(table)
        found = {item.name.replace(" ", "_"): round(item.nbytes) for item in items}
        parameters = sum(math.prod(shape) for shape in llama.shapes(config).values())
        facts = {"model": self.model, "method": self.method, "parameters": parameters, "total": round(total)}
        emit(facts | found, self.json, self.out)
        return 0

    def _paper(self) -> int:
        rows = [row for row in lora_paper() if self.model in ("lora-paper", row["model"])]
        table = Table(title="LoRA on W_q and W_v: 2 L · 2 d r", box=None, padding=(0, 2, 0, 0))
        for heading in ("model", "r", "counted", "as printed", "of the model", "fewer by"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for row in rows:
            share = row["lora_parameters"] / row["parameters"]
            table.add_row(
                row["model"],
                str(row["r"]),
                f"{row['lora_parameters']:,}",
                f"{row['printed'] / 1e6:g}M",
                f"{share:.3%}",
                f"{row['fewer']:,.0f}×",
            )
        console.print(table)
        emit({"rows": rows}, self.json, self.out)
        return 0


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.3f}"
