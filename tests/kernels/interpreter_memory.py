"""Between Triton's interpreter and memory: what a kernel reads and writes, address by address.

The interpreter itself notices no access outside of a tensor, and no two programs that write to one place. `watch` does:
every load must lie in one of the tensors that may be read, every store in the one that may be written, and no place is
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
    """A tensor that may be read, or written; `far` is by how many bytes it pretends to begin earlier."""

    tensor: Any
    far: int = 0
    write: bool = False
    touched: set = field(default_factory=set)

    def holds(self, address, size):
        start = np.uint64(self.tensor.data_ptr() + self.far)
        with np.errstate(over="ignore"):
            return address - start <= np.uint64(max(self.tensor.nbytes - size, 0)) if self.tensor.nbytes else False


@contextmanager
def watch(tensors, programs=0):
    """While inside, kernels may touch only these `Watched` tensors; AssertionError at the end if they did otherwise."""
    wrong = []

    def translate(pointers, mask, write):
        """The true addresses, and the lanes that may go on."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        address, active = np.broadcast_arrays(pointers.data, mask.data)
        address, allowed = address.copy(), np.zeros(active.shape, bool)
        original = address.copy()
        for t in tensors:
            here = active & t.holds(original, size) & (t.write == write)
            address[here] -= np.uint64(t.far)
            allowed |= here
            if write:
                places = address[here].tolist()
                if len(set(places)) < len(places) or t.touched.intersection(places):
                    wrong.append("a place is stored to twice")
                t.touched.update(places)
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
