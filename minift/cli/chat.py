"""`minift chat`: talk to a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minift.cli.common import answer, console, emit, load_with_adapter
from minift.data.example import Message
from minift.io import load_tokenizer
from minift.models import module_of
from minift.models.generation import check_settings


@dataclass
class Chat:
    """Talk to a model; it sees the whole conversation so far.

    An empty line is ignored, /reset forgets the conversation. Ctrl-C stops an answer; at the prompt it ends the
    conversation, as /quit and Ctrl-D do.
    """

    model: str = "tiny"
    """tiny (built in), a Hugging Face folder (Llama or GPT-2), or a .gguf file."""
    adapter: Path | None = None
    """An adapter folder, such as runs/finetune/adapter."""
    system: str | None = None
    """What the model is told before the conversation."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """0 takes the likeliest token each time; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only."""
    top_p: float | None = 0.9
    """Sample from the likeliest tokens that together have this probability."""
    seed: int = 0
    """For sampling."""
    out: Path | None = None
    """A folder for summary.json, which holds the same as --json."""
    json: bool = False
    """Print the conversation as one JSON object on the last line."""

    def run(self) -> int:
        check_settings(self.max_new_tokens, self.temperature, self.top_k, self.top_p)
        config, params = load_with_adapter(self.model, self.adapter)
        tokenizer, ready = load_tokenizer(self.model), module_of(config).fuse(params)
        rng = np.random.default_rng(self.seed)
        start = [] if self.system is None else [Message("system", self.system)]
        messages = list(start)
        while (line := _ask()) is not None and line != "/quit":
            if line == "/reset":
                messages = list(start)
                continue
            if not line:
                continue
            messages.append(Message("user", line))
            reply = ""
            try:
                for piece in answer(
                    ready,
                    config,
                    tokenizer,
                    messages,
                    self.max_new_tokens,
                    self.temperature,
                    rng,
                    top_k=self.top_k,
                    top_p=self.top_p,
                ):
                    reply += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass
            print()
            messages.append(Message("assistant", reply))
        emit({"messages": [{"role": m.role, "content": m.content} for m in messages]}, self.json, self.out)
        return 0


def _ask() -> str | None:
    try:
        return console.input("[bold]> [/bold]" if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
