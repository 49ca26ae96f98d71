"""Block-wise quantization with any codebook, on a GPU: the rule of `minift.quant.blockwise`, rounded as it is there.

    a = max |x|          q = #{ i : fl(x · fl(1/a)) > m_i }                                                      (1)
    x̂ = fl(c_q · a)                                                                                              (2)

c is the codebook, of at most 256 entries, and m its midpoints. Both directions are a stream of bytes: 4 for a float32
number (2 for 16 bits) and 1 for its code, 4/256 for the scale of its block. So a kernel is good when it needs few
enough instructions to stay out of the memory's way, and moves 16 bytes at a time.

**Finding the code.** NF4's kernel counts: it compares with each of 15 thresholds. With 255 that is 255 comparisons and
as many additions a number. For the 58.7 million numbers of 4096 × 14336 an H100 (132 multiprocessors, 128 lanes each,
1.7 GHz) would take a millisecond for them, and 88 µs to read float32 and write codes. Thresholds are sorted, so a
binary search needs 8 steps, each an address, a load, a comparison and a selection: with all else 59 instructions a
number in the machine code for sm_90, not 510. The thresholds are 1 KB in memory, and so in the L1 cache; in the first
steps all lanes ask for the same few. Predicted: 120 µs for the instructions, so these and not the memory set the time.

    code = 0;  for s = 128, 64, … 1:   if m[code + s − 1] < scaled:  code += s                                   (3)

is exact for 2ᵏ − 1 thresholds. Shorter tables are filled up with infinity; k is as small as can be, 4 for 16 entries.

**The reciprocal** must be the correctly rounded one (`div_rn`): a code hangs on the last bit of fl(x · fl(1/a)). It is
computed once a block. No product here is part of a sum, so nothing can be fused; OPTIONS says so all the same.
"""

import triton
import triton.language as tl

OPTIONS = {"enable_fp_fusion": False}

# (TILE, num_warps): how many numbers a program quantizes, and the longest block that it holds in registers. 4,096
# numbers for 128 lanes are 32 a lane: two times 16, whose codes are 16 bytes.
QUANTIZE_TILE = (4096, 4)

# By the bytes of an element of `out`: (TILE, num_warps). A lane writes 16 bytes at a time, four times in a tile, after
# it has asked for all of its codes (`nf4_kernels`, step 7).
DEQUANTIZE_TILES = {2: (4096, 4), 4: (2048, 4), 8: (1024, 4)}


@triton.jit
def reciprocal(a):
    """fl(1 / a), of blocks whose absmax is below 1e-38 fl(1 / 1e-38): 1/a would overflow for a < 2.9e-39."""
    tiny = tl.full(a.shape, 1e-38, tl.float32)  # a bare 1e-38 is a float64
    return tl.math.div_rn(tl.full(a.shape, 1.0, tl.float32), tl.maximum(a, tiny))


@triton.jit
def count_below(scaled, thresholds, STEPS: tl.constexpr):
    """How many of the 2^STEPS − 1 sorted thresholds lie strictly below each number: equation (3)."""
    code = tl.full(scaled.shape, 0, tl.int32)
    for k in tl.static_range(STEPS):
        step = 1 << (STEPS - 1 - k)
        code += tl.where(tl.load(thresholds + code + (step - 1)) < scaled, step, 0)
    return code


@triton.jit
def quantize(codes, absmax, x, thresholds, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr):
    """Equation (1) for blocks of at most TILE numbers. A tile is a matrix with one block a row, as wide as the next
    power of two. A block with a NaN gets the scale NaN, on which the caller refuses: `max` alone would drop it."""
    WIDTH: tl.constexpr = triton.next_power_of_2(BLOCK_SIZE)
    ROWS: tl.constexpr = TILE // WIDTH
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits, and so is all that follows
    column = tl.arange(0, WIDTH)[None, :]
    at = block[:, None] * BLOCK_SIZE + column
    inside = at < n
    if WIDTH != BLOCK_SIZE:
        inside = inside & (column < BLOCK_SIZE)
    numbers = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    a = tl.max(tl.abs(numbers), axis=1)
    holds_nan = tl.max((numbers != numbers).to(tl.int32), axis=1) != 0
    tl.store(absmax + block, tl.where(holds_nan, float("nan"), a), mask=block * BLOCK_SIZE < n)
    code = count_below(numbers * reciprocal(a)[:, None], thresholds, STEPS)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)


@triton.jit
def quantize_long(codes, absmax, x, thresholds, n, block_size, TILE: tl.constexpr, STEPS: tl.constexpr):
    """Equation (1) for one block longer than TILE: once over it for its absmax, once for its codes."""
    block = tl.program_id(0).to(tl.int64)
    first = block * block_size
    length = tl.minimum(block_size, n - first)
    column = tl.arange(0, TILE)
    largest = tl.zeros((TILE,), tl.float32)
    nans = tl.zeros((TILE,), tl.int32)
    for start in range(0, length, TILE):
        numbers = tl.load(x + first + start + column, mask=column < length - start, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(numbers))
        nans += (numbers != numbers).to(tl.int32)
    a = tl.max(largest, axis=0)
    tl.store(absmax + block, tl.where(tl.max(nans, axis=0) != 0, float("nan"), a))
    inverse = reciprocal(tl.full((TILE,), 0, tl.float32) + a)
    for start in range(0, length, TILE):
        inside = column < length - start
        numbers = tl.load(x + first + start + column, mask=inside, other=0).to(tl.float32)
        code = count_below(numbers * inverse, thresholds, STEPS)
        tl.store(codes + first + start + column, code.to(tl.uint8), mask=inside)


@triton.jit
def dequantize(
    out, codes, absmax, table, n, entries, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Equation (2). A row of the tile is WIDTH numbers, a power of two that divides the block size, so that a row has
    one scale and loads it once; at least two rows, or results would take a detour through shared memory. A code beyond
    the codebook gets its last entry, as in the reference."""
    first = tl.program_id(0).to(tl.int64) * TILE
    start = tl.arange(0, TILE // WIDTH) * WIDTH
    at = start[:, None] + tl.arange(0, WIDTH)[None, :]
    WORD: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # as many codes as fill 16 bytes of results
    byte = tl.load(codes + first + tl.max_contiguous(at, [1, min(WORD, WIDTH)]), mask=at < n - first, other=0)
    scale = tl.load(absmax + (first + start) // BLOCK_SIZE, mask=start < n - first, other=0)[:, None]
    value = tl.load(table + tl.minimum(byte.to(tl.int32), entries - 1)) * scale
    tl.store(out + first + at, value.to(out.dtype.element_ty), mask=at < n - first)
