"""What one looks at while a model trains, and afterwards: a progress bar, and a picture of the loss."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minift.cli.common import console
from minift.train.loop import Record


@dataclass
class Watcher:
    """Progress of a training run: a bar with loss, rate and time left on a terminal, a line now and then elsewhere."""

    steps: int
    every: float = 15.0  # seconds between lines where there is no terminal
    _progress: Progress | None = field(default=None, init=False)
    _task: Any = field(default=None, init=False)
    _eval_loss: float | None = field(default=None, init=False)
    _started: float = field(default_factory=time.monotonic, init=False)
    _last_line: float = field(default_factory=time.monotonic, init=False)
    _first_step: int | None = field(default=None, init=False)
    _unread: bool = field(default=False, init=False)

    def __enter__(self):
        if console.is_terminal:
            text = TextColumn("{task.description}")
            self._progress = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
            self._progress.start()
            self._task = self._progress.add_task("training", total=self.steps)
        return self

    def __exit__(self, *_):
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, record: Record) -> None:
        step = record["step"]
        if console.quiet and not self._unread:
            self._unread = True
            with suppress(OSError):  # stderr may have gone the same way
                print("minift: nobody reads this output any more; training goes on, see metrics.jsonl", file=sys.stderr)
        if "eval_loss" in record:
            self._eval_loss = record["eval_loss"]
            console.print(f"step {step:>5}  held-out loss {self._eval_loss:.3f}")
            return
        self.show(step, f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s")

    def show(self, step: int, text: str, unit: str = "step") -> None:
        """Move the bar, or now and then print a line."""
        self._first_step = step if self._first_step is None else self._first_step
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line > self.every:
            self._last_line = time.monotonic()
            per_step = (time.monotonic() - self._started) / (step - self._first_step + 1)
            console.print(f"{unit} {step:>5}/{self.steps}  {text}  {per_step * (self.steps - step):,.0f} s left")


def draw_losses(records: Sequence[Record], path: Path, title: str, unit: str = "token") -> None:
    """Training and held-out loss by step, in nats a `unit`, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if training:
        axes.plot(*zip(*training, strict=True), color="0.75", linewidth=1, label="training batch")
        width = max(1, len(training) // 30)
        steps, losses = np.array(training).T
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color="C0", label=f"training, mean of {width} steps")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C3", label="held out")
    axes.set(xlabel="step", ylabel=f"loss (nats a {unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
