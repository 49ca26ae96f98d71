"""`minift merge`: a model and its adapter become one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minift.cli.common import console, emit
from minift.io import load_adapter, load_model, load_tokenizer, save_model
from minift.peft import lora, qlora


@dataclass
class Merge:
    """Write W' = W + BA as a Hugging Face folder that runs anywhere, at the base model's speed.

    An adapter that was trained over 4-bit weights (--method qlora) belongs to those weights, not to the ones they were
    made from: with --nf4 the base is quantized as in training before the adapter is added, which is exact.
    """

    adapter: Path
    """The adapter folder."""
    model: str = "tiny"
    """The model it was trained on: tiny (built in), a Hugging Face folder, or a .gguf file."""
    out: Path = Path("runs/merged")
    """The folder to write."""
    nf4: bool = False
    """The adapter was trained with --method qlora: add it to the quantized, then dequantized, weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the written weights."""
    overwrite: bool = False
    """Replace --out if it is there already."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        config, params = load_model(self.model)
        adapter = load_adapter(self.adapter)
        base = qlora.quantize(params) if self.nf4 else params
        merged = lora.merge(lora.insert(base, adapter))
        dense = {name: weight.dense() for name, weight in merged.items()}
        save_model(self.out, config, dense, load_tokenizer(self.model), dtype=self.dtype, overwrite=self.overwrite)
        changed = len(adapter.arrays) // 2
        console.print(f"merged {changed} layers of {adapter!r} into {self.out}")
        emit({"out": str(self.out), "merged_layers": changed, "dtype": self.dtype}, self.json)
        return 0
