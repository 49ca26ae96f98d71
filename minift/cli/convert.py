"""`minift convert`: an adapter or a model in another library's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minift.cli.common import console, emit
from minift.io import (
    FormatError,
    adapter_kind,
    load_adapter,
    load_mlx_adapter,
    load_model,
    load_tokenizer,
    refuse_to_destroy,
    refuse_to_replace,
    save_adapter,
    save_mlx_adapter,
    save_model,
)

Kind = Literal["peft", "mlx", "hf"]
NAMES = {"peft": "an adapter of PEFT", "mlx": "an adapter of mlx-lm", "hf": "a Hugging Face folder of a model"}


@dataclass
class Convert:
    """Write an adapter of PEFT for mlx-lm or the other way round, or any model as a Hugging Face folder.

    minift convert runs/finetune/adapter mlx-adapter          minift convert MODEL.gguf model --dtype bfloat16

    An adapter stays what it was to the last bit of float32, where one rank and one scale serve all its layers, as
    mlx-lm has it; else smaller ranks are filled up with zeros, and scales go into the matrices. A model in 4 bits is
    decoded. What is written loads in PEFT and transformers; for mlx-lm it follows that library's format.
    """

    source: Annotated[str, tyro.conf.Positional]
    """An adapter folder of PEFT or mlx-lm, a Hugging Face folder, a .gguf file, or tiny (built in)."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write."""
    to: Kind | None = None
    """peft or mlx for an adapter, by default the one that it is not; hf for a model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of a model's weights; adapters are written in float32."""
    overwrite: bool = False
    """Replace the folder if it is there already."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        kind = adapter_kind(self.source)
        to: Kind = self.to or ("hf" if kind is None else "mlx" if kind == "peft" else "peft")
        if (kind is None) != (to == "hf"):
            found = NAMES[kind] if kind else "a model"
            needed = "a model (`minift merge` makes one of an adapter and its base)" if kind else "an adapter"
            raise FormatError(self.source, "", found, f"{needed} for --to {to}")
        if kind and self.dtype != "float32":
            raise ValueError(f"--dtype {self.dtype} is for models, and {self.source} is {NAMES[kind]}")
        if not self.overwrite:
            refuse_to_replace(self.out)
        refuse_to_destroy(self.out, {"adapter_config.json" if kind else "config.json"})
        facts = self._adapter(kind, to) if kind else self._model()
        console.print(f"{self.source} is now {NAMES[to]} in {self.out}: {facts['parameters']:,} parameters")
        emit({"source": self.source, "out": str(self.out), "from": kind or "model", "to": to} | facts, self.json)
        return 0

    def _adapter(self, kind: str, to: Kind) -> dict[str, Any]:
        adapter = load_adapter(self.source) if kind == "peft" else load_mlx_adapter(self.source)
        if adapter.over_nf4 and to == "mlx":
            console.print("it was trained over NF4 weights, and belongs to a base that has gone through them")
        if to == "peft":
            save_adapter(self.out, adapter, overwrite=self.overwrite)
        else:
            save_mlx_adapter(self.out, adapter, overwrite=self.overwrite)
        return {"parameters": sum(array.size for array in adapter.arrays.values())}

    def _model(self) -> dict[str, Any]:
        config, params = load_model(self.source)
        save_model(self.out, config, params, load_tokenizer(self.source), dtype=self.dtype, overwrite=self.overwrite)
        return {"parameters": sum(weight.size for weight in params.values()), "dtype": self.dtype}
