"""Training data from JSONL files: one JSON object a line, in the forms that people have.

    {"prompt": …, "completion": …}                               a question and its answer
    {"messages": [{"role": …, "content": …}, …]}                 a conversation; every assistant turn is learned
    {"instruction": …, "input": …, "output": …}                  Alpaca; `input` may be missing or empty
    {"text": …}                                                  plain text; every token is learned

The first three become conversations and go through the model's chat template. Other keys are ignored, but a line
that fits two forms is refused, as is everything that a training run would swallow and be worse for: a key given
twice, half a surrogate pair, an empty answer. Every error is a `DataError` that begins with file and line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minift.data import plain_text
from minift.data.example import DataError, Example, pair
from minift.data.json_lines import keys, messages, read_lines, string
from minift.data.split import HELD_OUT, train_and_held_out
from minift.io.atomic import atomic_write

_FORMS = {"prompt": "completion", "messages": "messages", "instruction": "output", "text": "text"}
_NEEDED = 'one of {"prompt", "completion"}, {"messages"}, {"instruction", "input", "output"}, {"text"}'


def read(path: str | os.PathLike[str]) -> list[Example]:
    """All examples of a JSONL file, in order.

    Raises DataError, with file and line, for what is not UTF-8 JSON objects of one of the four forms (see above),
    for blank lines, a byte-order mark, NaN and Infinity, lines over 16 MiB, a file without any example, and one that is
    not there."""
    return read_lines(path, _example, _NEEDED)


def read_split(path: str | os.PathLike[str], share: float = HELD_OUT) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: of one file by the hash of the answer, of a folder as it comes.

    A file is JSONL, or plain text if its name ends in .txt, and goes through `split.train_and_held_out`. A folder holds
    `train.jsonl` and `valid.jsonl` (or `test.jsonl`), the names that mlx-lm uses, and is taken at its word. The
    held-out side of a small file may be empty.
    Raises DataError as `read` does, and for a folder without these files."""
    path = Path(path)
    if not path.is_dir():
        examples = plain_text.read(path) if path.suffix == ".txt" else read(path)
        return train_and_held_out(examples, share=share)
    held_out = [path / name for name in ("valid.jsonl", "test.jsonl") if (path / name).is_file()]
    if not held_out or not (path / "train.jsonl").is_file():
        found = ", ".join(sorted(p.name for p in path.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(f"{path}: found {found}, needed train.jsonl and valid.jsonl (or test.jsonl)")
    return read(path / "train.jsonl"), read(held_out[0])


def write(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """A file that `read` turns into the same examples; it appears whole or not at all."""
    records = [
        {"text": e.text} if e.text else {"messages": [{"role": m.role, "content": m.content} for m in e.messages]}
        for e in examples
    ]
    atomic_write(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode("utf-8"))


def _example(record: dict[str, Any]) -> Example:
    forms = [first for first, second in _FORMS.items() if first in record or second in record]
    if len(forms) != 1:
        what = f"fits several forms ({', '.join(forms)})" if forms else "fits no form"
        raise DataError(f"found {keys(record)}, which {what}; needed {_NEEDED}")
    match forms[0]:
        case "prompt":
            return pair(string(record, "prompt"), string(record, "completion"))
        case "instruction":
            question = string(record, "instruction")
            if record.get("input") not in (None, ""):
                question += "\n\n" + string(record, "input")
            return pair(question, string(record, "output"))
        case "text":
            return Example(text=string(record, "text"))
        case _:
            return _conversation(record)


def _conversation(record: dict[str, Any]) -> Example:
    turns = messages(record["messages"], "messages")
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError("'messages' has no message of the assistant, so there is nothing to learn")
    return Example(turns)
