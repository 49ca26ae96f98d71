"""Block-wise quantization kernels, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

QUANTIZE = (
    "divides",  # fl(x / a) instead of fl(x · fl(1/a)): one code in millions
    "ties up",  # a number on a threshold gets the higher code
    "half",  # scaled in float16
    "NaN dropped",  # as `max` does by itself
    "not tiny",  # 1/a overflows
    "signed max",  # max x instead of max |x|
    "next scale",  # every block's scale one place later
    "padding counts",  # numbers behind the block, of the next one, count for its scale
    "a step too few",  # half of the codes are never found
    "next code",
    "the last code forgotten",
    "32 bits",  # offsets wrap around
)
LONG = (
    "first piece",  # its scale is that of its first TILE numbers
    "next block counts",
    "NaN dropped",
    "second pass forgotten",  # codes of the first piece only
    "32 bits",
)
DEQUANTIZE = (
    "half scale",  # the scale rounded to the output's type before the product
    "double",  # the product in float64: not rounded to float32 first
    "truncated",  # float16 toward zero
    "next block",  # a scale too late
    "one scale a tile",
    "magnitude",  # |a|
    "signed codes",  # a byte above 127 is negative
    "beyond the table",  # a code that is in no codebook reads what lies behind
    "last forgotten",
    "whole tile",  # stores beyond the end
    "accumulates",  # adds to what was there
    "32 bits",
)


@triton.jit
def count_below(scaled, thresholds, STEPS: tl.constexpr, WRONG: tl.constexpr):
    code = tl.full(scaled.shape, 0, tl.int32)
    for k in tl.static_range(STEPS):
        if WRONG != "a step too few" or k > 0:
            step = 1 << (STEPS - 1 - k)
            threshold = tl.load(thresholds + code + (step - 1))
            above = threshold <= scaled if WRONG == "ties up" else threshold < scaled
            code += tl.where(above, step, 0)
    if WRONG == "next code":
        code = tl.minimum(code + 1, (1 << STEPS) - 1)
    return code


@triton.jit
def quantize(
    codes, absmax, x, thresholds, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
    WRONG: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = triton.next_power_of_2(BLOCK_SIZE)
    program = tl.program_id(0)
    if WRONG != "32 bits":
        program = program.to(tl.int64)
    block = program * (TILE // WIDTH) + tl.arange(0, TILE // WIDTH)
    column = tl.arange(0, WIDTH)[None, :]
    at = block[:, None] * BLOCK_SIZE + column
    inside = (at < n) & (column < BLOCK_SIZE)
    read = at < n if WRONG == "padding counts" else inside
    numbers = tl.load(x + at, mask=read, other=0).to(tl.float32)
    a = tl.max(numbers, axis=1) if WRONG == "signed max" else tl.max(tl.abs(numbers), axis=1)
    holds_nan = tl.max((numbers != numbers).to(tl.int32), axis=1) != 0
    stored = a if WRONG == "NaN dropped" else tl.where(holds_nan, float("nan"), a)
    place = tl.minimum(block + 1, (n - 1) // BLOCK_SIZE) if WRONG == "next scale" else block
    tl.store(absmax + place, stored, mask=block * BLOCK_SIZE < n)
    one, tiny = tl.full(a.shape, 1.0, tl.float32), tl.full(a.shape, 1e-38, tl.float32)
    a = a if WRONG == "not tiny" else tl.maximum(a, tiny)
    if WRONG == "divides":
        scaled = tl.math.div_rn(numbers, a[:, None] + tl.zeros_like(numbers))
    else:
        scaled = numbers * tl.math.div_rn(one, a)[:, None]
    if WRONG == "half":
        scaled = scaled.to(tl.float16).to(tl.float32)
    code = count_below(scaled, thresholds, STEPS, WRONG)
    kept = inside & (at < n - 1) if WRONG == "the last code forgotten" else inside
    tl.store(codes + at, code.to(tl.uint8), mask=kept)


@triton.jit
def quantize_long(
    codes, absmax, x, thresholds, n, block_size, TILE: tl.constexpr, STEPS: tl.constexpr, WRONG: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    if WRONG != "32 bits":
        block = block.to(tl.int64)
    first = block * block_size
    length = tl.minimum(block_size, n - first)
    end = length
    if WRONG == "first piece":
        end = tl.minimum(length, TILE)
    if WRONG == "next block counts":
        end = tl.minimum(tl.cdiv(length, TILE) * TILE, n - first)
    column = tl.arange(0, TILE)
    largest = tl.zeros((TILE,), tl.float32)
    nans = tl.zeros((TILE,), tl.int32)
    for start in range(0, end, TILE):
        numbers = tl.load(x + first + start + column, mask=column < end - start, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(numbers))
        nans += (numbers != numbers).to(tl.int32)
    a = tl.max(largest, axis=0)
    holds_nan = (tl.max(nans, axis=0) != 0) & (WRONG != "NaN dropped")
    tl.store(absmax + block, tl.where(holds_nan, float("nan"), a))
    one, tiny = tl.full((TILE,), 1.0, tl.float32), tl.full((TILE,), 1e-38, tl.float32)
    inverse = tl.math.div_rn(one, tl.maximum(tl.zeros((TILE,), tl.float32) + a, tiny))
    for start in range(0, tl.minimum(length, TILE) if WRONG == "second pass forgotten" else length, TILE):
        inside = column < length - start
        numbers = tl.load(x + first + start + column, mask=inside, other=0).to(tl.float32)
        code = count_below(numbers * inverse, thresholds, STEPS, "nothing")
        tl.store(codes + first + start + column, code.to(tl.uint8), mask=inside)


@triton.jit
def dequantize(
    out, codes, absmax, table, n, entries, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if WRONG != "32 bits":
        program = program.to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    inside = at < n
    byte = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    if WRONG == "signed codes":
        byte = tl.where(byte > 127, byte - 128, byte)
    if WRONG != "beyond the table":
        byte = tl.minimum(byte, entries - 1)
    block = at // BLOCK_SIZE
    if WRONG == "next block":
        block = tl.minimum(block + 1, (n - 1) // BLOCK_SIZE)
    if WRONG == "one scale a tile":
        block = block * 0 + program * TILE // BLOCK_SIZE
    scale = tl.load(absmax + block, mask=inside, other=0)
    if WRONG == "half scale":
        scale = scale.to(tl.float16).to(tl.float32)
    if WRONG == "magnitude":
        scale = tl.abs(scale)
    value = tl.load(table + byte)
    value = value.to(tl.float64) * scale.to(tl.float64) if WRONG == "double" else value * scale
    if WRONG == "accumulates":
        before = tl.load(out + at, mask=inside, other=0).to(tl.float32)
        value += tl.where(before == before, before, 0.0)
    if WRONG == "truncated":
        toward_zero = (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        value = toward_zero if out.dtype.element_ty == tl.float16 else value
    if WRONG == "last forgotten":
        inside = at < n - 1
    if WRONG == "whole tile":
        inside = at < n + TILE
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
