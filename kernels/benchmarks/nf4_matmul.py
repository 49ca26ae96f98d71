"""Products with an NF4 matrix on a GPU, by every step of both ladders, beside bitsandbytes and the library's product.

`minift` is what a layer calls: it chooses among its kernels by the number of rows. `cuBLAS` multiplies by the matrix as
it was decoded before, 16 bits a weight: it reads 3.6 times the bytes and decodes nothing. The floor is that of 4.5 bits
a weight. `timing.py` says how it is timed, `run.py` runs it.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from nf4 import bitsandbytes_decode, bitsandbytes_state, copy
from timing import Machine, Row, compare, forward, in_float32, installed

from minift_kernels import backend as backends
from minift_kernels.quant import nf4, nf4_matmul
from minift_kernels.quant.nf4 import NF4Tensor

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # (out, in): attention, and the two sides of an MLP
ROWS = (1, 4, 16, 512, 2048, 8192)
DTYPE = torch.bfloat16
BLOCK_SIZE = 64
WITHIN = 2**-7  # of the largest number: sums are rounded once to 16 bits; bitsandbytes rounds other weights


def rows(on: Machine, replays: int) -> list[Row]:
    """x Ŵᵀ for each number of rows, and the gradient dy Ŵ."""
    found = []
    for shape in SHAPES:
        d_out, d_in = shape
        q = nf4.quantize(on.random(d_out, d_in, dtype=DTYPE), BLOCK_SIZE, backend="torch")
        W = nf4.dequantize(q, DTYPE, backend="torch")
        for n in ROWS:
            moved = q.nbytes + DTYPE.itemsize * n * (d_in + d_out)
            operations = 2 * n * d_in * d_out
            inputs = [(on.random(n, d_in, dtype=DTYPE), copy(q), W.clone()) for _ in on.sets(moved)]
            about, wanted = f"{n} rows, {d_in} to {d_out}", in_float32(library, *inputs[0])
            functions = {what: forward(f) for what, f in contenders(on, n).items()}
            found += compare(on, about, moved, operations, functions, inputs, replays, wanted, WITHIN)
            inputs = [(on.random(n, d_out, dtype=DTYPE), q, W) for _, q, W in inputs]
            about, wanted = f"gradient of {about}", in_float32(library_gradient, *inputs[0])
            functions = {what: forward(f) for what, f in gradients(on).items()}
            found += compare(on, about, moved, operations, functions, inputs, replays, wanted, WITHIN)
    return found


def contenders(on: Machine, n: int) -> dict[str, Callable]:
    """Functions of x, the quantized matrix and the decoded one: x Ŵᵀ."""
    matvec, matmul = (
        backends.load(name, on.backend) for name in (nf4_matmul.MATVEC_KERNELS, nf4_matmul.MATMUL_KERNELS)
    )
    found: dict[str, Callable] = {"minift": lambda x, q, W: q.linear(x, backend=on.backend)}
    if n <= matvec.MOST_ROWS:
        for step in range(1, matvec.LAST + 1):
            found[f"minift, matvec step {step}"] = partial(launched, on, nf4_matmul.matvec_launch, step)
    for step in range(1, matmul.LAST + 1):
        found[f"minift, matmul step {step}"] = partial(launched, on, nf4_matmul.matmul_launch, step)
    found["cuBLAS"] = library
    if installed("bitsandbytes"):
        found |= {"bitsandbytes": bitsandbytes_matmul} | ({"bitsandbytes, gemv": bitsandbytes_gemv} if n == 1 else {})
    return found


def gradients(on: Machine) -> dict[str, Callable]:
    """Functions of dy, the quantized matrix and the decoded one: dy Ŵ."""
    found: dict[str, Callable] = {
        "minift": lambda dy, q, W: nf4_matmul.multiply(dy, *nf4._parts(q), True, on.backend),
        "cuBLAS": library_gradient,
    }
    if installed("bitsandbytes"):
        found["bitsandbytes"] = lambda dy, q, W: dy @ bitsandbytes_decode(q, dy)  # as its backward pass does
    return found


def launched(on: Machine, make: Callable, step: int, x: torch.Tensor, q: NF4Tensor, W: torch.Tensor) -> torch.Tensor:
    """By one step of a ladder, shared among as many programs as the last one is."""
    codes, absmax, *nested, shape, block_size, nested_block_size = nf4._parts(q)
    (d_out, d_in), n = shape, len(x)
    if make is nf4_matmul.matvec_launch:
        parts = backends.load(nf4_matmul.MATVEC_KERNELS, on.backend).parts(n, d_out, d_in)
    else:
        parts = backends.load(nf4_matmul.MATMUL_KERNELS, on.backend).parts(n, d_out, d_in, x.element_size())
    y = x.new_empty((parts, n, d_out), dtype=x.dtype if parts == 1 else torch.float32)
    make(y, x, (codes, absmax, *nested), shape, block_size, nested_block_size, on.backend, step).run(x.device)
    return y[0] if parts == 1 else y.sum(dim=0).to(x.dtype)


def library(x: torch.Tensor, q: NF4Tensor, W: torch.Tensor) -> torch.Tensor:
    return x @ W.T


def library_gradient(dy: torch.Tensor, q: NF4Tensor, W: torch.Tensor) -> torch.Tensor:
    return dy @ W


def bitsandbytes_matmul(x: torch.Tensor, q: NF4Tensor, W: torch.Tensor) -> torch.Tensor:
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, q.codes.view(-1, 1), bitsandbytes_state(q, x.dtype))


def bitsandbytes_gemv(x: torch.Tensor, q: NF4Tensor, W: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import functional as bnb

    return bnb.gemv_4bit(x, q.codes.view(-1, 1), state=bitsandbytes_state(q, x.dtype))
