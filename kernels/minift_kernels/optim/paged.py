"""AdamW with its moments in pages, on torch tensors: the twin of `minift.optim.paged`, which explains it.

Pages are the reference's, byte for byte where numbers are: both moments of consecutive numbers of one parameter, and
which of them are resident is the `pager`'s affair, which on a GPU copies beside the computation. A step of one page is
one launch. Gradients are looked at once, before the first page, so that the host runs ahead of all pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minift.optim.paged import PAGE_ELEMENTS
from minift.quant.blockwise import block_count
from minift_kernels.nn.weight import Tensors
from minift_kernels.optim.adamw import AdamW, check_names, checked
from minift_kernels.optim.adamw8bit import (
    AdamW8bit,
    Moment,
    check_block_size,
    check_gradients,
    check_moments,
    overwrite,
    piece,
    step_in_place,
    zero_moments,
)
from minift_kernels.optim.pager import Pager
from minift_kernels.quant.blockwise import BlockwiseTensor
from minift_kernels.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, on_device

__all__ = ["PAGE_ELEMENTS", "PagedAdamW"]


@dataclass(frozen=True)
class _Paged:
    """The moments of one parameter: where they are, and how to read them."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: 8 bits
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
            self._add(name, tuple(m.shape), m, self.optimizer.v[name])
        self.optimizer.m, self.optimizer.v = {}, {}

    @torch.no_grad()
    def update(self, arrays: Tensors, gradients: Tensors, learning_rate: float, *, backend: str | None = None) -> None:
        """One step on every tensor, in place, a page at a time. KeyError and ValueError as the optimizer's, ValueError
        for moments of another shape and for a page that is larger than the budget. Nothing has moved then."""
        check_names(arrays, gradients)
        if isinstance(self.optimizer, AdamW8bit):
            check_gradients(gradients)
        how = {name: checked(name, theta, gradients[name], (), backend) for name, theta in arrays.items()}
        if isinstance(self.optimizer, AdamW8bit):
            for kernel in set(how.values()) - {"torch"}:
                check_block_size(self._block_size, kernel)
        for name, theta in arrays.items():
            if name not in self._paged:
                self._add_zeros(name, theta)
            elif tuple(theta.shape) != (found := self._paged[name].shape):
                raise ValueError(f"the moments of {name} have shape {found}, needed {tuple(theta.shape)}, as it has")
        self.optimizer.step += 1
        for name, theta in arrays.items():
            self._step(theta, gradients[name], self._paged[name], learning_rate, how[name])

    @property
    def step(self) -> int:
        return self.optimizer.step

    @property
    def m(self) -> dict[str, Moment]:
        """First moments, gathered from their pages into the host's memory: copies, which is what a checkpoint needs."""
        return {name: self._gathered(name, 0) for name in self._paged}

    @property
    def v(self) -> dict[str, Moment]:
        return {name: self._gathered(name, 1) for name in self._paged}

    @property
    def nbytes(self) -> int:
        """Of the whole state, wherever it is."""
        return self.pager.nbytes

    def _step(self, theta: Tensor, gradient: Tensor, paged: _Paged, learning_rate: float, how: str) -> None:
        o = self.optimizer
        decay = o.weight_decay if theta.dim() >= 2 else 0.0
        settings = o.step, learning_rate, o.beta1, o.beta2, o.eps, decay
        flat, g = theta.view(-1), gradient.reshape(-1)
        for elements, number in paged.pages:
            with self.pager.page(number) as data:
                m, v = self._moments(data, elements.stop - elements.start, paged.dtype)
                if isinstance(m, BlockwiseTensor) and isinstance(v, BlockwiseTensor):
                    overwrite(flat[elements], g[elements], m, v, settings, how)
                else:
                    step_in_place(flat[elements], g[elements], m, v, *settings, backend=how)

    @property
    def _block_size(self) -> int:
        return self.optimizer.block_size if isinstance(self.optimizer, AdamW8bit) else 1

    def _pieces(self, n: int) -> Iterator[slice]:
        for start in range(0, n, self.page_elements):
            yield slice(start, min(start + self.page_elements, n))

    def _add_zeros(self, name: str, theta: Tensor) -> None:
        """A page at a time: the state of a whole parameter is nowhere at once."""
        eight = isinstance(self.optimizer, AdamW8bit) and theta.numel() >= self.optimizer.min_8bit_size
        zeros = partial(zero_moments, block_size=self._block_size, min_8bit_size=0 if eight else math.inf)
        flat = theta.view(-1)
        pages = [(elements, self.pager.add(_bytes_of(*zeros(flat[elements])))) for elements in self._pieces(len(flat))]
        dtype = None if eight else torch.float64 if theta.dtype == torch.float64 else torch.float32
        self._paged[name] = _Paged(tuple(theta.shape), dtype, pages)

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
        codes = _joined([q.codes for q in quantized], torch.uint8)
        absmax = _joined([q.absmax for q in quantized], torch.float32)
        code = on_device((DYNAMIC, DYNAMIC_UNSIGNED)[which], "cpu")
        return BlockwiseTensor(codes, absmax, code, paged.shape, self._block_size)

    def _moments(self, data: Tensor, n: int, dtype: torch.dtype | None) -> tuple[Moment, Moment]:
        """m and v of a page's n numbers: views, so that a step on them is a step on the page."""
        if dtype is not None:
            m, v = data.view(dtype).view(2, n)
            return m, v
        blocks = block_count(n, self._block_size)
        scales = data[: 8 * blocks].view(torch.float32).view(2, blocks)
        codes = data[8 * blocks :].view(2, n)
        m, v = (
            BlockwiseTensor(codes[i], scales[i], on_device(code, data.device), (n,), self._block_size)
            for i, code in enumerate((DYNAMIC, DYNAMIC_UNSIGNED))
        )
        return m, v


def _bytes_of(m: Moment, v: Moment) -> Tensor:
    """What lies in a page: m and v; or in 8 bits the scales of both, then the codes of both."""
    if isinstance(m, BlockwiseTensor) and isinstance(v, BlockwiseTensor):
        return torch.cat([part.view(torch.uint8) for part in (m.absmax, v.absmax, m.codes, v.codes)])
    moments: list[Any] = [m, v]
    return torch.cat([moment.contiguous().view(-1).view(torch.uint8) for moment in moments])


def _joined(pieces: list, dtype: torch.dtype) -> Tensor:
    """One after the other; a parameter without numbers has no pages."""
    return torch.cat([torch.empty(0, dtype=dtype), *pieces])
