"""Paged optimizer state: it lies elsewhere, and what is used is brought in.     (Dettmers et al. 2023, 2305.14314, §3)

The state of an optimizer is used once a step, after the backward pass; the activations of a long sequence need their
memory before it. Together they may not fit, though each does. So the state is cut into pages, of which at most `budget`
bytes are on the device; the rest waits in slower memory (here a memory-mapped file; beside a GPU, the host's memory).

    page fault     a page is asked for and is not there: it is copied in, after others have made room
    eviction       the least recently used page is copied out
    budget         resident bytes never exceed it, not even while a page is copied in: room is made first

A page holds both moments of consecutive numbers of one parameter, so a step needs one page at a time, and numbers do
not depend on where pages lie: paging is a bitwise no-op. What it costs is copies. A step walks through all pages in the
same order, the worst there is for "least recently used": where one page too few fits, every page faults every step.
That order is kept, because a page of the next step cannot be told from an older one by anything else.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from minift.nn.weight import Arrays
from minift.optim.adamw import AdamW, check_names
from minift.optim.adamw8bit import AdamW8bit, Moment, check_gradient, piece, step_in_place, zero_moments
from minift.quant.blockwise import BlockwiseTensor, block_count
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED

PAGE_ELEMENTS = 1 << 14


class Pager:
    """Pages of bytes, at most `budget` of them resident, the others in a temporary file in `folder`.

    The file has no name from the beginning, so the system removes it when the process ends, however it ends. Its blocks
    are reserved when a page is added: OSError then, and not a bus error later, where the disk is full."""

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget = budget
        self.faults = self.evictions = 0
        self.resident_bytes = self.peak_bytes = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the pager)
        weakref.finalize(self, self._file.close)
        self._places: list[tuple[int, int]] = []  # of each page: where in the file, bytes
        self._resident: OrderedDict[int, np.ndarray] = OrderedDict()  # the least recently used first
        self._in_use: Counter[int] = Counter()

    def add(self, content: UInt8[np.ndarray, " n"]) -> int:
        """A new page with this content, not resident; its number. ValueError where it is larger than the budget."""
        self._require_room(content.size, 0)
        end = sum(self._places[-1]) if self._places else 0
        if content.size:
            self._reserve(end, content.size)
        self._places.append((end, content.size))
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
    def nbytes(self) -> int:
        """Of all pages."""
        return sum(size for _, size in self._places)

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
        return np.memmap(self._file, np.uint8, "r+", start, (size,)) if size else np.empty(0, np.uint8)

    def _reserve(self, start: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), start, size)
        else:
            self._file.truncate(start + size)


@dataclass(frozen=True)
class _Paged:
    """The moments of one parameter: where they are, and how to read them."""

    shape: tuple[int, ...]
    dtype: np.dtype | None  # None: 8 bits
    pages: list[tuple[slice, int]]  # elements, number of the page


@dataclass
class PagedAdamW:
    """`AdamW` or `AdamW8bit` with its moments in the pages of a `Pager`; the same bits, and the same use.

    `optimizer` keeps settings and step; moments that it has already, of a run that goes on, are moved into pages.
    ValueError where `page_elements` is no multiple of the block size, or a page is larger than the budget."""

    optimizer: AdamW | AdamW8bit
    pager: Pager
    page_elements: int = PAGE_ELEMENTS
    _paged: dict[str, _Paged] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.page_elements < 1 or self.page_elements % self._block_size:
            raise ValueError(f"page_elements is {self.page_elements}, needed a multiple of {self._block_size}")
        for name, m in self.optimizer.m.items():
            self._add(name, m.shape, m, self.optimizer.v[name])
        self.optimizer.m, self.optimizer.v = {}, {}

    def update(self, arrays: Arrays, gradients: Arrays, learning_rate: float) -> None:
        """One step on every array, in place, a page at a time. KeyError and ValueError as the optimizer's."""
        check_names(arrays, gradients)
        for name, gradient in gradients.items() if isinstance(self.optimizer, AdamW8bit) else ():
            check_gradient(gradient, name)
        if broken := [name for name, theta in arrays.items() if not theta.flags.c_contiguous]:
            raise ValueError(f"AdamW writes into {broken[0]}: needed a contiguous array, see np.ascontiguousarray")
        self.optimizer.step += 1
        for name, theta in arrays.items():
            if name not in self._paged:
                self._add_zeros(name, theta)
            self._step(theta, gradients[name], self._paged[name], learning_rate)

    @property
    def step(self) -> int:
        return self.optimizer.step

    @property
    def m(self) -> dict[str, Moment]:
        """First moments, gathered from their pages: copies, which is what a checkpoint needs."""
        return {name: self._gathered(name, 0) for name in self._paged}

    @property
    def v(self) -> dict[str, Moment]:
        return {name: self._gathered(name, 1) for name in self._paged}

    @property
    def nbytes(self) -> int:
        """Of the whole state, wherever it is."""
        return self.pager.nbytes

    def _step(self, theta: np.ndarray, gradient: np.ndarray, paged: _Paged, learning_rate: float) -> None:
        o = self.optimizer
        decay = o.weight_decay if theta.ndim >= 2 else 0.0
        settings = o.step, learning_rate, o.beta1, o.beta2, o.eps, decay
        flat, g = theta.reshape(-1), gradient.reshape(-1)
        for elements, number in paged.pages:
            with self.pager.page(number) as data:
                m, v = self._moments(data, elements.stop - elements.start, paged.dtype)
                step_in_place(flat[elements], g[elements], m, v, *settings)

    @property
    def _block_size(self) -> int:
        return self.optimizer.block_size if isinstance(self.optimizer, AdamW8bit) else 1

    def _pieces(self, n: int) -> Iterator[slice]:
        for start in range(0, n, self.page_elements):
            yield slice(start, min(start + self.page_elements, n))

    def _add_zeros(self, name: str, theta: np.ndarray) -> None:
        """A page at a time: the state of a whole parameter is nowhere at once."""
        eight = isinstance(self.optimizer, AdamW8bit) and theta.size >= self.optimizer.min_8bit_size
        flat, pages = theta.reshape(-1), []
        for elements in self._pieces(theta.size):
            moments = zero_moments(flat[elements], self._block_size, 0 if eight else math.inf)
            pages.append((elements, self.pager.add(_bytes_of(*moments))))
        self._paged[name] = _Paged(theta.shape, None if eight else theta.dtype, pages)

    def _add(self, name: str, shape: tuple[int, ...], m: Moment, v: Moment) -> None:
        pages = [
            (elements, self.pager.add(_bytes_of(self._cut(m, elements), self._cut(v, elements))))
            for elements in self._pieces(math.prod(shape))
        ]
        self._paged[name] = _Paged(shape, None if isinstance(m, BlockwiseTensor) else m.dtype, pages)

    def _cut(self, moment: Moment, elements: slice) -> Moment:
        if not isinstance(moment, BlockwiseTensor):
            return moment.reshape(-1)[elements]
        first, last = elements.start // self._block_size, block_count(elements.stop, self._block_size)
        return piece(moment, elements, slice(first, last))

    def _gathered(self, name: str, which: int) -> Moment:
        paged = self._paged[name]
        pieces = [
            self._moments(self.pager.peek(number), elements.stop - elements.start, paged.dtype)[which]
            for elements, number in paged.pages
        ]
        if paged.dtype is not None:
            empty = np.empty(0, paged.dtype)
            return np.concatenate([empty, *pieces]).reshape(paged.shape)
        codes, absmax = (np.concatenate([getattr(q, part) for q in pieces]) for part in ("codes", "absmax"))
        return BlockwiseTensor(codes, absmax, (DYNAMIC, DYNAMIC_UNSIGNED)[which], paged.shape, self._block_size)

    def _moments(self, data: np.ndarray, n: int, dtype: np.dtype | None) -> tuple[Moment, Moment]:
        """m and v of a page's n numbers: views, so that a step on them is a step on the page."""
        if dtype is not None:
            m, v = data.view(dtype).reshape(2, n)
            return m, v
        blocks = block_count(n, self._block_size)
        scales = data[: 8 * blocks].view(np.float32).reshape(2, blocks)
        codes = data[8 * blocks :].reshape(2, n)
        m, v = (
            BlockwiseTensor(codes[i], scales[i], code, (n,), self._block_size)
            for i, code in enumerate((DYNAMIC, DYNAMIC_UNSIGNED))
        )
        return m, v


def _bytes_of(m: Moment, v: Moment) -> np.ndarray:
    """What lies in a page: m and v; or in 8 bits the scales of both, then the codes of both."""
    if isinstance(m, BlockwiseTensor) and isinstance(v, BlockwiseTensor):
        return np.concatenate([part.view(np.uint8) for part in (m.absmax, v.absmax, m.codes, v.codes)])
    return np.concatenate([np.ascontiguousarray(moment).reshape(-1).view(np.uint8) for moment in (m, v)])
