"""A JSONL file that is written a line at a time, while the work that fills it goes on.

A line is handed to the system before the work goes on, so a killed process loses at most the line it was writing. What
is left of that one has no line break yet; it is cut off when the file is opened next. The file is locked meanwhile, so
that two processes do not write into it; when it is closed it is flushed to the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from minift.data.example import DataError
from minift.data.json_lines import read_lines, record
from minift.io.atomic import sync

T = TypeVar("T")

_BEGINNING = b'{"prompt": [{"role": "'  # of every line that is written here


class Journal(Generic[T]):
    """`with Journal(path, parse, to_record) as journal:` reads what is there, and appends to it.

    `parse` makes of a line's object what stands in `journal.entries`, `to_record` is its inverse.
    Raises DataError, with file and line, for a file of anything else, or one that another process has open."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        parse: Callable[[dict[str, Any]], T],
        to_record: Callable[[T], dict[str, Any]],
    ):
        self.path = Path(path)
        self.entries: list[T] = []
        self._parse, self._to_record = parse, to_record

    def __enter__(self) -> Journal[T]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}, needed a JSONL file to write into") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._mend()
            self.entries = read_lines(self.path, self._parse, "") if os.fstat(self._file).st_size else []
            sync(self.path.parent)
        except BlockingIOError:
            os.close(self._file)
            raise DataError(f"{self.path}: another process is writing it; wait for that one, or use another") from None
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def append(self, entry: T) -> None:
        """Add a line, whole or not at all. Raises OSError."""
        line = encoded(self._to_record(entry))
        start = os.lseek(self._file, 0, os.SEEK_END)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        finally:
            if os.fstat(self._file).st_size == start + len(line):
                self.entries.append(entry)
            else:  # a full disk, or Ctrl-C
                os.ftruncate(self._file, start)

    def _mend(self) -> None:
        """Cut off a last line that was not finished; end one that only lacks its line break."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        try:
            record(data[end:], "")
        except DataError:
            if data[end:].startswith(_BEGINNING[: len(data) - end]):  # else nothing of ours: reading will complain
                os.ftruncate(self._file, end)
        else:
            os.write(self._file, b"\n")


def encoded(fields: dict[str, Any]) -> bytes:
    """An object as a line."""
    return (json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
