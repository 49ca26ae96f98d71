"""Several answers to one question, to be compared: JSONL files of {"prompt": …, "answers": […, …]}.

The prompt is a string or a list of {"role", "content"} messages, an answer a string, and may be empty. "source" may
say where the answers come from, in whatever way; other keys are ignored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from minift.data.example import DataError, Message
from minift.data.journal import Journal
from minift.data.json_lines import keys, kind, messages, read_lines, string

_NEEDED = '{"prompt", "answers"}'


@dataclass(frozen=True)
class Candidates:
    """A conversation that ends with a question, and at least two answers to it: DataError otherwise."""

    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    source: Any = None

    def __post_init__(self):
        if not self.prompt or self.prompt[-1].role != "user":
            raise DataError("the prompt does not end with a question of the user")
        if len(self.answers) < 2:
            raise DataError(f"'answers' holds {len(self.answers)}, needed at least 2 to compare")


def read(path: str | os.PathLike[str]) -> list[Candidates]:
    """All lines of a file, in order. Raises DataError, with file and line; see `json_lines.read_lines`."""
    return read_lines(path, from_record, _NEEDED)


def journal(path: str | os.PathLike[str]) -> Journal[Candidates]:
    """A file of candidates to append to, see `Journal`."""
    return Journal(path, from_record, to_record)


def from_record(fields: dict[str, Any]) -> Candidates:
    """The candidates in one line's object. Raises DataError."""
    for key in ("prompt", "answers"):
        if key not in fields:
            raise DataError(f"{key!r} is missing; found {keys(fields)}; needed {_NEEDED}")
    if isinstance(fields["prompt"], list):
        prompt = messages(fields["prompt"], "prompt", blank=True)
    else:
        prompt = (Message("user", string(fields, "prompt")),)
    answers = fields["answers"]
    if not isinstance(answers, list):
        raise DataError(f"'answers' is {kind(answers)}, needed a list of strings")
    texts = tuple(string({f"answers[{i}]": answer}, f"answers[{i}]", blank=True) for i, answer in enumerate(answers))
    return Candidates(prompt, texts, fields.get("source"))


def to_record(candidates: Candidates) -> dict[str, Any]:
    """The object for one line."""
    return {
        "prompt": [{"role": m.role, "content": m.content} for m in candidates.prompt],
        "answers": list(candidates.answers),
        "source": candidates.source,
    }
