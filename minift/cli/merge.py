"""`minift merge`: a model and its adapter become one model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from minift.cli.common import Base, console, emit, put_on
from minift.data import stdlib_docs
from minift.data.batches import Batch, chunks, pad
from minift.io import (
    Tokenizer,
    load_adapter,
    load_model,
    load_tokenizer,
    refuse_to_destroy,
    refuse_to_replace,
    save_model,
)
from minift.io.huggingface import as_stored, stored_bytes
from minift.models import Config, module_of
from minift.nn.losses import cross_entropy
from minift.nn.weight import Params
from minift.peft import lora
from minift.peft.merge import Way, exact_way, merge_dequantized, merge_error, merge_original, merge_requantized
from minift.peft.tuned import Tuned
from minift.train.loop import at_least

SEQ_LEN = 64  # tokens of each text on which the ways are compared
FORMULAS: dict[Way, str] = {"dequantized": "W_q + BA", "original": "W + BA", "requantized": "NF4(trained)"}
LEGEND = (
    "error: |merged − trained| / |BA| over the adapted layers; 1 is as bad as no adapter\n"
    "Δ logits, loss: against the unmerged model, on a few held-out texts"
)


@dataclass
class Merge:
    """Write a model and its adapter as one Hugging Face folder, at the base model's speed, and say what that loses.

    minift merge --adapter runs/finetune/adapter --out merged          minift merge … --into requantized --double-quant

    An adapter that was trained over 4-bit weights W_q (--method qlora) belongs to those, not to the W that they were
    made from. So "merged" can mean three models, and a table compares them with the unmerged one: W_q + BA (exact for
    such an adapter), W + BA (exact for one that was trained over W), or 4 bits again, which is the smallest and may
    lose much of what was learned.
    """

    adapter: Path
    """The adapter folder."""
    model: str = "tiny"
    """The model it was trained on: tiny (built in), a Hugging Face folder, or a .gguf file."""
    out: Path = Path("runs/merged")
    """The folder to write."""
    into: Literal["auto", "dequantized", "original", "requantized"] = "auto"
    """Which weights to write: dequantized W_q + BA, original W + BA, requantized to NF4; auto is the exact one."""
    base: Base = "auto"
    """What the adapter was trained over: nf4, the original weights, or what it says. Those of PEFT say nothing."""
    double_quant: bool = False
    """With requantized: the scales in 8 bits as well."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the written weights; of NF4 weights, what they are dequantized to."""
    eval_examples: int = 4
    """Held-out texts, of Python's documentation, on which the ways are compared; 0 compares the weights only."""
    overwrite: bool = False
    """Replace --out if it is there already."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        at_least(0, eval_examples=self.eval_examples)
        if not self.overwrite:
            refuse_to_replace(self.out)
        refuse_to_destroy(self.out, {"config.json"})
        config, original = load_model(self.model)
        tokenizer = load_tokenizer(self.model)
        trained = put_on(original, load_adapter(self.adapter, original), self.base)
        exact = exact_way(trained)
        into: Way = exact if self.into == "auto" else self.into
        changed = sum(isinstance(weight, lora.LoRA | Tuned) for weight in trained.values())
        over = "4-bit weights" if exact == "dequantized" else "the original weights"
        unsaid = self.base == "auto" and exact == "original"
        hint = "; if it was trained over 4-bit weights: --base nf4" if unsaid else ""
        console.print(f"{self.adapter}: {changed} layers, trained over {over}{hint}")
        yardstick = _unmerged(trained, config, tokenizer, self.eval_examples) if self.eval_examples else None
        rows: dict[Way, dict[str, Any]] = {}
        for way in sorted(FORMULAS, key=lambda way: way == into):  # what is written comes last, and is still there then
            with console.status(f"merging: {way}"):
                merged = self._merge(way, trained, original)
                stored = as_stored(merged, self.dtype)
                rows[way] = {"error": _number(merge_error(stored, trained)), "bytes": stored_bytes(merged, self.dtype)}
                if yardstick is not None:
                    rows[way] |= _compare(stored, config, *yardstick)
                del stored
        save_model(self.out, config, merged, tokenizer, dtype=self.dtype, overwrite=self.overwrite)

        loss = None if yardstick is None else _loss(*yardstick)
        ordered = {way: rows[way] for way in FORMULAS}
        _show(ordered, {exact: "exact" if self.dtype == "float32" else "exact, rounded"}, loss)
        console.print(f"wrote {self.out}: the {into} way, {self.dtype}")
        result = {"out": str(self.out), "merged_layers": changed, "dtype": self.dtype, "into": into, "exact": exact}
        emit(result | {"unmerged_loss": loss, "ways": ordered}, self.json)
        return 0

    def _merge(self, way: Way, trained: Params, original: Params) -> dict[str, Any]:
        if way == "dequantized":
            return merge_dequantized(trained)
        if way == "original":
            return merge_original(trained, original)
        return merge_requantized(trained, use_double_quant=self.double_quant)


def _unmerged(trained: Params, config: Config, tokenizer: Tokenizer, examples: int) -> tuple[np.ndarray, Batch]:
    """The logits of the unmerged model on the beginnings of some sections of the language reference."""
    texts = stdlib_docs.embedded().held_out_text
    chosen = np.random.default_rng(0).permutation(len(texts))[:examples]  # the same ones in every run
    encoded = (tokenizer.encode(texts[i].everything) for i in chosen)
    batch = pad([chunks(ids, SEQ_LEN)[0] for ids in encoded if len(ids) > 1])
    return _logits(trained, config, batch), batch


def _compare(stored: Params, config: Config, unmerged: np.ndarray, batch: Batch) -> dict[str, float | None]:
    """How far a merged model's logits are from the unmerged one's, mean |Δ| over the tokens, and its loss."""
    logits = _logits(stored, config, batch)
    tokens = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]  # not the padding
    return {"logits": _number(np.abs(logits - unmerged)[tokens].mean()), "loss": _loss(logits, batch)}


def _logits(params: Params, config: Config, batch: Batch) -> np.ndarray:
    return module_of(config).forward(params, batch.tokens, config, recompute=True)[0]


def _loss(logits: np.ndarray, batch: Batch) -> float | None:
    return _number(cross_entropy(logits[:, :-1], batch.labels[:, 1:])[0])


def _number(x: float | np.floating) -> float | None:
    """For JSON, which has no infinity."""
    return float(x) if math.isfinite(x) else None


def _show(rows: dict[Way, dict[str, Any]], notes: dict[Way, str], loss: float | None) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), caption=LEGEND, caption_justify="left")
    for heading in ("", "error", "Δ logits", "loss", "MB", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    if loss is not None:
        table.add_row("unmerged", "", "", f"{loss:.4f}", "", "")
    for way, row in rows.items():
        table.add_row(
            f"{way:<12} {FORMULAS[way]}",
            _short(row["error"], ".2g"),
            _short(row.get("logits"), ".2g"),
            _short(row.get("loss"), ".4f"),
            f"{row['bytes'] / 1e6:,.1f}",
            notes.get(way, ""),
        )
    console.print(table)


def _short(x: float | None, form: str) -> str:
    return "—" if x is None else format(x, form)
