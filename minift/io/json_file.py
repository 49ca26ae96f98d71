"""JSON objects in files, with errors that name the file and the key."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from minift.io import checksum, leftovers
from minift.io.errors import FormatError, shown


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError for a missing file, bad JSON, a repeated key, or no object."""
    try:
        data = checksum.read_bytes(path)
    except OSError as error:
        leftovers.require_not_aside(path.parent)
        raise FormatError(path, "", error.strerror or error, "a JSON file that can be read") from error
    return parse_json(data, path)


def parse_json(data: bytes, path: Path | str, key: str = "") -> dict[str, Any]:
    """The object in these bytes, which came from `path` (and `key` in it)."""

    def no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise FormatError(path, key, f"key {shown(name)} twice", "every key once")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_repetition)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of too many digits; too deep
        raise FormatError(path, key, f"bad JSON ({error})", "a JSON object in UTF-8") from error
    if not isinstance(value, dict):
        raise FormatError(path, key, f"JSON of type {type(value).__name__}", "a JSON object")
    return value


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


class Fields:
    """A JSON object that knows where it came from: `take` checks a value's type and names the key if it is wrong."""

    def __init__(self, path: Path | str, values: dict[str, Any]):
        self.path, self.values = path, values

    def error(self, key: str, needed: object) -> FormatError:
        found = shown(self.values[key]) if key in self.values else "nothing"
        return FormatError(self.path, key, found, needed)

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise self.error(key, f"a whole number >= {least} and below 2^63")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise self.error(key, "a positive finite number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def refuse(self, key: str, allowed: tuple[object, ...], why: str) -> None:
        """A key that may be missing or null, or have one of the allowed values; anything else is not supported."""
        value = self.values.get(key)
        if value is not None and not any(value == one and type(value) is type(one) for one in allowed):
            raise self.error(key, why)
