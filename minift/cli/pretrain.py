"""`minift pretrain`: a small model from nothing; this is how the built-in one is made."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.text import Text

from minift.cli.common import Device, batches_of, check_page_budget, console, emit, engine_on, peak_memory_bytes
from minift.cli.watch import Watcher, draw_losses
from minift.data import stdlib_docs
from minift.io import refuse_to_destroy, save_model
from minift.models import llama
from minift.peft import qlora
from minift.train.engine import Optimizer
from minift.train.evaluate import held_out_loss
from minift.train.loop import Settings, at_least, fit
from minift.train.pretraining import PRESETS, entry, rows, train_tokenizer


@dataclass
class Pretrain:
    """Train a small Llama from random weights on the documentation inside Python itself.

    It reads the language reference and, as in a dictionary, names and what they do ("math.isqrt: Return the …"). It is
    never asked a question: that is left to `minift finetune`. The checkpoint with the lowest held-out loss is kept,
    since a model this size soon knows so little text by heart.
    """

    preset: Literal["tiny", "nano"] = "tiny"
    """tiny has about a million parameters, nano a tenth (to try things out)."""
    out: Path = Path("runs/pretrain")
    """Where model, metrics.jsonl, the loss curve and checkpoints go."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Rows a step."""
    seq_len: int = 128
    """Tokens a row."""
    learning_rate: float = 4e-3
    """At its peak; it falls along a cosine."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    optimizer: Optimizer = "adamw"
    """adamw, adamw8bit (moments in 8 bits) or paged-adamw8bit (those in pages); see minift finetune --help."""
    page_budget: int = 1_000_000
    """Bytes of moments that paged-adamw8bit keeps in memory."""
    storage: Literal["nf4", "float32"] = "nf4"
    """How the linear layers are written: 4 bits with double quantization, or as they are."""
    device: Device = "cpu"
    """cpu: NumPy. cpu-torch: the same in PyTorch. cuda: the kernels of minift_kernels."""
    eval_every: int = 100
    """Steps between measurements of the held-out loss."""
    seed: int = 0
    """Decides the first weights and the order of the text."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    json: bool = False
    """Print the results as one JSON object on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        at_least(1, batch_size=self.batch_size)
        at_least(2, seq_len=self.seq_len)
        check_page_budget(self.optimizer, self.page_budget)
        settings = Settings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=max(1, self.steps // 20),
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            page_budget=self.page_budget,
            seed=self.seed,
            eval_every=self.eval_every,
            save_every=self.eval_every,
            keep_best=True,
        )
        refuse_to_destroy(self.out / "model", {"config.json"})
        engine = engine_on(self.device)
        config, found = PRESETS[self.preset], stdlib_docs.embedded()
        train_text, held_out_text = (
            [*map(entry, pairs), *(e.text for e in text)]
            for pairs, text in (
                (found.train_pairs, found.train_text),
                (found.held_out_pairs, found.held_out_text),
            )
        )
        tokenizer = train_tokenizer([*train_text, *(e.everything for e in found.train_pairs)], config.vocab_size)
        rng = np.random.default_rng(self.seed)
        train = rows(train_text, tokenizer, self.seq_len, rng)
        held_out = rows(held_out_text, tokenizer, self.seq_len, rng)
        params = llama.initialize(config, rng)
        size = sum(array.size for array in params.values())
        console.print(
            Text("pretrain", style="bold"),
            f"{self.preset}: {size:,} parameters, {sum(len(t) for t, _ in train):,} training "
            f"tokens, {sum(len(t) for t, _ in held_out):,} held out",
        )

        def loss(params, batch, normalizer, key):
            return engine.loss(params, batch, config, normalizer)

        with Watcher(self.steps) as watch:
            result = fit(
                params,
                loss,
                batches_of(train, self.batch_size, 1, self.seed),
                settings,
                evaluate=lambda p: held_out_loss(p, held_out, config, value=engine.value),
                folder=self.out,
                identity={"preset": self.preset, "batch_size": self.batch_size, "seq_len": self.seq_len},
                resume=self.resume,
                report=watch,
                engine=engine,
            )
        if result.interrupted:
            console.print(f"stopped after step {result.records[-1]['step']}; the same command with --resume goes on")
            return 130
        stored = qlora.quantize(result.params) if self.storage == "nf4" else result.params
        save_model(self.out / "model", config, stored, tokenizer, overwrite=True)
        draw_losses(result.records, self.out / "loss.png", f"pretraining {self.preset}")
        evaluations = result.losses()
        best_step, best = min(evaluations, key=lambda pair: pair[1])
        summary: dict[str, Any] = {
            "preset": self.preset,
            "total_parameters": size,
            "optimizer": self.optimizer,
            "optimizer_bytes": result.optimizer_bytes,
            **result.paging,
            "eval_loss_before": evaluations[0][1],
            "eval_loss_after": best,
            "eval_loss_stored": held_out_loss(stored, held_out, config),
            "best_step": best_step,
            "file_bytes": sum(file.stat().st_size for file in (self.out / "model").iterdir()),
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "model": str(self.out / "model"),
        }
        console.print(
            f"held-out loss {summary['eval_loss_before']:.3f} → {best:.3f} at step {best_step}, "
            f"{summary['eval_loss_stored']:.3f} as stored ({summary['file_bytes'] / 1e6:.2f} MB in {summary['model']})"
        )
        emit(summary, self.json, self.out)
        return 0
