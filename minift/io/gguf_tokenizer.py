"""The tokenizer inside a GGUF file: vocabulary, merges and token types as metadata, the way of splitting as a *name*.

A byte-level BPE tokenizer first cuts the text into words, by a regular expression, and merges within words only. GGUF
does not store the expression, it names the model whose expression was used, `tokenizer.ggml.pre`. The wrong one gives
other ids for the same text, without any error, so a name that is not in the table is refused. (llama.cpp's "default" is
such a name: it means that the converter did not know the model, and is not GPT-2's rule.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from minift.io.errors import FormatError, shown
from minift.io.tokenizer import Tokenizer

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    """Every digit by itself, then GPT-2's words."""
    return Sequence([Digits(individual_digits=True), _gpt2()])


def _llama3() -> PreTokenizer:
    words = Split(Regex(LLAMA3_WORDS), behavior="isolated")
    return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])


WORDS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
}


def tokenizer_from_fields(path: Path | str, fields: Mapping[str, Callable[[], Any]]) -> Tokenizer:
    """Build the tokenizer from GGUF metadata: `fields[key]()` is a value. Raises FormatError."""

    def get(key: str) -> Any:
        return fields[key]() if key in fields else None

    def items(key: str, kind: type, default: list) -> list:
        found = get(key)
        if found is not None and not (isinstance(found, list) and all(type(item) is kind for item in found)):
            raise FormatError(path, key, shown(found), f"an array of {kind.__name__}")
        return default if found is None else found

    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise FormatError(path, "tokenizer.ggml.model", shown(kind), "'gpt2', which means byte-level BPE")
    if not isinstance(pre, str) or pre not in WORDS:
        raise FormatError(path, "tokenizer.ggml.pre", shown(pre), " or ".join(map(repr, WORDS)))
    tokens = items("tokenizer.ggml.tokens", str, [])
    types = items("tokenizer.ggml.token_type", int, [1] * len(tokens))
    if len(types) != len(tokens):
        raise FormatError(path, "tokenizer.ggml.token_type", f"{len(types)} types", f"{len(tokens)}, one per token")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise FormatError(path, "tokenizer.ggml.tokens", f"{len(tokens) - len(vocab)} repeated", "every token once")
    merges = [_merge(path, text) for text in items("tokenizer.ggml.merges", str, [])]
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=WORDS[pre] is _llama3)
    except Exception as error:  # the library raises a plain Exception
        raise FormatError(path, "tokenizer.ggml.merges", error, "merges of tokens in the vocabulary") from error

    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = WORDS[pre]()
    backend.decoder = decoders.ByteLevel()
    named = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in named if kind == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in named if kind == USER_DEFINED])

    def special(role: str) -> str | None:
        key = f"tokenizer.ggml.{role}_token_id"
        i = get(key)
        if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
            raise FormatError(path, key, shown(i), f"an id below {len(tokens)}")
        return None if i is None else tokens[i]

    ends = [vocab[token] for role in ("eot", "eom") if (token := special(role)) is not None]
    template = get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise FormatError(path, "tokenizer.chat_template", shown(template), "a string")
    return Tokenizer(
        backend,
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding"),
        unk_token=special("unknown"),
        chat_template=template,
        stop_token_ids=ends,
    )


def _merge(path: Path | str, text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if not left or not right or " " in right:
        raise FormatError(path, "tokenizer.ggml.merges", shown(text), "two tokens with one space between")
    return left, right
