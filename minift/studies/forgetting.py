"""What is forgotten in fine-tuning: the loss on the old kind of text, before and after learning a new one.

Nothing in the loss of the new text asks a model to keep what it knew.           (McCloskey & Cohen 1989; French 1999)
Three answers, side by side: let everything learn; learn a difference of low rank only, which can move the model less
far ("LoRA learns less and forgets less", Biderman et al. 2024, arXiv 2405.09673); or show it some of the old text along
with the new (replay). One pretrained model, the texts of `two_texts`, the same new rows in the same order, as many
steps; with replay, a step has 4 rows of the old text beside the 16 of the new, so it costs more.

A loss alone says little: whoever learns nothing forgets nothing. So both losses stand side by side, along the way too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minift.models import llama
from minift.nn.weight import trainable
from minift.peft import lora
from minift.studies.two_texts import NANO, mixed, pretrained, train, two_texts
from minift.train.evaluate import held_out_loss

Record = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to fine-tune: the rank of its adapters (None: everything learns), its rate, rows of old text a step."""

    name: str
    r: int | None
    learning_rate: float
    old_rows: int = 0


WAYS = (
    Way("full", None, 3e-3),
    Way("LoRA, r = 2", 2, 1e-2),
    Way("LoRA, r = 16", 16, 1e-2),
    Way("full, with replay", None, 3e-3, old_rows=4),
)


def run(
    model: str,
    seed: int,
    say: Callable[[str], None],
    *,
    config: llama.Config = NANO,
    seeds: int = 3,
    steps: int = 200,
    pretraining_steps: int = 500,
) -> list[Record]:
    """Both losses of each way and seed, five times on its way; the same whatever the `model`: it trains its own."""
    texts = two_texts(config, seed)
    before = pretrained(texts, config, pretraining_steps, seed)
    records: list[Record] = []
    every = max(steps // 5, 1)
    for way in WAYS:
        for trial in range(seed, seed + seeds):
            rng = np.random.default_rng([trial, 3])
            start = before if way.r is None else lora.attach(before, r=way.r, lora_alpha=2 * way.r, rng=rng)
            learned = sum(array.size for array in trainable(start).values())
            path: list[Record] = []

            def watch(params, way=way, trial=trial, learned=learned, path=path):
                new, old = (held_out_loss(params, text, config, 64) for text in (texts.test, texts.old_held_out))
                step = min(every * len(path), steps)
                path.append({"way": way.name, "seed": trial, "step": step, "new_loss": new, "old_loss": old})
                path[-1]["trainable"] = learned

            batches = mixed(texts.new, trial, texts.old, way.old_rows)
            rate, little = way.learning_rate, texts.validation[:1]
            train(start, config, batches, steps, rate, trial, little, every, keep_best=False, watch=watch)
            records += path
        say(f"{way.name}: new text {records[-1]['new_loss']:.3f}, old text {records[-1]['old_loss']:.3f}")
    return records


def rows(records: Sequence[Record]) -> list[Record]:
    """Before, and for each way: mean and standard deviation of both losses at the end, and what was forgotten."""
    first = records[0]
    before = {"way": "before", "trainable": 0, "new_loss": first["new_loss"], "new_spread": 0.0}
    made = [before | {"old_loss": first["old_loss"], "old_spread": 0.0, "learned": 0.0, "forgotten": 0.0}]
    for name in dict.fromkeys(r["way"] for r in records):
        last = max(r["step"] for r in records if r["way"] == name)
        ends = [r for r in records if r["way"] == name and r["step"] == last]
        new, old = (np.array([r[key] for r in ends]) for key in ("new_loss", "old_loss"))
        spreads = [float(x.std(ddof=1)) if len(x) > 1 else 0.0 for x in (new, old)]
        made.append(
            {"way": name, "trainable": ends[0]["trainable"]}
            | {"new_loss": float(new.mean()), "new_spread": spreads[0]}
            | {"old_loss": float(old.mean()), "old_spread": spreads[1]}
            | {"learned": first["new_loss"] - float(new.mean()), "forgotten": float(old.mean()) - first["old_loss"]}
        )
    return made


def draw(records: Sequence[Record], path: Path) -> None:
    """Each way's path through the plane of both losses, the mean over seeds, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(r["way"] for r in records):
        steps = sorted({r["step"] for r in records if r["way"] == name})
        own = [r for r in records if r["way"] == name]
        points = [[(r["new_loss"], r["old_loss"]) for r in own if r["step"] == step] for step in steps]
        new, old = np.mean(points, axis=1).T
        axes.plot(new, old, marker=".", label=name)
    axes.axhline(records[0]["old_loss"], color="k", linestyle=":", linewidth=1)
    axes.plot(records[0]["new_loss"], records[0]["old_loss"], "ko", label="before")
    axes.invert_xaxis()  # learning goes to the right, forgetting up
    axes.set(xlabel="loss on the new text (nats a token)", ylabel="loss on the old text", title="learned and forgotten")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
