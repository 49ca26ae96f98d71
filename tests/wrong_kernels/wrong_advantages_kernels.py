"""Kernels of the advantages, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

GAE = (
    "carry forgotten",  # each tile begins anew
    "carries the last",  # Â of the tile's last token instead of its first
    "from the start",  # a scan in the other direction
    "maps exchanged",  # (a a′, b′ + a′ b)
    "gaps are bridged",  # a is γλ where nothing counts too
    "masked by a product",  # what does not count times 0
    "value behind the end",  # V_{t+1} wherever it stands, counting or not
    "gamma forgotten",  # in δ
    "decay without lambda",
    "bootstrap in every tile",  # at the last token that counts in each
    "bootstrap at the width",  # at the last column instead of the last token
    "bootstrap in every episode",
    "neighbor's row",
    "last tile forgotten",
)


@triton.jit
def after(a_behind, b_behind, a, b):
    return a * a_behind, b + a * b_behind


@triton.jit
def exchanged(a_behind, b_behind, a, b):
    return a * a_behind, b_behind + a_behind * b


@triton.jit
def gae(
    advantages, rewards, values, mask, bootstrap, width, gamma, decay,
    BOOTSTRAP: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    end = tl.full((), 0.0, tl.float32)
    if BOOTSTRAP:
        end = tl.load(bootstrap + row).to(tl.float32)
    carried = tl.full((), 0.0, tl.float32)
    met = tl.full((), 0, tl.int32)
    tiles = tl.cdiv(width, BLOCK)
    if WRONG == "neighbor's row":
        start = tl.maximum(row - 1, 0) * width
    if WRONG == "decay without lambda":
        decay = gamma
    if WRONG == "gamma forgotten":
        gamma = 1.0
    for i in range(0, tiles):
        column = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        counts = tl.load(mask + start + column, mask=inside, other=0) != 0
        next_counts = tl.load(mask + start + column + 1, mask=column + 1 < width, other=0) != 0
        read, read_next = counts, next_counts
        if WRONG == "masked by a product":
            read, read_next = inside, column + 1 < width
        r = tl.load(rewards + start + column, mask=read, other=0).to(tl.float32)
        v = tl.load(values + start + column, mask=read, other=0).to(tl.float32)
        if WRONG == "value behind the end":
            read_next = counts & (column + 1 < width)
        following = tl.load(values + start + column + 1, mask=read_next, other=0).to(tl.float32)
        if WRONG == "masked by a product":
            following = following * next_counts.to(tl.float32)
        last = tl.max(tl.where(counts, column, -1), axis=0)
        if BOOTSTRAP:
            if WRONG == "bootstrap in every tile":
                following = tl.where(column == last, end, following)
            elif WRONG == "bootstrap at the width":
                following = tl.where(column == width - 1, end, following)
            elif WRONG == "bootstrap in every episode":
                following = tl.where(next_counts, following, end)
            else:
                following = tl.where((column == last) & (met == 0), end, following)
        met = tl.where(last >= 0, 1, met)
        delta = tl.where(counts, r + gamma * following - v, 0.0)
        if WRONG == "masked by a product":
            delta = (r + gamma * following - v) * counts.to(tl.float32)
        a = tl.where(counts, decay, 0.0)
        if WRONG == "gaps are bridged":
            a = tl.zeros((BLOCK,), tl.float32) + decay
        if WRONG == "from the start":
            a, b = tl.associative_scan((a, delta), 0, after)
        elif WRONG == "maps exchanged":
            a, b = tl.associative_scan((a, delta), 0, exchanged, reverse=True)
        else:
            a, b = tl.associative_scan((a, delta), 0, after, reverse=True)
        result = b + a * carried
        edge = (tiles - 1 - i) * BLOCK
        if WRONG == "carries the last":
            edge += BLOCK - 1
        if WRONG != "carry forgotten":
            carried = tl.sum(tl.where(column == edge, result, 0.0), axis=0)
        if WRONG == "last tile forgotten":
            result = tl.where((column >= BLOCK) & (column >= width // BLOCK * BLOCK), 0.0, result)
        tl.store(advantages + row * width + column, result.to(advantages.dtype.element_ty), mask=inside)
