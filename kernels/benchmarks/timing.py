"""How the benchmarks of this folder time a kernel, and what they measure it against.

**What is timed.** A CUDA graph that holds one call for each of several sets of operands, replayed between two events:
no time of Python or of launching is in it. The sets together are larger than four times the L2 cache, and each call has
its own memory for results, so that each finds its operands in memory, as a layer of a large model does. A figure is the
median over the replays, with the fastest and the slowest. What is not `captured` is the same calls one after the other
without a graph: with what Python and launching take where the GPU waits for them. `one call` is the time that the CPU
needs to start one, which is what counts for small tensors.

**The floor.** Each row says how many bytes must move and how many operations must be done: each input read once, each
output written once. The machine's rates are measured in the same run, a device-to-device copy and a matrix product of
bfloat16, and the floor is the longer of the two times. `of floor` is the floor divided by the kernel's time.

**The same work?** Before it is timed, what a contender gives for the first set is compared with what plain PyTorch
gives: bit for bit where that can be asked for, otherwise within a bound, which stands where it is chosen. Ours must be
right; of a peer the row says how far off it was.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

Call = Callable[[], Any]
Row = dict[str, Any]

LONGEST = 3.0  # seconds of replays; slower contenders have fewer replays, but FEWEST at least
FEWEST = 3


@dataclass(frozen=True)
class Machine:
    """A GPU and its two measured rates. Tests put a CPU and Triton's interpreter in its place."""

    name: str
    multiprocessors: int
    l2_bytes: int
    bytes_a_second: float  # read plus written
    operations_a_second: float  # of a bfloat16 matrix product
    device: str = "cuda"
    backend: str = "triton"

    def floor(self, nbytes: float, operations: float = 0) -> float:
        """Seconds that nothing can go below."""
        return max(nbytes / self.bytes_a_second, operations / self.operations_a_second)

    def sets(self, nbytes: int) -> range:
        """So many sets of operands of this size are larger than four times the L2 cache together."""
        return range(min(max(4 * self.l2_bytes // max(nbytes, 1) + 2, 2), 256))

    def random(self, *shape: int, dtype: torch.dtype, scale: float = 1.0, learns: bool = False) -> Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(dtype).requires_grad_(learns)


def machine(replays: int = 20) -> Machine:
    """Measure the GPU of this process. SystemExit without one."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; compiled.py beside it needs none")
    properties = torch.cuda.get_device_properties(0)
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    copy = timed([lambda: target.copy_(source)], replays)["seconds"]
    n = 8192
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device="cuda")  # random: zeros are multiplied faster
    product = timed([lambda: a @ b], replays)["seconds"]
    rates = 2 * source.nbytes / copy, 2 * n**3 / product
    return Machine(properties.name, properties.multi_processor_count, properties.L2_cache_size, *rates)


def timed(calls: Sequence[Call], replays: int = 50, captured: bool = True) -> Row:
    """Seconds a call: median, fastest and slowest replay of all calls; of starting one; bytes that one allocates."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls[0]()
    peak = torch.cuda.max_memory_allocated() - before
    started = time.perf_counter()
    for call in calls:
        call()
    launching = (time.perf_counter() - started) / len(calls)
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = [call() for call in calls]  # kept, or the next call would write to the same places
        again: Call = graph.replay
    else:
        results = []

        def again():
            for call in calls:
                call()

    again()
    times: list[float] = []
    while len(times) < replays and (len(times) < FEWEST or sum(times) * len(calls) < LONGEST):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        again()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    del results
    found = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
    return found | {"one_call": launching, "sets": len(calls), "replays": len(times), "peak_bytes": peak}


def row(
    on: Machine,
    what: str,
    about: str,
    nbytes: int,
    operations: int,
    calls: Sequence[Call],
    replays: int,
    captured: bool = True,
) -> Row:
    """Time one contender: `what` it is, `about` what task, and the bytes and operations that the task needs."""
    found = timed(calls, replays, captured)
    floor = on.floor(nbytes, operations)
    limits = {"bytes": nbytes, "operations": operations, "floor": floor, "of_floor": floor / found["seconds"]}
    return {"task": about, "what": what} | limits | found


def compare(
    on: Machine,
    about: str,
    nbytes: int,
    operations: int,
    contenders: dict[str, Callable],
    inputs: Sequence[Sequence[Any]],
    replays: int,
    wanted: Any,
    within: float,
    captured: bool = True,
) -> list[Row]:
    """A row for each contender, a function of one of `inputs`; `wanted` is what it should give for the first.

    `within` is the bound on the largest difference of ours, relative to the largest number; 0 asks for the same bits.
    From a peer nothing is asked, and the row says how it was."""
    rows = []
    for what, f in contenders.items():
        found = agreement(f(*inputs[0]), wanted)
        right = found["difference"] <= within and (within > 0 or found["same_bits"])
        if what.startswith("minift") and not right:
            raise AssertionError(f"{about}, {what}: off by {found['difference']:.2g}, needed {within:.2g}")
        calls = [partial(f, *args) for args in inputs]
        rows.append(row(on, what, about, nbytes, operations, calls, replays, captured) | found)
    return rows


def agreement(found: Any, wanted: Any) -> Row:
    """Are the bits of a tensor, or of several, the same; and the largest difference, relative to the largest number."""
    pairs = [(found, wanted)] if isinstance(wanted, Tensor) else list(zip(found, wanted, strict=True))
    assert all(x.shape == y.shape for x, y in pairs), [(tuple(x.shape), tuple(y.shape)) for x, y in pairs]
    with torch.no_grad():
        same = all(x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in pairs)
        largest = (torch.stack([(x.float() - y.float()).abs().max(), y.float().abs().max()]) for x, y in pairs)
        difference = max((off / size.clamp(min=1e-30)).item() for off, size in largest)
    return {"same_bits": same, "difference": difference}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def forward(f: Callable) -> Callable:
    """f without its gradient."""

    def value(*args):
        with torch.no_grad():
            return f(*args)

    return value


def both(f: Callable) -> Callable:
    """dy and the arguments of f -> the gradients of all that learns among these; dy is None for a loss."""

    def gradients(dy, *args):
        return torch.autograd.grad(f(*args), [a for a in args if isinstance(a, Tensor) and a.requires_grad], dy)

    return gradients


def in_float32(f: Callable, *args: Any) -> Any:
    """What f gives for the same numbers in float32: what 16-bit contenders are compared with."""

    def raised(a):
        if isinstance(a, Tensor) and a.is_floating_point():
            return a.detach().to(torch.float32).requires_grad_(a.requires_grad)
        return a

    return f(*map(raised, args))


def compiled(f: Callable) -> Callable:
    """torch.compile for these very shapes, whatever was compiled before."""
    torch.compiler.reset()
    return torch.compile(f, dynamic=False)


# More columns, for rows that have them: key -> heading and how to write the value.
MORE: dict[str, tuple[str, Callable[[Any], str]]] = {
    "same_bits": ("same bits", lambda same: "yes" if same else "no"),
    "difference": ("off by", "{:.1g}".format),
}


def show(rows: Sequence[Row], title: str) -> None:
    """One line a contender, tasks apart; the ratio is to the first contender of the task, which is ours."""
    table = Table(title=title)
    more = {key: how for key, how in MORE.items() if any(key in found for found in rows)}
    headings = "task", "", "µs", "GB/s", "TFLOP/s", "of floor", "ours is faster by", "one call, µs", "peak, MB"
    for heading in (*headings, *(heading for heading, _ in more.values())):
        table.add_column(heading, justify="left" if heading in ("task", "") else "right")
    first: dict[str, float] = {}
    for found in rows:
        ours = first.setdefault(found["task"], found["seconds"])
        table.add_row(
            found["task"],
            found["what"],
            f"{found['seconds'] * 1e6:.1f}",
            f"{found['bytes'] / found['seconds'] / 1e9:,.0f}",
            f"{found['operations'] / found['seconds'] / 1e12:,.0f}" if found["operations"] else "",
            f"{found['of_floor']:.2f}",
            f"{found['seconds'] / ours:.2f}",
            f"{found['one_call'] * 1e6:.1f}",
            f"{found['peak_bytes'] / 1e6:,.1f}",
            *(write(found[key]) if key in found else "" for key, (_, write) in more.items()),
        )
    Console().print(table)
