"""The detour of LoRA on a GPU: three kernels, each of which both passes use.

    h = s x̃ Aᵀ        y = y₀ + h Bᵀ        x̃ = m x / (1 − p)        y₀ = x Wᵀ                                (1)
    g = dy B        dA = s gᵀ x̃        dB = dyᵀ h        dx = dx₀ + m (s / (1 − p)) g A        dx₀ = dy W       (2)

y₀ and dx₀ are the base's: a dense matrix multiplies them with the vendor's product, an NF4Tensor decodes itself on the
way. What is left are six products in which one side has only r columns. They come in three kinds:

    down    long rows to r numbers       h from x and A,  g from dy and B                                   (3)
    up      r numbers to long rows       y from h and B,  dx from g and A                                   (4)
    outer   a sum over rows              dA from g and x, dB from h and dy                                  (5)

**Bytes.** For each number of x, `down` does 2r operations, 32 for r = 16, and reads 2 bytes; a tensor core does some
300 operations in the time that memory takes for a byte. So all three kinds wait for memory, and are good if they touch
each long row once: `down` reads x, `up` reads y₀ and writes y, `outer` reads x or dy. Done with the usual functions,
the forward pass moves x̃ (written and read), h, s h, h Bᵀ, and y₀ + h Bᵀ as well. Predicted for 8,192 rows and a
4,096 × 4,096 matrix in 16 bits, without dropout: 64 MB of x and 128 MB of y, about 60 µs at 3.35 TB/s, where the base
product itself takes 2 · 8192 · 4096² operations, about 400 µs at 700 TFLOP/s.

**Why y₀ is not in the same kernel.** x Wᵀ + h Bᵀ is one product with r more columns, and written as one it would save
the 128 MB. But then the large product is ours and not the vendor's, and there a tenth is easily lost. `up` adds to y₀
in float32 and rounds once; in 16 bits y₀ has its own rounding before.

**Dropout leaves no trace in memory.** Element i of the mask is a pure function of (key, i): Philox of the counter i,
bit for bit `minift.nn.dropout`. It is formed where it is used, three times: in `down`, in `outer` for dA, in `up` for
dx. Neither it nor x̃ is stored. A mask only chooses, so 1 / (1 − p) waits and is multiplied into s once, on the sum: x̃
is not rounded. But it is not free: ten rounds of two products each, about a hundred integer instructions a number.
Predicted for the x above, on an H100 with 64 of them a clock on each multiprocessor: 230 µs a mask, several times what
reading x takes, and all three nearly as much as the base's products in both passes. Fewer would need another mask.

**Sums without atomics.** A sum over all rows is split into shares of rows; a program of `outer` sums one share and
writes it to a place of its own, and the shares are added in order. The same bits every time. So is the sum over
features in `down` where there are few rows: for a single one, one program would go through all of x and A by itself,
with one multiprocessor of 132. Where r is not a multiple of 16, the least that a tensor core multiplies, the places
beyond are zeros.

Sums are in float32. `scale` is s or s / (1 − p). A matrix of any strides will do, so B serves as its own transpose; it
takes the type of what it is multiplied with. DROPOUT False: p and key are not used.
"""

import triton
import triton.language as tl

# (ROWS, FEATURES, num_warps, num_stages) by the bytes of an element of x, without and with dropout: that needs so many
# registers for its random numbers that a lane can have fewer elements. The stages in flight fit into 64 KB of shared
# memory, which is all that an MI300 has, also where A is float32 and its tile 64 ranks wide.
DOWN = {(2, False): (32, 64, 4, 3), (2, True): (32, 64, 4, 2), (4, False): (32, 32, 4, 2), (4, True): (32, 32, 4, 2)}
UP = {(2, False): (64, 128, 8, 1), (2, True): (32, 64, 4, 1), (4, False): (32, 32, 4, 1), (4, True): (32, 32, 4, 1)}
OUTER = {(2, False): (32, 128, 4, 4), (2, True): (32, 64, 4, 2), (4, False): (32, 32, 4, 2), (4, True): (32, 32, 4, 2)}
PROGRAMS = 256  # so many, about two a multiprocessor, are made by splitting a sum where there are fewer
RANKS = 64  # the widest tile of ranks; a larger r takes several


@triton.jit
def keeps(row, feature, n_features, p, key):
    """The dropout mask of these rows and features: [u(key, element) > p], elements counted in row-major order."""
    return tl.rand(key, row[:, None] * n_features + feature[None, :]) > p


@triton.jit(do_not_specialize=["key"])
def down(
    h, x, A, x_stride, rank_stride, feature_stride, n_rows, n_features, r, features_a_part, scale, p, key,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Kind (3): scale · (m x) Aᵀ for ROWS rows and a share of the features; h (parts, n_rows, r) is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    start = tl.program_id(2) * features_a_part
    end = tl.minimum(start + features_a_part, n_features)
    for first in range(start, end, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        inside = (row < n_rows)[:, None] & (feature < end)[None, :]
        values = tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)
        if DROPOUT:
            values = tl.where(keeps(row, feature, n_features, p, key), values, 0).to(values.dtype)
        inside = (feature < end)[:, None] & (rank < r)[None, :]
        at = rank[None, :] * rank_stride + feature[:, None] * feature_stride
        matrix = tl.load(A + at, mask=inside, other=0).to(values.dtype)
        total += tl.dot(values, matrix, input_precision="ieee")
    inside = (row < n_rows)[:, None] & (rank < r)[None, :]
    row += tl.program_id(2).to(tl.int64) * n_rows
    tl.store(h + row[:, None] * r + rank[None, :], (total * scale).to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key"])
def up(
    y, base, h, B, base_stride, rank_stride, feature_stride, n_rows, n_features, r, scale, p, key,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Kind (4): y = base + scale · m (h Bᵀ), a tile of ROWS × FEATURES; y and h are contiguous, B (n_features, r)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    for first in range(0, r, RANKS):
        rank = first + tl.arange(0, RANKS)
        inside = (row < n_rows)[:, None] & (rank < r)[None, :]
        values = tl.load(h + row[:, None] * r + rank[None, :], mask=inside, other=0)
        inside = (rank < r)[:, None] & (feature < n_features)[None, :]
        at = rank[:, None].to(tl.int64) * rank_stride + feature[None, :] * feature_stride
        matrix = tl.load(B + at, mask=inside, other=0).to(values.dtype)
        total += tl.dot(values, matrix, input_precision="ieee")
    total *= scale
    if DROPOUT:
        total = tl.where(keeps(row, feature, n_features, p, key), total, 0.0)
    inside = (row < n_rows)[:, None] & (feature < n_features)[None, :]
    total += tl.load(base + row[:, None] * base_stride + feature[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(y + row[:, None] * n_features + feature[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key"])
def outer(
    gradient, h, x, x_stride, n_rows, n_features, r, rows_a_part, scale, p, key,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Kind (5): hᵀ (m x) · scale over one share of the rows; gradient (parts, r, n_features) and h are contiguous."""
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    part = tl.program_id(2).to(tl.int64)
    start = part * rows_a_part
    end = tl.minimum(start + rows_a_part, n_rows)
    total = tl.zeros((RANKS, FEATURES), tl.float32)
    for i in range(0, end - start, ROWS):
        row = start + i + tl.arange(0, ROWS)
        inside = (rank < r)[:, None] & (row < end)[None, :]
        left = tl.load(h + row[None, :] * r + rank[:, None], mask=inside, other=0)
        inside = (row < end)[:, None] & (feature < n_features)[None, :]
        values = tl.load(x + row[:, None] * x_stride + feature[None, :], mask=inside, other=0)
        if DROPOUT:
            values = tl.where(keeps(row, feature, n_features, p, key), values, 0).to(values.dtype)
        total += tl.dot(left, values, input_precision="ieee")
    inside = (rank < r)[:, None] & (feature < n_features)[None, :]
    at = (part * r + rank[:, None]) * n_features + feature[None, :]
    tl.store(gradient + at, total * scale, mask=inside)
