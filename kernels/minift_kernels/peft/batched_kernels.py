"""The detours of many adapters on a GPU, in one launch whatever their number.

    h_i = s_a x_i A_aᵀ        y_i = y₀_i + h_i B_aᵀ        a = the adapter of row i                         (1)
    g_i = s_a dy_i B_a        dA_a = Σ_i g_iᵀ x_i        dB_a = Σ_i dy_iᵀ h_i        dx_i = dx₀_i + g_i A_a  (2)

The kinds of product are those of `lora_kernels`: `down`, `up` and `outer`, each for both passes. What is new is that
rows which are multiplied with one matrix do not lie together.

**Tiles of one adapter.** Rows are sorted by adapter, which moves only their numbers: `order`. A tile is up to ROWS rows
of one adapter, neighbors in `order`; its last places may be empty. How many tiles there are depends on the data, which
the CPU would have to wait for. So as many programs are started as could ever be needed, N / ROWS and one for each
adapter; a small table says where tile t begins and ends and whose it is, and programs beyond the last find an empty
one. Rows without an adapter are a segment like the others, with h = 0.

**Bytes.** While text is generated every row may belong to another user. Then a tile has one row, and what takes time is
reading the adapters, each once: 4 r (in + out) bytes in float32, 1 MB for r = 32 and two times 4,096. A product of one
row needs no tensor core, but nothing is lost by multiplying 15 rows of zeros beside it, as long as memory is what all
wait for.

**Sums without atomics.** Where there are few tiles, `down` splits its sum over features into shares, each with a place
of its own, and they are added in order. A program of `outer` has an adapter and a range of columns to itself, and goes
through all rows of the segment in order. For few adapters and many rows that leaves multiprocessors idle; training one
adapter is what `lora_kernels` is for.

Sums are in float32. A (n, r, features) and B (n, features, r) may have any strides, so that each serves as the other;
they take the type of what they are multiplied with.
"""

import triton
import triton.language as tl

ROWS = 16  # of a tile: the least that a tensor core multiplies
PROGRAMS = 256  # so many, about two a multiprocessor, are made by splitting a sum over features where there are fewer
# (FEATURES, num_warps, num_stages) by the bytes of an element of x
DOWN = {2: (128, 4, 3), 4: (64, 4, 2)}
UP = {2: (128, 4, 1), 4: (64, 4, 1)}
OUTER = {2: (128, 4, 2), 4: (64, 4, 2)}
RANKS = 32  # the widest tile of ranks; a larger r takes several


@triton.jit
def tile_rows(order, tiles, n_tiles, ROWS: tl.constexpr):
    """The adapter of this program's tile, its rows, and which of its places hold one."""
    tile = tl.program_id(0)
    place = tl.load(tiles + n_tiles + tile) + tl.arange(0, ROWS)
    inside = place < tl.load(tiles + 2 * n_tiles + tile)
    return tl.load(tiles + tile), tl.load(order + place, mask=inside, other=0), inside


@triton.jit
def down(
    h, x, A, scaling, order, tiles, x_stride, adapter_stride, rank_stride, feature_stride, n_tiles, n_rows, n_features,
    r, features_a_part,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """s_a x_i A_aᵀ of (1) for one tile and a share of the features, zero for rows without an adapter; h (parts, n_rows,
    r) is contiguous."""
    adapter, row, filled = tile_rows(order, tiles, n_tiles, ROWS)
    rank = tl.program_id(1).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    if adapter >= 0:
        start = tl.program_id(2) * features_a_part
        end = tl.minimum(start + features_a_part, n_features)
        for first in range(start, end, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            inside = filled[:, None] & (feature < end)[None, :]
            values = tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)
            inside = (feature < end)[:, None] & (rank < r)[None, :]
            at = adapter * adapter_stride + rank[None, :] * rank_stride + feature[:, None] * feature_stride
            matrix = tl.load(A + at, mask=inside, other=0).to(values.dtype)
            total += tl.dot(values, matrix, input_precision="ieee")
        total *= tl.load(scaling + adapter).to(tl.float32)
    inside = filled[:, None] & (rank < r)[None, :]
    row += tl.program_id(2).to(tl.int64) * n_rows
    tl.store(h + row[:, None] * r + rank[None, :], total.to(h.dtype.element_ty), mask=inside)


@triton.jit
def up(
    y, base, h, B, order, tiles, base_stride, adapter_stride, rank_stride, feature_stride, n_tiles, n_features, r,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y_i = y₀_i + h_i B_aᵀ of (1) for one tile and FEATURES columns; y and h are contiguous."""
    adapter, row, filled = tile_rows(order, tiles, n_tiles, ROWS)
    feature = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    inside = filled[:, None] & (feature < n_features)[None, :]
    total = tl.load(base + row[:, None] * base_stride + feature[None, :], mask=inside, other=0).to(tl.float32)
    if adapter >= 0:
        detour = tl.zeros((ROWS, FEATURES), tl.float32)
        for first in range(0, r, RANKS):
            rank = first + tl.arange(0, RANKS)
            values = tl.load(h + row[:, None] * r + rank[None, :], mask=filled[:, None] & (rank < r)[None, :], other=0)
            at = adapter * adapter_stride + rank[:, None] * rank_stride + feature[None, :] * feature_stride
            matrix = tl.load(B + at, mask=(rank < r)[:, None] & (feature < n_features)[None, :], other=0)
            detour += tl.dot(values, matrix.to(values.dtype), input_precision="ieee")
        total += detour
    tl.store(y + row[:, None] * n_features + feature[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def outer(
    gradient, h, x, order, starts, x_stride, n_features, r,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Σ_i h_iᵀ x_i of (2) over the rows of one adapter; gradient (n, r, n_features) and h are contiguous.

    `starts` says where the segment of each adapter begins in `order`, and at its end where the last one ends."""
    adapter = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    start = tl.load(starts + adapter)
    end = tl.load(starts + adapter + 1)
    total = tl.zeros((RANKS, FEATURES), tl.float32)
    for i in range(0, end - start, ROWS):
        place = start + i + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < end, other=0)
        left = tl.load(h + row[None, :] * r + rank[:, None], mask=(rank < r)[:, None] & (place < end)[None, :], other=0)
        inside = (place < end)[:, None] & (feature < n_features)[None, :]
        values = tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)
        total += tl.dot(left, values, input_precision="ieee")
    inside = (rank < r)[:, None] & (feature < n_features)[None, :]
    at = (adapter * r + rank[:, None]) * n_features + feature[None, :]
    tl.store(gradient + at, total.to(gradient.dtype.element_ty), mask=inside)
