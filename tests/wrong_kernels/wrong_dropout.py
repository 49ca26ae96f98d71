"""Dropout's kernel, wrong in one way each: the properties must reject every one of them.

With WRONG = "nothing" it is right. Only what is wrong differs.
"""

import triton
import triton.language as tl

DROPOUT = (
    "offset forgotten",
    "upper half of the offset forgotten",
    "upper half of the key forgotten",
    "counters of the tile",  # each tile begins at the offset again
    "keeps below p",
    "keeps what is p",  # u ≥ p
    "not scaled",
    "scaled by 1 - p",
    "another word",
    "seven rounds",
    "zero for NaN",
    "scale rounded early",
    "last one forgotten",
    "p in float16",
)


@triton.jit(do_not_specialize=["key", "offset"])
def dropout(y, x, n, key, offset, p, scale, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    if WRONG == "last one forgotten":
        inside = i < n - 1
    value = tl.load(x + i, mask=inside).to(tl.float32)
    counter = offset + i
    if WRONG == "offset forgotten":
        counter = i
    if WRONG == "upper half of the offset forgotten":
        counter = counter & 0xFFFFFFFF
    if WRONG == "counters of the tile":
        counter = offset + i % BLOCK
    if WRONG == "upper half of the key forgotten":
        key = tl.to_tensor(key).to(tl.uint32)
    if WRONG == "another word":
        _, word, _, _ = tl.randint4x(key, counter)
        u = tl.uint_to_uniform_float(word)
    elif WRONG == "seven rounds":
        u = tl.rand(key, counter, 7)
    else:
        u = tl.rand(key, counter)
    if WRONG == "keeps below p":
        keep = u <= p
    elif WRONG == "keeps what is p":
        keep = u >= p
    elif WRONG == "p in float16":
        keep = u > (u * 0 + p).to(tl.float16).to(tl.float32)
    else:
        keep = u > p
    if WRONG == "not scaled":
        scale = 1.0
    if WRONG == "scaled by 1 - p":
        scale = 1.0 / scale
    factor = tl.where(keep, scale, 0.0)
    if WRONG == "scale rounded early":
        factor = factor.to(tl.float16).to(tl.float32)
    result = value * factor
    if WRONG == "zero for NaN":
        result = tl.where(keep, value * scale, 0.0)
    tl.store(y + i, result.to(y.dtype.element_ty), mask=inside)
