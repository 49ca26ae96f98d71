"""What every launch compiles to, on three GPUs that need not be there: the kernels of all families, one table.

    python kernels/benchmarks/compiled.py                             everything, in float16
    python kernels/benchmarks/compiled.py --only nf4 --target sm_90 --dtype bfloat16 --json compiled.json

One row a launch and target: registers of a lane, how many of them were spilled, bytes of shared memory of a program,
instructions that load, bits that a lane loads and stores at once. Copies into shared memory that pass no register are
not among the loads. Launches are made by the functions that the operators call, on tensors that have no memory, of the
sizes of a Llama 3 of 8 billion parameters. Nothing is timed: this is what the predictions in the kernel files rest on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from minift_kernels import aot, backend
from minift_kernels.backend import Launch
from minift_kernels.nn import attention, dropout, embedding, losses, mlp, norms, rope
from minift_kernels.optim import adamw, adamw8bit
from minift_kernels.peft import batched, lora
from minift_kernels.quant import blockwise, nf4, nf4_kernels, nf4_matmul, nf4_matmul_kernels, nf4_matvec_kernels
from minift_kernels.rlhf import advantages, dpo, ppo, reward_model

Launches = Iterator[tuple[str, Launch]]

TOKENS, WIDTH, INNER, VOCAB, RANK = 2048, 4096, 14336, 128256, 16
HEADS, KV_HEADS, HEAD_DIMS = 32, 8, (64, 128)
empty = partial(torch.empty, device="meta")
integers = partial(empty, dtype=torch.int64)


def of_nf4(dtype: torch.dtype) -> Launches:
    """The ladder; the last step with double-quantized scales too; and the way to the codes."""
    for step in range(1, nf4_kernels.LAST + 1):
        yield f"dequantize_{step}", nf4.meta_launch(WIDTH * WIDTH, dtype, step=step)
    yield f"dequantize_{step}, double-quantized", nf4.meta_launch(WIDTH * WIDTH, dtype, nested_block_size=256)
    n = WIDTH * WIDTH
    codes, absmax = empty(n // 2, dtype=torch.uint8), empty(n // 64)
    yield "quantize", nf4.quantize_launch(codes, absmax, empty(n, dtype=dtype), 64, "triton")


def of_nf4_matmul(dtype: torch.dtype) -> Launches:
    """Both ladders; the last steps for other numbers of rows and with double-quantized scales; the gradient."""
    made = partial(nf4_matmul.meta_launch, shape=(WIDTH, INNER), dtype=dtype)
    for step in range(1, nf4_matvec_kernels.LAST + 1):
        yield f"matvec_{step}, 1 row", made(nf4_matmul.matvec_launch, 1, step=step)
    for step in range(1, nf4_matmul_kernels.LAST + 1):
        yield f"matmul_{step}, {TOKENS} rows", made(nf4_matmul.matmul_launch, TOKENS, step=step)
    nested = partial(made, nested_block_size=256)
    yield "matvec, 1 row, double-quantized", nested(nf4_matmul.matvec_launch, 1)
    for rows in (2, 4):
        yield f"matvec, {rows} rows, double-quantized", nested(nf4_matmul.matvec_launch, rows)
    for rows in (16, 64, TOKENS):
        yield f"matmul, {rows} rows, double-quantized", nested(nf4_matmul.matmul_launch, rows)
        yield f"gradient, {rows} rows, double-quantized", nested(nf4_matmul.gradient_launch, rows)


def of_blockwise(dtype: torch.dtype) -> Launches:
    n, code = WIDTH * WIDTH, empty(256)
    codes, x = empty(n, dtype=torch.uint8), empty(n, dtype=dtype)
    for size in (256, 8192):
        yield f"quantize, blocks of {size}", blockwise.quantize_launch(codes, empty(n // size), x, code, size, "triton")
    yield "dequantize", blockwise.dequantize_launch(x, codes, empty(n // 256), code, 256, "triton")


def of_norms(dtype: torch.dtype) -> Launches:
    x, gain, of_row, parts = (
        empty(TOKENS, WIDTH, dtype=dtype),
        empty(WIDTH, dtype=dtype),
        empty(TOKENS),
        empty(256, WIDTH),
    )
    for name, shift in (("rms_norm", None), ("layer_norm", gain)):
        yield name, norms.forward_launch(x, of_row, of_row, x, gain, shift, 1e-5, "triton")
        gradients, centered = (x, parts, parts), shift is not None
        yield f"{name}, backward", norms.backward_launch(gradients, x, x, gain, of_row, of_row, centered, "triton")


def of_mlp(dtype: torch.dtype) -> Launches:
    x = empty(TOKENS, INNER, dtype=dtype)
    yield "swiglu", mlp.swiglu_launch(x, x, x, "triton")
    yield "swiglu, backward", mlp.swiglu_backward_launch((x, x), x, x, x, "triton")
    for name, tanh in (("gelu", False), ("gelu_tanh", True)):
        yield name, mlp.gelu_launch(x, x, tanh, "triton")
        yield f"{name}, backward", mlp.gelu_backward_launch(x, x, x, tanh, "triton")


def of_losses(dtype: torch.dtype) -> Launches:
    logits, of_row, labels = empty(TOKENS, VOCAB, dtype=dtype), empty(TOKENS), integers(TOKENS)
    given = of_row, labels, of_row, of_row
    for name, temperature in (("cross_entropy", None), ("token_log_probs", 0.7)):
        entropies, of_entropy = (of_row, (of_row, of_row)) if temperature else (of_row[:0], None)
        statistics = of_row, entropies, of_row, of_row
        yield name, losses.forward_launch(statistics, logits, labels, temperature, "triton")
        backward = losses.backward_launch(logits, logits, given, of_entropy, temperature, "triton")
        yield f"{name}, backward", backward


def of_attention(dtype: torch.dtype) -> Launches:
    for d in HEAD_DIMS:
        q, k = (empty(2, TOKENS, heads, d, dtype=dtype).transpose(1, 2) for heads in (HEADS, KV_HEADS))
        of_row, visible = empty(2, HEADS, TOKENS), empty(1, TOKENS, TOKENS, dtype=torch.bool)
        found = backend.load(attention.KERNELS, "triton").configuration(dtype.itemsize, d)
        sizes = [*found["forward"][:2], *found["backward_kv"][:2]]
        by_query, by_key = (
            empty(1, TOKENS // own, 2 + TOKENS // step, dtype=torch.int32) for own, step in (sizes[:2], sizes[2:])
        )
        arguments = q, k, k, visible, by_query, sizes, "triton"
        yield f"forward, heads of {d}", attention.forward_launch(q, of_row, *arguments)
        arguments = q, q, q, k, k, of_row, visible, by_query, sizes, "triton"
        yield f"backward_q, heads of {d}", attention.backward_q_launch(q, of_row, *arguments)
        arguments = q, q, k, k, of_row, of_row, visible, by_key, sizes, "triton"
        yield f"backward_kv, heads of {d}", attention.backward_kv_launch(k, k, *arguments)


def of_rope(dtype: torch.dtype) -> Launches:
    for d in HEAD_DIMS:
        x, angle = empty(2, TOKENS, HEADS, d, dtype=dtype).transpose(1, 2), empty(1, TOKENS, d // 2)
        yield f"turn, heads of {d}", rope.launch(x, x, angle, angle, 1.0, "triton")


def of_embedding(dtype: torch.dtype) -> Launches:
    table, dy = empty(VOCAB, WIDTH, dtype=dtype), empty(TOKENS, WIDTH, dtype=dtype)
    yield "backward", embedding.backward_launch(table, dy, integers(TOKENS), integers(VOCAB + 1), "triton")


def of_dropout(dtype: torch.dtype) -> Launches:
    x = empty(TOKENS, WIDTH, dtype=dtype)
    yield "dropout", dropout.dropout_launch(x, x, 0.1, 1 << 40, 0, "triton")


def of_lora(dtype: torch.dtype) -> Launches:
    x, h = empty(TOKENS, WIDTH, dtype=dtype), empty(TOKENS, RANK, dtype=dtype)
    A, B, parts = empty(RANK, WIDTH), empty(WIDTH, RANK), empty(8, RANK, WIDTH)
    for name, p in (("", 0.0), (", dropout", 0.1)):
        rest = 2.0, p, 1 << 40, "triton"
        yield f"down{name}", lora.down_launch(h[None], x, A, *rest)
        yield f"up{name}", lora.up_launch(x, x, h, A.T if p else B, *rest)  # forward; with dropout, only backward
        yield f"outer{name}", lora.outer_launch(parts, h, x, *rest)


def of_batched(dtype: torch.dtype) -> Launches:
    x, h, n = empty(256, WIDTH, dtype=dtype), empty(256, RANK, dtype=dtype), 64
    A, B, order, tiles = empty(n, RANK, WIDTH), empty(n, WIDTH, RANK), integers(256), integers(3, 80)
    yield "down", batched.down_launch(h[None], x, A, empty(n), order, tiles, "triton")
    yield "up", batched.up_launch(x, x, h, B, order, tiles, "triton")
    yield "outer", batched.outer_launch(A, h, x, order, integers(n + 1), "triton")


def of_adamw(dtype: torch.dtype) -> Launches:
    tensors, numbers = [empty(1 << 24, dtype=t) for t in (dtype, torch.float32, torch.float32, dtype)], [0.5] * 9
    yield "step_one", adamw.step_launch(*tensors, numbers, "triton")
    yield "step_all", adamw.update_launch(*([t, t[:999]] for t in tensors), numbers, "triton")
    yield "squares", adamw.squares_launch(empty(1025, dtype=torch.float64), tensors[3:], "triton")
    theta, *_, gradient = ([t] for t in tensors)
    codes, scales = [empty(1 << 24, dtype=torch.uint8)], [empty((1 << 24) // adamw8bit.BLOCK_SIZE)]
    moments = codes, codes, scales, scales
    launch = adamw8bit.update_launch(theta, *moments, gradient, [True], numbers, adamw8bit.BLOCK_SIZE, "triton")
    yield "step_blocks", launch


def of_rlhf(dtype: torch.dtype) -> Launches:
    x, mask, sums = empty(256, TOKENS, dtype=dtype), empty(256, TOKENS, dtype=torch.bool), empty(512)
    slope, pairs = empty(256, TOKENS), empty(TOKENS, dtype=dtype)
    yield "gae", advantages.gae_launch(x, x, x, mask, 1.0, 0.95, None, "triton")
    yield "ppo", ppo.minibatch_launch((sums, slope, slope), (x,) * 7, mask, (0.2, 0.2, 0.1, 0.0), "triton")
    of_pair = empty(TOKENS)
    yield "reward", reward_model.pairwise_launch((sums, of_pair, of_pair), pairs, pairs, None, 0.01, "triton")
    for name, ipo in (("dpo", False), ("ipo", True)):
        yield name, dpo.preference_launch((sums, of_pair), (pairs,) * 4, 0.1, 0.0, ipo, "triton")


FAMILIES: dict[str, Callable[[torch.dtype], Launches]] = {
    "nf4": of_nf4,
    "nf4_matmul": of_nf4_matmul,
    "blockwise": of_blockwise,
    "norms": of_norms,
    "mlp": of_mlp,
    "losses": of_losses,
    "attention": of_attention,
    "rope": of_rope,
    "embedding": of_embedding,
    "dropout": of_dropout,
    "lora": of_lora,
    "batched": of_batched,
    "adamw": of_adamw,
    "rlhf": of_rlhf,
}
HEADINGS = ("family", "kernel", "target", "registers", "spilled", "shared", "loads", "load_bits", "store_bits")


@dataclass
class Report:
    """Compile launches ahead of time and print a table."""

    target: tuple[Literal["sm_80", "sm_90", "gfx942"], ...] = ("sm_80", "sm_90", "gfx942")
    """The GPUs to compile for."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The type of the numbers."""
    only: tuple[str, ...] = ()
    """Families; all if not given."""
    json: Path | None = None
    """Where to write the rows too."""

    def run(self) -> None:
        if unknown := set(self.only) - FAMILIES.keys():
            raise SystemExit(f"--only {min(unknown)}: needed some of {', '.join(FAMILIES)}")
        table = Table(title=f"Launches in {self.dtype}")
        for heading in HEADINGS:
            table.add_column(heading.replace("_", " "), justify="left" if heading in HEADINGS[:3] else "right")
        rows = list(self.rows())
        for row in rows:
            bits = (", ".join(map(str, row[key])) for key in ("load_bits", "store_bits"))
            table.add_row(*(str(row[key]) for key in HEADINGS[:-2]), *bits)
        Console().print(table)
        if self.json:
            self.json.write_text(json.dumps({"dtype": self.dtype, "rows": rows}, indent=1) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        for target in self.target:
            with made_for(target):
                for family in self.only or FAMILIES:
                    for kernel, launch in FAMILIES[family](getattr(torch, self.dtype)):
                        yield {"family": family, "kernel": kernel, **properties(launch, target)}


def properties(launch: Launch, target: str) -> dict[str, Any]:
    found = aot.compile_launch(launch, target)
    return {
        "target": target,
        "registers": found.registers,
        "spilled": found.spilled,
        "shared": found.shared,
        "loads": len(found.widths("load")),
        "load_bits": sorted(set(found.widths("load"))),
        "store_bits": sorted(set(found.widths("store"))),
    }


@contextmanager
def made_for(target: str) -> Iterator[None]:
    """Launches have as many warps as on this target, whatever PyTorch was built for."""
    before, torch.version.hip = torch.version.hip, "6.4" if target == "gfx942" else None
    try:
        yield
    finally:
        torch.version.hip = before


if __name__ == "__main__":
    tyro.cli(Report).run()
