"""Pages: memory that is used rarely lies elsewhere, and what is used is brought in.          (Dettmers et al. 2023, §3)

A device has room for `budget` bytes of pages; the rest waits in slower memory (here a memory-mapped file; beside a GPU,
the host's memory).

    page fault     a page is asked for and is not there: it is copied in, after others have made room
    eviction       the least recently used page is copied out
    budget         resident bytes never exceed it, not even while a page is copied in: room is made first
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8


class Pager:
    """Pages of bytes, at most `budget` of them resident, the others in a temporary file in `folder`.

    The file has no name from the beginning, so the system removes it when the process ends, however it ends. Its blocks
    are reserved when a page is added: OSError then, and not a bus error later, where the disk is full."""

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget = budget
        self.faults = self.evictions = 0
        self.nbytes = 0  # of all pages
        self.resident_bytes = self.peak_bytes = 0  # now, and the most so far
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the pager)
        weakref.finalize(self, self._file.close)
        self._places: list[tuple[int, int]] = []  # of each page: where in the file, bytes
        self._resident: OrderedDict[int, np.ndarray] = OrderedDict()  # the least recently used first
        self._in_use: Counter[int] = Counter()

    def add(self, content: UInt8[np.ndarray, " n"]) -> int:
        """A new page with this content (not empty), which is not resident yet; its number.

        ValueError where it is larger than the budget."""
        self._require_room(content.size, 0)
        self._reserve(self.nbytes, content.size)
        self._places.append((self.nbytes, content.size))
        self.nbytes += content.size
        self._in_file(len(self._places) - 1)[:] = content
        return len(self._places) - 1

    @contextmanager
    def page(self, number: int) -> Iterator[UInt8[np.ndarray, " n"]]:
        """`with pager.page(number) as data:` its bytes, resident while the block runs, to be read and written.

        ValueError where it does not fit beside the pages that are in use."""
        if number not in self._resident:
            size = self._places[number][1]
            self._require_room(size, self._bytes_in_use())
            self.faults += 1
            self._evict_down_to(self.budget - size)
            self._resident[number] = np.array(self._in_file(number))
            self.resident_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
        self._resident.move_to_end(number)
        self._in_use[number] += 1
        try:
            yield self._resident[number]
        finally:
            self._in_use[number] -= 1
            if not self._in_use[number]:
                del self._in_use[number]

    def peek(self, number: int) -> UInt8[np.ndarray, " n"]:
        """A copy of a page's bytes, from wherever it is: nothing is moved or counted."""
        return np.array(self._resident[number] if number in self._resident else self._in_file(number))

    def limit(self, budget: int) -> None:
        """Another budget from now on; pages are evicted until they keep it. ValueError where those in use do not."""
        if self._bytes_in_use() > budget:
            raise ValueError(f"pages in use take {self._bytes_in_use():,} bytes, the budget cannot be {budget:,}")
        self.budget = budget
        self._evict_down_to(budget)

    @property
    def counts(self) -> dict[str, int]:
        """What paging has cost so far."""
        return {
            "budget_bytes": self.budget,
            "peak_resident_bytes": self.peak_bytes,
            "page_faults": self.faults,
            "evictions": self.evictions,
        }

    def __repr__(self) -> str:
        return (
            f"Pager({len(self._places)} pages, {self.nbytes:,} bytes, {self.resident_bytes:,} of at most "
            f"{self.budget:,} resident, {self.faults:,} faults, {self.evictions:,} evictions)"
        )

    def _require_room(self, size: int, beside: int) -> None:
        if beside + size > self.budget:
            others = f" beside {beside:,} bytes of pages in use" if beside else ""
            raise ValueError(
                f"a page of {size:,} bytes{others} does not fit a budget of {self.budget:,}: "
                "raise the budget, or take smaller pages"
            )

    def _bytes_in_use(self) -> int:
        return sum(self._places[number][1] for number in self._in_use)

    def _evict_down_to(self, allowed: int) -> None:
        while self.resident_bytes > allowed:
            number = next(number for number in self._resident if number not in self._in_use)
            self._in_file(number)[:] = self._resident.pop(number)
            self.resident_bytes -= self._places[number][1]
            self.evictions += 1

    def _in_file(self, number: int) -> np.ndarray:
        """The page's place in the file, mapped: what is written here is written there."""
        start, size = self._places[number]
        return np.memmap(self._file, np.uint8, "r+", start, (size,))

    def _reserve(self, start: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):  # elsewhere (macOS) the file grows as it is mapped
            os.posix_fallocate(self._file.fileno(), start, size)
