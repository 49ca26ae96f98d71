"""`minift dpo`: from comparisons to a policy, without a reward model and without sampling."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minift.cli.common import console, emit
from minift.cli.policy import Start, identity, pairs_and_settings, read_comparisons, start, stopped, texts
from minift.cli.watch import Watcher, draw_losses
from minift.data.comparisons import Comparison
from minift.io import refuse_to_destroy
from minift.nn.weight import Params, freeze
from minift.peft import lora
from minift.rlhf import dpo, training
from minift.rlhf.pairs import Pairs
from minift.train.loop import Result


@dataclass
class Dpo:
    """Learn from comparisons directly: DPO. The policy is its own reward model.

    Makes chosen answers likelier than rejected ones, both measured against the model that it began as. There is no
    reward model, nothing is sampled, and one run costs about as much as fine-tuning.

    minift dpo runs/rate/comparisons.jsonl --adapter runs/finetune/adapter
    """

    comparisons: Annotated[Path, tyro.conf.Positional]
    """JSONL of prompt, chosen, rejected, as `minift rate` and TRL write it."""
    model: str = "tiny"
    """tiny (built in), a Hugging Face folder of a Llama model, or a .gguf file."""
    adapter: Path | None = None
    """The adapter to begin with, such as runs/finetune/adapter: what it answers now is the reference."""
    out: Path = Path("runs/dpo")
    """Where the adapter, metrics.jsonl, the loss curve and checkpoints go."""
    steps: int | None = None
    """Optimizer steps; by default as many as read each comparison once: a second time, it is learned by heart."""
    batch_size: int = 32
    """Comparisons a step."""
    method: Literal["lora", "qlora"] = "lora"
    """lora: an adapter on the model as it is. qlora: over its weights in 4 bits."""
    r: int = 8
    """Rank of the new adapter."""
    learning_rate: float | None = None
    """At its peak; by default 0.128 / hidden_size (1e-3 for tiny)."""
    beta: float = 0.1
    """The leash: smaller lets the policy go further from where it began."""
    label_smoothing: float = 0.0
    """The share of comparisons that are believed to be the wrong way around."""
    loss_type: dpo.LossType = "sigmoid"
    """sigmoid: DPO. ipo: a squared loss that does not reward certainty without end."""
    held_out: float = 0.1
    """Share of the questions whose comparisons are kept to measure on."""
    eval_every: int = 50
    """Steps between measurements."""
    save_every: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Decides what is held out, the order of the data and the adapter's first values."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    json: bool = False
    """Print the results as one JSON object on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        refuse_to_destroy(self.out / "adapter", {"adapter_config.json"})
        found = read_comparisons(self.comparisons)
        begin = start(self.model, self.adapter)
        options = {"folder": self.out, "identity": identity(self, begin, *texts(found)), "resume": self.resume}
        result, held_out = train(self, begin, found, **options)
        if stopped(result):
            return 130
        draw_losses(result.records, self.out / "loss.png", "DPO")
        losses = result.losses()
        summary: dict[str, Any] = {
            "comparisons": len([c for c in found if not c.tie]),
            "held_out": len(held_out),
            "eval_loss_before": losses[0][1],
            "eval_loss_after": losses[-1][1],
            **judged(result.params, held_out, begin, self.beta),
            "seconds": round(time.perf_counter() - started, 1),
            "adapter": str(begin.save(self.out, result.params)),
        }
        for name, value in summary.items():
            console.print(f"{name:<20}{value if isinstance(value, str) else round(value, 4)}")
        emit(summary, self.json, self.out)
        return 0


def train(command: Dpo, begin: Start, found: list[Comparison], **options: Any) -> tuple[Result, Pairs]:
    """The training itself, and the pairs that were held out."""
    learned, held_out, settings = pairs_and_settings("DPO", command, begin, found)
    params = begin.policy(command.r, command.seed, command.method == "qlora")
    loss = {"beta": command.beta, "label_smoothing": command.label_smoothing, "loss_type": command.loss_type}
    with Watcher(settings.steps) as watch:
        options = {"batch_size": command.batch_size, "report": watch} | loss | options
        return training.train_dpo(params, learned, held_out, begin.config, settings, **options), held_out


def judged(params: Params, held_out: Pairs, begin: Start, beta: float) -> dict[str, float]:
    """What TRL shows of held-out pairs: implicit rewards of both answers, and how often their order is right."""
    pairs = training.with_reference(params, held_out, begin.config)
    logps = training.with_reference(freeze(lora.merge(params)), held_out, begin.config)
    assert pairs.reference is not None and logps.reference is not None
    return dpo.statistics(logps.reference, pairs.reference, beta)
