"""Attention on a GPU, forward and backward, beside PyTorch's own flash attention, for causal texts.

    python kernels/benchmarks/attention.py              prints a table

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.

A figure is the median time of one call, between two events, over several calls after a warm-up; forward and backward
are timed together and forward alone. `tile_map` is timed by itself, because a model calls it once for all layers.
FLOP are those of the visible half: 2 products forward, 5 backward, of 2 · tokens² · d / 2 each a head.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from minift_kernels.nn import attention

# batch, query heads, key/value heads, tokens, features of a head: SmolLM2, Llama 3 8B, one long text
SHAPES = ((8, 9, 3, 2048, 64), (4, 32, 8, 2048, 128), (1, 32, 8, 16384, 128))


@dataclass
class Benchmark:
    """Time the attention kernels beside torch's flash attention."""

    dtype: str = "bfloat16"
    """float16 or bfloat16."""
    calls: int = 30
    """How often each is timed."""

    def run(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("kernels/benchmarks/attention.py needs a CUDA device")
        table = Table(title=f"Causal attention on {torch.cuda.get_device_name()}, {self.dtype}")
        for heading in ("shape", "", "forward, µs", "TFLOP/s", "both, µs", "TFLOP/s"):
            table.add_column(heading, justify="left" if heading in ("shape", "") else "right")
        for shape in SHAPES:
            for name, forward, both in self.contenders(shape, getattr(torch, self.dtype)):
                table.add_row(str(shape), name, *self.cells(shape, forward, 2), *self.cells(shape, both, 7))
        Console().print(table)

    def contenders(self, shape: tuple, dtype: torch.dtype) -> Iterator[tuple[str, Callable, Callable | None]]:
        """name, the forward pass, forward and backward."""
        batch, heads, kv_heads, tokens, d = shape

        def made(heads: int) -> torch.Tensor:
            rows = torch.randn(batch, tokens, heads, d, device="cuda", dtype=dtype)
            return rows.transpose(1, 2).requires_grad_()

        q, k, v = made(heads), made(kv_heads), made(kv_heads)
        dy = torch.randn_like(q)
        visible = attention.causal_mask(torch.arange(tokens, device="cuda")[None], tokens)
        tiles = attention.tile_map(visible, d, dtype)

        def ours() -> torch.Tensor:
            return attention.attention(q, k, v, visible, tiles=tiles)

        def flash() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        difference = (ours() - flash()).abs().max().item()
        assert difference <= 16 * torch.finfo(dtype).eps, f"off by {difference:.2g} from PyTorch's"
        for name, f in (("minift", ours), ("torch, flash", flash)):
            yield name, f, lambda f=f: torch.autograd.grad(f(), (q, k, v), dy)
        yield "tile_map", lambda: attention.tile_map(visible, d, dtype), None

    def cells(self, shape: tuple, call: Callable[[], Any] | None, products: int) -> tuple[str, str]:
        if call is None:
            return "", ""
        batch, heads, _, tokens, d = shape
        seconds = median_time(call, self.calls)
        flop = products * batch * heads * tokens * tokens * d
        return f"{seconds * 1e6:,.0f}", f"{flop / seconds / 1e12:.0f}"


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
