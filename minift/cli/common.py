"""What several commands share: data, models with adapters, answers, and the JSON line."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from minift.data import jsonl, stdlib_docs, topics
from minift.data.batches import Batch, Encoded, batch_indices, pad
from minift.data.example import Example, Message
from minift.data.templates import encode_all, encode_prompt, end_of_turn
from minift.io import Tokenizer, atomic_write, load_adapter, load_model, load_prompt, prompt_kind
from minift.models import Config, llama, module_of
from minift.nn.weight import Params
from minift.optim.paged import LARGEST_PAGE
from minift.peft import lora, qlora, soft_prompt
from minift.quant.sixteen import Dtype
from minift.train.engine import NUMPY, Engine, Optimizer


class _Console(Console):
    """Rich ends the process when the reader of our output has gone (`| head`). Here the work goes on: what it is for
    are files, and a training run of an hour must not be lost with the terminal that watched it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        forget_the_reader()


def forget_the_reader() -> None:
    """From now on stdout leads nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Names of files, questions and answers are printed as they are: [/x] is no markup, :x: no emoji, and a line stays a
# line when it goes into a file or through grep.
console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def emit(result: dict[str, Any] | list[dict[str, Any]], as_json: bool, folder: Path | None = None) -> None:
    """What a command found, in numbers: `summary.json` in its --out, and with --json the last line of stdout."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "summary.json", (json.dumps(result, indent=2) + "\n").encode())
    if as_json:
        sys.stdout.flush()
        print(json.dumps(result), flush=True)


def peak_memory_bytes() -> int:
    """The most memory this process has held at once.

    Linux hands `ru_maxrss` down to a new program: one that a large process has started would begin with its figure.
    VmHWM belongs to the program itself."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
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
    """`stdlib` or `topics`, the embedded questions and answers; `stdlib-text`, the embedded language reference; or a
    file of JSONL or plain text, or a folder: split into training and held out."""
    if source == "stdlib":
        found = stdlib_docs.embedded()
        train, held_out = found.train_pairs, found.held_out_pairs
    elif source == "stdlib-text":
        found = stdlib_docs.embedded()
        train, held_out = found.train_text, found.held_out_text
    elif source == "topics":
        train, held_out = topics.topic_pairs()
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
        if not part.examples and name == "held-out" and not held_out:
            raise ValueError(
                f"{source}: no example is held out, needed some to measure on; add examples, "
                "or make a folder with train.jsonl and valid.jsonl"
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


def modules(names: tuple[str, ...]) -> str | tuple[str, ...]:
    """What `--target-modules` means: names, or one argument that is all-linear or a regular expression for paths."""
    if len(names) != 1 or (names[0] != "all-linear" and not set(names[0]) & set("\\^$*+?()[]{}|")):
        return names
    try:
        re.compile(names[0])
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"target_modules is {names[0]!r}, needed a regular expression ({error})") from None
    return names[0]


Device = Literal["cpu", "cpu-torch", "cuda"]


def engine_on(device: Device) -> Engine:
    """What computes on this device. torch is imported where it is asked for, and nowhere else.

    ValueError where it is not installed, or finds no GPU."""
    if device == "cpu":
        return NUMPY
    try:
        from minift_kernels.train import engine
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--device {device}: {error.name} is not installed; pip install 'minift[kernels]', or use --device cpu"
        ) from None
    return engine.on(device.removesuffix("-torch"))


def check_page_budget(optimizer: Optimizer, page_budget: int) -> None:
    """ValueError where not even one page fits, before a model is loaded."""
    if optimizer == "paged-adamw8bit" and page_budget < LARGEST_PAGE:
        raise ValueError(f"--page-budget {page_budget:,}: a page takes up to {LARGEST_PAGE:,} bytes, needed that much")


# --- models -----------------------------------------------------------------------------------------------------------


PROMPT_AND_ANSWER = "prompt and answer together"
Base = Literal["auto", "nf4", "original"]


def load_with_adapter(model: str, folder: Path | None, dtype: Dtype = "float32") -> tuple[Config, dict[str, Any]]:
    """A model, with an adapter on it if one is named, over the weights that the adapter was trained on."""
    config, params = load_model(model, dtype=dtype)
    if folder is None:
        return config, params
    if prompt_kind(folder) is not None:
        sizes = llama_only(config, model, "soft prompts")
        return config, soft_prompt.insert(params, load_prompt(folder, sizes))
    return config, put_on(params, load_adapter(folder, params))


def llama_only(config: Config, model: str, what: str) -> llama.Config:
    """The configuration of a Llama model. ValueError for another, which `what` cannot be done with."""
    if not isinstance(config, llama.Config):
        kind = module_of(config).__name__.rpartition(".")[2]
        raise ValueError(f"{model} is a {kind} model, and {what} works with Llama models only: give another --model")
    return config


def put_on(params: Params, adapter: lora.Adapter, base: Base = "auto") -> dict[str, Any]:
    """An adapter over the weights that it was trained on.

    QLoRA trains over NF4 weights, and its adapter also mends what quantization did to them; on the original weights it
    would be another model. minift's own adapters say which they are (`auto`); of others the caller must know it."""
    over_nf4 = adapter.over_nf4 if base == "auto" else base == "nf4"
    return lora.insert(qlora.quantize(params) if over_nf4 else params, adapter)


def warn_beyond(config: Config, tokens: int, what: str) -> None:
    """A UserWarning where a text may get longer than those that the model has seen."""
    limit = config.max_position_embeddings
    if tokens > limit:
        warnings.warn(f"{what} may go beyond the {limit:,} tokens the model was made for, and get worse", stacklevel=2)


def answer(
    params: Params,
    config: Config,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_new_tokens: int,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Iterator[str]:
    """The model's next turn in a conversation, piece by piece, without the mark that ends it."""
    prompt = encode_prompt(messages, tokenizer)[None]
    warn_beyond(config, prompt.size + max_new_tokens, PROMPT_AND_ANSWER)
    stops = {*end_of_turn(tokenizer), *tokenizer.stop_token_ids}
    stream = module_of(config).stream
    steps = stream(params, prompt, config, max_new_tokens, temperature, rng, stop_tokens=stops, **options)
    yield from tokenizer.decode_stream(token for (token,) in steps if int(token) not in stops)
