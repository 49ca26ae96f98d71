"""x Ŵᵀ for a matrix in NF4, decoded inside of the product: what `NF4Tensor.linear` runs on a GPU.

Three ways to multiply with the same weights, chosen by the number of rows (`plan`). All round a weight to the type of x
before the product, sum in float32 and round once, so that they differ by the order of their sums and nothing else.

    "matvec"   a few rows, as when text is generated: lanes multiply              `nf4_matvec_kernels`
    "matmul"   tensor cores, weights decoded on the way to them                   `nf4_matmul_kernels`
    "decode"   `nf4.dequantize` once, then the library's product                  `nf4`

The gradient dx = dy Ŵ goes the same way. Nothing of the size of the matrix is kept for it, and neither "matvec" nor
"matmul" ever has the decoded matrix in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from minift.quant.blockwise import block_count
from minift.quant.nf4 import CODE
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.quant.codebooks import on_device

MATMUL_KERNELS = "minift_kernels.quant.nf4_matmul_kernels"
MATVEC_KERNELS = "minift_kernels.quant.nf4_matvec_kernels"

MATVEC_ROWS = 2  # with more, tensor cores need fewer instructions: step 4 of nf4_matvec_kernels
MATMUL_ROWS = 1024

Parts = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None
]  # codes, then scales as `dequantize` has them
Tile = tuple[int, int, int, int, int]


def plan(rows: int, whole: bool) -> str:
    """How to multiply so many rows with a matrix, whose blocks do (`whole`) or do not each lie in one of its rows.

    Decoding first writes 2 bytes a weight and reads them again, beside 0.56: 4.6 bytes, 1.4 ps a weight on an H100
    (3.35 TB/s). A row costs 2 operations a weight, 2.5 fs at 800 TFLOP/s. If the fused kernel multiplies at two thirds
    of that rate, which is a guess, a row costs it 1.3 fs more: it wins up to about 1,100 rows. Then decoding is paid
    for, and there must be room for one decoded matrix while it is used. All of this is predicted, not measured."""
    if rows <= MATVEC_ROWS and whole:
        return "matvec"
    return "matmul" if rows <= MATMUL_ROWS else "decode"


def is_whole(d_in: int, block_size: int) -> bool:
    """Does each block of weights, and so each byte, lie in one row?"""
    return d_in % block_size == 0


def _multiply(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    nested_block_size: int,
    gradient: bool,
    backend: str,
) -> Tensor:
    """The operator `minift::nf4_matmul`: x Ŵᵀ, or with `gradient` x Ŵ; with nested_block_size 0 scales are float32."""
    q, matrix = (codes, absmax, nested_absmax, nested_code, offset), backends.rows(x)
    n_rows, (d_out, d_in), size = len(matrix), shape, x.element_size()
    columns, summed = (d_in, d_out) if gradient else (d_out, d_in)
    if not gradient and plan(n_rows, is_whole(d_in, block_size)) == "matvec":
        launch: Callable[..., Launch] = matvec_launch
        n_parts = backends.load(MATVEC_KERNELS, backend).parts(n_rows, columns, summed)
    else:
        launch = gradient_launch if gradient else matmul_launch
        n_parts = backends.load(MATMUL_KERNELS, backend).parts(n_rows, columns, summed, size)
    y = x.new_empty((n_parts, n_rows, columns), dtype=x.dtype if n_parts == 1 else torch.float32)
    launch(y, matrix, q, shape, block_size, nested_block_size, backend).run(x.device)
    y = y.view(*x.shape[:-1], columns) if n_parts == 1 else y.sum(dim=0).to(x.dtype).view(*x.shape[:-1], columns)
    return y


def _like(x, codes, absmax, a, b, c, shape, block_size, nested_block_size, gradient, backend):
    return x.new_empty((*x.shape[:-1], shape[1 if gradient else 0]))


def _save(ctx, inputs, output):
    _, *ctx.parts, ctx.shape, ctx.block_size, ctx.nested_block_size, ctx.gradient, ctx.backend = inputs


def _differentiate(ctx, dy):
    sizes = ctx.shape, ctx.block_size, ctx.nested_block_size
    return multiply(dy, *ctx.parts, *sizes, not ctx.gradient, ctx.backend), *[None] * 10


multiply = backends.operator(
    "nf4_matmul(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset,"
    " SymInt[] shape, int block_size, int nested_block_size, bool gradient, str backend) -> Tensor",
    _multiply,
    _like,
    _differentiate,
    _save,
)


def matmul_launch(
    y: Tensor,
    x: Tensor,
    q: Parts,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    backend: str,
    step: int | None = None,
    tile: Tile | None = None,
) -> Launch:
    """Equation (1) of `nf4_matmul_kernels`. x (rows, d_in) has rows whose elements are neighbors; y (parts, rows,
    d_out) is contiguous: one part is the result, several are float32 numbers to add up. `step` is a step of the ladder,
    `tile` as in its TILES. Steps 3 and 4 are for matrices that are whole."""
    kernels = backends.load(MATMUL_KERNELS, backend)
    step = step or kernels.LAST
    tile = tile or kernels.default_tile(len(x), x.element_size(), step)
    d_in = shape[1]
    options = {"ROWS": tile[0], "OUTS": tile[1], "INS": tile[2], "num_warps": tile[3], "num_stages": tile[4]}
    if step == 6:  # the kernel of step 7 in another order
        options["GROUPED"] = False
    kernel = getattr(kernels, f"matmul_{7 if step == 6 else step}")
    options |= {"WHOLE": is_whole(d_in, block_size), **kernels.OPTIONS}
    return _launch(kernel, tile[:3], d_in, y, x, q, shape, block_size, nested_block_size, options)


def gradient_launch(
    dx: Tensor,
    dy: Tensor,
    q: Parts,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    backend: str,
    tile: Tile | None = None,
) -> Launch:
    """Equation (2) of `nf4_matmul_kernels`: dy (rows, d_out) into dx (parts, rows, d_in), as `matmul_launch`."""
    kernels = backends.load(MATMUL_KERNELS, backend)
    tile = tile or kernels.default_tile(len(dy), dy.element_size())
    options = {"ROWS": tile[0], "INS": tile[1], "OUTS": tile[2], "num_warps": tile[3], "num_stages": tile[4]}
    options |= {"WHOLE": is_whole(shape[1], block_size), **kernels.OPTIONS}
    return _launch(kernels.gradient, tile[:3], shape[0], dx, dy, q, shape, block_size, nested_block_size, options)


def matvec_launch(
    y: Tensor,
    x: Tensor,
    q: Parts,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    backend: str,
    step: int | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> Launch:
    """Equation (1) of `nf4_matvec_kernels`, for a matrix that is whole; step 4 has up to MOST_ROWS rows of x."""
    kernels = backends.load(MATVEC_KERNELS, backend)
    step = step or kernels.LAST
    outs, ins, warps, stages = tile or kernels.default_tile(len(x) if step == kernels.LAST else 1)
    rows = len(x) if step == kernels.LAST else 1
    options = {"ROWS": rows, "OUTS": outs, "INS": ins, "STAGES": stages, "num_warps": warps, **kernels.OPTIONS}
    kernel = getattr(kernels, f"matvec_{step}")
    return _launch(kernel, (rows, outs, ins), shape[1], y, x, q, shape, block_size, nested_block_size, options)


def _launch(kernel, tile, summed, y, x, q, shape, block_size, nested_block_size, options) -> Launch:
    """`tile` = (rows, columns, summed) of a program at a turn, `summed` the length of the sums."""
    (n_parts, n_rows, columns), (d_out, d_in) = y.shape, shape
    grid = -(-n_rows // max(tile[0], 1)) * -(-columns // tile[1]), n_parts
    turns = -(-summed // tile[2])
    parts = (None if part is None else part.contiguous() for part in q)
    sizes = x.stride(0), n_rows, d_in, d_out, d_in // 2, d_in // block_size, -(-turns // n_parts)
    options = {"BLOCK_SIZE": block_size, "NESTED": nested_block_size, **options}
    return Launch(kernel, grid, (y, x, *parts, on_device(CODE, x.device), *sizes), options)


def meta_launch(
    make: Callable[..., Launch],
    rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int = 64,
    nested_block_size: int = 0,
    parts: int = 1,
    **settings,
) -> Launch:
    """The launch that `make` makes for so many rows, on tensors that have no memory: for `aot.compile_launch`."""
    empty = partial(torch.empty, device="meta")
    (d_out, d_in), blocks = shape, block_count(shape[0] * shape[1], block_size)
    q: tuple = (empty(d_out * d_in // 2, dtype=torch.uint8), empty(blocks), None, None, None)
    if nested_block_size:
        nested = empty(block_count(blocks, nested_block_size)), empty(256), empty(())
        q = (q[0], empty(blocks, dtype=torch.uint8), *nested)
    given, made = (d_out, d_in) if make is gradient_launch else (d_in, d_out)
    y = empty(parts, rows, made, dtype=dtype if parts == 1 else torch.float32)
    return make(y, empty(rows, given, dtype=dtype), q, shape, block_size, nested_block_size, "triton", **settings)
