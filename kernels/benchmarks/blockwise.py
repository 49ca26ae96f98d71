"""Block-wise quantization on a GPU, both ways, beside bitsandbytes; `timing.py` says how, `run.py` runs it.

Bytes are those that must move: numbers, codes and scales, once each. Decoded numbers have the same bits everywhere.
Codes need not: where a number lies exactly between two entries, bitsandbytes' kernel takes now the one, now the other.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Machine, Row, compare, installed

from minift_kernels.quant import blockwise, codebooks

SHAPES = ((1024, 4096), (4096, 4096), (4096, 14336))
DTYPES = (torch.bfloat16, torch.float32)
BLOCK_SIZE = 256  # one that bitsandbytes has too


def rows(on: Machine, replays: int) -> list[Row]:
    """The dynamic map, from numbers to codes and back."""
    found = []
    code = codebooks.on_device(codebooks.DYNAMIC, on.device)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in SHAPES:
            x = on.random(*shape, dtype=dtype)
            q = blockwise.quantize(x, code, BLOCK_SIZE, backend="torch")
            moved = q.nbytes + x.nbytes
            inputs = [(x.clone(), q.codes.clone(), q.absmax.clone()) for _ in on.sets(moved)]
            sizes = f"{name}, {shape[0]} x {shape[1]}"
            wanted = q.codes, q.absmax
            found += compare(on, f"quantize {sizes}", moved, 0, encoders(on, code), inputs, replays, wanted, 0)
            for _, codes, absmax in inputs:
                codes.copy_(q.codes)
                absmax.copy_(q.absmax)
            decoded = blockwise.dequantize(q, dtype, backend="torch")
            found += compare(on, f"dequantize {sizes}", moved, 0, decoders(on, code), inputs, replays, decoded, 0)
    return found


def encoders(on: Machine, code: torch.Tensor) -> dict[str, Callable]:
    """Functions of numbers, codes and scales: from the first, ours into the others."""

    def encode(x, codes, absmax):
        blockwise.quantize_launch(codes, absmax, x.view(-1), code, BLOCK_SIZE, on.backend).run(x.device)
        return codes, absmax

    def bitsandbytes(x, codes, absmax):
        from bitsandbytes import functional as bnb

        codes, state = bnb.quantize_blockwise(x, code=code, blocksize=BLOCK_SIZE)
        return codes.view(-1), state.absmax

    return {"minift": encode} | ({"bitsandbytes": bitsandbytes} if installed("bitsandbytes") else {})


def decoders(on: Machine, code: torch.Tensor) -> dict[str, Callable]:
    """Functions of the same: ours writes the first, from the others."""

    def decode(x, codes, absmax):
        blockwise.dequantize_launch(x, codes, absmax, code, BLOCK_SIZE, on.backend).run(x.device)
        return x

    def bitsandbytes(x, codes, absmax):
        from bitsandbytes import functional as bnb

        state = bnb.QuantState(absmax=absmax, code=code, blocksize=BLOCK_SIZE, dtype=x.dtype)
        return bnb.dequantize_blockwise(codes.view(x.shape), state)

    return {"minift": decode} | ({"bitsandbytes": bitsandbytes} if installed("bitsandbytes") else {})
