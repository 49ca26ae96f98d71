"""Products with an NF4 matrix, decoded on the way: from the first kernel that comes to mind to the one for many rows.

    y  = x Ŵᵀ        ŵ_oi = fl_T(fl(c_q · a))        T the type of x, a the scale of the weight's block           (1)
    dx = dy Ŵ                                                                                                    (2)

Every kernel multiplies with these weights, those of `nf4.dequantize` to the last bit: rounded to T before the product,
so that a row of x gives the same alone, in a batch and with a decoded matrix, but for the order of its sum. Sums are
float32 and are rounded once. A product of two 16-bit numbers is exact in float32.

**What there is to gain.** A weight is read as 0.5625 bytes (blocks of 64) instead of 2, and no decoded matrix is ever
written. With R rows there are 2 R operations for each weight. An H100 does 989e12 of them a second and reads 3.35e12
bytes: until R is about 80 time is bytes, and a quarter of the bytes is a quarter of the time. Beyond, time is that of
the tensor cores, and all that decoding can do is hide behind them. A multiprocessor multiplies 8,192 weights with 128
rows in 512 clocks, in which it can start 2,048 instructions, each for 32 lanes: eight for each weight. So steps are
judged by the instructions that a weight costs. What a step gains is *predicted* from counts, which
tests/kernels/test_kernel_nf4_matmul.py repeats on what is compiled. `kernels/benchmarks/nf4_matmul.py` measures it.

**Two roundings.** `enable_fp_fusion=False` keeps the two roundings of a double-quantized scale (`nf4_kernels`, equation
2). Sums in tensor cores do not heed it.

Weights are numbered row by row through the matrix. With an even d_in the two weights of a byte lie in one row; with
d_in a multiple of the block size a block does too: WHOLE. Then a row has `row_bytes` and `row_blocks`, which are
arguments so that the compiler may know that 16 divides them. Other matrices go element by element, as in step 2: right,
and slow.

A program computes a tile of ROWS × OUTS results, from INS features at a time. It takes the `part`-th share of the sums,
`turns_a_part` tiles of INS, and writes to matrix `part` of y: there is one, or there are float32 partial sums that are
added up afterwards, in order. No atomics: the same bits every time.
"""

import triton
import triton.language as tl

LAST = 7  # the step that is launched unless another is asked for

OPTIONS = {"enable_fp_fusion": False}  # a double-quantized scale has two roundings

# (ROWS, COLUMNS, SUMMED, num_warps, num_stages) for up to so many rows of x, the last for all larger numbers. A program
# has ROWS × COLUMNS results, and adds up SUMMED products at a turn: COLUMNS are outputs and SUMMED are features, in the
# gradient it is the other way. float32 has no tensor cores here ("ieee"): its tiles are in registers, and small.
TILES = {
    2: ((16, (16, 64, 128, 4, 4)), (64, (64, 64, 64, 4, 3)), (1 << 62, (128, 128, 64, 8, 3))),
    4: ((16, (16, 32, 64, 4, 2)), (1 << 62, (32, 32, 32, 4, 2))),
}
PROGRAMS = 264  # two for each multiprocessor of an H100: fewer tiles than that are split into parts


def default_tile(rows, element_size, step=LAST):
    """Steps before the last have no loads on their way early; the first has a row a program."""
    *sizes, warps, stages = next(sizes for most, sizes in TILES[element_size] if rows <= most)
    if step == 1:
        return (1, 32, 64, 4, 1)
    return (*sizes, warps, stages if step == LAST else 1)


def parts(rows, columns, summed, element_size):
    """How many programs share a tile of results: until the machine is full, while each has four turns or more."""
    tile = default_tile(rows, element_size)
    tiles = -(-rows // tile[0]) * -(-columns // tile[1])
    return max(min(PROGRAMS // max(tiles, 1), -(-summed // tile[2]) // 4, 16), 1)


@triton.jit
def load_scales(q, block, inside, NESTED: tl.constexpr):
    """The scales of these blocks, decoded if NESTED, the nested block size, is not 0; zero outside."""
    if NESTED == 0:
        scale = tl.load(q[1] + block, mask=inside, other=0)
    else:
        code = tl.load(q[1] + block, mask=inside, other=0)
        nested = tl.load(q[2] + block // NESTED, mask=inside, other=0)
        decoded = tl.load(q[3] + code.to(tl.int32)) * nested + tl.load(q[4])  # not fused: OPTIONS
        scale = tl.where(inside, decoded, 0.0)
    return scale


@triton.jit
def load_x(x, x_stride, first_row, first, n_rows, n_features, ROWS: tl.constexpr, INS: tl.constexpr):
    """A tile (ROWS, INS) of x, zero outside."""
    row = first_row + tl.arange(0, ROWS)
    feature = first + tl.arange(0, INS)
    inside = (row < n_rows)[:, None] & (feature < n_features)[None, :]
    return tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)


@triton.jit
def store_tile(y, result, first_row, first, n_rows, n_features, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """result (ROWS, COLUMNS) into matrix `part` of y, rounded to its type."""
    row = first_row + tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_features)[None, :]
    row += tl.program_id(1).to(tl.int64) * n_rows
    tl.store(y + row[:, None] * n_features + column[None, :], result.to(y.dtype.element_ty), mask=inside)


# 1. A row of x and a tile of outputs a program: the formula, as it is written.
#
# Every row of x decodes the whole matrix again, and each product takes a lane a multiplication and an addition, of
# which a multiprocessor does 128 a clock; its tensor cores do 2,048. Good for any d_in, and to be compared with.


@triton.jit
def element_weights(
    q, first_out, first, d_in, d_out,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """ŵ of a tile (OUTS, INS), each element by itself; zero outside of the matrix."""
    out = first_out + tl.arange(0, OUTS)
    feature = first + tl.arange(0, INS)
    inside = (out < d_out)[:, None] & (feature < d_in)[None, :]
    weight = out[:, None] * d_in + feature[None, :]  # (OUTS, INS), 64 bits
    byte = tl.load(q[0] + weight // 2, mask=inside, other=0)
    code = tl.where(weight % 2 == 0, byte >> 4, byte & 15)
    return (tl.load(q[5] + code) * load_scales(q, weight // BLOCK_SIZE, inside, NESTED)).to(dtype)


@triton.jit
def first_places(d_out, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """The first row and output of this program, in 64 bits. Programs go through the outputs, then through the rows."""
    across = tl.cdiv(d_out, OUTS)
    return (tl.program_id(0) // across).to(tl.int64) * ROWS, (tl.program_id(0) % across).to(tl.int64) * OUTS


@triton.jit
def matmul_1(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    row, out = first_places(d_out, ROWS, OUTS)  # ROWS is 1
    total = tl.zeros((OUTS,), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        w = element_weights(q, out, i * INS, d_in, d_out, BLOCK_SIZE, NESTED, OUTS, INS, x.dtype.element_ty)
        values = load_x(x, x_stride, row, i * INS, n_rows, d_in, ROWS, INS)
        total += tl.sum(w.to(tl.float32) * values.to(tl.float32), axis=1)
    store_tile(y, total[None, :], row, out, n_rows, d_out, ROWS, OUTS)


# 2. Tensor cores: a tile of rows meets a tile of decoded weights.
#
# A weight is decoded once for ROWS rows, and multiplied by tensor cores. Predicted: with 128 rows, several times as
# fast as step 1, and yet slow: a weight's own number, its parity, byte, scale, look-up, product and rounding are 17.4
# instructions (counted in the loop for sm_90, as below), where the tensor cores leave time for eight.


@triton.jit
def matmul_2(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    row, out = first_places(d_out, ROWS, OUTS)
    total = tl.zeros((ROWS, OUTS), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        w = element_weights(q, out, i * INS, d_in, d_out, BLOCK_SIZE, NESTED, OUTS, INS, x.dtype.element_ty)
        values = load_x(x, x_stride, row, i * INS, n_rows, d_in, ROWS, INS)
        total = tl.dot(values, w.T, total, input_precision="ieee")
    store_tile(y, total, row, out, n_rows, d_out, ROWS, OUTS)


# 3. A byte once, a scale once a block.
#
# The tile is cut into pieces that lie in one row and one block: a row of the tile has PER of them, of WIDTH weights. A
# piece has one scale, and its bytes are neighbors: a lane loads 16 bytes, 32 weights, from one address. `join` brings
# the nibbles of a byte side by side again. For a weight a shift or mask, an address, a look-up, a product and half a
# rounding are left: counted, 9.4 instructions. Predicted: nearly twice step 2.


@triton.jit
def load_pieces(
    q, first_out, first, d_in, d_out, row_bytes, row_blocks,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """Bytes (pieces, WIDTH / 2) and scales (pieces, 1) of a tile of a WHOLE matrix; zero outside of it."""
    WIDTH: tl.constexpr = min(INS, BLOCK_SIZE)
    PER: tl.constexpr = INS // WIDTH
    piece = tl.arange(0, OUTS * PER)
    out = first_out + piece // PER
    feature = first + piece % PER * WIDTH
    inside = (out < d_out) & (feature < d_in)
    at = (out * row_bytes + feature // 2)[:, None] + tl.arange(0, WIDTH // 2)[None, :]
    scale = load_scales(q, out * row_blocks + feature // BLOCK_SIZE, inside, NESTED)
    return tl.load(q[0] + at, mask=inside[:, None], other=0), scale[:, None]


@triton.jit
def matmul_3(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    row, out = first_places(d_out, ROWS, OUTS)
    total = tl.zeros((ROWS, OUTS), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        byte, scale = load_pieces(q, out, i * INS, d_in, d_out, row_bytes, row_blocks, BLOCK_SIZE, NESTED, OUTS, INS)
        high = (tl.load(table + (byte >> 4)) * scale).to(x.dtype.element_ty)
        low = (tl.load(table + (byte & 15)) * scale).to(x.dtype.element_ty)
        w = tl.join(high, low).reshape(OUTS, INS)
        values = load_x(x, x_stride, row, i * INS, n_rows, d_in, ROWS, INS)
        total = tl.dot(values, w.T, total, input_precision="ieee")
    store_tile(y, total, row, out, n_rows, d_out, ROWS, OUTS)


# 4. Even and odd features apart.
#
# A sum has no order: high nibbles are the weights of even features, low ones those of odd features. So two products of
# half the length will do, if x is split instead of w joined. Predicted: nothing gained, a step aside (counted, 10.2).
# In w it saves nothing, as `join` is only which register holds what; but x, which was copied to shared memory for the
# tensor cores, now takes a detour to be split.


@triton.jit
def matmul_4(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    row, out = first_places(d_out, ROWS, OUTS)
    total = tl.zeros((ROWS, OUTS), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        byte, scale = load_pieces(q, out, i * INS, d_in, d_out, row_bytes, row_blocks, BLOCK_SIZE, NESTED, OUTS, INS)
        high = (tl.load(table + (byte >> 4)) * scale).to(x.dtype.element_ty).reshape(OUTS, INS // 2)
        low = (tl.load(table + (byte & 15)) * scale).to(x.dtype.element_ty).reshape(OUTS, INS // 2)
        values = load_x(x, x_stride, row, i * INS, n_rows, d_in, ROWS, INS)
        even, odd = tl.split(values.reshape(ROWS, INS // 2, 2))
        total = tl.dot(even, high.T, total, input_precision="ieee")
        total = tl.dot(odd, low.T, total, input_precision="ieee")
    store_tile(y, total, row, out, n_rows, d_out, ROWS, OUTS)


# 5. Sixteen weights a block.
#
# A block has one scale, and so no more than sixteen different weights: let them be scaled and rounded once and then be
# chosen from. The sixteen lie in lanes of the warp that holds the piece; `gather` fetches one with a shuffle: no
# look-up in memory, no address for it, 16 products and roundings a block instead of 64. Predicted: nothing by itself
# (counted, 10.5), as codes take a detour through shared memory to the lanes that hold the sixteen. It pays in step 7,
# which brings them through shared memory anyway. Step 3 could not go there: in a loop with loads on their way early,
# Triton turns each look-up into an asynchronous copy of 4 bytes.


@triton.jit
def weights(
    q, first_out, first, d_in, d_out, row_bytes, row_blocks,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    OUTS: tl.constexpr, INS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """ŵ of a tile (OUTS, INS); zero outside of the matrix."""
    if WHOLE:
        byte, scale = load_pieces(
            q, first_out, first, d_in, d_out, row_bytes, row_blocks, BLOCK_SIZE, NESTED, OUTS, INS
        )
        sixteen = (tl.load(q[5] + tl.arange(0, 16))[None, :] * scale).to(dtype)  # (pieces, 16)
        code = byte.to(tl.int32)
        w = tl.join(tl.gather(sixteen, code >> 4, 1), tl.gather(sixteen, code & 15, 1)).reshape(OUTS, INS)
    else:
        w = element_weights(q, first_out, first, d_in, d_out, BLOCK_SIZE, NESTED, OUTS, INS, dtype)
    return w


@triton.jit
def matmul_5(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    row, out = first_places(d_out, ROWS, OUTS)
    total = tl.zeros((ROWS, OUTS), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        w = weights(
            q, out, i * INS, d_in, d_out, row_bytes, row_blocks,
            BLOCK_SIZE, NESTED, WHOLE, OUTS, INS, x.dtype.element_ty,
        )  # fmt: skip
        values = load_x(x, x_stride, row, i * INS, n_rows, d_in, ROWS, INS)
        total = tl.dot(values, w.T, total, input_precision="ieee")
    store_tile(y, total, row, out, n_rows, d_out, ROWS, OUTS)


# 6. The weights on the left: yᵀ = Ŵ xᵀ.
#
# An H100's tensor cores take their left operand from registers or from shared memory, their right one from shared
# memory only. Weights come out of registers; x can be copied to shared memory as it is. Predicted: weights need not be
# visible to other warps before they are multiplied, which saves a barrier of the whole program; and a tile for few rows
# may be 16 wide on the right, where the left side needs 64. Counted: 10.0, and 6.9 in step 7's tile for 16 rows.
#
# 7. Neighbors in time are neighbors in memory, and loads are on their way early.
#
# The 132 programs that run at once share tiles of x and of codes in the L2 cache. In the order of step 6 they have one
# tile of rows in common: with 14336 outputs, 1 tile of x (128 × 2 bytes a feature) and 112 of codes (128 × 0.56), 65
# units. With GROUP tiles of rows side by side they need 8 of x and 17 of codes: 26. And with num_stages above 1 the
# loop asks for its bytes and its x one or two turns ahead, by asynchronous copies to shared memory. Predicted: the
# second gains most of all steps, as until now every turn waits for memory; the first gains once x is large. Counted:
# 8.1 instructions (10.4 with double-quantized scales), in the 512 clocks that have room for eight: half the rate of a
# plain product at worst, if nothing of it is hidden. Tiles of 256 × 128 halve that share, on an H100 only: an A100 has
# too few registers for them, an MI300 too little shared memory.

GROUP = tl.constexpr(8)


@triton.jit
def matmul_7(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, GROUPED: tl.constexpr = True,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    if GROUPED:
        row, out = grouped_places(n_rows, d_out, ROWS, OUTS)
    else:
        row, out = first_places(d_out, ROWS, OUTS)
    total = tl.zeros((OUTS, ROWS), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        w = weights(
            q, out, i * INS, d_in, d_out, row_bytes, row_blocks,
            BLOCK_SIZE, NESTED, WHOLE, OUTS, INS, x.dtype.element_ty,
        )  # fmt: skip
        values = load_x(x, x_stride, row, i * INS, n_rows, d_in, ROWS, INS)
        total = tl.dot(w, values.T, total, input_precision="ieee")
    store_tile(y, total.T, row, out, n_rows, d_out, ROWS, OUTS)


@triton.jit
def grouped_places(n_rows, d_out, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """As `first_places`, but GROUP tiles of rows are gone through before the next tile of outputs."""
    down, across = tl.cdiv(n_rows, ROWS), tl.cdiv(d_out, OUTS)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)  # the last group may be lower
    within = tl.program_id(0) % (GROUP * across)
    row = (group * GROUP + within % height).to(tl.int64) * ROWS
    return row, (within // height).to(tl.int64) * OUTS


# The gradient: equation (2).
#
# dx has a column a feature, so the sum runs over outputs: down the columns of Ŵ, which stays as it is in memory. A tile
# of weights is decoded as in step 5, and is now the right operand, not transposed; the sixteen weights of a piece serve
# a row of the tile as before. Nothing is saved for it in the forward pass but x's shape: the codes are decoded again.


@triton.jit
def gradient(
    dx, dy, codes, absmax, nested_absmax, nested_code, offset, table,
    dy_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    row, feature = grouped_places(n_rows, d_in, ROWS, INS)
    total = tl.zeros((ROWS, INS), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_out, OUTS))):
        out = tl.full((), i, tl.int64) * OUTS
        w = weights(
            q, out, feature, d_in, d_out, row_bytes, row_blocks,
            BLOCK_SIZE, NESTED, WHOLE, OUTS, INS, dy.dtype.element_ty,
        )  # fmt: skip
        cotangent = load_x(dy, dy_stride, row, out, n_rows, d_out, ROWS, OUTS)
        total = tl.dot(cotangent, w, total, input_precision="ieee")
    store_tile(dx, total, row, feature, n_rows, d_in, ROWS, INS)
