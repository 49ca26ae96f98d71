"""What a language model loses when its linear layers are stored in fewer bits.      (Dettmers et al. 2023, table 2)

Each data type replaces the matrices of the blocks, as in QLoRA; embeddings, norms and head stay in float32. Measured is
the mean cross-entropy of held-out text in nats a token, and its exponential, the perplexity. All data types read the
same rows, so a loss is compared row by row, and the spread of the n differences says how sure their mean is:

    increase = mean_n(loss_n − loss_n in float32) ± std_n(…) / √n                                       (1)

**Which model.** The built-in one is stored in NF4 with double quantization: NF4 gives it back, and every other data
type is measured on NF4's grid. SmolLM2's GGUF file lies on a grid of affine int4 in blocks of 32, which gives that
back. Such a model is therefore measured twice: as it is, and moved off its grid, by normal noise on the matrices of a
tenth of each row's size, about as much as rounding to 4 bits moves them. Then little of the grid is left (NF4's
`weight_error` is 0.080, and 0.092 for normal weights), and what it answers is what data types do to a model of this
quality. Only one that was published in 16 or 32 bits (`--model FOLDER`) answers the question about itself.

**What was found** (SmolLM2-135M-Instruct, 35 rows of 256 tokens, seed 0; `benchmarks/data_types_smollm2.json`). In
float32 the perplexity is 17.05, and 26.47 off the grid; these are the increases of the loss:

    data type             bits    on its 4-bit grid       moved off it
    bfloat16             16        0.0001 ± 0.0001      -0.0004 ± 0.0002
    int8, row             8.05    -0.0006 ± 0.0009       0.0094 ± 0.0014
    int4, block 64        4.5      0.402  ± 0.019        0.661  ± 0.017
    affine int4, block 32 6        0.0000 ± 0.0000       0.266  ± 0.008
    fp4 + DQ, block 64    4.13     0.369  ± 0.013        0.614  ± 0.020
    nf4 + DQ, block 64    4.13     0.262  ± 0.011        0.349  ± 0.016
    nf4, block 64         4.5      0.260  ± 0.010        0.348  ± 0.016

The order is that of QLoRA's table 2 (mean perplexities 34.34, 31.07 and 27.41 of int4, FP4 and NF4 + DQ): there NF4's
is 20 % below int4's, here 13 % (25.49, 24.67, 22.15), and 27 % off the grid. Double quantization costs 0.001 to 0.002,
which is nothing beside its standard error. Two things are not in the paper's table. Four bits cost this model a quarter
to a third of a nat: 135 million parameters have little to spare, and these were rounded to 4 bits once before. And
affine int4 with a scale and a zero point every 32 numbers is ahead of NF4 off its grid too, at 6 bits against 4.13.
The built-in model, moved off its grid (44 rows, float32: 46.85),
loses 0.014 ± 0.010 with NF4 + DQ and 0.016 ± 0.010 with int4: it does not resolve the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minift.data.batches import chunks, pad
from minift.io import load_llama, load_tokenizer
from minift.models import llama
from minift.nn.weight import Frozen, Params, dense
from minift.studies.formats import DQ, Format, linear_layers, round_trip, share_on_a_grid
from minift.studies.held_out import held_out_rows
from minift.train.engine import NUMPY

Record = dict[str, Any]
FORMATS = [
    Format("float32"),
    Format("bfloat16"),
    Format("int8", "row"),
    Format("int8", 64),
    Format("int4", "row"),
    Format("int4", 64),
    Format("affine int4", 128),
    Format("affine int4", 32),
    Format("fp4", 64),
    Format("fp4" + DQ, 64),
    Format("nf4", "row"),
    Format("nf4", 256),
    Format("nf4", 64),
    Format("nf4" + DQ, 64),
]
ON_GRID, OFF_GRID = "on its 4-bit grid", "moved off its grid"
NOISE = 0.1
LENGTH = 256
WORK = 1_500_000_000_000  # parameters times tokens that a data type is measured with, in at most ROWS rows: for
# SmolLM2 35 rows, and a quarter of an hour for all data types, on and off its grid
ROWS = 48


def run(model: str, seed: int, say: Callable[[str], None], formats: Sequence[Format] = FORMATS) -> list[Record]:
    """Every data type in `model`, and, if that lies on a grid of 4 bits, in what it becomes a little beside it."""
    config, params = load_llama(model)
    name, models = Path(model).name, {Path(model).name: params}
    if (share := share_on_a_grid(linear_layers(params))) > 0.5:
        say(
            f"{name}: {share:.0%} of its blocks of 32 hold no more than 16 values: it was in 4 bits before. A data "
            "type with that grid loses nothing, and others are measured on it; so it is measured off its grid as well"
        )
        models = {ON_GRID: params, OFF_GRID: off_the_grid(params, np.random.default_rng(seed))}
    length = min(LENGTH, config.max_position_embeddings)
    size = sum(math.prod(shape) for shape in llama.shapes(config).values())
    texts = held_out_rows(load_tokenizer(model), length, min(max(WORK // (size * length), 2), ROWS))
    return [
        r for title, weights in models.items() for r in in_every_format(title, weights, config, texts, formats, say)
    ]


def in_every_format(
    name: str,
    params: Params,
    config: llama.Config,
    texts: Sequence[np.ndarray],
    formats: Sequence[Format],
    say: Callable,
) -> list[Record]:
    """One record a data type, in this order; the first of them is what the others are compared with."""
    records: list[Record] = []
    base = np.zeros(len(texts))
    for how in formats:
        rounded, bits, error = in_format(params, how)
        losses = row_losses(rounded, config, texts)
        base = base if records else losses
        increase = losses - base
        records.append(
            {
                "model": name,
                "data_type": how.data_type,
                "scale": how.scale,
                "bits_per_parameter": bits,
                "weight_error": error,
                "loss": float(losses.mean()),
                "perplexity": math.exp(losses.mean()),
                "increase": float(increase.mean()),
                "standard_error": float(increase.std(ddof=1) / math.sqrt(len(texts))),
                "tokens": len(texts) * (len(texts[0]) - 1),
            }
        )
        say(f"{name}: {how}: loss {losses.mean():.4f}")
    return records


def in_format(params: Params, how: Format) -> tuple[dict[str, Any], float, float]:
    """The model with its linear layers as this data type has them, their bits a parameter, and their relative error."""
    rounded = {name: Frozen(dense(w)) for name, w in params.items()}
    bits = count = error = power = 0.0
    for name, w in linear_layers(params).items():
        w_hat, each = round_trip(w, how)
        rounded[name] = Frozen(w_hat)
        bits, count = bits + each * w.size, count + w.size
        error += float(np.sum(np.square(w_hat - w, dtype=np.float64)))
        power += float(np.sum(np.square(w, dtype=np.float64)))
    return rounded, bits / count, math.sqrt(error / power)


def row_losses(params: Params, config: llama.Config, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Mean cross-entropy of each row, in nats a token."""
    batches = (pad(chunks(row, len(row))) for row in texts)
    return np.array(
        [NUMPY.value(params, batch, config, len(row) - 1) for batch, row in zip(batches, texts, strict=True)]
    )


def off_the_grid(params: Params, rng: np.random.Generator) -> dict[str, Any]:
    """The model with normal noise on its linear layers, NOISE times as large as the numbers of each row."""
    moved: dict[str, Any] = dict(params)
    for name, w in linear_layers(params).items():
        size = np.sqrt(np.mean(np.square(w), axis=1, keepdims=True))  # (out, 1)
        moved[name] = w + np.float32(NOISE) * size * rng.standard_normal(w.shape, np.float32)
    return moved


def rows(records: Sequence[Record]) -> list[Record]:
    """All of them, without what is the same in each."""
    return [{key: value for key, value in r.items() if key != "tokens"} for r in records]


def draw(records: Sequence[Record], path: Path) -> None:
    """The increase of the loss over float32 and its standard error, one panel a model, as a PNG."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(r["model"] for r in records))
    figure = Figure(figsize=(6 * len(models), 5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        found = [r for r in records if r["model"] == model][::-1]
        names = [str(Format(r["data_type"], r["scale"])) for r in found]
        errors = [r["standard_error"] for r in found]
        axes.barh(names, [r["increase"] for r in found], xerr=errors, color="C0", ecolor="0.3")
        axes.set(xlabel="held-out loss, more than in float32 (nats a token)", title=model)
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=130)
