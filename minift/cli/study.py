"""`minift study`: one question about fine-tuning, answered by an experiment: a table and a picture."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from minift.cli.common import console, emit
from minift.studies import data_types, forgetting, outliers, quantization, shift, spikes

Name = Literal["shift", "forgetting", "quantization", "outliers", "data-types", "spikes"]
STUDIES: dict[str, Any] = {
    "shift": shift,
    "forgetting": forgetting,
    "quantization": quantization,
    "outliers": outliers,
    "data-types": data_types,
    "spikes": spikes,
}


@dataclass
class Study:
    """Answer one question about fine-tuning by an experiment.

    shift         How many examples is pretraining worth, when they are of another kind than what was read?
    forgetting    What is forgotten of the old kind of text while a model learns a new one?
    quantization  How much of a weight is lost in 8 and 4 bits, and what does it matter who shares a scale?
    outliers      What do a few large columns do to products in 8 bits, and where are they?
    data-types    What does a language model lose when its layers are stored in fewer bits?
    spikes        What do paged optimizers save when a long sequence comes among short ones?
    """

    name: Annotated[Name, tyro.conf.Positional]
    """Which question."""
    model: str = "tiny"
    """What it is asked of, where it trains none itself: tiny (built in), a folder of a Llama model, or a .gguf file."""
    out: Path | None = None
    """Where the table (summary.json) and the picture go; by default runs/study/NAME."""
    seed: int = 0
    """Decides everything that is drawn."""
    json: bool = False
    """Print the rows as one JSON list on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        study, out = STUDIES[self.name], self.out or Path("runs/study") / self.name
        records = study.run(self.model, self.seed, console.print)
        rows = study.rows(records)
        out.mkdir(parents=True, exist_ok=True)
        study.draw(records, out / f"{self.name}.png")
        console.print(table(rows))
        console.print(f"{out / self.name}.png, {time.perf_counter() - started:.0f} s")
        emit(rows, self.json, out)
        return 0


def table(rows: list[dict[str, Any]]) -> Table:
    """Rows of the same keys, numbers to the right and rounded to what one can read; None is a dash."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    for name, value in rows[0].items():
        made.add_column(name.replace("_", " "), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        made.add_row(*(value if isinstance(value, str) else number(value) for value in row.values()))
    return made


def number(value: float | None) -> str:
    """Whole numbers with commas, others to four digits."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
