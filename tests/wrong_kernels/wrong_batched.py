"""The kernels of many adapters in one batch, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

DOWN = (
    "neighbor's adapter",
    "neighbor's scale",
    "scale forgotten",
    "rows not sorted",  # the places themselves instead of `order`
    "last segment lost",
    "last row lost",  # of each tile
    "last features forgotten",
    "float16 sums",
)
UP = (
    "neighbor's adapter",
    "base forgotten",
    "only with an adapter",  # rows without one are not written
    "one tile of ranks",
    "ranks not masked",
    "rounded early",
)
OUTER = (
    "neighbor's adapter",
    "segment too long",  # with the first row of the next one
    "last row lost",
    "rows not sorted",
    "all rows",
)


@triton.jit
def tile_rows(order, tiles, n_tiles, ROWS: tl.constexpr, WRONG: tl.constexpr):
    tile = tl.program_id(0)
    place = tl.load(tiles + n_tiles + tile) + tl.arange(0, ROWS)
    last = tl.load(tiles + 2 * n_tiles + tile)
    if WRONG == "last row lost":
        last -= 1
    inside = place < last
    row = tl.load(order + place, mask=inside, other=0)
    if WRONG == "rows not sorted":
        row = place
    return tl.load(tiles + tile), row, inside


@triton.jit
def down(
    h, x, A, scaling, order, tiles, x_stride, adapter_stride, rank_stride, feature_stride, n_tiles, n_rows, n_features,
    r, features_a_part,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    adapter, row, filled = tile_rows(order, tiles, n_tiles, ROWS, WRONG)
    rank = tl.program_id(1).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    largest = tl.max(tl.load(tiles + tl.arange(0, 8), mask=tl.arange(0, 8) < n_tiles, other=-1), axis=0)
    taken = adapter
    if WRONG == "neighbor's adapter":
        taken = tl.maximum(adapter - 1, 0)
    start = tl.program_id(2) * features_a_part
    end = tl.minimum(start + features_a_part, n_features)
    if WRONG == "last features forgotten":
        end = end // FEATURES * FEATURES
    if WRONG == "last segment lost":
        end = tl.where(adapter == largest, 0, end)
    if adapter >= 0:
        for first in range(start, end, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            inside = filled[:, None] & (feature < end)[None, :]
            values = tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)
            inside = (feature < end)[:, None] & (rank < r)[None, :]
            at = taken * adapter_stride + rank[None, :] * rank_stride + feature[:, None] * feature_stride
            matrix = tl.load(A + at, mask=inside, other=0).to(values.dtype)
            total += tl.dot(values, matrix, input_precision="ieee")
            if WRONG == "float16 sums":
                total = total.to(tl.float16).to(tl.float32)
        if WRONG == "neighbor's scale":
            adapter = tl.maximum(adapter - 1, 0)
        if WRONG != "scale forgotten":
            total *= tl.load(scaling + adapter).to(tl.float32)
    inside = filled[:, None] & (rank < r)[None, :]
    row += tl.program_id(2).to(tl.int64) * n_rows
    tl.store(h + row[:, None] * r + rank[None, :], total.to(h.dtype.element_ty), mask=inside)


@triton.jit
def up(
    y, base, h, B, order, tiles, base_stride, adapter_stride, rank_stride, feature_stride, n_tiles, n_features, r,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    adapter, row, filled = tile_rows(order, tiles, n_tiles, ROWS, WRONG)
    feature = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    inside = filled[:, None] & (feature < n_features)[None, :]
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    if WRONG != "base forgotten":
        total = tl.load(base + row[:, None] * base_stride + feature[None, :], mask=inside, other=0).to(tl.float32)
    taken = adapter
    if WRONG == "neighbor's adapter":
        taken = tl.maximum(adapter - 1, 0)
    end = r
    if WRONG == "one tile of ranks":
        end = tl.minimum(r, RANKS)
    beyond = 0
    if WRONG == "ranks not masked":
        beyond = 1
    if adapter >= 0:
        detour = tl.zeros((ROWS, FEATURES), tl.float32)
        for first in range(0, end, RANKS):
            rank = first + tl.arange(0, RANKS)
            values = tl.load(
                h + row[:, None] * r + rank[None, :], mask=filled[:, None] & (rank < r)[None, :], other=beyond
            )
            at = taken * adapter_stride + rank[:, None] * rank_stride + feature[None, :] * feature_stride
            matrix = tl.load(B + at, mask=(rank < r)[:, None] & (feature < n_features)[None, :], other=beyond)
            detour += tl.dot(values, matrix.to(values.dtype), input_precision="ieee")
        if WRONG == "rounded early":
            detour = detour.to(tl.float16).to(tl.float32)
        total += detour
    if WRONG == "only with an adapter":
        inside = inside & (tl.zeros((ROWS, FEATURES), tl.int64) + adapter >= 0)
    tl.store(y + row[:, None] * n_features + feature[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def outer(
    gradient, h, x, order, starts, x_stride, n_features, r,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    n = tl.num_programs(0)
    start = tl.load(starts + adapter)
    end = tl.load(starts + adapter + 1)
    if WRONG == "neighbor's adapter":
        start = tl.load(starts + (adapter + 1) % n)
        end = tl.load(starts + (adapter + 1) % n + 1)
    if WRONG == "segment too long":
        end = tl.minimum(end + 1, tl.load(starts + n))
    if WRONG == "last row lost":
        end -= 1
    if WRONG == "all rows":
        start = tl.load(starts)
        end = tl.load(starts + n)
    total = tl.zeros((RANKS, FEATURES), tl.float32)
    for i in range(0, end - start, ROWS):
        place = start + i + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < end, other=0)
        if WRONG == "rows not sorted":
            row = place
        left = tl.load(h + row[None, :] * r + rank[:, None], mask=(rank < r)[:, None] & (place < end)[None, :], other=0)
        inside = (place < end)[:, None] & (feature < n_features)[None, :]
        values = tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)
        total += tl.dot(left, values, input_precision="ieee")
    inside = (rank < r)[:, None] & (feature < n_features)[None, :]
    at = (adapter * r + rank[:, None]) * n_features + feature[None, :]
    tl.store(gradient + at, total.to(gradient.dtype.element_ty), mask=inside)
