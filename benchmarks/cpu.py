"""minift beside its peers on this machine's CPU: pairs in turn, in one run, as ratios.

    python benchmarks/cpu.py                       NF4 against bitsandbytes and torchao
    python benchmarks/cpu.py --model MODEL.gguf    also training steps and generation, against PEFT and transformers

A ratio above 1 means that minift is faster. Each pair is run in turn, ours then theirs, several times: the ratio is
that of the medians, its spread the smallest and the largest ratio of a turn. Beside each time stands the share of it
that its floor takes, the least that anybody must do on this machine, measured in the same turns:

    quantization      every byte in and out once, at the rate of a plain copy
    training steps    the matrix products alone, on arrays of the same shapes
    generation        every weight read once a token, at the rate of a plain copy

Peak memory is measured in processes of their own, one for each side, from the second step on: what was needed to load
the model does not count, libraries do. Results go to --out as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from minift.data.batches import pad
from minift.io import load_model
from minift.models import llama
from minift.nn import threads
from minift.nn.weight import trainable
from minift.optim.adamw import AdamW
from minift.quant import double_quant, nf4
from minift.train import sft
from minift.train.allocator import keep_freed_memory
from minift.train.methods import prepare
from minift.train.parallel import side_by_side

Row = dict[str, Any]
Call = Callable[[], Any]
METHODS = {"lora": "PEFT", "qlora": "PEFT + bitsandbytes", "full": "transformers"}


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
    new_tokens: int = 32
    """Tokens to generate."""
    out: Path = Path("runs/benchmark_cpu.json")
    """Where the results go."""
    memory_of: Literal["", "ours", "theirs"] = ""
    """Only print the peak memory in bytes of one side of --method: what a run does in processes of its own."""
    method: Literal["lora", "qlora", "full", "generate"] = "lora"
    """For --memory-of."""

    def run(self) -> None:
        keep_freed_memory()
        if self.memory_of:
            print(peak_bytes(getattr(self, self.memory_of)(self.method)))
            return
        rows = self.quantization()
        if self.model is not None:
            rows += [self.training_step(method) for method in METHODS]
            rows.append(self.generation())
        machine = {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": threads.count(),
            "python": platform.python_version(),
            "copy_gigabytes_per_second": round(copy_rate() / 1e9, 1),
        }
        Console(width=150).print(_table(rows, machine))
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
        floor = functools.partial(copy, w.nbytes + q.nbytes)
        peer, doubly = "bitsandbytes", "NF4 + double quantization"
        quantize = functools.partial(bnb.quantize_4bit, theirs, quant_type="nf4")
        rows = [
            self.pair("NF4 quantize", lambda: nf4.quantize(w), quantize, peer, floor),
            self.pair("NF4 dequantize", lambda: nf4.dequantize(q), lambda: bnb.dequantize_4bit(p, state), peer, floor),
            self.pair(
                f"{doubly}, quantize",
                lambda: double_quant.compress(nf4.quantize(w)),
                lambda: quantize(compress_statistics=True),
                peer,
                floor,
            ),
            self.pair(
                f"{doubly}, dequantize",
                lambda: nf4.dequantize(nested),
                lambda: bnb.dequantize_4bit(p2, state2),
                peer,
                floor,
            ),
        ]
        torchao = _torchao()
        if torchao is not None:  # always double-quantizes, and with other rules: its codes are not bitsandbytes'
            o = torchao(theirs)
            rows += [
                self.pair(
                    f"{doubly}, quantize",
                    lambda: double_quant.compress(nf4.quantize(w)),
                    lambda: torchao(theirs),
                    "torchao",
                    floor,
                ),
                self.pair(
                    f"{doubly}, dequantize",
                    lambda: nf4.dequantize(nested),
                    lambda: o.get_original_weight(),
                    "torchao",
                    floor,
                ),
            ]
        return rows

    def training_step(self, method: str) -> Row:
        """Forward, backward and AdamW, adapters of rank 8 on every linear layer."""
        ours, theirs = self.ours(method), self.theirs(method)
        what = f"{method} step, {self.batch_size} x {self.seq_len} tokens"
        row = self.pair(what, ours, theirs, METHODS[method], self.products(method))
        return row | self.memory(method)

    def generation(self) -> Row:
        """Greedy decoding of one sequence, prompt included."""
        config, _ = load_model(self.model)
        nbytes = 4 * sum(int(np.prod(shape)) for shape in llama.shapes(config).values())
        floor = functools.partial(copy, self.new_tokens * nbytes // 2)  # a copy moves each byte twice
        what = f"generate {self.new_tokens} tokens"
        row = self.pair(what, self.ours("generate"), self.theirs("generate"), "transformers", floor)
        return row | self.memory("generate")

    def ours(self, method: str) -> Call:
        """One training step, or one generation, by minift."""
        config, params = load_model(self.model)
        tokens = self.tokens(config.vocab_size)
        if method == "generate":
            fused = llama.fuse(params)
            return lambda: llama.generate(fused, tokens[:1, :16], config, self.new_tokens)
        params, config = prepare(method, params, config, r=8, lora_alpha=16, rng=np.random.default_rng(0))
        batch = pad([(row, row) for row in tokens])
        arrays, optimizer = trainable(params), AdamW()
        loss = side_by_side(lambda params, batch, normalizer, _: sft.loss(params, batch, config, normalizer))

        def step():
            _, vjp = loss(params, batch, None, 0)
            optimizer.update(arrays, vjp(1.0), 1e-4)

        return step

    def theirs(self, method: str) -> Call:
        """The same by PyTorch."""
        import torch
        import transformers

        import peft

        path = self.model
        assert path is not None
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        ids = torch.from_numpy(self.tokens(model.config.vocab_size).astype(np.int64))
        if method == "generate":
            ids, new = ids[:1, :16], self.new_tokens
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if method == "qlora":
            _quantize_linears(model)
        if method != "full":
            settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, settings)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step():
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

        return step

    def products(self, method: str) -> Call:
        """The matrix products of a step and nothing else: forward, gradient of the input, and of weights that learn.

        For what an adapter adds, a few percent, and for attention's products there is no place in this floor."""
        config, _ = load_model(self.model)
        weights = [np.ones(s, np.float32) for name, s in matrices(config).items()]
        rows = self.batch_size * self.seq_len
        inputs = {size: np.ones((rows, size), np.float32) for w in weights for size in w.shape}

        def run():
            for w in weights:
                inputs[w.shape[1]] @ w.T
                inputs[w.shape[0]] @ w
                if method == "full":
                    inputs[w.shape[0]].T @ inputs[w.shape[1]]

        return run

    def memory(self, method: str) -> Row:
        """Peak memory of both sides, each in a process of its own."""
        peaks = {}
        for side in ("ours", "theirs"):
            settings = {"model": self.model, "batch-size": self.batch_size, "seq-len": self.seq_len}
            settings |= {"new-tokens": self.new_tokens, "memory-of": side, "method": method}
            options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
            done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
            peaks[f"{side}_bytes"] = int(done.stdout.split()[-1])
        return peaks

    def tokens(self, vocab_size: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, vocab_size, (self.batch_size, self.seq_len)).astype(np.int32)

    def pair(self, what: str, ours: Call, theirs: Call, against: str, floor: Call) -> Row:
        """Run both, and the floor, in turn after one warm-up of each."""
        ours(), theirs(), floor()
        turns = [(_seconds(ours), _seconds(theirs), _seconds(floor)) for _ in range(self.turns)]
        ratios = [b / a for a, b, _ in turns]
        a, b, least = (statistics.median(column) for column in zip(*turns, strict=True))
        found = {"ours": a, "theirs": b, "ratio": b / a, "lowest": min(ratios), "highest": max(ratios), "floor": least}
        return {"what": what, "against": against} | found


# --- floors -----------------------------------------------------------------------------------------------------------


def matrices(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """The matrices that a step multiplies by: every linear layer, and the head (the input table is looked up)."""
    shapes = {n: s for n, s in llama.shapes(config).items() if len(s) == 2 and n != llama.EMBEDDING}
    return shapes | {llama.HEAD: (config.vocab_size, config.hidden_size)}


@functools.lru_cache(maxsize=1)
def _buffers(n: int = 1 << 26) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(n, np.uint8), np.ones(n, np.uint8)


def copy(nbytes: int) -> None:
    """Move as many bytes, in and out together, as `nbytes` say: on all cores, between buffers of 64 MB."""
    source, target = _buffers()
    parts = max(threads.count(), 1)
    edges = np.linspace(0, len(source), parts + 1).astype(int)
    rounds, rest = divmod(nbytes // 2, len(source))

    def move(i):
        part = slice(edges[i], edges[i + 1])
        for _ in range(rounds):
            target[part] = source[part]
        end = edges[i] + (edges[i + 1] - edges[i]) * rest // len(source)
        target[edges[i] : end] = source[edges[i] : end]

    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(move, range(parts)))


def copy_rate() -> float:
    """Bytes a second, in and out together."""
    return 2e9 / min(_seconds(lambda: copy(2 * 10**9)) for _ in range(3))


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(step: Call) -> int:
    """The most memory that this process held during the second step (Linux: the high-water mark can be set back)."""
    step()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# --- the rest ---------------------------------------------------------------------------------------------------------


def _table(rows: list[Row], machine: dict[str, Any]) -> Table:
    table = Table(title=", ".join(f"{k} {v}" for k, v in machine.items()))
    for heading in ("", "minift", "peer", "ratio", "spread", "floor's share", "peak memory", "against"):
        table.add_column(heading, justify="left" if heading in ("", "against") else "right")
    for row in rows:
        ours, theirs = (f"{row[key] * 1e3:,.1f} ms" for key in ("ours", "theirs"))
        spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
        share = f"{row['floor'] / row['ours']:.0%} / {row['floor'] / row['theirs']:.0%}"
        memory = ""
        if "ours_bytes" in row:
            a, b = row["ours_bytes"], row["theirs_bytes"]
            memory = f"{a / 1e9:.2f} / {b / 1e9:.2f} GB = {a / b:.2f}"
        table.add_row(row["what"], ours, theirs, f"{row['ratio']:.2f}", spread, share, memory, row["against"])
    return table


def _seconds(function: Call) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _torchao() -> Callable[[Any], Any] | None:
    """torchao's NF4, where it is installed and still has one."""
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    except ImportError:
        return None
    return to_nf4


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
