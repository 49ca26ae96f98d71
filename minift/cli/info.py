"""`minift info`: what is in a model, an adapter or a soft prompt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from minift.cli.common import console, emit
from minift.io import (
    adapter_kind,
    adapter_names,
    load_adapter,
    load_mlx_adapter,
    load_model,
    load_prompt,
    load_tokenizer,
    prompt_kind,
)
from minift.peft.lora import Adapter
from minift.peft.soft_prompt import SoftPrompt


@dataclass
class Info:
    """Show the sizes of a model, or what an adapter changes.

    minift info tiny            minift info MODEL.gguf            minift info runs/finetune/adapter
    """

    source: Annotated[str, tyro.conf.Positional] = "tiny"
    """tiny (built in), a Hugging Face folder, a .gguf file, or the folder of an adapter or soft prompt."""
    tensors: bool = False
    """List every tensor."""
    out: Path | None = None
    """A folder for summary.json, which holds the same as --json."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        if prompt_kind(self.source):
            return self._prompt(load_prompt(self.source))
        if kind := adapter_kind(self.source):
            return self._adapter(load_mlx_adapter(self.source) if kind == "mlx" else load_adapter(self.source), kind)
        config, params = load_model(self.source, keep_quantized=True)
        tokenizer = load_tokenizer(self.source)
        nbytes = sum(w.nbytes for w in params.values())
        total = sum(int(_size(w)) for w in params.values())
        rows = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
        rows += [("parameters", f"{total:,}")]
        rows += [("in memory", f"{nbytes / 1e6:,.2f} MB, {8 * nbytes / total:.2f} bits a parameter")]
        rows += [("tokenizer", repr(tokenizer))]
        console.print(_table(rows))
        if self.tensors:
            for name, weight in params.items():
                console.print(f"{name:<50} {_describe(weight)}")
        emit({"parameters": total, "bytes": nbytes, "config": dataclasses.asdict(config)}, self.json, self.out)
        return 0

    def _prompt(self, prompt: SoftPrompt) -> int:
        virtual_tokens, row = prompt.table.shape
        facts = {
            "kind": prompt.kind,
            "virtual_tokens": virtual_tokens,
            "parameters": prompt.table.size,
            "bytes": prompt.table.nbytes,
        }
        rows = [
            ("soft prompt", f"{prompt.kind} of PEFT"),
            ("virtual tokens", f"{virtual_tokens}, of {row:,} numbers each"),
            ("parameters", f"{prompt.table.size:,}"),
            ("in memory", f"{prompt.table.nbytes / 1e6:,.2f} MB"),
        ]
        console.print(_table(rows))
        if self.tensors:
            console.print(f"{'prompt_embeddings':<60} {_describe(prompt.table)}")
        emit(facts, self.json, self.out)
        return 0

    def _adapter(self, adapter: Adapter, kind: str) -> int:
        ranks = adapter.ranks
        own_ranks = {path: r for path, r in ranks.items() if r != adapter.r}
        facts: dict[str, Any] = {
            "kind": kind,
            "r": adapter.r,
            "lora_alpha": adapter.lora_alpha,
            "scaling": sorted({adapter.scaling(path) for path in ranks}),
            "use_rslora": adapter.use_rslora,
            "lora_dropout": adapter.lora_dropout,
            "target_modules": list(adapter.target_modules),
            "adapted_layers": len(ranks),
            "rank_pattern": own_ranks,
            "alpha_pattern": adapter.alpha_pattern,
            "modules_to_save": list(adapter.modules_to_save),
            "over_nf4": adapter.over_nf4,
            "parameters": sum(array.size for array in adapter.arrays.values()),
            "bytes": sum(array.nbytes for array in adapter.arrays.values()),
        }
        others = [name for name in adapter_names(self.source) if name != "default"]
        rows = [
            ("adapter", {"peft": "of PEFT", "mlx": "of mlx-lm"}[kind]),
            ("r", adapter.r),
            *((f"  {path}", r) for path, r in own_ranks.items()),
            ("lora_alpha", f"{adapter.lora_alpha:g}"),
            *((f"  {path}", f"{alpha:g}") for path, alpha in adapter.alpha_pattern.items()),
            ("scaling", ", ".join(f"{s:g}" for s in facts["scaling"]) + (" (rsLoRA)" if adapter.use_rslora else "")),
            ("lora_dropout", f"{adapter.lora_dropout:g}"),
            ("target_modules", f"{_short(adapter.target_modules)}: {len(ranks)} layers"),
            ("trained in full", ", ".join(adapter.modules_to_save) or "nothing"),
            ("trained over", "NF4 weights" if adapter.over_nf4 else "the weights as they are, or it does not say"),
            ("parameters", f"{facts['parameters']:,}"),
            ("in memory", f"{facts['bytes'] / 1e6:,.2f} MB"),
            *((("also here", ", ".join(others)),) if others else ()),
        ]
        console.print(_table(rows))
        if self.tensors:
            for name, array in adapter.arrays.items():
                console.print(f"{name:<60} {_describe(array)}")
        emit(facts, self.json, self.out)
        return 0


def _table(rows: Iterable[tuple[str, Any]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def _short(names: Iterable[str]) -> str:
    """Module names; of whole paths, which may be hundreds, only the ends."""
    ends = sorted({name.split(".")[-1] for name in names})
    return ", ".join(ends) + (", named by whole paths" if set(ends) != set(names) else "")


def _size(weight: Any) -> int:
    return math.prod(weight.shape)


def _describe(weight: Any) -> str:
    return f"{weight.dtype} {weight.shape}" if hasattr(weight, "dtype") else repr(weight)
