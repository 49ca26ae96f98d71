"""The gradient of an embedding table on a GPU: a program for each row of the table, and no atomics.

    dW[v] = Σ_{n : t_n = v} dy_n                                                                                (1)

Positions come sorted by token, so that a row's terms are neighbors in `order`, from starts[v] to starts[v + 1]. A
program adds them up in registers, in order, and writes its row once: zeros, where the token does not occur. So the
sum is the same bits every time, dW need not be cleared before, and nobody asks the GPU how many tokens there are.

The bytes are those of dW and dy, each once. A token that fills the batch, such as padding, is one long loop; that is
the price of one order. Sums are in float32, rounded once.
"""

import triton
import triton.language as tl

TILES = {2: (2048, 4), 4: (1024, 4), 8: (1024, 4)}  # bytes of a number: the most columns a program, num_warps


@triton.jit
def scatter_add(dweight, dy, order, starts, dy_stride, d, BLOCK: tl.constexpr):
    """Equation (1) for a tile of one row's columns; dweight is contiguous."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(starts + token)
    for i in range(0, (tl.load(starts + token + 1) - first).to(tl.int32)):
        n = tl.load(order + first + i)  # 64 bits
        total += tl.load(dy + n * dy_stride + column, mask=inside, other=0).to(tl.float32)
    tl.store(dweight + token * d + column, total.to(dweight.dtype.element_ty), mask=inside)
