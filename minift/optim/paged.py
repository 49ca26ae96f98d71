"""AdamW with its moments in pages, of which a budget of bytes is resident.     (Dettmers et al. 2023, 2305.14314, §3)

The state of an optimizer is used once a step, after the backward pass; the activations of a long sequence need their
memory before it. Together they may not fit, though each does. So the moments are cut into pages (`minift.optim.pager`):
a long sequence evicts some, and the step after it brings them back.

A page holds both moments of consecutive numbers of one parameter, so a step needs one page at a time, and numbers do
not depend on where pages lie: paging is a bitwise no-op. What it costs is copies. A step walks through all pages in the
same order, the worst there is for "least recently used": where one page too few fits, every page faults in every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minift.nn.weight import Arrays
from minift.optim.adamw import AdamW, check_names
from minift.optim.adamw8bit import (
    BLOCK_SIZE,
    AdamW8bit,
    Moment,
    check_gradient,
    check_moments,
    piece,
    step_in_place,
    zero_moments,
)
from minift.optim.pager import Pager
from minift.quant.blockwise import BlockwiseTensor, block_count
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED

PAGE_ELEMENTS = 1 << 14
LARGEST_PAGE = 2 * PAGE_ELEMENTS + 8 * PAGE_ELEMENTS // BLOCK_SIZE  # bytes, of moments in 8 bits


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
    ValueError where `page_elements` is no multiple of the block size, a page is larger than the budget, or moments in
    8 bits are over other maps than `zero_moments` has, or in other blocks than the optimizer's."""

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
        """One step on every array, in place, a page at a time. KeyError and ValueError as the optimizer's, ValueError
        for moments of another shape and for a page that is larger than the budget. Nothing has moved then."""
        check_names(arrays, gradients)
        for name, gradient in gradients.items() if isinstance(self.optimizer, AdamW8bit) else ():
            check_gradient(gradient, name)
        if broken := [name for name, theta in arrays.items() if not theta.flags.c_contiguous]:
            raise ValueError(f"AdamW writes into {broken[0]}: needed a contiguous array, see np.ascontiguousarray")
        for name, theta in arrays.items():
            if name not in self._paged:
                self._add_zeros(name, theta)
            elif theta.shape != (found := self._paged[name].shape):
                raise ValueError(f"the moments of {name} have shape {found}, needed {theta.shape}, as the parameter")
        self.optimizer.step += 1
        for name, theta in arrays.items():
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
        if isinstance(m, BlockwiseTensor) and isinstance(v, BlockwiseTensor):
            check_moments(m, v, name)
            if m.block_size != self._block_size:
                found = f"{m.block_size:,}, needed {self._block_size:,}, as the optimizer has"
                raise ValueError(f"the moments of {name}: blocks of {found}")
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
            return _joined(pieces, paged.dtype).reshape(paged.shape)
        quantized = [q for q in pieces if isinstance(q, BlockwiseTensor)]
        codes = _joined([q.codes for q in quantized], np.uint8)
        absmax = _joined([q.absmax for q in quantized], np.float32)
        return BlockwiseTensor(codes, absmax, (DYNAMIC, DYNAMIC_UNSIGNED)[which], paged.shape, self._block_size)

    def _moments(self, data: np.ndarray, n: int, dtype: np.dtype | None) -> tuple[Moment, Moment]:
        """m and v of a page's n numbers: views, so that a step on them is a step on the page."""
        if dtype is not None:
            m, v = data.view(dtype).reshape(2, n)
            return m, v
        blocks = block_count(n, self._block_size)
        scales = data[: 8 * blocks].view(np.float32).reshape(2, blocks)
        codes = data[8 * blocks :].reshape(2, n)
        return (
            BlockwiseTensor(codes[0], scales[0], DYNAMIC, (n,), self._block_size),
            BlockwiseTensor(codes[1], scales[1], DYNAMIC_UNSIGNED, (n,), self._block_size),
        )


def _bytes_of(m: Moment, v: Moment) -> np.ndarray:
    """What lies in a page: m and v; or in 8 bits the scales of both, then the codes of both."""
    if isinstance(m, BlockwiseTensor) and isinstance(v, BlockwiseTensor):
        return np.concatenate([part.view(np.uint8) for part in (m.absmax, v.absmax, m.codes, v.codes)])
    return np.concatenate([np.ascontiguousarray(moment).reshape(-1).view(np.uint8) for moment in (m, v)])


def _joined(pieces: list, dtype: Any) -> np.ndarray:
    """One after the other; a parameter without numbers has no pages."""
    return np.concatenate([np.empty(0, dtype), *pieces])
