"""AdamW with 8-bit moments on a GPU: opened, moved and closed again in one pass, all parameters in one launch.

    m = fl(c[q_m] a)        v = fl(d[q_v] b)                    c, d: the signed and the unsigned dynamic map    (1)
    θ′, m′, v′ = a step of AdamW, rounded as in `adamw_kernels`                                                  (2)
    a′ = max |m′|           b′ = max v′                         of the block                                     (3)
    q_m′ = nearest entry to fl(m′ fl(1/a′))                     q_v′ = max(1 if v′ > 0, nearest)                 (4)

Codes and scales are the reference's, bit for bit, and so is a float32 θ (`minift.optim.adamw8bit`, which says why
nothing but zero may become zero in v).

**What it costs.** AdamW in 32 bits moves 28 bytes a parameter: θ, m and v read and written, g read. Here m and v are a
byte each, both ways, and 8 bytes of scales a block of 256, both ways:

    float32        8 + 4 + 4 + 16/256 = 16.06 bytes        16 bits        4 + 2 + 4 + 16/256 = 10.06, instead of 22

So the limit of the memory is 1.7 to 2.2 times as fast, if opening and closing keep up with it. (The caller looks at the
gradients once before, for the largest, so that nothing has moved where one is not finite: 4 or 2 bytes more.) In three
kernels, of which the first opens m and v into 32 bits and the last closes them, it would be 52 bytes.

**Why one pass is possible.** The scale (3) of a block is known when its last number is, so a block stays in registers
from (1) to (4): 256 numbers are two for each lane of a program of 128. A program takes TILE numbers, whole blocks, one
a row of its tile; the maximum of a row is the only thing that lanes tell each other. What is overwritten (codes and
scales) has been read by then: a′ depends on every number of the block, and these on its old codes and scale.

**Opening** is a look-up in a table of 256 entries, 1 KB, which lies in the L1 cache.

**Closing** is a search among 255 thresholds. A binary search (`blockwise_kernels`) is 8 look-ups, each of which waits
for the one before; for two moments 16. But the dynamic map is a formula: decades e = 0 … 6 with 2^e evenly spaced steps
of 0.9 in each, so within a decade the index of x > 0, counted from the zero of the map, is

    f_e(x) = 2^e (10^(6−e) x / 0.9 + 8/9)                                                                        (5)

At the end of a decade, x = 10^(e−6), both f_e and f_(e+1) are 2^(e+1), and each line is flatter than the one before, by
0.2. So the lines are the tangents of a concave function, and no decade has to be looked for:

    index of x = floor(min_e f_e(x))  in the signed map          floor(2 min_e f_e(x)) − 1  in the unsigned      (6)

(6) is the true index or beside it: it is off where a threshold is a midpoint across the end of a decade, near 0 and
1, and where (5) is rounded. The thresholds to the left and right of that entry then decide, two look-ups that wait for
nothing but (6):

    q = guess − [x ≤ left threshold] + [x > right threshold]                                                     (7)

(5) is monotone however it is rounded, and so is the true index. So if the guess is within 1 at both ends of every
interval between thresholds, it is within 1 for every float32: a test looks at these 1,020 numbers.

In the machine code for sm_90 the path without a mask is 193 instructions and 8.6 loads for a float32 parameter; 95 of
the instructions are AdamW's own. With binary searches it is 230 and 18.9. An H100 (132 multiprocessors, 128 lanes each,
1.7 GHz) has time for 138 while its memory moves 16 bytes, and for 240 while it moves the 28 of AdamW in 32 bits. Some
of the 193 are for numbers that are too small or too large for a quick quotient, and never reached. So the prediction is
that instructions set the time, and that it lies between 0.57 and 0.80 of the time of AdamW in 32 bits.

**Words of 16 bytes.** A lane's neighbors are as many numbers as fill 16 bytes of θ, for θ, the gradient and the codes
alike (`max_contiguous`), so that all lie with the same lanes: 4 or 8 bytes of codes. The table of addresses and
ALIGNED are those of `adamw_kernels`, with two more columns for the scales.
"""

import triton
import triton.language as tl

TILE, WARPS = 1024, 4
LONGEST_BLOCK = 4096  # which a program can hold in registers
COLUMNS = 8  # of `table`: θ, g, codes of m, codes of v, scales of m, scales of v, elements, 1 if it decays
ENTRIES, PADDED = 256, 257  # of a map; its thresholds, with −∞ before and +∞ behind them
OPTIONS = {"enable_fp_fusion": False}
TYPES = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}


@triton.jit
def reciprocal(a):
    """fl(1 / a), of blocks whose absmax is below 1e-38 fl(1 / 1e-38): 1/a would overflow for a < 2.9e-39."""
    tiny = tl.full(a.shape, 1e-38, tl.float32)  # a bare 1e-38 is a float64
    return tl.math.div_rn(tl.full(a.shape, 1.0, tl.float32), tl.maximum(a, tiny))


@triton.jit
def index_of(x):
    """min_e f_e(x) of equation (5), for x ≥ 0. Fused, which no result depends on: (7) decides."""
    low = tl.minimum(tl.fma(x, 1111111.1, 0.8888889), tl.fma(x, 222222.22, 1.7777778))
    middle = tl.minimum(tl.fma(x, 44444.444, 3.5555556), tl.fma(x, 8888.8889, 7.1111111))
    high = tl.minimum(tl.fma(x, 1777.7778, 14.222222), tl.fma(x, 355.55556, 28.444444))
    return tl.minimum(tl.minimum(low, middle), tl.minimum(high, tl.fma(x, 71.111111, 56.888889)))


@triton.jit
def corrected(scaled, guess, thresholds):
    """Equation (7). `thresholds` begin with −∞ and end with +∞: those of entry i are at i and i + 1."""
    left = tl.load(thresholds + guess)
    right = tl.load(thresholds + guess + 1)
    return guess - (scaled <= left).to(tl.int32) + (scaled > right).to(tl.int32)


@triton.jit
def close_first(scaled, thresholds):
    """Equation (4) for m, in [−1, 1]. The negative half is the mirror image, without an entry at −1."""
    index = index_of(tl.abs(scaled)).to(tl.int32)
    return corrected(scaled, tl.maximum(tl.where(scaled < 0, 127 - index, 127 + index), 0), thresholds)


@triton.jit
def close_second(scaled, positive, thresholds):
    """Equation (4) for v, in [0, 1]: what is positive does not become zero."""
    index = (index_of(scaled) * 2.0).to(tl.int32) - 1
    return tl.maximum(corrected(scaled, index, thresholds), positive.to(tl.int32))


@triton.jit
def step_at(
    theta, gradient, m, v, m_scale, v_scale, inside, blocks_inside, tables, shrink,
    learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    ENTRIES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Equations (1) to (4) for blocks at these addresses, one a row, where `inside` holds (None: everywhere).

    What lies outside is 0 everywhere, and so is what becomes of it: it enlarges no maximum."""
    second_map = tables + ENTRIES
    first_thresholds = second_map + ENTRIES
    second_thresholds = first_thresholds + PADDED
    if inside is None:
        g = tl.load(gradient).to(tl.float32)
        old_m, old_v = tl.load(m).to(tl.int32), tl.load(v).to(tl.int32)
        a, b = tl.load(m_scale), tl.load(v_scale)
    else:
        g = tl.load(gradient, mask=inside, other=0).to(tl.float32)
        old_m, old_v = tl.load(m, mask=inside, other=0).to(tl.int32), tl.load(v, mask=inside, other=0).to(tl.int32)
        old_m = tl.where(inside, old_m, 127)  # the zero of the signed map
        a, b = tl.load(m_scale, mask=blocks_inside, other=0), tl.load(v_scale, mask=blocks_inside, other=0)
    wide = tl.load(theta, mask=inside).to(tl.float32)
    first = tl.load(tables + old_m) * a[:, None] * beta1 + g * rest1
    second = tl.load(second_map + old_v) * b[:, None] * beta2 + g * rest2 * g
    zero = tl.zeros_like(first)
    denominator = tl.math.sqrt_rn(tl.math.div_rn(second, zero + correction2)) + eps
    step = tl.math.div_rn(tl.math.div_rn(first, zero + correction1) * learning_rate, denominator)
    tl.store(theta, (wide * shrink - step).to(theta.dtype.element_ty), mask=inside)
    a, b = tl.max(tl.abs(first), axis=1), tl.max(second, axis=1)
    tl.store(m_scale, a, mask=blocks_inside)
    tl.store(v_scale, b, mask=blocks_inside)
    new_m = close_first(first * reciprocal(a)[:, None], first_thresholds)
    new_v = close_second(second * reciprocal(b)[:, None], second > 0, second_thresholds)
    tl.store(m, new_m.to(tl.uint8), mask=inside)
    tl.store(v, new_v.to(tl.uint8), mask=inside)


@triton.jit
def address(row, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in this column of a row of `table`."""
    pointer = tl.load(row + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def step_blocks(
    table, tiles, tables, shrink, learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    THETA: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NEIGHBORS: tl.constexpr,
    ENTRIES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """ROWS blocks of one of many tensors, one a row of WIDTH, the next power of two. What does not decay has the factor
    1, which changes no bit."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + 2 * program).to(tl.int64) * COLUMNS
    block = tl.load(tiles + 2 * program + 1).to(tl.int64) * ROWS  # the first
    left = tl.load(row + 6) - block * BLOCK_SIZE  # elements from here to the tensor's end
    factor = tl.where(tl.load(row + 7) != 0, shrink, 1.0)
    ahead, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = tl.max_contiguous(ahead[:, None] * BLOCK_SIZE + column[None, :], [1, NEIGHBORS])
    start = block * BLOCK_SIZE
    theta = address(row, 0, THETA, ALIGNED) + start + at
    gradient = address(row, 1, GRADIENT, ALIGNED) + start + at
    m = address(row, 2, tl.uint8, ALIGNED) + start + at
    v = address(row, 3, tl.uint8, ALIGNED) + start + at
    m_scale = address(row, 4, tl.float32, ALIGNED) + block + ahead
    v_scale = address(row, 5, tl.float32, ALIGNED) + block + ahead
    if left >= ROWS * BLOCK_SIZE and BLOCK_SIZE == WIDTH:
        step_at(
            theta, gradient, m, v, m_scale, v_scale, None, None, tables, factor,
            learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2, ENTRIES, PADDED,
        )  # fmt: skip
    else:
        inside = (at < left) & (column < BLOCK_SIZE)[None, :]
        step_at(
            theta, gradient, m, v, m_scale, v_scale, inside, ahead * BLOCK_SIZE < left, tables, factor,
            learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2, ENTRIES, PADDED,
        )  # fmt: skip
