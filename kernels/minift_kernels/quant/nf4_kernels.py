"""NF4 to numbers, on a GPU: eight kernels, from the first that comes to mind to the one that is launched.

    w_i = fl(c_q · a)        q the four bits of weight i, c the table, a the scale of its block                  (1)
    a   = fl(fl(c'_s · a₂) + ā)        if the scales are double-quantized (minift.quant.double_quant, equation 3) (2)

Each fl is one rounding to float32; then one more to the type of `out`. That is the whole arithmetic: one product a
weight. What a GPU needs time for is bytes. A weight of a float16 matrix with blocks of 64 reads 4/8 + 4/64 bytes and
writes 2: 2.5625 bytes. For 4096 × 14336 weights that is 150 MB, or 45 µs on an H100 (3.35 TB/s); a kernel is good when
it takes little longer. So every step below is judged by two questions: does it move fewer bytes or move them in wider
words, and does it stay out of their way, that is, does it need few enough instructions?

What a step gains is *predicted* in its comment, from counting: from the bytes, and from the instructions in the PTX
that tests/kernels/test_kernel_aot.py compiles and counts. `kernels/benchmarks/nf4.py` measures it, on a GPU.

**The two roundings of (2).** A compiler likes to turn a product and a sum into one fused multiply-add, which rounds
once: 6.9 % of the scales would have other last bits than in every library that has read or written such files. So
every launch has `enable_fp_fusion=False` (OPTIONS). The interpreter cannot show the difference, since NumPy fuses
nothing; the tests look for `fma` in the PTX and for FFMA in the machine code.

A byte holds two weights, the first in its high nibble. `n_bytes` = ceil(n / 2). TILE is how many weights a program
decodes, a power of two like BLOCK_SIZE. Steps 1–7 want float32 scales.
"""

import triton
import triton.language as tl

LAST = 8  # the step that is launched unless another is asked for

# Tile sizes to choose from, by the bytes of an element of `out`: (TILE, num_warps). A lane writes 16 bytes at a time,
# so 4 warps of 32 lanes write 1,024 float16 numbers at once: the second of each row, for steps 1 to 6. From step 7 on
# a lane has several words at once: the first of each row.
TILES = {
    2: ((4096, 4), (1024, 4), (2048, 4), (8192, 8)),
    4: ((2048, 4), (512, 4), (1024, 4), (4096, 8)),
    8: ((1024, 4), (256, 4)),
}


def default_tile(step, element_size):
    return TILES[element_size][0 if step >= 7 else 1]


OPTIONS = {"enable_fp_fusion": False}  # equation (2) has two roundings

# The table, written out for step 5; the other steps are given it in memory.
CODE = tl.constexpr(
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)  # fmt: skip


@triton.jit
def first_of_tile(program, TILE: tl.constexpr):
    """The first weight of a program's tile, in 64 bits: beyond 2³¹ weights the product wraps around in 32."""
    return program.to(tl.int64) * TILE


# 1. One lane a weight: the formula, as it is written.
#
# Weights 2i and 2i + 1 both load byte i, and every weight loads its scale, the same one as its 63 neighbors. These
# come from the L1 cache, so memory is not read twice, but each is an instruction: three loads a weight (byte, table,
# scale), of which the assembler saves every second byte. Already good: neighboring lanes write neighboring weights,
# a lane 8 of them in one store of 16 bytes.


@triton.jit
def dequantize_1(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    weight = first_of_tile(tl.program_id(0), TILE) + tl.arange(0, TILE)
    byte = tl.load(codes + weight // 2, mask=weight < n, other=0)
    code = tl.where(weight % 2 == 0, byte >> 4, byte & 15)
    scale = tl.load(absmax + weight // BLOCK_SIZE, mask=weight < n, other=0)
    w = tl.load(table + code) * scale
    tl.store(out + weight, w.to(out.dtype.element_ty), mask=weight < n)


# 2. One lane a byte, two weights out.
#
# Predicted: half the loads of bytes and scales, and these in words of 4 bytes, but slower than step 1 all the same. The
# high nibbles belong to even places and the low ones to odd places, so each of the two stores writes every second
# element: 2 bytes at a time instead of 16. Eight store instructions where one would do, and both halves of every
# 32-byte sector come at different times. A step back, and the reason for step 3.


@triton.jit
def dequantize_2(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    at = first_of_tile(tl.program_id(0), TILE // 2) + tl.arange(0, TILE // 2)
    byte = tl.load(codes + at, mask=at < n_bytes, other=0)
    scale = tl.load(absmax + 2 * at // BLOCK_SIZE, mask=at < n_bytes, other=0)
    high = tl.load(table + (byte >> 4)) * scale
    low = tl.load(table + (byte & 15)) * scale
    tl.store(out + 2 * at, high.to(out.dtype.element_ty), mask=2 * at < n)
    tl.store(out + 2 * at + 1, low.to(out.dtype.element_ty), mask=2 * at + 1 < n)


# 3. Both nibbles side by side, then one store.
#
# `join` puts high and low next to each other in a new last axis, and `reshape` reads the two axes as one: high, low,
# high, low, … No data moves, since both are in the same lane. Predicted: step 2's few loads and step 1's wide stores;
# the bytes come 4 to a load, the weights leave 8 to a store.


@triton.jit
def dequantize_3(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    at = first_of_tile(tl.program_id(0), TILE // 2) + tl.arange(0, TILE // 2)
    byte = tl.load(codes + at, mask=at < n_bytes, other=0)
    scale = tl.load(absmax + 2 * at // BLOCK_SIZE, mask=at < n_bytes, other=0)
    high = tl.load(table + (byte >> 4)) * scale
    low = tl.load(table + (byte & 15)) * scale
    w = tl.join(high, low).reshape(TILE)
    weight = first_of_tile(tl.program_id(0), TILE) + tl.arange(0, TILE)
    tl.store(out + weight, w.to(out.dtype.element_ty), mask=weight < n)


# 4. A scale once a block.
#
# The tile becomes a matrix whose rows lie in one block each: as many rows as blocks, or one row if the block is larger
# than the tile. Scales are a vector with an element a row. Predicted: a lane's bytes lie in one row, so it loads one
# scale for them instead of one a byte: of a lane's 13 loads in step 3, 3 go. Offsets within the tile are 32 bits wide,
# added to a 64-bit start that the whole program shares, which saves address arithmetic in every lane.


@triton.jit
def tile_shape(BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WORD: tl.constexpr = 16):
    """Where rows begin, and the places of bytes and of weights in the tile; a row lies in one block.

    WORD is how many bytes are neighbors for one lane (step 7)."""
    WIDTH: tl.constexpr = min(BLOCK_SIZE, TILE)
    row = tl.arange(0, TILE // WIDTH)
    at = row[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]  # (rows, WIDTH / 2)
    weight = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # (rows, WIDTH)
    return row * WIDTH, tl.max_contiguous(at, [1, WORD]), weight


@triton.jit
def dequantize_4(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    first = first_of_tile(tl.program_id(0), TILE)
    start, at, weight = tile_shape(BLOCK_SIZE, TILE)
    byte = tl.load(codes + first // 2 + at, mask=at < n_bytes - first // 2, other=0)
    scale = tl.load(absmax + (first + start) // BLOCK_SIZE, mask=start < n - first, other=0)[:, None]
    high = tl.load(table + (byte >> 4)) * scale
    low = tl.load(table + (byte & 15)) * scale
    w = tl.join(high, low).reshape(weight.shape)
    tl.store(out + first + weight, w.to(out.dtype.element_ty), mask=weight < n - first)


# 5. The table in registers: a tree of selections by the four bits of the code.
#
# No load at all for the table, but 8 + 4 + 2 + 1 = 15 selections a weight. Predicted: slower. An H100 selects 64 times
# a clock on each of its 132 multiprocessors: at 1.7 GHz the 58.7 million weights of 4096 × 14336 take 61 µs for that
# alone, longer than memory needs for everything. bitsandbytes began with such a tree (of branches) and left it.


@triton.jit
def select(code):
    """CODE[code], by halving: the lowest bit chooses between neighbors, the highest between the halves."""
    bit = (code & 1) != 0
    c0, c1 = tl.where(bit, CODE[1], CODE[0]), tl.where(bit, CODE[3], CODE[2])
    c2, c3 = tl.where(bit, CODE[5], CODE[4]), tl.where(bit, CODE[7], CODE[6])
    c4, c5 = tl.where(bit, CODE[9], CODE[8]), tl.where(bit, CODE[11], CODE[10])
    c6, c7 = tl.where(bit, CODE[13], CODE[12]), tl.where(bit, CODE[15], CODE[14])
    bit = (code & 2) != 0
    c0, c1, c2, c3 = tl.where(bit, c1, c0), tl.where(bit, c3, c2), tl.where(bit, c5, c4), tl.where(bit, c7, c6)
    bit = (code & 4) != 0
    c0, c1 = tl.where(bit, c1, c0), tl.where(bit, c3, c2)
    return tl.where((code & 8) != 0, c1, c0)


@triton.jit
def dequantize_5(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    first = first_of_tile(tl.program_id(0), TILE)
    start, at, weight = tile_shape(BLOCK_SIZE, TILE)
    byte = tl.load(codes + first // 2 + at, mask=at < n_bytes - first // 2, other=0)
    scale = tl.load(absmax + (first + start) // BLOCK_SIZE, mask=start < n - first, other=0)[:, None]
    w = tl.join(select(byte >> 4) * scale, select(byte & 15) * scale).reshape(weight.shape)
    tl.store(out + first + weight, w.to(out.dtype.element_ty), mask=weight < n - first)


# 6. The table in shared memory: `gather`.
#
# Triton copies the table's 64 bytes to shared memory, waits for all warps, and looks up there. The sixteen entries lie
# in sixteen different banks, so that 32 lanes are served at once whatever they ask for. Predicted: about step 4. Its
# table sits in the L1 cache, in half of one 128-byte line, and a warp whose lanes all hit one line is served at once
# too. Against it: the copy, and barriers in every program.


@triton.jit
def dequantize_6(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    first = first_of_tile(tl.program_id(0), TILE)
    start, at, weight = tile_shape(BLOCK_SIZE, TILE)
    byte = tl.load(codes + first // 2 + at, mask=at < n_bytes - first // 2, other=0)
    scale = tl.load(absmax + (first + start) // BLOCK_SIZE, mask=start < n - first, other=0)[:, None]
    entries = tl.load(table + tl.arange(0, 16))
    high = tl.gather(entries, (byte >> 4).to(tl.int32).reshape(TILE // 2), 0).reshape(at.shape) * scale
    low = tl.gather(entries, (byte & 15).to(tl.int32).reshape(TILE // 2), 0).reshape(at.shape) * scale
    w = tl.join(high, low).reshape(weight.shape)
    tl.store(out + first + weight, w.to(out.dtype.element_ty), mask=weight < n - first)


# 7. Larger tiles: several loads on their way at once.
#
# A lane that waits for 4 bytes has nothing else to do. With a tile four times as large it asks for four words before it
# needs the first. But left alone, Triton then takes 16 neighboring bytes a lane, the widest load there is. Those become
# 32 neighboring weights, while a store should have 8 neighboring ones a lane: all results would take a detour through
# shared memory. `max_contiguous` says that only so many bytes are neighbors, as many as make 16 bytes of results: loads
# of 4 bytes, stores of 16, no detour (float32: 2 and 16). The table is in memory again, as in step 4.
# Predicted: a little faster than step 4, as far as that one waits; four times fewer programs to start.


@triton.jit
def dequantize_7(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    first = first_of_tile(tl.program_id(0), TILE)
    start, at, weight = tile_shape(BLOCK_SIZE, TILE, WORD=64 // out.dtype.element_ty.primitive_bitwidth)
    byte = tl.load(codes + first // 2 + at, mask=at < n_bytes - first // 2, other=0)
    scale = tl.load(absmax + (first + start) // BLOCK_SIZE, mask=start < n - first, other=0)[:, None]
    high = tl.load(table + (byte >> 4)) * scale
    low = tl.load(table + (byte & 15)) * scale
    w = tl.join(high, low).reshape(weight.shape)
    tl.store(out + first + weight, w.to(out.dtype.element_ty), mask=weight < n - first)


# 8. Double-quantized scales, decoded where they are needed: equation (2).
#
# The other way is three launches: decode the scales to float32 in memory, add the offset, then step 7. In the kernel a
# row costs one byte for its scale, a look-up in the 256-entry map (1 KB, in the L1 cache), the nested scale that it
# shares with 255 others, and the offset that all share. Predicted: 4/64 bytes a weight become 1/64 + 4/(64·256), so
# 2.5159 bytes instead of 2.5625; and nothing is written and read in between, nor launched three times, which is what
# small matrices wait for. With float32 scales it is step 7.


@triton.jit
def load_scales(absmax, nested_absmax, nested_code, offset, block, inside, NESTED_BLOCK_SIZE: tl.constexpr):
    """The scales of these blocks: float32 as they are if NESTED_BLOCK_SIZE is 0, otherwise decoded, (2)."""
    if NESTED_BLOCK_SIZE == 0:
        scale = tl.load(absmax + block, mask=inside, other=0)
    else:
        code = tl.load(absmax + block, mask=inside, other=0)
        nested = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=inside, other=0)
        scale = tl.load(nested_code + code.to(tl.int32)) * nested + tl.load(offset)  # not fused: OPTIONS
    return scale


@triton.jit
def dequantize_8(
    out, codes, absmax, table, n, n_bytes, nested_absmax, nested_code, offset,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    first = first_of_tile(tl.program_id(0), TILE)
    start, at, weight = tile_shape(BLOCK_SIZE, TILE, WORD=64 // out.dtype.element_ty.primitive_bitwidth)
    byte = tl.load(codes + first // 2 + at, mask=at < n_bytes - first // 2, other=0)
    block = (first + start) // BLOCK_SIZE
    inside = start < n - first
    scale = load_scales(absmax, nested_absmax, nested_code, offset, block, inside, NESTED_BLOCK_SIZE)[:, None]
    high = tl.load(table + (byte >> 4)) * scale
    low = tl.load(table + (byte & 15)) * scale
    w = tl.join(high, low).reshape(weight.shape)
    tl.store(out + first + weight, w.to(out.dtype.element_ty), mask=weight < n - first)
