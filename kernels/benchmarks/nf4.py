"""NF4 dequantization on a GPU: every step of the ladder, bitsandbytes, and a copy of as many bytes, in one run.

    python kernels/benchmarks/nf4.py                    prints a table, writes runs/nf4_<device>.json

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.

**What is timed.** A CUDA graph that holds one call for each of several sets of operands, replayed between two events:
no time of Python or of launching is in it. The sets together are larger than four times the L2 cache, so that each call
finds its operands in memory, as a layer of a large model does. A figure is the median over the replays, with the
fastest and the slowest. Before it is timed, every kernel's result is compared with PyTorch's, bit for bit;
`same_bits` says how it was for bitsandbytes.

**The limit.** `copy` is a device-to-device copy that reads and writes as many bytes in total. A kernel cannot be much
faster; `of copy` is the copy's time divided by the kernel's. Bytes a second are those that must move: codes, scales
and results, once each. `one call` is something else: the time that the CPU needs to start one, without a graph, which
is what counts for a small matrix.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from rich.console import Console
from rich.table import Table

from minift.quant.nf4 import CODE
from minift_kernels import backend
from minift_kernels.quant import double_quant, nf4
from minift_kernels.quant.nf4 import NF4Tensor

SHAPES = ((1024, 4096), (4096, 4096), (4096, 14336), (8192, 28672))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Row = dict[str, Any]
Call = Callable[[], Any]
Prepare = Callable[[NF4Tensor, torch.Tensor], Call]


@dataclass
class Benchmark:
    """Time the NF4 kernels beside bitsandbytes and a copy."""

    dtype: tuple[str, ...] = ("float16", "bfloat16")
    """Types of the decoded matrix: float16, bfloat16, float32."""
    block_size: int = 64
    """Weights that share a scale."""
    replays: int = 50
    """How often each graph is timed."""
    every_tile: bool = False
    """Time all tile sizes of nf4_kernels.TILES instead of the default."""
    out: Path | None = None
    """Where the results go; runs/nf4_<device>.json if not given."""

    def run(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("kernels/benchmarks/nf4.py needs a CUDA device; compiled.py beside it needs none")
        properties = torch.cuda.get_device_properties(0)
        rows = [
            row
            for shape in SHAPES
            for dtype in self.dtype
            for nested in (False, True)
            for row in self.matrix(shape, DTYPES[dtype], nested, 4 * properties.L2_cache_size)
        ]
        import bitsandbytes

        machine = {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "bitsandbytes": bitsandbytes.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
        }
        self.show(rows, properties.name)
        name = re.sub(r"\W+", "_", properties.name).strip("_")
        out = self.out or Path(f"runs/nf4_{name}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype, nested: bool, at_least: int) -> list[Row]:
        """All contenders for one matrix, on the same numbers."""
        q = nf4.quantize(torch.randn(shape, device="cuda"), self.block_size)
        q = double_quant.compress(q) if nested else q
        moved = q.nbytes + q.size * dtype.itemsize
        sets = [(_copy(q), torch.empty(shape, dtype=dtype, device="cuda")) for _ in range(at_least // moved + 2)]
        wanted = nf4.dequantize(q, dtype, backend="torch")
        about = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "double_quantized": nested}
        rows: list[Row] = []
        for name, prepare in self.contenders(dtype, nested):
            calls = [prepare(part, out) for part, out in sets]
            for _, out in sets:
                out.fill_(torch.nan)
            for call in calls:
                call()
            same = all(torch.equal(out, wanted) for _, out in sets)
            assert same or name == "bitsandbytes", f"{name}: another result than PyTorch's"
            rows.append(about | {"what": name, "bytes": moved, "same_bits": same} | self.timed(calls))
        pairs = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in sets]
        copies = [partial(pair[1].copy_, pair[0]) for pair in pairs]
        rows.append(about | {"what": "copy", "bytes": moved} | self.timed(copies))
        for row in rows:
            row["of_copy"] = rows[-1]["seconds"] / row["seconds"]
        return rows

    def contenders(self, dtype: torch.dtype, nested: bool) -> list[tuple[str, Prepare]]:
        """name -> a maker of calls; only the last step takes double-quantized scales."""
        kernels = backend.load(nf4.KERNELS, "triton")
        size = dtype.itemsize
        steps = range(kernels.LAST if nested else 1, kernels.LAST + 1)
        ours = [
            (f"dequantize_{step}, tile {tile[0]}, {tile[1]} warps", partial(_ours, step=step, tile=tile))
            for step in steps
            for tile in (kernels.TILES[size] if self.every_tile else [kernels.default_tile(step, size)])
        ]
        return [*ours, ("bitsandbytes", _bitsandbytes)]

    def timed(self, calls: Sequence[Call]) -> Row:
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
        for _ in range(self.replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        found = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
        return found | {"one_call": launching, "sets": len(calls)}

    def show(self, rows: list[Row], device: str) -> None:
        table = Table(title=f"NF4 dequantization on {device}")
        for heading in ("matrix", "", "µs", "GB/s", "of copy", "one call, µs"):
            table.add_column(heading, justify="left" if heading in ("matrix", "") else "right")
        for row in rows:
            scales = ", double-quantized" if row["double_quantized"] else ""
            table.add_row(
                f"{row['shape'][0]} x {row['shape'][1]} {row['dtype']}{scales}",
                row["what"],
                f"{row['seconds'] * 1e6:.1f}",
                f"{row['bytes'] / row['seconds'] / 1e9:,.0f}",
                f"{row['of_copy']:.2f}",
                f"{row['one_call'] * 1e6:.1f}",
            )
        Console().print(table)


def _ours(q: NF4Tensor, out: torch.Tensor, step: int, tile: tuple[int, int]) -> Call:
    s = q.absmax
    scales: tuple = (s, None, None, None)
    nested = 0
    if not isinstance(s, torch.Tensor):
        scales, nested = (s.codes, s.absmax, s.code, s.offset), s.block_size

    def call():
        nf4.dequantize_launch(out, q.codes, scales, q.block_size, nested, "triton", step, tile).run(out.device)

    return call


def _bitsandbytes(q: NF4Tensor, out: torch.Tensor) -> Call:
    """From the same codes and statistics into the same output."""
    from bitsandbytes import functional as bnb

    s = q.absmax
    state = bnb.QuantState(
        absmax=s if isinstance(s, torch.Tensor) else s.codes,
        shape=torch.Size(q.shape),
        code=torch.tensor(CODE, device=out.device),
        blocksize=q.block_size,
        quant_type="nf4",
        dtype=out.dtype,
    )
    if not isinstance(s, torch.Tensor):
        state.nested, state.offset = True, s.offset
        state.state2 = bnb.QuantState(absmax=s.absmax, code=s.code, blocksize=s.block_size, dtype=torch.float32)
    return partial(bnb.dequantize_4bit, q.codes.view(-1, 1), state, out=out)


def _copy(q: NF4Tensor) -> NF4Tensor:
    """The same tensor elsewhere in memory."""
    s = q.absmax
    if isinstance(s, torch.Tensor):
        return replace(q, codes=q.codes.clone(), absmax=s.clone())
    scales = double_quant.DoubleQuantizedScales(
        s.codes.clone(), s.absmax.clone(), s.offset.clone(), s.block_size, s.code
    )
    return replace(q, codes=q.codes.clone(), absmax=scales)


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
