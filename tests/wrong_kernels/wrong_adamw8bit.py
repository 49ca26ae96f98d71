"""Kernels of AdamW with 8-bit moments, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" the kernel is right. Only what is wrong differs.
"""

import triton
import triton.language as tl

FORMULA = (
    "v may be zero",  # the nearest code, zero among them
    "v never zero",  # what had no gradient gets a second moment
    "no correction",  # the guess as it is
    "left only",  # corrected downwards only
    "right only",
    "no mirror",  # negative numbers are closed as positive ones
    "signed map for v",
    "one scale a tile",
    "scales as before",
    "scales only grow",
    "scales swapped",  # opened by the other moment's
    "rounded before use",  # θ from what the codes stand for
    "not finite",  # 1 / a of a block of zeros
    "L2",
    "decay without rate",
    "m not corrected",
    "v not corrected",
    "eps inside",
    "fast quotient",
)
TABLE = (
    "vectors decay",
    "neighbor's decay",
    "first tile only",
    "first scales only",
    "last forgotten",
    "boundary crossed",
    "no mask for columns",  # of blocks that are no power of two
    "32 bits",
)


@triton.jit
def reciprocal(a, WRONG: tl.constexpr):
    tiny = tl.full(a.shape, 0.0 if WRONG == "not finite" else 1e-38, tl.float32)
    return tl.math.div_rn(tl.full(a.shape, 1.0, tl.float32), tl.maximum(a, tiny))


@triton.jit
def index_of(x):
    low = tl.minimum(tl.fma(x, 1111111.1, 0.8888889), tl.fma(x, 222222.22, 1.7777778))
    middle = tl.minimum(tl.fma(x, 44444.444, 3.5555556), tl.fma(x, 8888.8889, 7.1111111))
    high = tl.minimum(tl.fma(x, 1777.7778, 14.222222), tl.fma(x, 355.55556, 28.444444))
    return tl.minimum(tl.minimum(low, middle), tl.minimum(high, tl.fma(x, 71.111111, 56.888889)))


@triton.jit
def corrected(scaled, guess, thresholds, WRONG: tl.constexpr):
    down = (scaled <= tl.load(thresholds + guess)).to(tl.int32)
    up = (scaled > tl.load(thresholds + guess + 1)).to(tl.int32)
    if WRONG == "no correction" or WRONG == "right only":
        down = down * 0
    if WRONG == "no correction" or WRONG == "left only":
        up = up * 0
    return guess - down + up


@triton.jit
def close_first(scaled, thresholds, WRONG: tl.constexpr):
    if WRONG == "no mirror":
        scaled = tl.abs(scaled)
    index = index_of(tl.abs(scaled)).to(tl.int32)
    return corrected(scaled, tl.maximum(tl.where(scaled < 0, 127 - index, 127 + index), 0), thresholds, WRONG)


@triton.jit
def close_second(scaled, positive, thresholds, WRONG: tl.constexpr):
    found = corrected(scaled, (index_of(scaled) * 2.0).to(tl.int32) - 1, thresholds, WRONG)
    if WRONG == "v may be zero":
        return found
    return tl.maximum(found, 1 if WRONG == "v never zero" else positive.to(tl.int32))


@triton.jit
def step_at(
    theta, gradient, m, v, m_scale, v_scale, inside, blocks_inside, tables, shrink,
    learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    ENTRIES: tl.constexpr, PADDED: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    second_map = tables + ENTRIES
    first_thresholds = second_map + ENTRIES
    second_thresholds = first_thresholds + PADDED
    g = tl.load(gradient, mask=inside, other=0).to(tl.float32)
    old_m, old_v = tl.load(m, mask=inside, other=0).to(tl.int32), tl.load(v, mask=inside, other=0).to(tl.int32)
    old_m = tl.where(inside, old_m, 127)
    old_a, old_b = tl.load(m_scale, mask=blocks_inside, other=0), tl.load(v_scale, mask=blocks_inside, other=0)
    a, b = (old_b, old_a) if WRONG == "scales swapped" else (old_a, old_b)
    wide = tl.load(theta, mask=inside).to(tl.float32)
    if WRONG == "L2":
        g += tl.where(inside, (1 - shrink) / learning_rate * wide, 0)
        shrink = 1.0
    if WRONG == "decay without rate":
        shrink = 1 - (1 - shrink) / learning_rate
    if WRONG == "m not corrected":
        correction1 = 1.0
    if WRONG == "v not corrected":
        correction2 = 1.0
    first = tl.load(tables + old_m) * a[:, None] * beta1 + g * rest1
    second = tl.load(second_map + old_v) * b[:, None] * beta2 + g * rest2 * g
    a, b = tl.max(tl.abs(first), axis=1), tl.max(second, axis=1)
    if WRONG == "one scale a tile":
        a, b = a * 0 + tl.max(a, axis=0), b * 0 + tl.max(b, axis=0)
    if WRONG == "scales only grow":
        a, b = tl.maximum(a, old_a), tl.maximum(b, old_b)
    if WRONG == "scales as before":
        a, b = tl.where(old_a > 0, old_a, a), tl.where(old_b > 0, old_b, b)
    new_m = close_first(first * reciprocal(a, WRONG)[:, None], first_thresholds, WRONG)
    if WRONG == "signed map for v":
        new_v = tl.maximum(close_first(second * reciprocal(b, WRONG)[:, None], first_thresholds, WRONG), second > 0)
    else:
        new_v = close_second(second * reciprocal(b, WRONG)[:, None], second > 0, second_thresholds, WRONG)
    zero = tl.zeros_like(first)
    if WRONG == "rounded before use":
        used_first, used_second = tl.load(tables + new_m) * a[:, None], tl.load(second_map + new_v) * b[:, None]
    else:
        used_first, used_second = first, second
    v_hat = tl.math.div_rn(used_second, zero + correction2)
    denominator = tl.math.sqrt_rn(v_hat + eps) if WRONG == "eps inside" else tl.math.sqrt_rn(v_hat) + eps
    step = tl.math.div_rn(used_first, zero + correction1) * learning_rate
    if WRONG == "fast quotient":
        step = step * tl.math.div_rn(zero + 1, denominator)
    else:
        step = tl.math.div_rn(step, denominator)
    tl.store(theta, (wide * shrink - step).to(theta.dtype.element_ty), mask=inside)
    tl.store(m_scale, a, mask=blocks_inside)
    tl.store(v_scale, b, mask=blocks_inside)
    tl.store(m, new_m.to(tl.uint8), mask=inside)
    tl.store(v, new_v.to(tl.uint8), mask=inside)


@triton.jit
def step_blocks(
    table, tiles, tables, shrink, learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    THETA: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NEIGHBORS: tl.constexpr,
    ENTRIES: tl.constexpr, PADDED: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tiles + 2 * program).to(tl.int64)
    row = table + tensor * COLUMNS
    before = table + tl.maximum(tensor - 1, 0) * COLUMNS
    block = tl.load(tiles + 2 * program + 1)
    if WRONG != "32 bits":
        block = block.to(tl.int64)
    if WRONG == "first tile only":
        block = block * 0
    block = block * ROWS
    start = (block * BLOCK_SIZE).to(tl.int64)
    left = tl.load(row + 6) - start
    decays = tl.load((before if WRONG == "neighbor's decay" else row) + 7) != 0
    if WRONG == "vectors decay":
        decays = decays | True
    ahead, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = ahead[:, None] * BLOCK_SIZE + column[None, :]
    inside = (at < left) & (column < BLOCK_SIZE)[None, :]
    if WRONG == "last forgotten":
        inside = (at < left - 1) & (column < BLOCK_SIZE)[None, :]
    if WRONG == "boundary crossed":
        inside = (at >= 0) & (column < BLOCK_SIZE)[None, :]
    if WRONG == "no mask for columns":
        inside = (at < left) & (column < WIDTH)[None, :]
    scales = (0 if WRONG == "first scales only" else block) + ahead
    theta = tl.load(row).to(tl.pointer_type(THETA)) + start + at
    gradient = tl.load(row + 1).to(tl.pointer_type(GRADIENT)) + start + at
    m = tl.load(row + 2).to(tl.pointer_type(tl.uint8)) + start + at
    v = tl.load(row + 3).to(tl.pointer_type(tl.uint8)) + start + at
    m_scale = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + scales
    v_scale = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + scales
    step_at(
        theta, gradient, m, v, m_scale, v_scale, inside, ahead * BLOCK_SIZE < left, tables,
        tl.where(decays, shrink, 1.0), learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
        ENTRIES, PADDED, WRONG,
    )  # fmt: skip
