"""minift beside its peers on this machine's CPU: pairs in turn, in one run, as ratios.

    python benchmarks/cpu.py                       NF4 against bitsandbytes
    python benchmarks/cpu.py --model MODEL.gguf    also training steps and generation, against PEFT and transformers

A ratio above 1 means that minift is faster. Each pair is run in turn, ours then theirs, several times, and the ratio is
that of the medians, with the smallest and largest ratio of a turn as its spread. On a machine that does something else
at the same time the spread says so. The results go to --out as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from minift.data.batches import pad
from minift.io import load_model
from minift.models import llama
from minift.nn.weight import Frozen, dense, trainable
from minift.optim.adamw import AdamW
from minift.peft import lora, qlora
from minift.quant import double_quant, nf4
from minift.train import sft

Row = dict[str, Any]


@dataclass
class Benchmark:
    """Time minift and its peers in turn."""

    model: Path | None = None
    """A GGUF file, for the training steps and generation."""
    turns: int = 5
    """How often each pair is run."""
    size: int = 4096
    """Side of the matrix that is quantized."""
    batch_size: int = 2
    """Sequences of a training step."""
    seq_len: int = 256
    """Tokens in each."""
    out: Path = Path("runs/benchmark_cpu.json")
    """Where the results go."""

    def run(self) -> None:
        rows = self.quantization()
        if self.model is not None:
            rows += self.training_steps(self.model)
            rows.append(self.generation(self.model))
        machine = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        table = Table(title=", ".join(f"{k} {v}" for k, v in machine.items()))
        for heading in ("", "minift", "peer", "ratio", "spread", "against"):
            table.add_column(heading, justify="left" if heading in ("", "against") else "right")
        for row in rows:
            spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
            ours, theirs = (f"{row[key] * 1e3:,.1f} ms" for key in ("ours", "theirs"))
            table.add_row(row["what"], ours, theirs, f"{row['ratio']:.2f}", spread, row["against"])
        Console().print(table)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")

    def quantization(self) -> list[Row]:
        """NF4, plain and double-quantized, of one square float32 matrix."""
        import torch
        from bitsandbytes import functional as bnb

        w = np.random.default_rng(0).standard_normal((self.size, self.size), np.float32)
        theirs = torch.from_numpy(w)
        q = nf4.quantize(w)
        nested = double_quant.compress(q)
        p, state = bnb.quantize_4bit(theirs, quant_type="nf4")
        p2, state2 = bnb.quantize_4bit(theirs, quant_type="nf4", compress_statistics=True)
        peer = "bitsandbytes"
        return [
            self.pair(
                "NF4 quantize", lambda: nf4.quantize(w), lambda: bnb.quantize_4bit(theirs, quant_type="nf4"), peer
            ),
            self.pair("NF4 dequantize", lambda: nf4.dequantize(q), lambda: bnb.dequantize_4bit(p, state), peer),
            self.pair(
                "NF4 + double quantization, quantize",
                lambda: double_quant.compress(nf4.quantize(w)),
                lambda: bnb.quantize_4bit(theirs, quant_type="nf4", compress_statistics=True),
                peer,
            ),
            self.pair(
                "NF4 + double quantization, dequantize",
                lambda: nf4.dequantize(nested),
                lambda: bnb.dequantize_4bit(p2, state2),
                peer,
            ),
        ]

    def training_steps(self, path: Path) -> list[Row]:
        """Forward, backward and AdamW of LoRA and QLoRA, rank 8 on every linear layer."""
        import torch

        import peft

        config, params = load_model(path)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, config.vocab_size, (self.batch_size, self.seq_len)).astype(np.int32)
        batch = pad([(row, row) for row in tokens])
        rows = []
        for what, attach in (("LoRA", lora.attach), ("QLoRA", qlora.attach)):
            attached = attach(params, r=8, lora_alpha=16, rng=rng)
            arrays, optimizer = trainable(attached), AdamW()

            def ours(attached=attached, arrays=arrays, optimizer=optimizer):
                _, vjp = sft.loss(attached, batch, config)
                optimizer.update(arrays, vjp(1.0), 1e-4)

            theirs_model = _torch_model(path)
            if what == "QLoRA":
                _quantize_linears(theirs_model)
            settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            theirs_model = peft.get_peft_model(theirs_model, settings)
            theirs_optimizer = torch.optim.AdamW([p for p in theirs_model.parameters() if p.requires_grad], lr=1e-4)
            ids = torch.from_numpy(tokens.astype(np.int64))

            def theirs(model=theirs_model, optimizer=theirs_optimizer, ids=ids):
                optimizer.zero_grad()
                model(ids, labels=ids).loss.backward()
                optimizer.step()

            peer = "PEFT + bitsandbytes" if what == "QLoRA" else "PEFT"
            rows.append(self.pair(f"{what} step, {self.batch_size} x {self.seq_len} tokens", ours, theirs, peer))
        return rows

    def generation(self, path: Path, new_tokens: int = 32) -> Row:
        """Greedy decoding of one sequence, prompt included."""
        import torch

        config, params = load_model(path)
        frozen = {name: Frozen(dense(w)) for name, w in params.items()}
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, 16))
        model, ids = _torch_model(path), torch.from_numpy(prompt)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        return self.pair(
            f"generate {new_tokens} tokens",
            lambda: llama.generate(frozen, prompt, config, new_tokens),
            lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options),
            "transformers",
        )

    def pair(self, what: str, ours: Callable[[], Any], theirs: Callable[[], Any], against: str) -> Row:
        """Run both in turn after one warm-up of each."""
        ours(), theirs()
        turns = [(_seconds(ours), _seconds(theirs)) for _ in range(self.turns)]
        ratios = [b / a for a, b in turns]
        a, b = (statistics.median(column) for column in zip(*turns, strict=True))
        found = {"ours": a, "theirs": b, "ratio": b / a, "lowest": min(ratios), "highest": max(ratios)}
        return {"what": what, "against": against} | found


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _torch_model(path: Path):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def _quantize_linears(model) -> None:
    """Every linear layer but the head as bitsandbytes' `Linear4bit`: NF4, double quantization, computing in float32."""
    import bitsandbytes as bnb
    import torch

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                four = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=torch.float32,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                four.weight = bnb.nn.Params4bit(
                    layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                setattr(parent, name, four.to("cpu"))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
