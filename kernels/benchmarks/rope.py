"""Rotary positions on a GPU, forward and backward, beside plain PyTorch, Liger (where installed) and a copy.

    python kernels/benchmarks/rope.py                   prints a table

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.

A figure is the median time of one call, between two events, over several calls after a warm-up. Bytes are those that
must move: x and y, once each. `copy` moves as many.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from minift_kernels.nn import rope

SHAPES = ((8, 9, 2048, 64), (4, 32, 2048, 128), (1, 32, 16384, 128))  # batch, heads, tokens, features of a head


@dataclass
class Benchmark:
    """Time the rotation of queries beside plain PyTorch, Liger and a copy."""

    dtype: str = "bfloat16"
    """float16, bfloat16 or float32."""
    calls: int = 50
    """How often each is timed."""

    def run(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("kernels/benchmarks/rope.py needs a CUDA device")
        table = Table(title=f"Rotary positions on {torch.cuda.get_device_name()}, {self.dtype}")
        for heading in ("shape", "", "µs", "GB/s"):
            table.add_column(heading, justify="left" if heading in ("shape", "") else "right")
        for shape in SHAPES:
            for name, call, bytes_moved in self.contenders(shape, getattr(torch, self.dtype)):
                seconds = median_time(call, self.calls)
                table.add_row(str(shape), name, f"{seconds * 1e6:,.1f}", f"{bytes_moved / seconds / 1e9:,.0f}")
        Console().print(table)

    def contenders(self, shape: tuple, dtype: torch.dtype) -> Iterator[tuple[str, Callable, int]]:
        batch, heads, tokens, d = shape
        x = torch.randn(batch, tokens, heads, d, device="cuda", dtype=dtype).transpose(1, 2)
        learning, dy = x.clone().requires_grad_(), torch.randn_like(x)
        cos, sin = rope.rotations(torch.arange(tokens, device="cuda")[None], rope.frequencies(d))
        moved = 2 * x.nbytes
        for name, how in (("minift", "triton"), ("plain PyTorch", "torch")):
            yield name, partial(rope.rope, x, cos, sin, backend=how), moved
            yield f"{name}, and backward", partial(self.both, learning, cos, sin, dy, how), 2 * moved
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers.rope import liger_rotary_pos_emb

            angles = [torch.cat([a, a], dim=-1).to(dtype) for a in (cos, sin)]
            half = x.contiguous()  # Liger turns queries and keys in one launch: here half of the heads are the keys
            q, k = half[:, : heads // 2], half[:, heads // 2 :]
            yield "Liger", lambda: liger_rotary_pos_emb(q, k, *angles), moved
        out = torch.empty_like(x)
        yield "copy", lambda: out.copy_(x), moved

    def both(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dy: torch.Tensor, how: str) -> Any:
        return torch.autograd.grad(rope.rope(x, cos, sin, backend=how), x, dy)


def median_time(call: Callable[[], Any], calls: int) -> float:
    """Seconds of one call, between two events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
