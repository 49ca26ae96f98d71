"""The kernel of the table's gradient, wrong in one way each: the properties must reject every one of them.

With WRONG = "nothing" it is right. Only what is wrong differs.
"""

import triton
import triton.language as tl

SCATTER_ADD = (
    "first term only",
    "last term forgotten",
    "a term of the next token",
    "order forgotten",  # the sorted place instead of the position in the batch
    "row by width",
    "first tile only",
    "rows without terms left out",
    "rounded in between",
    "accumulates",
)


@triton.jit
def scatter_add(dweight, dy, order, starts, dy_stride, d, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    if WRONG == "row by width":
        dy_stride = d
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(starts + token)
    terms = (tl.load(starts + token + 1) - first).to(tl.int32)
    if WRONG == "rows without terms left out":
        inside = inside & (terms > 0)
    if WRONG == "first term only":
        terms = tl.minimum(terms, 1)
    if WRONG == "last term forgotten":
        terms = tl.maximum(terms - 1, 0)
    if WRONG == "a term of the next token":
        terms = terms + 1
    for i in range(0, terms):
        n = tl.load(order + first + i)
        if WRONG == "order forgotten":
            n = first + i
        if WRONG == "first tile only":
            column = tl.arange(0, BLOCK)
        total += tl.load(dy + n * dy_stride + column, mask=inside, other=0).to(tl.float32)
        if WRONG == "rounded in between":
            total = total.to(tl.float16).to(tl.float32)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if WRONG == "accumulates":
        before = tl.load(dweight + token * d + column, mask=inside, other=0).to(tl.float32)
        total = tl.where(before == before, before + total, total)
    tl.store(dweight + token * d + column, total.to(dweight.dtype.element_ty), mask=inside)
