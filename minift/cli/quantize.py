"""`minift quantize`: a model becomes one with 4-bit linear layers, and one sees what that cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.progress import track
from rich.table import Table

from minift.cli.common import console, emit
from minift.io import TINY, load_model, load_tokenizer, refuse_to_destroy, refuse_to_replace, save_model
from minift.io.bitsandbytes4 import rounded
from minift.nn.weight import dense
from minift.peft import lora, qlora
from minift.peft.merge import squares
from minift.quant import nf4
from minift.quant.nf4 import NF4Tensor

REST = "embeddings, norms, head"


@dataclass
class Quantize:
    """Write a model as a Hugging Face folder with its linear layers in NF4, as bitsandbytes does, and say what it cost.

    minift quantize SmolLM2-135M-Instruct.Q4_1.gguf smollm2-nf4 --double-quant --dtype bfloat16

    transformers loads the folder where bitsandbytes is installed. Embeddings, norms and the head stay as they are.
    The error is |W_nf4 − W| / |W|, each kind of layer by itself; W is the model as it is read. Layers that are in NF4
    already are kept, bit for bit.
    """

    source: Annotated[str, tyro.conf.Positional]
    """tiny (built in), a Hugging Face folder (Llama or GPT-2), or a .gguf file."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write."""
    double_quant: bool = False
    """The scales in 8 bits as well: 4.127 bits a parameter instead of 4.5, with blocks of 64."""
    block_size: int = 64
    """Parameters that share a scale: 32, 64, 128, … 4096. Smaller blocks are nearer to the model and take more bits."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of what is not quantized, and what bitsandbytes dequantizes the rest to."""
    overwrite: bool = False
    """Replace OUT if it is there already."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        nf4.check_block_size(self.block_size)
        if not self.overwrite:
            refuse_to_replace(self.out)
        refuse_to_destroy(self.out, {"config.json"})
        config, params = load_model(self.source, keep_quantized=True)
        tokenizer = load_tokenizer(self.source)
        linear = lora.targets(params, "all-linear")
        kept = [name for name in linear if isinstance(params[name], NF4Tensor)]
        if kept:
            one = params[kept[0]]
            scales = "float32" if isinstance(one.absmax, np.ndarray) else "double-quantized"
            console.print(
                f"{len(kept)} of {len(linear)} linear layers are in NF4 already (blocks of {one.block_size}, {scales} "
                "scales) and are kept as they are: quantizing them again would only add error"
            )
        before, rows = _on_disk(self.source), {REST: _Row()}
        quantized: dict[str, Any] = {}
        for name in track(list(params), "quantizing", console=console, transient=True, disable=not console.is_terminal):
            one = qlora.quantize({name: params[name]}, "all-linear", self.block_size, self.double_quant)
            kind = name.split(".")[-2] if name in linear else REST
            rows.setdefault(kind, _Row()).add(params.pop(name), one[name], self.dtype)
            quantized |= one
        save_model(self.out, config, quantized, tokenizer, dtype=self.dtype, overwrite=self.overwrite)

        rest = rows.pop(REST)
        rows |= {"all linear layers": _sum(rows.values()), REST: rest}
        rows["the model"] = _sum([rows["all linear layers"], rest])
        after = _on_disk(self.out)
        _show(rows, self.dtype)
        console.print(f"wrote {self.out}: {after / 1e6:,.2f} MB of weights, from {before / 1e6:,.2f} MB")
        facts = {"double_quant": self.double_quant, "block_size": self.block_size, "dtype": self.dtype}
        counts = {"quantized_layers": len(linear) - len(kept), "kept_layers": len(kept)}
        sizes = {"bytes_on_disk_before": before, "bytes_on_disk": after}
        layers = {kind: row.facts() for kind, row in rows.items()}
        emit({"out": str(self.out)} | facts | counts | sizes | {"layers": layers}, self.json)
        return 0


@dataclass
class _Row:
    """What some layers had and have: parameters, bytes in `dtype` and now, ‖Ŵ − W‖² and ‖W‖²."""

    parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    lost: float = 0.0
    norm: float = 0.0

    def add(self, weight: Any, now: Any, dtype: str) -> None:
        exact = dense(weight)
        width = 4 if dtype == "float32" else 2
        self.parameters += exact.size
        self.bytes_before += width * exact.size
        self.bytes_after += now.nbytes if isinstance(now, NF4Tensor) else width * exact.size
        self.lost += squares(rounded(dense(now), dtype).astype(np.float64) - exact)
        self.norm += squares(exact)

    def facts(self) -> dict[str, float]:
        error = math.sqrt(self.lost / self.norm) if self.norm else 0.0  # nothing but zeros stays that
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        bits = 8 * self.bytes_after / self.parameters
        return {"parameters": self.parameters} | sizes | {"bits_per_parameter": bits, "error": error}


def _sum(rows: Iterable[_Row]) -> _Row:
    return _Row(*(sum(values) for values in zip(*map(astuple, rows), strict=True)))


def _on_disk(source: Path | str) -> int:
    """Bytes of the files with weights."""
    path = TINY if source == "tiny" else Path(source)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


def _show(rows: dict[str, _Row], dtype: str) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "parameters", f"MB in {dtype}", "MB now", "bits", "error"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for kind, row in rows.items():
        facts = row.facts()
        table.add_row(
            kind,
            f"{row.parameters:,}",
            f"{row.bytes_before / 1e6:,.2f}",
            f"{row.bytes_after / 1e6:,.2f}",
            f"{facts['bits_per_parameter']:.3f}",
            f"{facts['error']:.2%}",
        )
    console.print(table)
