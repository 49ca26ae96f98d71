"""The product of an NF4 matrix with a row or a few, as when text is generated token by token: four kernels.

    y = x Ŵᵀ        ŵ_oi = fl_T(fl(c_q · a))        equation (1) of `nf4_matmul_kernels`, the same weights           (1)

With one row each weight is used once: 0.5625 bytes and one multiply-add. For 4096 × 14336 weights that is 33 MB, 10 µs
on an H100 (3.35 TB/s). In these 10 µs its 132 multiprocessors start 132 × 4 × 1.7e9 × 10e-6 = 9.0e6 instructions of 32
lanes: 4.9 for each weight. A kernel that needs more waits for its instructions and not for memory, and that is the
difference between NF4 and formats that are a shift and a product away from their number. So steps are judged by
instructions a weight, counted on sm_90 by tests/kernels/test_kernel_nf4_matmul.py; what they gain is predicted, and
`kernels/benchmarks/nf4_matmul.py` measures it.

The other condition: memory answers after some 600 ns, so that 3.35 TB/s × 600 ns = 2 MB must be on their way at any
time, 15 KB for each multiprocessor. A matrix with few outputs is therefore shared among parts, as in
`nf4_matmul_kernels`: each writes a float32 sum, and these are added up in order.

Matrices are WHOLE, as explained there; others are left to the kernels there. A program has OUTS outputs and takes INS
features at a turn, cut into pieces of one row and one block. Sums are float32, by `tl.fma`: `enable_fp_fusion=False`,
which keeps the two roundings of a double-quantized scale, would make two instructions of a product and a sum.
"""

import triton
import triton.language as tl

LAST = 4  # the step that is launched unless another is asked for
MOST_ROWS = 4  # of step 4, one of the others

OPTIONS = {"enable_fp_fusion": False}  # a double-quantized scale has two roundings

# (OUTS, INS, num_warps, num_stages) for up to so many rows. One row: a lane has four words of 16 bytes at a turn, and
# two turns on their way. Several rows have a sum for each byte of a turn and row, so a turn is smaller.
TILES = {1: (32, 256, 4, 3), 2: (32, 256, 4, 3), 4: (16, 256, 4, 3)}
PROGRAMS = 1056  # eight for each multiprocessor of an H100


def default_tile(rows):
    return next(tile for most, tile in TILES.items() if rows <= most)


def parts(rows, d_out, d_in):
    """How many programs share a tile of outputs: until the machine is full, while each has four turns or more."""
    outs, ins, *_ = default_tile(rows)
    return max(min(PROGRAMS // -(-d_out // outs), -(-d_in // ins) // 4, 16), 1)


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
def load_pieces(
    q, first_out, first, d_in, d_out, row_bytes, row_blocks,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """Bytes (pieces, WIDTH / 2) and scales (pieces, 1); zero outside of the matrix."""
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
def store_outputs(y, sums, row, first_out, n_rows, d_out, OUTS: tl.constexpr):
    """sums (OUTS,) into row `row` of matrix `part` of y, rounded to its type."""
    out = first_out + tl.arange(0, OUTS)
    at = (tl.program_id(1).to(tl.int64) * n_rows + row) * d_out + out
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=out < d_out)


@triton.jit
def load_x(x, first, d_in, PER: tl.constexpr, HALF: tl.constexpr):
    """What even and odd weights are multiplied with: twice (1, PER, HALF), in float32. `x` points to a row."""
    feature = first + tl.arange(0, PER * HALF * 2)
    values = tl.load(x + feature, mask=feature < d_in, other=0)
    even, odd = tl.split(values.reshape(1, PER, HALF, 2))
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def first_places(d_out, OUTS: tl.constexpr):
    """The row and the first output of this program, in 64 bits."""
    across = tl.cdiv(d_out, OUTS)
    return (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across).to(tl.int64) * OUTS


# 1. A tile of outputs and a row a program, summed up at every turn.
#
# A lane loads 16 bytes of codes and looks their 32 weights up, in memory. For a weight: a shift or mask, an address, a
# look-up, a product, half a rounding, the way back to float32, and product and sum. And at every turn the lanes of an
# output are added up, by shuffles. Counted: 19.0 instructions a weight. Predicted: a quarter of the rate of memory.


@triton.jit
def matvec_1(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    HALF: tl.constexpr = min(INS, BLOCK_SIZE) // 2
    PER: tl.constexpr = INS // 2 // HALF
    row, out = first_places(d_out, OUTS)
    sums = tl.zeros((OUTS,), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        byte, scale = load_pieces(q, out, i * INS, d_in, d_out, row_bytes, row_blocks, BLOCK_SIZE, NESTED, OUTS, INS)
        high, low = look_up(table, byte, scale, OUTS, PER, HALF, x.dtype.element_ty)
        even, odd = load_x(x + row * x_stride, i * INS, d_in, PER, HALF)
        sums += tl.sum((high * even + low * odd).reshape(OUTS, INS // 2), axis=1)
    store_outputs(y, sums, row, out, n_rows, d_out, OUTS)


@triton.jit
def look_up(table, byte, scale, OUTS: tl.constexpr, PER: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr):
    """Even and odd weights, rounded to dtype, in float32: twice (OUTS, PER, HALF)."""
    high = (tl.load(table + (byte >> 4)) * scale).to(dtype).to(tl.float32)
    low = (tl.load(table + (byte & 15)) * scale).to(dtype).to(tl.float32)
    return high.reshape(OUTS, PER, HALF), low.reshape(OUTS, PER, HALF)


# 2. Sums stay in their lanes until the end.
#
# Every lane keeps a sum for each of the bytes that it has in a turn; lanes are added up once. The shuffles of the sums
# are gone, and product and sum are one instruction. Counted: 10.5. Predicted: nearly twice step 1.


@triton.jit
def matvec_2(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    HALF: tl.constexpr = min(INS, BLOCK_SIZE) // 2
    PER: tl.constexpr = INS // 2 // HALF
    row, out = first_places(d_out, OUTS)
    total = tl.zeros((OUTS, PER, HALF), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        byte, scale = load_pieces(q, out, i * INS, d_in, d_out, row_bytes, row_blocks, BLOCK_SIZE, NESTED, OUTS, INS)
        w = look_up(table, byte, scale, OUTS, PER, HALF, x.dtype.element_ty)
        total = add_products(total, w, x + row * x_stride, i * INS, d_in, PER, HALF)
    store_outputs(y, tl.sum(total.reshape(OUTS, INS // 2), axis=1), row, out, n_rows, d_out, OUTS)


@triton.jit
def add_products(total, w, x, first, d_in, PER: tl.constexpr, HALF: tl.constexpr):
    """total + even weights · even features + odd weights · odd features, for the row that x points to."""
    even, odd = load_x(x, first, d_in, PER, HALF)
    total = tl.fma(w[0], tl.broadcast_to(even, total.shape), total)
    return tl.fma(w[1], tl.broadcast_to(odd, total.shape), total)


# 3. Sixteen weights a block, by shuffles.
#
# As step 5 of `nf4_matmul_kernels`: no look-up in memory, a quarter of the products. Predicted: little as yet (10.2):
# the codes lie in the lanes that loaded them, a shuffle wants them in those that hold the sixteen, and they take a
# detour through shared memory, with barriers.


@triton.jit
def matvec_3(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    HALF: tl.constexpr = min(INS, BLOCK_SIZE) // 2
    PER: tl.constexpr = INS // 2 // HALF
    row, out = first_places(d_out, OUTS)
    entries = tl.load(table + tl.arange(0, 16))[None, :]
    total = tl.zeros((OUTS, PER, HALF), tl.float32)
    start = tl.program_id(1) * turns_a_part
    for i in range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS))):
        byte, scale = load_pieces(q, out, i * INS, d_in, d_out, row_bytes, row_blocks, BLOCK_SIZE, NESTED, OUTS, INS)
        w = choose((entries * scale).to(x.dtype.element_ty), byte.to(tl.int32), OUTS, PER, HALF)
        total = add_products(total, w, x + row * x_stride, i * INS, d_in, PER, HALF)
    store_outputs(y, tl.sum(total.reshape(OUTS, INS // 2), axis=1), row, out, n_rows, d_out, OUTS)


@triton.jit
def choose(sixteen, code, OUTS: tl.constexpr, PER: tl.constexpr, HALF: tl.constexpr):
    """The weights with these pairs of codes, even ones and odd ones, in float32: twice (OUTS, PER, HALF)."""
    even, odd = tl.gather(sixteen, code >> 4, 1).to(tl.float32), tl.gather(sixteen, code & 15, 1).to(tl.float32)
    return even.reshape(OUTS, PER, HALF), odd.reshape(OUTS, PER, HALF)


# 4. Loads on their way early; and up to four rows at once.
#
# `tl.range` with num_stages asks for codes, scales and x turns ahead, by asynchronous copies to shared memory. Whoever
# needs a byte then reads it from there, which is the detour of step 3 for nothing. Counted: 7.8 instructions a weight
# instead of 10.4. With several rows a weight is decoded once for all. Counted: 1.3 more for a second row, where another
# pass would cost 7.8; but the tensor cores take 16 rows for 6.9 (`nf4_matmul_kernels`), so that few rows are enough to
# prefer them: `nf4_matmul.plan`.


@triton.jit
def matvec_4(
    y, x, codes, absmax, nested_absmax, nested_code, offset, table,
    x_stride, n_rows, d_in, d_out, row_bytes, row_blocks, turns_a_part,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    q = codes, absmax, nested_absmax, nested_code, offset, table
    HALF: tl.constexpr = min(INS, BLOCK_SIZE) // 2
    PER: tl.constexpr = INS // 2 // HALF
    out = tl.program_id(0).to(tl.int64) * OUTS
    entries = tl.load(table + tl.arange(0, 16))[None, :]
    total_0 = tl.zeros((OUTS, PER, HALF), tl.float32)
    total_1, total_2, total_3 = total_0, total_0, total_0
    stride = tl.full((), x_stride, tl.int64)
    start = tl.program_id(1) * turns_a_part
    for i in tl.range(start, tl.minimum(start + turns_a_part, tl.cdiv(d_in, INS)), num_stages=STAGES):
        byte, scale = load_pieces(q, out, i * INS, d_in, d_out, row_bytes, row_blocks, BLOCK_SIZE, NESTED, OUTS, INS)
        w = choose((entries * scale).to(x.dtype.element_ty), byte.to(tl.int32), OUTS, PER, HALF)
        total_0 = add_products(total_0, w, x, i * INS, d_in, PER, HALF)
        if ROWS > 1:
            total_1 = add_products(total_1, w, x + stride, i * INS, d_in, PER, HALF)
        if ROWS > 2:
            total_2 = add_products(total_2, w, x + 2 * stride, i * INS, d_in, PER, HALF)
        if ROWS > 3:
            total_3 = add_products(total_3, w, x + 3 * stride, i * INS, d_in, PER, HALF)
    store_outputs(y, tl.sum(total_0.reshape(OUTS, INS // 2), axis=1), 0, out, n_rows, d_out, OUTS)
    if ROWS > 1:
        store_outputs(y, tl.sum(total_1.reshape(OUTS, INS // 2), axis=1), 1, out, n_rows, d_out, OUTS)
    if ROWS > 2:
        store_outputs(y, tl.sum(total_2.reshape(OUTS, INS // 2), axis=1), 2, out, n_rows, d_out, OUTS)
    if ROWS > 3:
        store_outputs(y, tl.sum(total_3.reshape(OUTS, INS // 2), axis=1), 3, out, n_rows, d_out, OUTS)
