"""`minift info`: what is in a model or an adapter."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from minift.cli.common import console, emit
from minift.io import load_adapter, load_model, load_tokenizer


@dataclass
class Info:
    """Show the sizes of a model, or what an adapter changes.

    minift info tiny            minift info MODEL.gguf            minift info runs/finetune/adapter
    """

    source: Annotated[str, tyro.conf.Positional] = "tiny"
    """tiny (built in), a Hugging Face folder, a .gguf file, or an adapter folder."""
    tensors: bool = False
    """List every tensor."""
    out: Path | None = None
    """A folder for summary.json, which holds the same as --json."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        if (Path(self.source) / "adapter_config.json").exists():
            return self._adapter()
        config, params = load_model(self.source, keep_quantized=True)
        tokenizer = load_tokenizer(self.source)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for field in dataclasses.fields(config):
            table.add_row(field.name, str(getattr(config, field.name)))
        sizes = {name: int(_size(w)) for name, w in params.items()}
        nbytes = sum(w.nbytes for w in params.values())
        total = sum(sizes.values())
        table.add_row("parameters", f"{total:,}")
        table.add_row("in memory", f"{nbytes / 1e6:,.2f} MB, {8 * nbytes / total:.2f} bits a parameter")
        table.add_row("tokenizer", repr(tokenizer))
        console.print(table)
        if self.tensors:
            for name, weight in params.items():
                console.print(f"{name:<50} {_describe(weight)}")
        emit({"parameters": total, "bytes": nbytes, "config": dataclasses.asdict(config)}, self.json, self.out)
        return 0

    def _adapter(self) -> int:
        adapter = load_adapter(self.source)
        console.print(repr(adapter))
        if self.tensors:
            for name, array in adapter.arrays.items():
                console.print(f"{name:<60} {_describe(array)}")
        size = sum(array.size for array in adapter.arrays.values())
        nbytes = sum(array.nbytes for array in adapter.arrays.values())
        facts = {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "target_modules": list(adapter.target_modules)}
        emit({"parameters": size, "bytes": nbytes} | facts, self.json, self.out)
        return 0


def _size(weight: Any) -> int:
    return math.prod(weight.shape)


def _describe(weight: Any) -> str:
    return f"{weight.dtype} {weight.shape}" if hasattr(weight, "dtype") else repr(weight)
