"""The kernels of LoRA's detour, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

DOWN = (
    "scale forgotten",
    "scale squared",
    "no dropout",
    "dropout unscaled",  # 1 / (1 − p) forgotten
    "counter transposed",  # elements counted column by column
    "counter from one",
    "keeps what it should drop",
    "row by width",  # n_features instead of the stride
    "padding not masked",  # features beyond the row
    "last features forgotten",  # where FEATURES does not divide the row
    "overlapping parts",  # a feature belongs to two shares
    "float16 sums",
)
UP = (
    "scale forgotten",
    "base forgotten",
    "no dropout",
    "dropout on the base",
    "counter transposed",
    "counter from one",
    "rounded early",  # h Bᵀ rounded to the type of y before the sum
    "one tile of ranks",  # what is beyond RANKS forgotten
    "ranks not masked",  # the places beyond r count as ones
    "B transposed",  # the strides exchanged
    "last row forgotten",
)
OUTER = (
    "scale forgotten",
    "undropped x",  # dA of x instead of x̃
    "overlapping parts",  # a row belongs to two shares
    "last row forgotten",
    "row of the share",  # each share has the mask of the first
    "neighbor's h",
    "float16 sums",
)


@triton.jit
def keeps(row, feature, n_rows, n_features, p, key, WRONG: tl.constexpr):
    element = row[:, None] * n_features + feature[None, :]
    if WRONG == "counter transposed":
        element = row[:, None] + feature[None, :].to(tl.int64) * n_rows
    if WRONG == "counter from one":
        element += 1
    u = tl.rand(key, element)
    if WRONG == "keeps what it should drop":
        kept = u <= p
    elif WRONG == "no dropout" or WRONG == "undropped x":
        kept = u >= 0
    else:
        kept = u > p
    return kept


@triton.jit
def down(
    h, x, A, x_stride, rank_stride, feature_stride, n_rows, n_features, r, features_a_part, scale, p, key,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    if WRONG == "row by width":
        x_stride = n_features
    start = tl.program_id(2) * features_a_part
    end = tl.minimum(start + features_a_part, n_features)
    if WRONG == "last features forgotten":
        end = end // FEATURES * FEATURES
    if WRONG == "overlapping parts":
        end = tl.minimum(end + 1, n_features)
    for first in range(start, end, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        inside = (row < n_rows)[:, None] & (feature < end)[None, :]
        if WRONG == "padding not masked":
            inside = (row < n_rows)[:, None] & (feature < end + 1)[None, :]
        values = tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)
        if DROPOUT:
            values = tl.where(keeps(row, feature, n_rows, n_features, p, key, WRONG), values, 0).to(values.dtype)
        inside = (feature < end)[:, None] & (rank < r)[None, :]
        at = rank[None, :] * rank_stride + feature[:, None] * feature_stride
        matrix = tl.load(A + at, mask=inside, other=0).to(values.dtype)
        total += tl.dot(values, matrix, input_precision="ieee")
        if WRONG == "float16 sums":
            total = total.to(tl.float16).to(tl.float32)
    if WRONG == "dropout unscaled":
        scale *= 1 - p
    if WRONG == "scale squared":
        scale *= scale
    if WRONG == "scale forgotten":
        scale = 1.0
    inside = (row < n_rows)[:, None] & (rank < r)[None, :]
    row += tl.program_id(2).to(tl.int64) * n_rows
    tl.store(h + row[:, None] * r + rank[None, :], (total * scale).to(h.dtype.element_ty), mask=inside)


@triton.jit
def up(
    y, base, h, B, base_stride, rank_stride, feature_stride, n_rows, n_features, r, scale, p, key,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    end = r
    if WRONG == "one tile of ranks":
        end = tl.minimum(r, RANKS)
    if WRONG == "B transposed":
        rank_stride, feature_stride = feature_stride, rank_stride
    beyond = 0
    if WRONG == "ranks not masked":
        beyond = 1
    for first in range(0, end, RANKS):
        rank = first + tl.arange(0, RANKS)
        inside = (row < n_rows)[:, None] & (rank < r)[None, :]
        values = tl.load(h + row[:, None] * r + rank[None, :], mask=inside, other=beyond)
        inside = (rank < r)[:, None] & (feature < n_features)[None, :]
        at = rank[:, None].to(tl.int64) * rank_stride + feature[None, :] * feature_stride
        matrix = tl.load(B + at, mask=inside, other=beyond).to(values.dtype)
        total += tl.dot(values, matrix, input_precision="ieee")
    if WRONG != "scale forgotten":
        total *= scale
    if DROPOUT and WRONG != "dropout on the base":
        total = tl.where(keeps(row, feature, n_rows, n_features, p, key, WRONG), total, 0.0)
    if WRONG == "rounded early":
        total = total.to(tl.float16).to(tl.float32)
    inside = (row < n_rows)[:, None] & (feature < n_features)[None, :]
    if WRONG != "base forgotten":
        total += tl.load(base + row[:, None] * base_stride + feature[None, :], mask=inside, other=0).to(tl.float32)
    if DROPOUT and WRONG == "dropout on the base":
        total = tl.where(keeps(row, feature, n_rows, n_features, p, key, WRONG), total, 0.0)
    if WRONG == "last row forgotten":
        inside = (row < n_rows - 1)[:, None] & (feature < n_features)[None, :]
    tl.store(y + row[:, None] * n_features + feature[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def outer(
    gradient, h, x, x_stride, n_rows, n_features, r, rows_a_part, scale, p, key,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    part = tl.program_id(2).to(tl.int64)
    start = part * rows_a_part
    end = tl.minimum(start + rows_a_part, n_rows)
    if WRONG == "overlapping parts":
        end = tl.minimum(end + 1, n_rows)
    if WRONG == "last row forgotten":
        end = tl.minimum(end, n_rows - 1)
    total = tl.zeros((RANKS, FEATURES), tl.float32)
    for i in range(0, end - start, ROWS):
        row = start + i + tl.arange(0, ROWS)
        of_h = row
        if WRONG == "neighbor's h":
            of_h = tl.maximum(row - 1, 0)
        inside = (rank < r)[:, None] & (row < end)[None, :]
        left = tl.load(h + of_h[None, :] * r + rank[:, None], mask=inside, other=0)
        inside = (row < end)[:, None] & (feature < n_features)[None, :]
        values = tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)
        if DROPOUT:
            counted = row
            if WRONG == "row of the share":
                counted = row - start
            values = tl.where(keeps(counted, feature, n_rows, n_features, p, key, WRONG), values, 0).to(values.dtype)
        total += tl.dot(left, values, input_precision="ieee")
        if WRONG == "float16 sums":
            total = total.to(tl.float16).to(tl.float32)
    if WRONG == "scale forgotten":
        scale = 1.0
    inside = (rank < r)[:, None] & (feature < n_features)[None, :]
    at = (part * r + rank[:, None]) * n_features + feature[None, :]
    tl.store(gradient + at, total * scale, mask=inside)
