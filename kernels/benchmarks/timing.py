"""How the benchmarks of this folder time a kernel, and what they measure it against.

**What is timed.** A CUDA graph that holds one call for each of several sets of operands, replayed between two events:
no time of Python or of launching is in it. The sets together are larger than four times the L2 cache, so that each call
finds its operands in memory, as a layer of a large model does. A figure is the median over the replays, with the
fastest and the slowest. `one call` is something else: the time that the CPU needs to start one, without a graph, which
is what counts for small tensors.

**The floor.** Each row says how many bytes must move and how many operations must be done: each input read once, each
output written once. The machine's rates are measured in the same run, a device-to-device copy and a matrix product of
bfloat16, and the floor is the longer of the two times. `of floor` is the floor divided by the kernel's time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """A GPU and its two measured rates."""

    name: str
    multiprocessors: int
    l2_bytes: int
    bytes_a_second: float  # read plus written
    operations_a_second: float  # of a bfloat16 matrix product

    def floor(self, nbytes: float, operations: float = 0) -> float:
        """Seconds that nothing can go below."""
        return max(nbytes / self.bytes_a_second, operations / self.operations_a_second)


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


def sets(at_least: int, nbytes: int) -> int:
    """How many sets of operands of this size are larger than `at_least` bytes together."""
    return min(max(at_least // max(nbytes, 1) + 2, 2), 256)


def timed(calls: Sequence[Call], replays: int = 50) -> Row:
    """Seconds a call: median, fastest and slowest replay of a graph of all calls; and of starting one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    started = time.perf_counter()
    for call in calls:
        call()
    launching = (time.perf_counter() - started) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    found = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
    return found | {"one_call": launching, "sets": len(calls)}


def row(on: Machine, what: str, about: str, nbytes: int, operations: int, calls: Sequence[Call], replays: int) -> Row:
    """Time one contender: `what` it is, `about` what task, and the bytes and operations that the task needs."""
    found = timed(calls, replays)
    floor = on.floor(nbytes, operations)
    limits = {"bytes": nbytes, "operations": operations, "floor": floor, "of_floor": floor / found["seconds"]}
    return {"task": about, "what": what} | limits | found


def show(rows: Sequence[Row], title: str) -> None:
    """One line a contender, tasks apart; `ratio` is to the first contender of the task, which is ours."""
    table = Table(title=title)
    for heading in ("task", "", "µs", "GB/s", "of floor", "ours is faster by", "one call, µs"):
        table.add_column(heading, justify="left" if heading in ("task", "") else "right")
    first: dict[str, float] = {}
    for found in rows:
        ours = first.setdefault(found["task"], found["seconds"])
        table.add_row(
            found["task"],
            found["what"],
            f"{found['seconds'] * 1e6:.1f}",
            f"{found['bytes'] / found['seconds'] / 1e9:,.0f}",
            f"{found['of_floor']:.2f}",
            f"{found['seconds'] / ours:.2f}",
            f"{found['one_call'] * 1e6:.1f}",
        )
    Console().print(table)
