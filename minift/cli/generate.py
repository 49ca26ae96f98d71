"""`minift generate`: continue a text, or answer one question."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from minift.cli.common import PROMPT_AND_ANSWER, answer, emit, load_with_adapter, warn_beyond
from minift.data.example import Message
from minift.io import load_tokenizer
from minift.models import module_of
from minift.models.generation import check_settings
from minift.quant.sixteen import Dtype


@dataclass
class Generate:
    """Answer one question, printing each token as it comes.

    minift generate "What does `math.isqrt` do?" --adapter runs/finetune/adapter
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """The question, or with --raw the text to continue."""
    model: str = "tiny"
    """tiny (built in), a Hugging Face folder (Llama or GPT-2), or a .gguf file."""
    adapter: Path | None = None
    """An adapter folder, such as runs/finetune/adapter."""
    dtype: Dtype = "float32"
    """Round the model's weights to bfloat16 or float16 first; the products are float32's, and as fast."""
    raw: bool = False
    """Continue the text as it is instead of putting it into the model's chat template."""
    max_new_tokens: int = 128
    """Stop after this many tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability."""
    seed: int = 0
    """For sampling."""
    out: Path | None = None
    """A folder for summary.json, which holds the same as --json."""
    json: bool = False
    """Print the result as one JSON object on the last line."""

    def run(self) -> int:
        check_settings(self.max_new_tokens, self.temperature, self.top_k, self.top_p)
        config, params = load_with_adapter(self.model, self.adapter, self.dtype)
        tokenizer = load_tokenizer(self.model)
        model, rng = module_of(config), np.random.default_rng(self.seed)
        ready = model.fuse(params)
        options: dict[str, Any] = {"top_k": self.top_k, "top_p": self.top_p}
        if self.raw:
            tokens = np.array([tokenizer.encode(self.prompt)], np.int64)
            warn_beyond(config, tokens.size + self.max_new_tokens, PROMPT_AND_ANSWER)
            stops = set(tokenizer.stop_token_ids)
            steps = model.stream(
                ready, tokens, config, self.max_new_tokens, self.temperature, rng, stop_tokens=stops, **options
            )
            pieces = tokenizer.decode_stream(token for (token,) in steps if int(token) not in stops)
        else:
            messages = [Message("user", self.prompt)]
            pieces = answer(ready, config, tokenizer, messages, self.max_new_tokens, self.temperature, rng, **options)
        started, text = time.perf_counter(), ""
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
        print()
        seconds = time.perf_counter() - started
        emit({"text": text, "tokens": len(tokenizer.encode(text)), "seconds": round(seconds, 2)}, self.json, self.out)
        return 0
