"""A few columns that are far larger than the rest: what they do to products in 8 bits, and where they are.

x Wᵀ is computed with both factors in 8 bits, in four ways, and compared with the exact product: ‖y − x Wᵀ‖ / ‖x Wᵀ‖.

    per tensor     one scale for all of x, one for all of W
    vector-wise    one for each row of either, which factors out of the integer sum
    LLM.int8       the same, with columns of x that reach 6 kept apart                    (`quant.int8_vectorwise`)
    block-wise     one for each 64 numbers, decoded and multiplied in float32: it fits no integer sum

**Planted.** x and W are N(0, 1), of 512 columns; in 4 of them x, or W, is multiplied by 1 … 100.

**Real.** Held-out text goes through `--model`, and each linear layer meets its own input. Layers that read the same
input are counted once. A column is an outlier if any token reaches 6 in it.

**What was found** (seed 0; relative errors):

                                  largest   columns ≥ 6   per tensor   vector-wise   LLM.int8   block-wise
    x, 20 times as large              71        0.8 %         0.078        0.036        0.009       0.017
    W, 20 times as large               5        0             0.073        0.035        0.035       0.017
    tiny, input of down_proj          31       27             0.042        0.016        0.010       0.010
    tiny, the other inputs             5        0             0.007-0.012  0.005-0.006  the same    0.005-0.006
    SmolLM2, input of gate_proj       31        0.02          0.045        0.019        0.019       0.010
    SmolLM2, input of down_proj    2,824        3.2           0.137        0.030        0.023       0.012

Keeping columns apart is the best of the four against a few large columns of x, and of no use against those of W. In
these two small models large numbers come from products of gate and up, in front of down_proj, and lie in many columns,
where the paper found few from 6.7 billion parameters on; there a scale for each block does as well or better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minift.io import load_llama, load_tokenizer
from minift.models import llama
from minift.nn.linear import rows as as_rows
from minift.nn.weight import Frozen, dense
from minift.quant import blockwise, int8_vectorwise
from minift.quant.codebooks import INT8
from minift.studies.formats import is_linear
from minift.studies.held_out import held_out_rows

Record = dict[str, Any]
SCHEMES = ("per tensor", "vector-wise", "LLM.int8", "block-wise")
TIMES = (1, 2, 5, 10, 20, 50, 100)
COLUMNS, PLANTED = 512, 4
READERS = ("q_proj", "o_proj", "gate_proj", "down_proj")  # k and v read what q reads, up what gate reads
TOKENS = 256


def run(model: str, seed: int, say: Callable[[str], None]) -> list[Record]:
    """The planted outliers, then those of the model."""
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((n, COLUMNS)).astype(np.float32) for n in (256, 384))
    columns = rng.choice(COLUMNS, PLANTED, replace=False)
    records = []
    for where in ("x", "W"):
        for times in TIMES:
            factor = np.ones(COLUMNS, np.float32)
            factor[columns] = times
            found = measured(x * factor, w) if where == "x" else measured(x, w * factor)
            records.append({"where": f"planted in {where}", "times": times} | found)
    say(f"planted: {PLANTED} of {COLUMNS} columns, {len(records)} products")
    return records + in_a_model(model, say)


def in_a_model(model: str, say: Callable[[str], None]) -> list[Record]:
    """One record for each input of linear layers, in the order of the computation."""
    config, params = load_llama(model)
    tokens = held_out_rows(load_tokenizer(model), TOKENS, 1)[0][None]
    records: list[Record] = []
    watched: dict[str, Any] = {
        name: Watched(dense(w), name, records)
        if is_linear(name) and name.split(".")[-2] in READERS
        else Frozen(dense(w))
        for name, w in params.items()
    }
    llama.backbone(watched, tokens, config)
    say(f"{Path(model).name}: {tokens.size} tokens through {config.num_hidden_layers} layers")
    return records


@dataclass(frozen=True, repr=False)
class Watched(Frozen):
    """A frozen weight that measures what comes in, and is otherwise one."""

    name: str
    records: list[Record]

    def linear(self, x, dropout_key=None):
        *_, layer, _, module, _ = self.name.split(".")
        self.records.append({"where": module, "layer": int(layer)} | measured(as_rows(x), self.array))
        return super().linear(x, dropout_key)


def measured(x: np.ndarray, w: np.ndarray) -> Record:
    """Errors of the four ways, how large x gets, and the share of its columns that reach the threshold."""
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    size, largest = np.linalg.norm(exact), np.abs(x).max(axis=0)
    errors = {scheme: float(np.linalg.norm(product(x, w, scheme) - exact) / size) for scheme in SCHEMES}
    return {
        "largest": float(largest.max()),
        "typical": math.sqrt(float(np.mean(np.square(x, dtype=np.float64)))),
        "outlier_columns": float(np.mean(largest >= int8_vectorwise.THRESHOLD)),
    } | errors


def product(x: np.ndarray, w: np.ndarray, scheme: str) -> np.ndarray:
    """x Wᵀ with both in 8 bits, in one of the SCHEMES."""
    if scheme in ("vector-wise", "LLM.int8"):
        threshold = int8_vectorwise.THRESHOLD if scheme == "LLM.int8" else 0.0
        return int8_vectorwise.forward(x, int8_vectorwise.quantize(w), threshold)[0]
    x_hat, w_hat = (
        blockwise.dequantize(blockwise.quantize(a, INT8, a.size if scheme == "per tensor" else 64)) for a in (x, w)
    )
    return x_hat @ w_hat.T


def rows(records: Sequence[Record]) -> list[Record]:
    """A row for each planted size, and one for each kind of layer: its layers' largest number, and means."""
    planted = [
        {"where": f"{r['where']}, {r['times']} times"}
        | {key: r[key] for key in ("largest", "outlier_columns", *SCHEMES)}
        for r in records
        if "times" in r
    ]
    for module in READERS:
        found = [r for r in records if r["where"] == module]
        mean = {key: float(np.mean([r[key] for r in found])) for key in ("outlier_columns", *SCHEMES)}
        planted.append({"where": f"input of {module}", "largest": max(r["largest"] for r in found)} | mean)
    return planted


def draw(records: Sequence[Record], path: Path) -> None:
    """Errors by the size of planted outliers, and by layer the largest number and the vector-wise error, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subplots(2, 2)
    for axes, where in zip(above, ("x", "W"), strict=True):
        found = [r for r in records if r["where"] == f"planted in {where}"]
        for scheme in SCHEMES:
            axes.loglog([r["times"] for r in found], [r[scheme] for r in found], marker="o", markersize=3, label=scheme)
        axes.set(xlabel=f"{PLANTED} of {COLUMNS} columns of {where} so many times as large", ylabel="relative error")
        axes.legend(fontsize="small")
    for module in READERS:
        found = [r for r in records if r["where"] == module]
        layers = [r["layer"] for r in found]
        below[0].semilogy(layers, [r["largest"] for r in found], marker="o", markersize=3, label=f"input of {module}")
        ratio = [r["vector-wise"] / r["LLM.int8"] for r in found]
        below[1].semilogy(layers, ratio, marker="o", markersize=3, label=f"input of {module}")
    below[0].axhline(int8_vectorwise.THRESHOLD, color="k", linestyle="--", linewidth=1)
    below[0].set(xlabel="layer", ylabel="largest number")
    below[1].set(xlabel="layer", ylabel="error, vector-wise ÷ LLM.int8")
    for axes in (*above, *below):
        axes.grid(alpha=0.3)
    below[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)
