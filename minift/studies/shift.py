"""A distribution shift, and what pretraining is worth beyond it: a learning curve.

A model that has read one kind of text is surprised by another. It can be fine-tuned on n examples of the new kind, or a
model can be trained on them from scratch. How many examples from scratch give the loss that fine-tuning reaches with n?
The difference is what pretraining has transferred, counted in examples.      (Hernandez et al. 2021, arXiv 2102.01293)

Old and new text are those of `two_texts`. Both starts see the same n examples in the same order, with one learning
rate, for as many steps: at most 20 epochs and at most 200 steps. Weights are kept where the loss on a validation set
was lowest, and measured on a test set. (Over 1,000 examples 200 steps are few: a start from scratch is still learning
when they end, which `best_step` shows. There the figure is what pretraining is worth at this budget.) A seed decides
which n examples, their order and the random start; the pretrained model is one and the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minift.models import llama
from minift.studies.two_texts import BATCH, NANO, mixed, pretrained, train, two_texts
from minift.train.evaluate import held_out_loss

Record = dict[str, Any]
SIZES = (30, 100, 300, 1000, 3000)
RATE = 3e-3
PRETRAINED, SCRATCH = "pretrained", "from scratch"


def run(
    model: str,
    seed: int,
    say: Callable[[str], None],
    *,
    config: llama.Config = NANO,
    sizes: Sequence[int] = SIZES,
    seeds: int = 3,
    steps: int = 200,
    pretraining_steps: int = 500,
) -> list[Record]:
    """A record for each start, number of examples and seed; the same whatever the `model`: it trains its own."""
    texts = two_texts(config, seed)
    before = pretrained(texts, config, pretraining_steps, seed)

    def measured(start: str, examples: int, run: int, params: Any, last: int, best: int) -> Record:
        new, old = (held_out_loss(params, text, config, 64) for text in (texts.test, texts.old_held_out))
        record = {"start": start, "examples": examples, "seed": run, "new_loss": new, "old_loss": old}
        return record | {"steps": last, "best_step": best}

    records = [measured(PRETRAINED, 0, seed, before, 0, 0)]
    say(f"pretrained on the reference: {_losses(records[0])}")
    for n in sizes:
        last = min(steps, math.ceil(20 * n / BATCH))
        for trial in range(seed, seed + seeds):
            rng = np.random.default_rng([trial, n])
            chosen = [texts.new[i] for i in rng.choice(len(texts.new), n, replace=False)]
            for start in (PRETRAINED, SCRATCH):
                first = before if start == PRETRAINED else llama.initialize(config, rng)
                result = train(
                    first, config, mixed(chosen, trial), last, RATE, trial, texts.validation, max(last // 8, 1)
                )
                best, _ = min(result.losses(), key=lambda pair: pair[1])
                records.append(measured(start, n, trial, result.params, last, best))
        tuned, scratch = (r["new_loss"] for r in records[-2:])
        say(f"{n:,} examples: {tuned:.3f} fine-tuned, {scratch:.3f} from scratch")
    say(f"from scratch on {sizes[-1]:,} entries of the dictionary: {_losses(records[-1])}")
    return records


def rows(records: Sequence[Record]) -> list[Record]:
    """Mean and standard deviation of the test loss for each number of examples, and what fine-tuning is worth: the
    number of examples from scratch with the same loss, None where the largest number does not reach it."""
    sizes = sorted({r["examples"] for r in records if r["start"] == SCRATCH})
    scratch = {n: _summary(records, SCRATCH, n) for n in sizes}
    made = []
    for n in [0, *sizes]:
        tuned = _summary(records, PRETRAINED, n)
        row: Record = {"examples": n, "fine_tuned": tuned[0], "tuned_spread": tuned[1]}
        names = ("from_scratch", "scratch_spread", "scratch_best_step")
        row |= dict(zip(names, scratch.get(n, (None, None, None)), strict=True))
        made.append(row | {"worth_from_scratch": worth(tuned[0], sizes, [scratch[m][0] for m in sizes])})
    return made


def worth(loss: float, sizes: Sequence[int], losses: Sequence[float]) -> int | None:
    """Where a learning curve first falls to `loss`, on a straight line between its points over log n.

    The smallest size where it begins lower, None where it does not get there."""
    if losses[0] <= loss:
        return sizes[0]
    for (n, above), (m, below) in zip(
        zip(sizes, losses, strict=True), zip(sizes[1:], losses[1:], strict=True), strict=False
    ):
        if below <= loss < above:
            return round(math.exp(np.interp(loss, [below, above], [math.log(m), math.log(n)])))
    return None


def draw(records: Sequence[Record], path: Path) -> None:
    """Both learning curves, with the spread over seeds, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({r["examples"] for r in records if r["start"] == SCRATCH})
    for start, color in ((SCRATCH, "C3"), (PRETRAINED, "C0")):
        means, spreads, _ = zip(*(_summary(records, start, n) for n in sizes), strict=True)
        label = "fine-tuned" if start == PRETRAINED else start
        axes.errorbar(sizes, means, spreads, color=color, marker="o", capsize=3, label=label)
    axes.axhline(records[0]["new_loss"], color="C0", linestyle="--", linewidth=1, label="pretrained, not fine-tuned")
    axes.set(xscale="log", xlabel="examples of the new text", ylabel="test loss (nats a token)")
    axes.set_title("how many examples is pretraining worth?")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def _summary(records: Sequence[Record], start: str, examples: int) -> tuple[float, float, float]:
    found = [r for r in records if r["start"] == start and r["examples"] == examples]
    losses = [r["new_loss"] for r in found]
    spread = float(np.std(losses, ddof=1)) if len(losses) > 1 else 0.0
    return float(np.mean(losses)), spread, float(np.mean([r["best_step"] for r in found]))


def _losses(record: Record) -> str:
    return f"{record['old_loss']:.3f} nats a token on the reference, {record['new_loss']:.3f} on the dictionary"
