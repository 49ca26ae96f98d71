"""`minift compare`: every way to fine-tune, side by side."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from minift.cli.apart import Run, digest
from minift.cli.common import console, emit
from minift.cli.watch import Watcher
from minift.train.engine import Optimizer
from minift.train.loop import at_least
from minift.train.methods import Method

NOTHING = "nothing"
METHODS = ("full", "full+adamw8bit", "full+paged-adamw8bit", "head", "lora", "qlora", "prompt", "prefix", "p-tuning")
IN_THE_MODEL = ("full", "head")  # what they train is part of the weights; with the others it comes on top


@dataclass
class Compare:
    """Fine-tune a model in every way, on one task with one budget, and put what it cost beside what it brought.

    Each method makes the same number of steps on the same batches, with the learning rate that `minift finetune` would
    give it; what differs from seed to seed is the order of the examples and what is drawn at the start. Each run is a
    `minift finetune` in a process of its own, one after the other, so that peak memory is the method's own. The first
    row, "nothing", is the model as it is.

    What to look at: the loss against how many numbers learn (a small part of the model may be enough); the bytes of
    weights, of what learns and of the optimizer (4-bit weights shrink the first, adapters the other two, 8-bit moments
    the last), and how much of the peak they are. The rest of the peak is activations and Python itself; the row
    "nothing" shows what that is without training. And the seeds: a difference smaller than their spread is none.
    (The built-in model was shipped in 4 bits, so qlora begins on it where lora does; on another it would not.)

    Ctrl-C leaves everything in --out; the same command goes on from there, and a finished run is not run again.

    minift compare --methods lora lora+adamw8bit

    minift compare --model MODEL.gguf --methods lora qlora prompt --seeds 0 --steps 30 --batch-size 4
    """

    methods: tuple[str, ...] = METHODS
    """full, head, lora, qlora, prompt, prefix or p-tuning; with another optimizer than AdamW as in lora+adamw8bit or
    full+paged-adamw8bit."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each method for each."""
    steps: int = 60
    """Optimizer steps of each run. Few favor methods that learn fast, not those that get far."""
    batch_size: int = 16
    """Examples a step."""
    seq_len: int = 256
    """Longer examples are cut to this many tokens."""
    model: str = "tiny"
    """tiny (built in), a Hugging Face folder of a Llama model, or a .gguf file."""
    data: str = "stdlib"
    """stdlib (built in), or a JSONL file or folder, as in finetune."""
    eval_examples: int = 200
    """Held-out examples that the loss is measured on."""
    out: Path = Path("runs/compare")
    """METHOD/SEED are the runs' folders; the table (summary.json) and the picture (compare.png) lie beside them."""
    json: bool = False
    """Print the rows as one JSON list on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        at_least(1, steps=self.steps, batch_size=self.batch_size, eval_examples=self.eval_examples)
        at_least(2, seq_len=self.seq_len)
        if not self.methods or not self.seeds:
            raise ValueError(f"--{'seeds' if self.methods else 'methods'} is empty, needed at least one")
        digests = {"digest_of_the_model": digest(self.model), "digest_of_the_data": digest(self.data)}
        if self.data == "stdlib":
            digests["python"] = platform.python_version()  # whose documentation it is
        runs = {name: [self._run(name, seed, digests) for seed in dict.fromkeys(self.seeds)] for name in self._names()}
        runs[NOTHING] = runs[NOTHING][:1]  # there is nothing in it that a seed decides
        missing = [(name, run) for name, several in runs.items() for run in several if not run.finished]
        total = sum(run.settings["steps"] for several in runs.values() for run in several)
        done = total - sum(run.settings["steps"] for _, run in missing)
        with Watcher(total) as watch:
            for number, (name, run) in enumerate(missing, 1):
                what = name if name == NOTHING else f"{name}, seed {run.settings['seed']}"
                console.print(f"{number} of {len(missing)}: {what}")
                if not run.carry_out(_report(watch, what, done)):
                    console.print(f"stopped in {run.folder}; the same command goes on")
                    return 130
                done += run.settings["steps"]
                summary = run.summary()
                learned = f"{summary['eval_loss_before']:.3f} → {summary['eval_loss_after']:.3f}"
                console.print(f"  held-out loss {learned}, {summary['seconds']:.0f} s")
        rows = [row(name, several) for name, several in runs.items()]
        draw(rows, self.out / "compare.png", f"{self.steps} steps of {self.batch_size} examples on {self.model}")
        console.print(table(rows))
        console.print(f"{self.out / 'compare.png'}, {time.perf_counter() - started:.0f} s")
        emit(rows, self.json, self.out)
        return 0

    def _names(self) -> list[str]:
        """What is compared, with the model as it is first. ValueError for what is none."""
        known = ", ".join(get_args(Method))
        for name in self.methods:
            method, plus, optimizer = name.partition("+")
            if method not in get_args(Method) or (plus and optimizer not in get_args(Optimizer)):
                others = " or ".join(f"+{o}" for o in get_args(Optimizer)[1:])
                raise ValueError(f"--methods {name}: needed one of {known}, alone or with {others} behind it")
        return list(dict.fromkeys((NOTHING, *self.methods)))

    def _run(self, name: str, seed: int, digests: dict[str, str]) -> Run:
        method, _, optimizer = ("lora" if name == NOTHING else name).partition("+")  # a fresh adapter changes nothing
        steps = 0 if name == NOTHING else self.steps
        shared = {key: getattr(self, key) for key in ("model", "data", "batch_size", "seq_len", "eval_examples")}
        settings = {"method": method, "optimizer": optimizer or "adamw", "seed": seed, "steps": steps, **shared}
        settings |= {"eval_every": max(steps, 1)}  # before and after
        return Run("finetune", settings, self.out / name / str(seed), digests)


def _report(watch: Watcher, what: str, before: int) -> Callable[[int], None]:
    """Shows how far all runs together are; nothing while one loads its model or measures before its first step."""

    def report(step: int) -> None:
        if step:
            watch.show(before + step, f"{what}, step {step}")

    return report


def row(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """What a method cost and brought: means over its seeds, of the loss also the lowest and the highest.

    `seconds` are those of the training steps alone; the peak is the highest of all seeds. Of paged moments,
    `optimizer_resident_bytes` are in memory at most."""
    summaries = [run.summary() for run in runs]
    first, losses = summaries[0], [summary["eval_loss_after"] for summary in summaries]
    learns = 0 if name == NOTHING else 1
    return {
        "method": name,
        "trainable_parameters": first["trainable_parameters"] * learns,
        "total_parameters": first["total_parameters"],
        "weight_bytes": first["weight_bytes"],
        "trainable_bytes": first["trainable_bytes"] * learns,
        "optimizer_bytes": first["optimizer_bytes"] * learns,
        "optimizer_resident_bytes": first.get("peak_resident_bytes", first["optimizer_bytes"]) * learns,
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
        "seconds": round(sum(map(_training_seconds, runs)) / len(runs), 2),
        "eval_loss_before": sum(summary["eval_loss_before"] for summary in summaries) / len(runs),
        "eval_loss": sum(losses) / len(runs),
        "eval_loss_lowest": min(losses),
        "eval_loss_highest": max(losses),
        "seeds": len(runs),
    }


def _training_seconds(run: Run) -> float:
    """Also of a run that was stopped and went on."""
    return sum(record["tokens"] / record["tokens_per_second"] for record in run.records() if "loss" in record)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a method, within 80 columns. MB are 10⁶ bytes, of paged moments those in memory; ± is half the distance
    from the lowest loss to the highest."""
    made = Table(box=None, padding=(0, 1, 0, 0))
    made.add_column("")
    for heading in ("numbers\nlearn", "MB of\nweights", "what\nlearns", "opti-\nmizer", "\npeak", "\ns"):
        made.add_column(heading, justify="right")
    made.add_column("held-out\nloss")
    for r in rows:
        sizes = (f"{r[f'{part}_bytes'] / 1e6:,.2f}" for part in ("weight", "trainable", "optimizer_resident"))
        spread = f" ± {(r['eval_loss_highest'] - r['eval_loss_lowest']) / 2:.3f}" if r["seeds"] > 1 else ""
        made.add_row(
            r["method"],
            f"{r['trainable_parameters']:,}",
            *sizes,
            f"{r['peak_memory_bytes'] / 1e6:,.0f}",
            f"{r['seconds']:.1f}",
            f"{r['eval_loss']:.3f}{spread}",
        )
    return made


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Held-out loss against how many numbers learn, and the memory of each method, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 3, 2))
    for i, r in enumerate(rows):
        if r["method"] == NOTHING:
            left.axhline(r["eval_loss"], color="0.5", linestyle="--", label="the model as it is")
            continue
        around = [[r["eval_loss"] - r["eval_loss_lowest"]], [r["eval_loss_highest"] - r["eval_loss"]]]
        marker = "osD"[("adamw", *get_args(Optimizer)[1:]).index(r["method"].partition("+")[2] or "adamw")]
        left.errorbar(
            r["trainable_parameters"],
            r["eval_loss"],
            around,
            fmt=marker,
            color=f"C{i % 10}",
            capsize=4,
            label=r["method"],
            markerfacecolor="none",
            markersize=max(15 - i, 4),  # so that one which lies on another is seen
        )
    left.set(xscale="log", xlabel="numbers that learn", ylabel="held-out loss (nats a token)")
    left.legend(fontsize="small")

    names = [r["method"] for r in rows]
    frozen = [r["weight_bytes"] - r["trainable_bytes"] * (_method(r) in IN_THE_MODEL) for r in rows]
    parts = {
        "frozen weights": frozen,
        "what learns": [r["trainable_bytes"] for r in rows],
        "its gradient": [r["trainable_bytes"] for r in rows],
        "optimizer": [r["optimizer_resident_bytes"] for r in rows],
    }
    start = [0.0] * len(rows)
    for (label, sizes), color in zip(parts.items(), ("0.75", "C0", "C1", "C3"), strict=True):
        middle.barh(names, [size / 1e6 for size in sizes], left=start, color=color, label=label)
        start = [at + size / 1e6 for at, size in zip(start, sizes, strict=True)]
    middle.set(xlabel="MB that must be in memory")
    middle.legend(fontsize="small")
    right.barh(names, [r["peak_memory_bytes"] / 1e6 for r in rows], color="0.6")
    right.set(xlabel="MB at the highest point", yticklabels=[])
    for axes in (middle, right):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    left.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _method(row: dict[str, Any]) -> str:
    return row["method"].partition("+")[0]
