"""Answers of the policy, many at a time: what RLHF learns from, and what it is measured on.

Sampling is most of the work of a round, so all prompts of a batch go through the model together, with fused weights and
a key/value cache. The random numbers are a function of a few whole numbers, such as (seed, round): a round that is
computed again gives the same answers, and a run needs no generator's state to be resumed.

What scores the answers is any function of their texts: a Python function, or a reward model, which reads a text as the
raters read it. So a policy earns nothing by spelling a sentence with other tokens than the tokenizer would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from minift.data.batches import Batch, Encoded, pad
from minift.data.comparisons import as_text
from minift.data.example import Example, Message
from minift.data.templates import encode_example, encode_prompt, end_of_turn
from minift.io import Tokenizer
from minift.models import llama
from minift.nn.weight import Params
from minift.rlhf import reward_model
from minift.rlhf.logprobs import answers

Prompt = tuple[Message, ...]
Score = Callable[[Sequence[Prompt], Sequence[str]], Float[np.ndarray, " n"]]

AT_ONCE = 64  # texts that a reward model reads in one rectangle


@dataclass(frozen=True)
class Answers:
    """What a policy said: as tokens, one prompt with its answer a row; as text; and whether it came to an end itself.

    The end-of-turn token is a token of the answer, and no part of the text."""

    batch: Batch
    texts: tuple[str, ...]
    ended: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.texts)


def sample(
    params: Params,
    prompts: Sequence[Prompt],
    config: llama.Config,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
) -> Answers:
    """One answer to each prompt from softmax(logits / temperature), or the likeliest tokens at 0.

    `params` as `llama.fuse` gives them are much faster. ValueError for no prompts, or no room for an answer."""
    if not prompts or max_new_tokens < 1:
        raise ValueError(f"{len(prompts)} prompts and {max_new_tokens} new tokens, needed at least 1 of each")
    stops = stop_tokens(tokenizer)
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    asked = pad([(tokens, tokens) for tokens in encoded])
    rng = np.random.default_rng(list(seed))
    options: dict[str, Any] = {"stop_tokens": stops, "lengths": asked.lengths}
    columns = list(llama.stream(params, asked.tokens, config, max_new_tokens, temperature, rng, **options))
    new = np.stack(columns, axis=1).astype(asked.tokens.dtype)  # (B, longest answer)
    stopped = np.isin(new, sorted(stops))
    ended = np.any(stopped, axis=1)
    said = np.where(ended, stopped.argmax(axis=1) + 1, new.shape[1])  # tokens of each answer, its end among them
    rows = [np.concatenate([prompt, row[:n]]) for prompt, row, n in zip(encoded, new, said, strict=True)]
    batch = pad([(row, row) for row in rows])
    texts = (tokenizer.decode(row[: n - end]).strip() for row, n, end in zip(new, said, ended, strict=True))
    return Answers(answers(batch.tokens, asked.lengths, batch.lengths), tuple(texts), ended)


def stop_tokens(tokenizer: Tokenizer) -> Collection[int]:
    """The tokens at which an answer is over."""
    return {*end_of_turn(tokenizer), *tokenizer.stop_token_ids}


# --- what an answer is worth ------------------------------------------------------------------------------------------


def encoded(prompt: Prompt, answer: str, tokenizer: Tokenizer) -> Encoded:
    """A prompt with an answer as tokens and labels, as they would stand in a training set."""
    return encode_example(Example((*prompt, Message("assistant", answer))), tokenizer)


def scored_by_function(function: Callable[[str, str], float]) -> Score:
    """A score from any `function(prompt, answer) -> float`, both as text; ValueError for no finite number."""

    def score(prompts, texts):
        scores = np.empty(len(texts), np.float32)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            scores[i] = found = function(as_text(prompt), text)
            if not np.isfinite(scores[i]):
                raise ValueError(f"the reward of {text[:100]!r} is {found}, needed a finite number")
        return scores

    return score


def scored_by_model(params: Params, config: llama.Config, tokenizer: Tokenizer) -> Score:
    """The reward of a trunk with a score head, with its adapter on; texts of about one length share a rectangle."""

    def score(prompts, texts):
        rows = [encoded(prompt, text, tokenizer) for prompt, text in zip(prompts, texts, strict=True)]
        scores = np.empty(len(rows), np.float32)
        by_length = np.argsort([len(tokens) for tokens, _ in rows], kind="stable")
        for first in range(0, len(rows), AT_ONCE):
            part = by_length[first : first + AT_ONCE]
            scores[part], _ = reward_model.score(params, pad([rows[i] for i in part]), config, recompute=True)
        return scores

    return score
