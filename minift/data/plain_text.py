"""Training data from text files: paragraphs, which blank lines separate; every token is learned.

A paragraph is one example, so that a held-out part can be chosen that is fixed and stands nowhere in the training text
(`split`). One that is longer than a row of tokens becomes several rows (`templates.encode_all`).
"""

from __future__ import annotations

import os
import re

from minift.data.example import DataError, Example

_BLANK_LINES = re.compile(r"\n\s*\n")


def read(path: str | os.PathLike[str]) -> list[Example]:
    """All paragraphs of a text file in UTF-8, in order.

    Raises DataError for bytes that are not UTF-8, with their place, for a file without any text, and one that cannot
    be read."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}, needed a text file that can be read") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found = f"byte {error.object[error.start]:#04x}"
        raise DataError(f"{name}, line {line}: {found} is not valid UTF-8; save the file as UTF-8") from None
    paragraphs = [paragraph.strip("\n") for paragraph in _BLANK_LINES.split(text) if paragraph.strip()]
    if not paragraphs:
        raise DataError(f"{name}: the file is empty, needed at least one line of text")
    return [Example(text=paragraph) for paragraph in paragraphs]
