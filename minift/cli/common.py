"""What several commands share: data, models with adapters, answers, progress, a picture, and the JSON line."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minift.data import jsonl, stdlib_docs
from minift.data.batches import Batch, Encoded, batch_indices, pad
from minift.data.example import Example, Message
from minift.data.templates import encode_all, encode_prompt, end_of_turn
from minift.io import Tokenizer, load_adapter, load_model
from minift.models import llama
from minift.nn.weight import Frozen, Params, dense
from minift.peft import lora, qlora
from minift.train.loop import Record

console = Console(highlight=False)


def emit(result: dict[str, Any], as_json: bool) -> None:
    """With --json the last line of stdout is one JSON object."""
    if as_json:
        sys.stdout.flush()
        print(json.dumps(result), flush=True)


def peak_memory_bytes() -> int:
    """The most memory this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Encoded training and held-out examples, and the held-out conversations as text, to ask a few of them."""

    train: list[Encoded]
    held_out: list[Encoded]
    conversations: list[Example]


def read_data(source: str, tokenizer: Tokenizer, seq_len: int, eval_examples: int) -> Data:
    """`stdlib`, the embedded questions and answers, or a JSONL file or folder, split into training and held out."""
    if source == "stdlib":
        found = stdlib_docs.embedded()
        train, held_out = found.train_pairs, found.held_out_pairs
    else:
        train, held_out = jsonl.read_split(source)
    chosen = np.random.default_rng(0).permutation(len(held_out))[:eval_examples]  # the same ones in every run
    held_out = [held_out[i] for i in chosen]
    encoded_train, encoded_held_out = (encode_all(part, tokenizer, max_length=seq_len) for part in (train, held_out))
    for name, part in (("training", encoded_train), ("held-out", encoded_held_out)):
        if part.truncated or part.dropped:
            console.print(
                f"{name}: {part.truncated:,} examples cut to {seq_len} tokens, {part.dropped:,} left out because their "
                "answer lay beyond; raise --seq-len to keep them"
            )
        if not part.examples:
            raise ValueError(f"{source}: no {name} example with an answer within {seq_len} tokens")
    conversations = [example for example in held_out if example.messages]
    return Data(encoded_train.examples, encoded_held_out.examples, conversations)


def batches_of(
    examples: Sequence[Encoded], batch_size: int, accumulation_steps: int, seed: int
) -> Callable[[int], list[Batch]]:
    """The micro-batches of a step: a pure function of the step, each padded to its own longest example."""

    def batches(step: int) -> list[Batch]:
        chosen = batch_indices(len(examples), batch_size * accumulation_steps, seed, step - 1)
        by_length = sorted(chosen, key=lambda i: len(examples[i][0]))
        parts = (by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size))
        return [pad([examples[i] for i in part]) for part in parts]

    return batches


# --- models -----------------------------------------------------------------------------------------------------------


Base = Literal["auto", "nf4", "original"]


def load_with_adapter(model: str, folder: Path | None, base: Base = "auto") -> tuple[llama.Config, dict[str, Any]]:
    """A model, with an adapter on it if one is named, over the weights that the adapter was trained on.

    QLoRA trains over NF4 weights, and its adapter also mends what quantization did to them; on the original weights it
    would be another model. minift's own adapters say which they are (`auto`); of others the caller must know it."""
    config, params = load_model(model)
    if folder is None:
        return config, params
    adapter = load_adapter(folder, params)
    over_nf4 = adapter.over_nf4 if base == "auto" else base == "nf4"
    return config, lora.insert(qlora.quantize(params) if over_nf4 else params, adapter)


def for_inference(params: Params) -> dict[str, Any]:
    """Every weight as one dense matrix: decoding reads each of them once a token, so none should be computed anew."""
    return {name: Frozen(dense(weight)) for name, weight in params.items()}


def answer(
    params: Params,
    config: llama.Config,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_new_tokens: int,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Iterator[str]:
    """The model's next turn in a conversation, piece by piece, without the mark that ends it."""
    prompt = encode_prompt(messages, tokenizer)[None]
    stops = {*end_of_turn(tokenizer), *tokenizer.stop_token_ids}
    steps = llama.stream(params, prompt, config, max_new_tokens, temperature, rng, stop_tokens=stops, **options)
    yield from tokenizer.decode_stream(token for (token,) in steps if int(token) not in stops)


# --- what one looks at ------------------------------------------------------------------------------------------------


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
        if "eval_loss" in record:
            self._eval_loss = record["eval_loss"]
            console.print(f"step {step:>5}  held-out loss {self._eval_loss:.3f}")
            return
        self._first_step = step if self._first_step is None else self._first_step
        text = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line > self.every:
            self._last_line = time.monotonic()
            per_step = (time.monotonic() - self._started) / (step - self._first_step + 1)
            console.print(f"step {step:>5}/{self.steps}  {text}  {per_step * (self.steps - step):,.0f} s left")


def draw_losses(records: Sequence[Record], path: Path, title: str) -> None:
    """Training and held-out loss by step, as a PNG."""
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
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
