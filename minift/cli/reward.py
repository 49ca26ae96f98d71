"""`minift reward`: from comparisons to a model that scores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from minift.cli.common import console, emit
from minift.cli.policy import Start, identity, pairs_and_settings, read_comparisons, start, stopped, texts
from minift.cli.watch import Watcher, draw_losses
from minift.data.comparisons import Comparison
from minift.io import refuse_to_destroy, save_adapter, save_reward_model
from minift.nn.weight import trainable
from minift.peft import lora, qlora
from minift.rlhf import reward_model, training
from minift.rlhf.pairs import Pairs
from minift.train.loop import Result


@dataclass
class Reward:
    """Learn a reward model from comparisons: a score that is higher for the answer that people prefer.

    The loss is -log sigmoid(reward of the chosen answer - reward of the rejected one). What counts is how often the
    model agrees with comparisons that it has not seen, and how sure it is when it does (calibration). If the raters
    contradict themselves in a tenth of the pairs, nobody can agree with more than 90% of them.

    minift rate --adapter runs/finetune/adapter                                  makes runs/rate/comparisons.jsonl
    minift reward runs/rate/comparisons.jsonl --adapter runs/finetune/adapter
    """

    comparisons: Annotated[Path, tyro.conf.Positional]
    """JSONL of prompt, chosen, rejected, as `minift rate` and TRL write it."""
    model: str = "tiny"
    """tiny (built in), a Hugging Face folder of a Llama model, or a .gguf file."""
    adapter: Path | None = None
    """The adapter of the model that answers, such as runs/finetune/adapter; the reward model goes on learning it."""
    out: Path = Path("runs/reward")
    """Where the adapter with its score head, metrics.jsonl, the loss curve and checkpoints go."""
    steps: int | None = None
    """Optimizer steps; by default as many as read each comparison once: a second time, it is learned by heart."""
    batch_size: int = 32
    """Comparisons a step."""
    learning_rate: float | None = None
    """At its peak; by default 0.128 / hidden_size (1e-3 for tiny)."""
    method: Literal["lora", "qlora"] = "lora"
    """lora: an adapter on the model as it is. qlora: over its weights in 4 bits."""
    r: int = 8
    """Rank of the adapter, where none is given."""
    center: float = 0.01
    """Holds the mean of the rewards near 0, which the loss itself leaves free; 0 does not."""
    whole: bool = False
    """Also write the whole reward model to --out/model, as transformers' LlamaForSequenceClassification."""
    held_out: float = 0.1
    """Share of the questions whose comparisons are kept to measure on."""
    eval_every: int = 50
    """Steps between measurements."""
    save_every: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Decides what is held out, the order of the data and the head's first values."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    json: bool = False
    """Print the results as one JSON object on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        refuse_to_destroy(self.out / "adapter", {"adapter_config.json"})
        if self.whole:
            refuse_to_destroy(self.out / "model", {"config.json"})
        found = read_comparisons(self.comparisons)
        begin = start(self.model, self.adapter)
        options = {"folder": self.out, "identity": identity(self, begin, *texts(found)), "resume": self.resume}
        result, held_out = train(self, begin, found, **options)
        if stopped(result):
            return 130
        save_adapter(self.out / "adapter", lora.detach(result.params)[1], begin.base, overwrite=True)
        if self.whole:
            save_reward_model(self.out / "model", begin.config, result.params, begin.tokenizer, overwrite=True)
        draw_losses(result.records, self.out / "loss.png", "reward model")
        summary = judged(result, held_out, begin) | {
            "comparisons": len([c for c in found if not c.tie]),
            "trainable_parameters": sum(array.size for array in trainable(result.params).values()),
            "seconds": round(time.perf_counter() - started, 1),
            "adapter": str(self.out / "adapter"),
        }
        show(summary)
        emit(summary, self.json, self.out)
        return 0


def train(command: Reward, begin: Start, found: list[Comparison], **options: Any) -> tuple[Result, Pairs]:
    """The training itself, and the pairs that were held out."""
    learned, held_out, settings = pairs_and_settings("reward model", command, begin, found)
    rng = np.random.default_rng(command.seed)
    base = qlora.quantize(begin.bare) if command.method == "qlora" else begin.bare
    params = training.with_score_head(base, begin.adapter, rng, command.r)
    with Watcher(settings.steps) as watch:
        options = {"batch_size": command.batch_size, "center": command.center, "report": watch} | options
        return training.train_reward_model(params, learned, held_out, begin.config, settings, **options), held_out


def judged(result: Result, held_out: Pairs, begin: Start) -> dict[str, Any]:
    """How often the model agrees with held-out comparisons, and how sure it is."""
    chosen, rejected = training.scores_of(result.params, held_out, begin.config)
    losses = result.losses()
    return {
        "reward_accuracy": reward_model.accuracy(chosen, rejected),
        "held_out": len(held_out),
        "calibration": reward_model.calibration(chosen, rejected),
        "eval_loss_before": losses[0][1],
        "eval_loss_after": losses[-1][1],
    }


def show(summary: dict[str, Any]) -> None:
    accuracy, n = summary["reward_accuracy"], summary["held_out"]
    error = (accuracy * (1 - accuracy) / n) ** 0.5
    console.print(f"agrees with {accuracy:.1%} ± {error:.1%} of {n:,} held-out comparisons")
    for expected, observed, pairs in summary["calibration"]:
        console.print(f"  where it is {expected:.0%} sure, raters agree in {observed:.0%} of {pairs:,} pairs")
