"""Between Triton's interpreter and memory: what a kernel reads and writes, address by address.

The interpreter itself notices no access outside of a tensor, and no two programs that write to one place. `watch` does:
every load must lie in one of the tensors that may be read, every store in one that may be written, and no place is
stored to twice. A lane that breaks this is switched off, so that a wrong kernel cannot harm the process.

`far` moves a launch to where offsets need 64 bits, without the memory for it. Program 0 becomes program `programs`, and
each tensor pretends to begin so much earlier that the launch meets its first element there.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import TensorHandle, interpreter_builder


@dataclass
class Watched:
    """A tensor that may be read, or written, or both; `far` is by how many bytes it pretends to begin earlier."""

    tensor: Any
    far: int = 0
    write: bool = False
    read: bool | None = None  # by default what may not be written
    stores: np.ndarray = field(init=False)  # how often each byte was the first of what was stored

    def __post_init__(self):
        self.read = not self.write if self.read is None else self.read
        self.extent = sum((n - 1) * s for n, s in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        self.extent = (self.extent + 1) * self.tensor.element_size() if self.tensor.numel() else 0  # bytes
        self.stores = np.zeros(self.extent if self.write else 0, np.uint8)

    @property
    def start(self):
        return np.uint64(self.tensor.data_ptr() + self.far)

    def holds(self, address, size):
        with np.errstate(over="ignore"):
            return address - self.start <= np.uint64(max(self.extent - size, 0)) if self.extent else False

    def store(self, addresses):
        """Count them; True if a place was stored to before, or is meant twice."""
        np.add.at(self.stores, (addresses - self.start).astype(np.intp), 1)
        return bool((self.stores > 1).any())

    @property
    def touched(self):
        """The places that were stored to."""
        return np.flatnonzero(self.stores)


@contextmanager
def watch(tensors, programs=0):
    """While inside, kernels may touch only these `Watched` tensors; AssertionError at the end if they did otherwise."""
    wrong = []

    def translate(pointers, mask, write):
        """The true addresses, and the lanes that may go on."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        address, active = np.broadcast_arrays(pointers.data, mask.data.astype(bool))  # a scalar's may be int32
        address, allowed = address.copy(), np.zeros(active.shape, bool)
        original = address.copy()
        for t in tensors:
            here = active & t.holds(original, size) & (t.write if write else t.read)
            if write and t.write and t.store(original[here]):
                wrong.append("a place is stored to twice")
            address[here] -= np.uint64(t.far)
            allowed |= here
        if (active & ~allowed).any():
            outside = original[active & ~allowed]
            wrong.append(f"{outside.size} {'stores' if write else 'loads'} outside, at {int(outside[0]):#x}")
        return TensorHandle(address, pointers.dtype), TensorHandle(allowed, mask.dtype)

    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
    program = interpreter_builder.create_get_program_id

    def watched_load(pointers, mask, other, *rest):
        return load(*translate(pointers, mask, False), other, *rest)

    def watched_store(pointers, value, mask, *rest):
        pointers, mask = translate(pointers, mask, True)
        return store(pointers, value, mask, *rest)

    def far_program(axis):
        handle = program(axis)
        return TensorHandle(handle.data + handle.data.dtype.type(programs), handle.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "create_masked_load", watched_load)
        patch.setattr(interpreter_builder, "create_masked_store", watched_store)
        patch.setattr(interpreter_builder, "create_get_program_id", far_program)
        yield
    assert not wrong, wrong[0]
