"""NF4 on a GPU, decoded by every step of the ladder and by bitsandbytes; `timing.py` says how, `run.py` runs it.

Decoded numbers have the same bits everywhere. Codes need not: bitsandbytes may round a number that lies on a threshold
to the other side. Bytes are codes, scales and numbers, once each, so that the floor is a copy of as many bytes.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timing import Machine, Row, compare, installed

from minift.quant.nf4 import CODE
from minift_kernels import backend as backends
from minift_kernels.quant import double_quant, nf4
from minift_kernels.quant.codebooks import on_device
from minift_kernels.quant.nf4 import NF4Tensor

SHAPES = ((1024, 4096), (4096, 4096), (4096, 14336), (8192, 28672))
DTYPES = (torch.bfloat16, torch.float16)
BLOCK_SIZE = 64


def rows(on: Machine, replays: int) -> list[Row]:
    """Decoding, with float32 scales and double-quantized; and quantizing."""
    found = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in SHAPES:
            x = on.random(*shape, dtype=dtype)
            plain = nf4.quantize(x, BLOCK_SIZE, backend="torch")
            for q, how in ((plain, ""), (double_quant.compress(plain), ", double-quantized")):
                moved = q.nbytes + x.nbytes
                inputs = [(copy(q), torch.empty_like(x)) for _ in on.sets(moved)]
                wanted = nf4.dequantize(q, dtype, backend="torch")
                about = f"dequantize to {name}, {shape[0]} x {shape[1]}{how}"
                found += compare(on, about, moved, 0, decoders(on, dtype, bool(how)), inputs, replays, wanted, 0)
            moved = plain.nbytes + x.nbytes
            inputs = [(copy(plain), x.clone()) for _ in on.sets(moved)]
            about = f"quantize {name}, {shape[0]} x {shape[1]}"
            wanted = plain.codes, plain.absmax
            found += compare(on, about, moved, 0, encoders(on), inputs, replays, wanted, 0)
    return found


def decoders(on: Machine, dtype: torch.dtype, nested: bool) -> dict[str, Callable]:
    """Functions of an NF4Tensor and of a tensor for the result; only the last step takes double-quantized scales."""
    kernels = backends.load(nf4.KERNELS, on.backend)
    last = kernels.LAST
    found = {"minift": partial(decode, on, step=last, tile=kernels.default_tile(last, dtype.itemsize))}
    for step in () if nested else range(1, last):
        found[f"minift, step {step}"] = partial(decode, on, step=step, tile=kernels.default_tile(step, dtype.itemsize))
    for tile in kernels.TILES[dtype.itemsize]:
        if tile != kernels.default_tile(last, dtype.itemsize):
            found[f"minift, tile {tile[0]}, {tile[1]} warps"] = partial(decode, on, step=last, tile=tile)
    return found | ({"bitsandbytes": bitsandbytes_decode} if installed("bitsandbytes") else {})


def decode(on: Machine, q: NF4Tensor, out: torch.Tensor, step: int, tile: tuple[int, int]) -> torch.Tensor:
    s = q.absmax
    scales: tuple = (s, None, None, None)
    nested = 0
    if not isinstance(s, torch.Tensor):
        scales, nested = (s.codes, s.absmax, s.code, s.offset), s.block_size
    nf4.dequantize_launch(out, q.codes, scales, q.block_size, nested, on.backend, step, tile).run(out.device)
    return out


def bitsandbytes_decode(q: NF4Tensor, out: torch.Tensor) -> torch.Tensor:
    """Into a tensor of its own, of the type of `out`."""
    from bitsandbytes import functional as bnb

    return bnb.dequantize_4bit(q.codes.view(-1, 1), bitsandbytes_state(q, out.dtype))


def bitsandbytes_state(q: NF4Tensor, dtype: torch.dtype) -> Any:
    """The same codes and statistics, as bitsandbytes takes them."""
    from bitsandbytes import functional as bnb

    s = q.absmax
    state = bnb.QuantState(
        absmax=s if isinstance(s, torch.Tensor) else s.codes,
        shape=torch.Size(q.shape),
        code=on_device(CODE, q.codes.device),
        blocksize=q.block_size,
        quant_type="nf4",
        dtype=dtype,
    )
    if not isinstance(s, torch.Tensor):
        state.nested, state.offset = True, s.offset
        state.state2 = bnb.QuantState(absmax=s.absmax, code=s.code, blocksize=s.block_size, dtype=torch.float32)
    return state


def encoders(on: Machine) -> dict[str, Callable]:
    """Functions of an NF4Tensor, whose memory is written to, and of the numbers: codes and scales."""

    def encode(q: NF4Tensor, x: torch.Tensor) -> tuple:
        nf4.quantize_launch(q.codes, q.absmax, x.view(-1), q.block_size, on.backend).run(x.device)
        return q.codes, q.absmax

    def bitsandbytes(q: NF4Tensor, x: torch.Tensor) -> tuple:
        from bitsandbytes import functional as bnb

        codes, state = bnb.quantize_4bit(x, blocksize=q.block_size, quant_type="nf4")
        return codes.view(-1), state.absmax

    return {"minift": encode} | ({"bitsandbytes": bitsandbytes} if installed("bitsandbytes") else {})


def copy(q: NF4Tensor) -> NF4Tensor:
    """The same tensor elsewhere in memory."""
    s = q.absmax
    if isinstance(s, torch.Tensor):
        return replace(q, codes=q.codes.clone(), absmax=s.clone())
    scales = replace(s, codes=s.codes.clone(), absmax=s.absmax.clone(), offset=s.offset.clone())
    return replace(q, codes=q.codes.clone(), absmax=scales)
