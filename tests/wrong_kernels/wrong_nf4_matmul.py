"""Products with an NF4 matrix, each wrong in one way: the properties must reject every one of them.

Three kernels with the arguments of the right ones, element by element. With WRONG = "nothing" they are right.
"""

import triton
import triton.language as tl

WEIGHTS = (
    "nibbles swapped",  # the low one first
    "next block",  # a scale too late
    "half scale",  # the scale rounded to float16 before the product, as other libraries have it in their fast kernels
    "not rounded",  # ŵ in float32, where `dequantize` rounds it to the type of x
    "scale afterwards",  # the code rounded and the scale multiplied in float32
    "fused",  # c a₂ + ā rounded once
    "offset forgotten",
)
SUMS = (
    "float16 sums",
    "last turn forgotten",
    "parts overlap",  # a part begins a turn early
    "stride by width",  # rows of x are taken to lie side by side
    "beyond the features",  # the last turn loads past the row
    "beyond the outputs",  # stores a whole tile
    "rows touch",  # a NaN in one row is in all
)
ROWS_OF_THE_MATRIX = ("scale of the row",)  # blocks are taken to begin with each row
MATMUL = (*WEIGHTS, *SUMS, *ROWS_OF_THE_MATRIX)
MATVEC = (*WEIGHTS, *SUMS)
GRADIENT = (*WEIGHTS, *SUMS, "not transposed back", *ROWS_OF_THE_MATRIX)


@triton.jit
def weights(
    q, out, feature, d_in, d_out, dtype: tl.constexpr, BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr,
    WRONG: tl.constexpr,
):  # fmt: skip
    inside = (out < d_out)[:, None] & (feature < d_in)[None, :]
    weight = out[:, None] * d_in + feature[None, :]
    byte = tl.load(q[0] + weight // 2, mask=inside, other=0)
    code = tl.where(weight % 2 == (1 if WRONG == "nibbles swapped" else 0), byte >> 4, byte & 15)
    block = weight // BLOCK_SIZE
    if WRONG == "scale of the row":
        block = out[:, None] * (d_in // BLOCK_SIZE) + feature[None, :] // BLOCK_SIZE
    if WRONG == "next block":
        block = tl.minimum(block + 1, (d_out * d_in - 1) // BLOCK_SIZE)
    scale = tl.load(q[1] + block, mask=inside, other=0)
    if NESTED != 0:
        nested = tl.load(q[2] + block // NESTED, mask=inside, other=0)
        entry, mean = tl.load(q[3] + scale.to(tl.int32)), tl.load(q[4])
        scale = entry * nested + mean
        if WRONG == "fused":
            scale = (entry.to(tl.float64) * nested.to(tl.float64) + mean.to(tl.float64)).to(tl.float32)
        if WRONG == "offset forgotten":
            scale = entry * nested
        scale = tl.where(inside, scale, 0.0)
    if WRONG == "half scale":
        scale = scale.to(tl.float16).to(tl.float32)
    w = tl.load(q[5] + code) * scale
    if WRONG == "scale afterwards":
        w = tl.load(q[5] + code).to(tl.float16).to(tl.float32) * scale
    elif WRONG != "not rounded":
        w = w.to(dtype).to(tl.float32)
    return w


@triton.jit
def add(total, values, w, WRONG: tl.constexpr):
    """total (ROWS, COLUMNS) + values (ROWS, SUMMED) · w (SUMMED, COLUMNS)."""
    total = total + tl.dot(values, w, input_precision="ieee")
    if WRONG == "float16 sums":
        total = total.to(tl.float16).to(tl.float32)
    if WRONG == "rows touch":
        total += tl.sum(tl.sum(values * 0, axis=1), axis=0)
    return total


@triton.jit
def turns(n, SUMMED: tl.constexpr, turns_a_part, WRONG: tl.constexpr):
    """The first turn of this part, and the one behind its last."""
    start = tl.program_id(1) * turns_a_part
    end = tl.minimum(start + turns_a_part, tl.cdiv(n, SUMMED))
    if WRONG == "last turn forgotten":
        end = tl.minimum(end, tl.maximum(tl.cdiv(n, SUMMED) - 1, 0))
    if WRONG == "parts overlap":
        start = tl.maximum(start - 1, 0)
    return start, end


@triton.jit
def load_values(x, x_stride, row, n_rows, feature, n_features, WRONG: tl.constexpr):
    if WRONG == "stride by width":
        x_stride = n_features
    inside = feature[None, :] < n_features
    if WRONG == "beyond the features":
        inside = feature[None, :] < n_features + 3
    inside = (row < n_rows)[:, None] & inside
    return tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def store(y, total, row, n_rows, column, n_columns, WRONG: tl.constexpr):
    inside = column[None, :] < n_columns
    if WRONG == "beyond the outputs":
        inside = column[None, :] < n_columns + 3
    at = (tl.program_id(1).to(tl.int64) * n_rows + row)[:, None] * n_columns + column[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(row < n_rows)[:, None] & inside)


@triton.jit
def matmul(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    dtype: tl.constexpr = x.dtype.element_ty
    first_row, first_out = tl.program_id(0) // tl.cdiv(d_out, OUTS), tl.program_id(0) % tl.cdiv(d_out, OUTS)
    if WRONG != "32 bits":
        first_row, first_out = first_row.to(tl.int64), first_out.to(tl.int64)
    row, out = first_row * ROWS + tl.arange(0, ROWS), first_out * OUTS + tl.arange(0, OUTS)
    total = tl.zeros((ROWS, OUTS), tl.float32)
    start, end = turns(d_in, INS, turns_a_part, WRONG)
    for i in range(start, end):
        feature = i * INS + tl.arange(0, INS)
        values = load_values(x, x_stride, row, n_rows, feature, d_in, WRONG)
        w = weights(q, out, feature, d_in, d_out, dtype, BLOCK_SIZE, NESTED, WRONG)
        total = add(total, values, w.T, WRONG)
    store(y, total, row, n_rows, out, d_out, WRONG)


@triton.jit
def matvec(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    STAGES: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    matmul(
        y, x, codes, absmax, nested_absmax, nested_code, offset, table,
        x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
        BLOCK_SIZE, NESTED, True, ROWS, OUTS, INS, WRONG,
    )  # fmt: skip


@triton.jit
def gradient(
    dx, dy, codes, absmax, nested_absmax, nested_code, offset, table,
    dy_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    dtype: tl.constexpr = dy.dtype.element_ty
    row = (tl.program_id(0) // tl.cdiv(d_in, INS)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = (tl.program_id(0) % tl.cdiv(d_in, INS)).to(tl.int64) * INS + tl.arange(0, INS)
    total = tl.zeros((ROWS, INS), tl.float32)
    start, end = turns(d_out, OUTS, turns_a_part, WRONG)
    for i in range(start, end):
        out = i * OUTS + tl.arange(0, OUTS)
        cotangent = load_values(dy, dy_stride, row, n_rows, out, d_out, WRONG)
        if WRONG == "not transposed back":  # the matrix read as (in, out)
            w = weights(q, feature, out, d_out, d_in, dtype, BLOCK_SIZE, NESTED, WRONG).T
        else:
            w = weights(q, out, feature, d_in, d_out, dtype, BLOCK_SIZE, NESTED, WRONG)
        total = add(total, cotangent, w, WRONG)
    store(dx, total, row, n_rows, feature, d_in, WRONG)
