"""NF4 dequantization kernels, each wrong in one way: the properties must reject every one of them.

One kernel with a switch, so that only what is wrong differs. With WRONG = "nothing" it is right.
"""

import triton
import triton.language as tl

WRONG = (
    "nibbles swapped",  # the low one first
    "four decimals",  # torchao's table
    "half scale",  # the scale rounded to the output's type before the product
    "truncated",  # float16 toward zero
    "flushed",  # subnormal results become zero, as with fast math
    "one scale a tile",  # right while a tile lies in one block
    "next block",  # a scale too late
    "magnitude",  # |a|: right for every scale that quantizing makes
    "clamped",  # a negative decoded scale becomes zero
    "fused",  # c a₂ + ā rounded once
    "offset forgotten",  # right if it is zero
    "nested by weight",  # nested scales counted in weights, not in scales
    "no mask",  # stores a whole tile
    "whole bytes",  # an odd last weight is not stored
    "whole tiles",  # the short last tile is not stored
    "32 bits",  # offsets wrap around
    "twice",  # two programs store the same weight
    "accumulates",  # adds to what was there
    "eats its scales",  # overwrites an input
    "padding read",  # loads beyond the scales
)


@triton.jit
def wrong(
    out, codes, absmax, table, n, n_bytes, nested_absmax, nested_code, offset,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0)
    if WRONG != "32 bits":
        start = start.to(tl.int64)
    weight = start * TILE + tl.arange(0, TILE)
    inside = weight < n
    byte = tl.load(codes + weight // 2, mask=inside, other=0)
    first = weight % 2 == (1 if WRONG == "nibbles swapped" else 0)
    code = tl.where(first, byte >> 4, byte & 15)
    value = tl.load(table + code)
    if WRONG == "four decimals":
        value = tl.floor(value * 10000 + 0.5) / 10000

    block = weight // BLOCK_SIZE
    if WRONG == "one scale a tile":
        block = block * 0 + start * TILE // BLOCK_SIZE
    if WRONG == "next block":
        block = tl.minimum(block + 1, (n - 1) // BLOCK_SIZE)
    scale = tl.load(absmax + block, mask=weight < n + (BLOCK_SIZE if WRONG == "padding read" else 0), other=0)
    if NESTED_BLOCK_SIZE != 0:
        group = block // NESTED_BLOCK_SIZE
        if WRONG == "nested by weight":
            group = tl.minimum(weight // NESTED_BLOCK_SIZE, (n - 1) // BLOCK_SIZE // NESTED_BLOCK_SIZE)
        nested = tl.load(nested_absmax + group, mask=inside, other=0)
        entry = tl.load(nested_code + scale.to(tl.int32))
        mean = tl.load(offset)
        if WRONG == "fused":
            scale = (entry.to(tl.float64) * nested.to(tl.float64) + mean.to(tl.float64)).to(tl.float32)
        elif WRONG == "offset forgotten":
            scale = entry * nested
        else:
            scale = entry * nested + mean
        if WRONG == "clamped":
            scale = tl.maximum(scale, 0.0)
    if WRONG == "magnitude":
        scale = tl.abs(scale)
    if WRONG == "half scale":
        scale = scale.to(tl.float16).to(tl.float32)

    w = value * scale
    if WRONG == "flushed":
        w = tl.where(tl.abs(w) < 6.103515625e-05, w * 0.0, w)
    rounded = w.to(out.dtype.element_ty)
    if WRONG == "truncated":
        rounded = tl.where(tl.abs(rounded.to(tl.float32)) > tl.abs(w), (w * 0.9995).to(out.dtype.element_ty), rounded)
    if WRONG == "accumulates":
        before = tl.load(out + weight, mask=inside, other=0)
        rounded = tl.where(before == before, rounded + before, rounded).to(out.dtype.element_ty)

    if WRONG == "no mask":
        tl.store(out + weight, rounded, mask=weight < n + 3)
    elif WRONG == "whole bytes":
        tl.store(out + weight, rounded, mask=weight < n // 2 * 2)
    elif WRONG == "whole tiles":
        tl.store(out + weight, rounded, mask=weight < n // TILE * TILE)
    else:
        tl.store(out + weight, rounded, mask=inside)
    if WRONG == "twice":
        tl.store(out + weight, rounded, mask=inside)
    if WRONG == "eats its scales":
        tl.store(absmax + block, tl.load(absmax + block, mask=inside, other=0) * 0, mask=inside)
