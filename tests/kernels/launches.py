"""What every launch must satisfy, whatever the kernel; and how a wrong kernel takes the place of the right one.

    with guarded():                      # each launch in here runs in the interpreter, twice, between canaries
        norms.rms_norm(x, weight, backend="interpreter")

    with replaced("backward", wrong, WRONG="no mean"):      # the public function now runs this kernel instead
        ...

Both work on `Launch.run`, so they hold for public functions, their gradients and whole models. `sparse` and
`last_program` show that offsets have 64 bits: a tensor of many gigabytes whose memory is never touched but in a few
places, and of a launch over it only the program that meets the far end.
"""

import dataclasses
import mmap
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from interpreter_memory import Watched, watch
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from minift_kernels.backend import Launch

PAD = 64  # elements on either side of an output
CANARY = 0x5A


@contextmanager
def every_launch(run):
    """While inside, `launch.run(device)` is `run(launch, device, before)`, with `before` what it was until now."""
    before = Launch.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "run", lambda launch, device: run(launch, device, before))
        yield


@contextmanager
def replaced(name, kernel, **options):
    """Launches of the kernel of this name run another one, with more `options`."""

    def run(launch, device, before):
        if launch.kernel.fn.__name__ == name:
            launch = dataclasses.replace(launch, kernel=kernel, options={**launch.options, **options})
        before(launch, device)

    with every_launch(run):
        yield


def version(f, name, kernel, what, also=()):
    """`f(*args) -> y, vjp` with the kernel of this name replaced by one with WRONG = what, in both passes, guarded.

    With WRONG = "nothing" it must be right, or what rejects the others says nothing."""

    def changed(*args):
        with guarded(also), replaced(name, kernel, WRONG=what):
            y, vjp = f(*args)

        def changed_vjp(*dy):
            with guarded(also), replaced(name, kernel, WRONG=what):
                return vjp(*dy)

        return y, changed_vjp

    changed.__name__ = what
    return changed


@contextmanager
def guarded(also=()):
    """Every launch writes all of its outputs, each place once, and nothing else; reads nothing else than its arguments;
    changes no input; gives the same bits twice, into outputs that are NaN before.

    `also` holds `Watched` tensors for a kernel that is given addresses. Those that may be written are overwritten in
    place: all of their elements, or, by a launch that is not about them, none."""

    def run(launch, device, before):
        written, given = launch.arguments[: launch.outputs], launch.arguments[launch.outputs :]
        inputs = [a for a in given if isinstance(a, torch.Tensor)]
        hashes = [bits(a) for a in inputs]
        in_place = [(place.tensor, place.tensor.clone()) for place in also if place.write]
        results = []
        for watching in (True, False):  # watching takes most of the time, and once is enough
            buffers = [between_canaries(a, launch.in_place) for a in written]
            for tensor, before_launch in in_place:
                tensor.copy_(before_launch)
            guarded_launch = dataclasses.replace(launch, arguments=(*(out for _, out in buffers), *given))
            if watching:
                outputs = [Watched(out, write=True, read=launch.in_place) for _, out in buffers]
                others = [dataclasses.replace(place) for place in also]  # which have not been stored to yet
                with watch([*outputs, *map(Watched, inputs), *others]):
                    before(guarded_launch, device)
                for index, place in enumerate(outputs if 0 not in launch.grid else []):
                    stored, needed = len(place.touched), place.tensor.numel()
                    assert stored == needed, f"output {index}: {stored} of {needed} places were stored to"
                for index, place in enumerate(others):
                    stored, needed = len(place.touched), place.tensor.numel()
                    assert stored in (0, needed), f"tensor {index}: {stored} of {needed} places were stored to"
            else:
                before(guarded_launch, device)
            assert all(canaries_alive(*pair) for pair in buffers), "a canary beside an output was changed"
            results.append([bits(out) for out in [*(out for _, out in buffers), *(tensor for tensor, _ in in_place)]])
        assert [bits(a) for a in inputs] == hashes, "an input was changed"
        assert results[0] == results[1], "other bits the second time"
        for target, (_, out) in zip(written, buffers, strict=True):
            target.copy_(out)

    with every_launch(run):
        yield


@contextmanager
def repeated(times):
    """On a GPU: every launch runs so often, and gives the same bits each time. A race shows as bits that change."""

    def run(launch, device, before):
        written, given = launch.arguments[: launch.outputs], launch.arguments[launch.outputs :]
        first = None
        for _ in range(times):
            outputs = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device) for a in written]
            for out, original in zip(outputs, written, strict=True):
                if launch.in_place:
                    out.copy_(original)
                else:
                    out.fill_(torch.nan if out.is_floating_point() else 113)
            before(dataclasses.replace(launch, arguments=(*outputs, *given)), device)
            found = [out.contiguous().view(torch.uint8) for out in outputs if out.numel()]
            first = found if first is None else first
            name = launch.kernel.fn.__name__
            assert all(map(torch.equal, found, first)), f"{name}: other bits in one of {times} runs"
        for target, out in zip(written, outputs, strict=True):
            target.copy_(out)

    with every_launch(run):
        yield


def between_canaries(output, keep):
    """(buffer, a view of it in the shape and strides of `output`), full of NaN or, if `keep`, of the same numbers."""
    extent = 1 + sum((n - 1) * s for n, s in zip(output.shape, output.stride(), strict=True)) if output.numel() else 0
    size = output.element_size()
    buffer = torch.full(((extent + 2 * PAD) * size,), CANARY, dtype=torch.uint8)
    out = buffer.view(output.dtype).as_strided(output.shape, output.stride(), PAD)
    if keep:
        out.copy_(output)
    else:
        out.fill_(torch.nan if out.is_floating_point() else 113)
    return buffer, out


def canaries_alive(buffer, out):
    """Bytes around the view, and in the gaps between its elements."""
    around = torch.ones(buffer.numel() // out.element_size(), dtype=torch.bool)
    around.as_strided(out.shape, out.stride(), PAD).fill_(False)
    return bool((buffer.view(-1, out.element_size())[around] == CANARY).all())


def bits(x):
    return x.detach().numpy().tobytes()


def sparse(shape, dtype, fill=None):
    """An array of zeros in virtual memory, which takes real memory only where something is written to it."""
    n = int(np.prod(shape, dtype=object)) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux
    return torch.frombuffer(mmap.mmap(-1, max(n, 1), flags=flags), dtype=torch.uint8)[:n].view(dtype).view(shape)


@contextmanager
def last_program():
    """Of each launch only the last program runs, of a grid that may have millions of them."""

    def run(launch, device, before):
        program = interpreter_builder.create_get_program_id

        def last(axis):
            handle = program(axis)
            return TensorHandle(np.full_like(handle.data, launch.grid[axis] - 1), handle.dtype)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter_builder, "create_get_program_id", last)
            before(dataclasses.replace(launch, grid=(1,) * len(launch.grid)), device)

    with every_launch(run):
        yield
