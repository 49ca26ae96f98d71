"""Block-wise quantization on a GPU, both ways: ours, bitsandbytes, and a copy of as many bytes, in one run.

    python kernels/benchmarks/blockwise.py              prints a table, writes runs/blockwise_<device>.json

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.

A figure is the time of one call in a CUDA graph that holds one for each of several sets of operands, together larger
than four times the L2 cache; the median over the replays, with the fastest and the slowest (as in nf4.py). Bytes are
those that must move: numbers, codes and scales, once each. Decoded numbers must have the same bits everywhere. Codes
need not: where a number lies exactly between two entries, bitsandbytes' kernel takes now the one, now the other;
`same_codes` is the share that is equal.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from minift_kernels.quant import blockwise, codebooks

SHAPES = ((1024, 4096), (4096, 4096), (4096, 14336))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Row = dict[str, Any]
Call = Callable[[], Any]


@dataclass
class Benchmark:
    """Time block-wise quantization with the dynamic map beside bitsandbytes and a copy."""

    dtype: tuple[str, ...] = ("bfloat16", "float32")
    """Types of the numbers: float16, bfloat16, float32."""
    block_size: int = 256
    """Numbers that share a scale: one that bitsandbytes has too."""
    replays: int = 50
    """How often each graph is timed."""
    out: Path | None = None
    """Where the results go; runs/blockwise_<device>.json if not given."""

    def run(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("kernels/benchmarks/blockwise.py needs a CUDA device")
        properties = torch.cuda.get_device_properties(0)
        rows = [
            row
            for shape in SHAPES
            for dtype in self.dtype
            for row in self.matrix(shape, DTYPES[dtype], 4 * properties.L2_cache_size)
        ]
        self.show(rows, properties.name)
        name = re.sub(r"\W+", "_", properties.name).strip("_")
        out = self.out or Path(f"runs/blockwise_{name}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"device": properties.name, "rows": rows}, indent=2) + "\n", encoding="utf-8")

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype, at_least: int) -> list[Row]:
        """All contenders for one matrix, on the same numbers."""
        from bitsandbytes import functional as bnb

        code = codebooks.on_device(codebooks.DYNAMIC, "cuda")
        x = torch.randn(shape, device="cuda").to(dtype)
        q = blockwise.quantize(x, code, self.block_size)
        moved = q.nbytes + x.nbytes
        sets = [(x.clone(), q.codes.clone(), q.absmax.clone()) for _ in range(at_least // moved + 2)]
        pairs = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in sets]
        theirs = [
            bnb.QuantState(absmax=absmax, code=code, blocksize=self.block_size, dtype=dtype) for _, _, absmax in sets
        ]
        encoders = {
            "ours, quantize": [partial(self._quantize, *operands, code) for operands in sets],
            "bitsandbytes, quantize": [
                partial(bnb.quantize_blockwise, x, code=code, out=codes, absmax=absmax, blocksize=self.block_size)
                for x, codes, absmax in sets
            ],
        }
        decoders = {
            "ours, dequantize": [partial(self._dequantize, *operands, code) for operands in sets],
            "bitsandbytes, dequantize": [
                partial(bnb.dequantize_blockwise, codes.view(shape), state, out=x)
                for (x, codes, _), state in zip(sets, theirs, strict=True)
            ],
        }
        about = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "bytes": moved}
        rows: list[Row] = []
        for name, calls in encoders.items():
            seconds = self.timed(calls)
            same = statistics.mean((codes == q.codes).float().mean().item() for _, codes, _ in sets)
            rows.append(about | {"what": name, "same_codes": same} | seconds)
        wanted = blockwise.dequantize(q, dtype, backend="torch")
        for name, calls in decoders.items():
            for operands in sets:
                operands[1].copy_(q.codes)
            rows.append(about | {"what": name} | self.timed(calls))
            assert all(torch.equal(x, wanted) for x, _, _ in sets), f"{name}: another result than PyTorch's"
        rows.append(about | {"what": "copy"} | self.timed([partial(pair[1].copy_, pair[0]) for pair in pairs]))
        return rows

    def _quantize(self, x, codes, absmax, code) -> None:
        blockwise.quantize_launch(codes, absmax, x.view(-1), code, self.block_size, "triton").run(x.device)

    def _dequantize(self, x, codes, absmax, code) -> None:
        blockwise.dequantize_launch(x, codes, absmax, code, self.block_size, "triton").run(x.device)

    def timed(self, calls: Sequence[Call]) -> Row:
        """Seconds a call: median, fastest and slowest replay of a graph of all calls."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        stream.synchronize()
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
        return {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}

    def show(self, rows: list[Row], device: str) -> None:
        table = Table(title=f"Block-wise quantization on {device}")
        for heading in ("matrix", "", "µs", "GB/s", "same codes"):
            table.add_column(heading, justify="left" if heading in ("matrix", "") else "right")
        for row in rows:
            table.add_row(
                f"{row['shape'][0]} x {row['shape'][1]} {row['dtype']}",
                row["what"],
                f"{row['seconds'] * 1e6:.1f}",
                f"{row['bytes'] / row['seconds'] / 1e9:,.0f}",
                f"{row['same_codes']:.6f}" if "same_codes" in row else "",
            )
        Console().print(table)


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
