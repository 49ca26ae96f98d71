"""JSON objects line by line, read more strictly than `json.loads` reads them, and refused with file and line.

What the files of `jsonl` and `comparisons` have in common: UTF-8, one object a line, no key twice, no NaN, no half of a
surrogate pair. The functions here raise a `DataError` that says what is wrong in the line; `read_lines` puts the file
and the number of the line before it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar

from minift.data.example import ROLES, DataError, Message
from minift.io.errors import shown

MAX_LINE_BYTES = 16 * 2**20

T = TypeVar("T")


def read_lines(path: str | os.PathLike[str], parse: Callable[[dict[str, Any]], T], needed: str) -> list[T]:
    """`parse` of every line's object, in order; `needed` says in messages what an object should hold.

    Raises DataError, with file and line, for what is not UTF-8 JSON objects, for blank lines, a byte-order mark, NaN
    and Infinity, lines over 16 MiB, whatever `parse` refuses, and for a file that is empty or cannot be read."""
    found, number = [], 0
    try:
        with open(path, "rb") as file:  # in bytes: only \n ends a line, not the U+2028 that str.splitlines breaks at
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                found.append(parse(record(line, needed, first=number == 1)))
    except DataError as error:
        raise DataError(f"{os.fspath(path)}, line {number}: {error}") from None
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: {error.strerror}, needed a JSONL file that can be read") from None
    if not found:
        raise DataError(f"{os.fspath(path)}: the file is empty, needed at least one line with {needed}")
    return found


def record(line: bytes, needed: str, first: bool = False) -> dict[str, Any]:
    """One line as an object."""
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"longer than {MAX_LINE_BYTES:,} bytes; split the example")
    if first and line.startswith(b"\xef\xbb\xbf"):
        raise DataError("begins with a byte-order mark; save the file as UTF-8 without one")
    if not line.strip():
        raise DataError("a blank line, needed a JSON object; delete it")
    try:
        found = json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} ({line[error.start]:#04x}) is not valid UTF-8") from None
    except RecursionError:
        raise DataError("nested too deeply to be read as JSON") from None
    except DataError:
        raise
    except ValueError as error:  # json.JSONDecodeError, or an integer of too many digits
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"found {kind(found)}, needed a JSON object with {needed}")
    return found


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        twice, _ = Counter(key for key, _ in items).most_common(1)[0]
        raise DataError(f"the key {shown(twice)} stands twice in one object")
    return found


def _no_constant(name: str):
    raise DataError(f"{name} is not JSON")


def messages(value: Any, where: str, blank: bool = False) -> tuple[Message, ...]:
    """A list of {"role", "content"} objects as messages; `where` is what to call it in an error."""
    if not isinstance(value, list) or not value:
        raise DataError(f"'{where}' is {kind(value)}, needed a list of {{'role', 'content'}} objects")
    turns = []
    for index, message in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{place} is {kind(message)}, needed an object with 'role' and 'content'")
        role = string(message, "role", place)
        if role not in ROLES:
            raise DataError(f"{place}: unknown role {shown(role)}, needed one of {', '.join(ROLES)}")
        turns.append(Message(role, string(message, "content", place, blank and role == "assistant")))
    return tuple(turns)


def string(record: dict[str, Any], key: str, where: str = "", blank: bool = False) -> str:
    """The text under a key: present, a string, not blank (unless `blank`), and possible to encode."""
    place = f"{where}: " if where else ""
    if key not in record:
        raise DataError(f"{place}{key!r} is missing; found {keys(record)}")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{place}{key!r} is {kind(text)}, needed a string")
    if not (blank or text.strip()):
        raise DataError(f"{place}{key!r} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"{place}{key!r} has half a surrogate pair (U+{code:04X}) at character {error.start}") from None
    return text


def keys(record: dict[str, Any]) -> str:
    """The first ten keys of an object."""
    names = [*map(shown, islice(record, 10)), *(["…"] if len(record) > 10 else [])]
    return ", ".join(names) or "no keys"


def kind(value: Any) -> str:
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
