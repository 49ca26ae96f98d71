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
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from minift.data.example import ROLES, DataError, Example, Message, pair
from minift.data.split import HELD_OUT, train_and_held_out
from minift.io.atomic import atomic_write
from minift.io.errors import shown

MAX_LINE_BYTES = 16 * 2**20

_FORMS = {"prompt": "completion", "messages": "messages", "instruction": "output", "text": "text"}
_NEEDED = 'one of {"prompt", "completion"}, {"messages"}, {"instruction", "input", "output"}, {"text"}'


def read(path: str | os.PathLike[str]) -> list[Example]:
    """All examples of a JSONL file, in order.

    Raises DataError, with file and line, for what is not UTF-8 JSON objects of one of the four forms (see above),
    for blank lines, a byte-order mark, NaN and Infinity, lines over 16 MiB, a file without any example, and one that is
    not there."""
    examples, number = [], 0
    try:
        with open(path, "rb") as file:  # in bytes: only \n ends a line, not the U+2028 that str.splitlines breaks at
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                examples.append(_example(_record(line, first=number == 1)))
    except DataError as error:
        raise DataError(f"{os.fspath(path)}, line {number}: {error}") from None
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: {error.strerror}, needed a JSONL file that can be read") from None
    if not examples:
        raise DataError(f"{os.fspath(path)}: the file is empty, needed at least one line with {_NEEDED}")
    return examples


def read_split(path: str | os.PathLike[str], share: float = HELD_OUT) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: of one file by the hash of the answer, of a folder as it comes.

    A folder holds `train.jsonl` and `valid.jsonl` (or `test.jsonl`), the names that mlx-lm uses, and is taken at
    its word; a file goes through `split.train_and_held_out`. The held-out side of a small file may be empty.
    Raises DataError as `read` does, and for a folder without these files."""
    path = Path(path)
    if not path.is_dir():
        return train_and_held_out(read(path), share=share)
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


def _record(line: bytes, first: bool) -> dict[str, Any]:
    """One line as a JSON object, more strictly than `json.loads` reads it."""
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"longer than {MAX_LINE_BYTES:,} bytes; split the example")
    if first and line.startswith(b"\xef\xbb\xbf"):
        raise DataError("begins with a byte-order mark; save the file as UTF-8 without one")
    if not line.strip():
        raise DataError("a blank line, needed a JSON object; delete it")
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} ({line[error.start]:#04x}) is not valid UTF-8") from None
    except RecursionError:
        raise DataError("nested too deeply to be read as JSON") from None
    except DataError:
        raise
    except ValueError as error:  # json.JSONDecodeError, or an integer of too many digits
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"found {_kind(record)}, needed a JSON object with {_NEEDED}")
    return record


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) < len(items):
        twice, _ = Counter(key for key, _ in items).most_common(1)[0]
        raise DataError(f"the key {shown(twice)} stands twice in one object")
    return record


def _no_constant(name: str):
    raise DataError(f"{name} is not JSON")


def _example(record: dict[str, Any]) -> Example:
    forms = [first for first, second in _FORMS.items() if first in record or second in record]
    if len(forms) != 1:
        what = f"fits several forms ({', '.join(forms)})" if forms else "fits no form"
        raise DataError(f"found {_keys(record)}, which {what}; needed {_NEEDED}")
    match forms[0]:
        case "prompt":
            return pair(_string(record, "prompt"), _string(record, "completion"))
        case "instruction":
            question = _string(record, "instruction")
            if record.get("input") not in (None, ""):
                question += "\n\n" + _string(record, "input")
            return pair(question, _string(record, "output"))
        case "text":
            return Example(text=_string(record, "text"))
        case _:
            return _conversation(record["messages"])


def _conversation(messages: Any) -> Example:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'messages' is {_kind(messages)}, needed a list of {{'role', 'content'}} objects")
    turns = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{where} is {_kind(message)}, needed an object with 'role' and 'content'")
        role = _string(message, "role", where)
        if role not in ROLES:
            raise DataError(f"{where}: unknown role {shown(role)}, needed one of {', '.join(ROLES)}")
        turns.append(Message(role, _string(message, "content", where)))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError("'messages' has no message of the assistant, so there is nothing to learn")
    return Example(tuple(turns))


def _string(record: dict[str, Any], key: str, where: str = "") -> str:
    """The text under a key: present, a string, not blank, and possible to encode."""
    place = f"{where}: " if where else ""
    if key not in record:
        raise DataError(f"{place}{key!r} is missing; found {_keys(record)}")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{place}{key!r} is {_kind(text)}, needed a string")
    if not text.strip():
        raise DataError(f"{place}{key!r} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"{place}{key!r} has half a surrogate pair (U+{code:04X}) at character {error.start}") from None
    return text


def _keys(record: dict[str, Any]) -> str:
    """The first ten keys of an object."""
    names = [*map(shown, islice(record, 10)), *(["…"] if len(record) > 10 else [])]
    return ", ".join(names) or "no keys"


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an empty list" if not value else "a list"
        case _:
            return "an object"
