"""Pages of memory on a GPU, of which a budget of bytes is there: the twin of `minift.optim.pager`, which says the rule.

What is not resident waits in the host's memory, pinned, so that the GPU's copy engine can reach it. Copies have a
stream of their own, beside the one that computes:

    page fault     copied in on that stream; the computing stream waits for it, and the host for nothing
    eviction       copied out on that stream, when the last use of this page is done, whatever is computed since
    a peek         waits until copies are done: the host reads then

The host runs ahead: it asks for the next page while the GPU computes with this one, so with room for two pages the
copies for the next run beside the computation. A page that is brought in lies where one has been that was evicted for
it, if both are of one size: on one stream the copy in follows the copy out, so the host never asks for more memory than
the budget.

On the CPU pages that wait are plain memory, and copies are copies. Which pages are where, and what is counted, are the
reference's, whatever the order of uses.

Unified memory, with which bitsandbytes pages, would move pages of 4 KB to 2 MB when a kernel touches one that is not
there, while the kernel waits. Here the optimizer knows beforehand which page it needs.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import UInt8
from torch import Tensor


class Pager:
    """Pages of bytes, at most `budget` of them resident on `device`, the others in the host's memory."""

    def __init__(self, budget: int, device: torch.device | str = "cpu"):
        self.budget = budget
        self.device = torch.device(device)
        self.faults = self.evictions = 0
        self.nbytes = 0  # of all pages
        self.resident_bytes = self.peak_bytes = 0  # now, and the most so far
        self._host: list[Tensor] = []  # every page; what is in it counts while it is not resident
        self._resident: OrderedDict[int, Tensor] = OrderedDict()  # the least recently used first
        self._in_use: Counter[int] = Counter()
        self._used: dict[int, torch.cuda.Event] = {}  # on a GPU: when the last use of a resident page is done
        self._left: list[Tensor] = []  # memory of pages that were evicted for the one that comes
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def add(self, content: UInt8[Tensor, " n"]) -> int:
        """A new page with this content (not empty), which is not resident yet; its number.

        ValueError where it is larger than the budget."""
        self._require_room(content.numel(), 0)
        page = torch.empty(content.numel(), dtype=torch.uint8, pin_memory=self._copies is not None)
        self._host.append(page.copy_(content))
        self.nbytes += content.numel()
        return len(self._host) - 1

    @contextmanager
    def page(self, number: int) -> Iterator[UInt8[Tensor, " n"]]:
        """`with pager.page(number) as data:` its bytes, resident while the block runs, to be read and written.

        ValueError where it does not fit beside the pages that are in use."""
        if number not in self._resident:
            size = self._host[number].numel()
            self._require_room(size, self._bytes_in_use())
            self.faults += 1
            self._evict_down_to(self.budget - size)
            self._resident[number] = self._copied_in(number)
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
            if self._copies is not None:
                self._used[number] = torch.cuda.current_stream(self.device).record_event()

    def peek(self, number: int) -> UInt8[Tensor, " n"]:
        """A copy of a page's bytes in the host's memory, from wherever it is: nothing is moved or counted."""
        if number in self._resident:
            return torch.empty_like(self._host[number]).copy_(self._resident[number])
        if self._copies is not None:
            self._copies.synchronize()
        return self._host[number].clone()

    def limit(self, budget: int) -> None:
        """Another budget from now on; pages are evicted until they keep it. ValueError where those in use do not."""
        if self._bytes_in_use() > budget:
            raise ValueError(f"pages in use take {self._bytes_in_use():,} bytes, the budget cannot be {budget:,}")
        self.budget = budget
        self._evict_down_to(budget)
        self._left.clear()

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
            f"Pager({len(self._host)} pages, {self.nbytes:,} bytes, {self.resident_bytes:,} of at most "
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
        return sum(self._host[number].numel() for number in self._in_use)

    def _evict_down_to(self, allowed: int) -> None:
        while self.resident_bytes > allowed:
            number = next(number for number in self._resident if number not in self._in_use)
            page = self._resident.pop(number)
            self._copy_out(number, page)
            self._left.append(page)
            self.resident_bytes -= self._host[number].numel()
            self.evictions += 1

    def _copied_in(self, number: int) -> Tensor:
        """Its copy on the device. It follows all copies out on the same stream, also that of this page."""
        if self._copies is None:
            self._left.clear()
            return self._host[number].clone()
        computing = torch.cuda.current_stream(self.device)
        page = next((p for p in self._left if p.shape == self._host[number].shape), None)
        self._left.clear()
        if page is None:
            page = torch.empty_like(self._host[number], device=self.device)
            self._copies.wait_stream(computing)  # the memory may have been another tensor's, which is still read there
        with torch.cuda.stream(self._copies):
            page.copy_(self._host[number], non_blocking=True)
        page.record_stream(self._copies)
        computing.wait_stream(self._copies)
        return page

    def _copy_out(self, number: int, page: Tensor) -> None:
        if self._copies is None:
            self._host[number].copy_(page)
            return
        self._copies.wait_event(self._used.pop(number))
        with torch.cuda.stream(self._copies):
            self._host[number].copy_(page, non_blocking=True)
        page.record_stream(self._copies)  # its memory is no one else's before the copy is done
