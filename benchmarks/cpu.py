"""minift beside its peers on this machine's CPU: pairs in turn, in one run, as ratios.

    python benchmarks/cpu.py                       NF4 against bitsandbytes and torchao
    python benchmarks/cpu.py --model MODEL.gguf    also training steps and generation, against PEFT and transformers

A ratio above 1 means that minift is faster. Each pair is run in turn, ours then theirs, several times: the ratio is
that of the medians, its spread the smallest and the largest ratio of a turn. Beside each time stands the share of it
that its floor takes, the least that anybody must do on this machine, measured in the same turns:

    quantization      every byte in and out once, at the rate of a plain copy
    training steps    the matrix products alone, on arrays of the same shapes
    generation        every weight read once a token, at the rate of a plain copy

Each side is a process of its own, since each sets up memory and threads as it likes, and they take turns: while one
computes the other sleeps. Peak memory is that of the process from the second step on: what was needed to load the model
does not count, libraries do. Results go to --out as JSON.
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
from typing import Any

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


PAIRS = {  # what: (its name in the table, the peers)
    "quantize": ("NF4 quantize", ("bitsandbytes",)),
    "dequantize": ("NF4 dequantize", ("bitsandbytes",)),
    "double-quantize": ("NF4 + double quantization, quantize", ("bitsandbytes", "torchao")),
    "double-dequantize": ("NF4 + double quantization, dequantize", ("bitsandbytes", "torchao")),
    "lora": ("LoRA step, {batch_size} x {seq_len} tokens", ("PEFT",)),
    "qlora": ("QLoRA step, {batch_size} x {seq_len} tokens", ("PEFT + bitsandbytes",)),
    "full": ("full step, {batch_size} x {seq_len} tokens", ("transformers",)),
    "generate": ("generate {new_tokens} tokens", ("transformers",)),
}
STEPS = ("lora", "qlora", "full")


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
    worker: tuple[str, str] | None = None
    """What and whose: be one side of a pair, in a process of its own. The main process starts these."""

    def run(self) -> None:
        if self.worker is not None:
            serve(self.side(*self.worker))
            return
        rows = []
        for what, (_, peers) in PAIRS.items():
            if self.model is None and what in (*STEPS, "generate"):
                continue
            rows += [self.pair(what, peer) for peer in peers if peer != "torchao" or _torchao() is not None]
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

    def pair(self, what: str, peer: str) -> Row:
        """Both sides and the floor, in turn."""
        workers = [Worker(self, what, whose) for whose in ("minift", peer, "floor")]
        turns = [[worker.turn() for worker in workers] for _ in range(self.turns)]
        ours_bytes, theirs_bytes, _ = [worker.stop() for worker in workers]
        ratios = [theirs / ours for ours, theirs, _ in turns]
        ours, theirs, floor = (statistics.median(column) for column in zip(*turns, strict=True))
        name = PAIRS[what][0].format(**vars(self))
        row = {"what": name, "against": peer, "ours": ours, "theirs": theirs, "floor": floor}
        row |= {"ratio": theirs / ours, "lowest": min(ratios), "highest": max(ratios)}
        return row | {"ours_bytes": ours_bytes, "theirs_bytes": theirs_bytes}

    def side(self, what: str, whose: str) -> Call:
        """What one side does in a turn."""
        if whose == "floor":
            return self.floor(what)
        if what in (*STEPS, "generate"):
            return self.ours(what) if whose == "minift" else self.theirs(what)
        return self.quantization(what, whose)

    def floor(self, what: str) -> Call:
        if what in STEPS:
            return self.products(what)
        if what == "generate":
            config, _ = load_model(self.model)
            nbytes = 4 * sum(int(np.prod(shape)) for shape in llama.shapes(config).values())
            return functools.partial(copy, self.new_tokens * nbytes // 2)  # a copy moves each byte twice
        return functools.partial(copy, self.size**2 * 4 + self.size**2 // 2)

    def quantization(self, what: str, whose: str) -> Call:
        """NF4, plain and double-quantized, of one square float32 matrix."""
        w = np.random.default_rng(0).standard_normal((self.size, self.size), np.float32)
        double = what.startswith("double")
        if whose == "minift":
            keep_freed_memory()

            def quantize():
                return double_quant.compress(nf4.quantize(w)) if double else nf4.quantize(w)

            q = quantize()
            return (lambda: nf4.dequantize(q)) if what.endswith("dequantize") else quantize

        import torch
        from bitsandbytes import functional as bnb

        theirs = torch.from_numpy(w)
        to_nf4 = _torchao()
        if whose == "torchao" and to_nf4 is not None:  # its rules are its own: other codes than bitsandbytes'
            tensor = to_nf4(theirs)
            return tensor.get_original_weight if what.endswith("dequantize") else lambda: to_nf4(theirs)
        four_bits = functools.partial(bnb.quantize_4bit, theirs, quant_type="nf4", compress_statistics=double)
        packed, state = four_bits()
        return (lambda: bnb.dequantize_4bit(packed, state)) if what.endswith("dequantize") else four_bits

    def ours(self, method: str) -> Call:
        """One training step (forward, backward, AdamW; adapters of rank 8 on every linear layer), or one generation."""
        keep_freed_memory()
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

    def tokens(self, vocab_size: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, vocab_size, (self.batch_size, self.seq_len)).astype(np.int32)


# --- one side of a pair, in a process of its own ----------------------------------------------------------------------


class Worker:
    """The process, seen from outside: it takes its turn when it is told to."""

    def __init__(self, benchmark: Benchmark, what: str, whose: str):
        fields = {"size": benchmark.size, "batch-size": benchmark.batch_size, "seq-len": benchmark.seq_len}
        fields |= {"new-tokens": benchmark.new_tokens} | ({"model": benchmark.model} if benchmark.model else {})
        options = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, __file__, *options, "--worker", what, whose]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer("ready")

    def turn(self) -> float:
        """Seconds."""
        return float(self._ask("turn"))

    def stop(self) -> int:
        """The most bytes it has held."""
        nbytes = int(self._ask("stop"))
        self.process.wait()
        return nbytes

    def _ask(self, question: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self._answer(question)

    def _answer(self, question: str) -> str:
        """The line that begins with the question: libraries print others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(question + " "):
                return line.removeprefix(question).strip()
        raise RuntimeError(f"the process ended before it answered {question!r}; what it said stands above")


def serve(step: Call) -> None:
    """The process, from inside: one warm-up, then a turn whenever it is told to."""
    step()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: set the high-water mark back
    print("ready now", flush=True)
    for question in map(str.strip, sys.stdin):
        if question == "turn":
            print("turn", _seconds(step), flush=True)
        else:
            print("stop", _peak_bytes(), flush=True)
            return


def _peak_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


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


# --- the rest ---------------------------------------------------------------------------------------------------------


def _table(rows: list[Row], machine: dict[str, Any]) -> Table:
    table = Table(title=", ".join(f"{k} {v}" for k, v in machine.items()))
    for heading in ("", "minift", "peer", "ratio", "spread", "floor's share", "peak memory", "against"):
        table.add_column(heading, justify="left" if heading in ("", "against") else "right")
    for row in rows:
        ours, theirs = (f"{row[key] * 1e3:,.1f} ms" for key in ("ours", "theirs"))
        spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
        share = f"{row['floor'] / row['ours']:.0%} / {row['floor'] / row['theirs']:.0%}"
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
