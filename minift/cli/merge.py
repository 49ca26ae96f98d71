"""`minift merge`: a model and its adapter become one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minift.cli.common import Base, console, emit, for_inference, load_with_adapter
from minift.io import FormatError, load_tokenizer, refuse_to_destroy, save_model
from minift.peft import lora


@dataclass
class Merge:
    """Write W' = W + BA as a Hugging Face folder that runs anywhere, at the base model's speed.

    An adapter that was trained over 4-bit weights (--method qlora) belongs to those weights, not to the ones they were
    made from: the base is quantized as in training and dequantized again before the adapter is added, which is exact.
    """

    adapter: Path
    """The adapter folder."""
    model: str = "tiny"
    """The model it was trained on: tiny (built in), a Hugging Face folder, or a .gguf file."""
    out: Path = Path("runs/merged")
    """The folder to write."""
    base: Base = "auto"
    """What the adapter is added to: weights that went through nf4, the original ones, or what the adapter says."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the written weights."""
    overwrite: bool = False
    """Replace --out if it is there already."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        if not self.overwrite and self.out.is_dir() and any(self.out.iterdir()):
            raise FormatError(self.out, "", "a folder that is not empty", "an empty or new one, or --overwrite")
        refuse_to_destroy(self.out, {"config.json"})
        config, params = load_with_adapter(self.model, self.adapter, self.base)
        changed = sum(isinstance(weight, lora.LoRA) for weight in params.values())
        merged = for_inference(lora.merge(params))
        save_model(self.out, config, merged, load_tokenizer(self.model), dtype=self.dtype, overwrite=self.overwrite)
        console.print(f"merged {changed} layers of {self.adapter} into {self.out}")
        emit({"out": str(self.out), "merged_layers": changed, "dtype": self.dtype}, self.json)
        return 0
