"""Numbers to NF4, on a GPU: the rule of `minift.quant.blockwise`, every operation rounded as it is written there.

    a = max |w|          q = #{ i : fl(w · fl(1/a)) > m_i }                                                      (1)

A code is decided by the last bit of fl(w · fl(1/a)), so the reciprocal must be the correctly rounded one. Triton's `/`
is not, on NVIDIA (it becomes `div.full`, off by up to 2 units in the last place); `div_rn` is. It is computed once a
block. The product is no part of a sum, so nothing can be fused with it.

A program takes TILE weights: a matrix with one block a row. Two codes of a byte are neighbors in their row, so a last
axis of two and `split` bring them into one lane. Beyond the end of the tensor weights are zero: that does not change a
scale, and zero has code 7, which is what a byte with an odd last weight is filled up with.

Quantizing is done once for each model; this is one step of a ladder, not a ladder.
"""

import triton
import triton.language as tl

TILE, WARPS = 4096, 4

OPTIONS = {"enable_fp_fusion": False}

# (c_i + c_(i+1)) / 2, each rounded to float32: the fifteen midpoints of the table.
MIDPOINTS = tl.constexpr(
    (-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
     -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
     0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011)
)  # fmt: skip


@triton.jit
def quantize(codes, absmax, w, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Equation (1). A block with a NaN gets the scale NaN, on which the caller refuses: `max` alone would drop it."""
    ROWS: tl.constexpr = TILE // BLOCK_SIZE
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits, and so is all that follows
    weight = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(w + weight, mask=weight < n, other=0).to(tl.float32)
    a = tl.max(tl.abs(x), axis=1)
    holds_nan = tl.max((x != x).to(tl.int32), axis=1) != 0
    tl.store(absmax + block, tl.where(holds_nan, float("nan"), a), mask=block * BLOCK_SIZE < n)
    one, tiny = tl.full(a.shape, 1.0, tl.float32), tl.full(a.shape, 1e-38, tl.float32)  # a bare 1e-38 is a float64
    inverse = tl.math.div_rn(one, tl.maximum(a, tiny))  # 1/a would overflow for a < 2.9e-39
    scaled = x * inverse[:, None]
    code = (scaled > MIDPOINTS[0]).to(tl.int32)
    for i in tl.static_range(1, 15):
        code += (scaled > MIDPOINTS[i]).to(tl.int32)
    high, low = tl.split(code.reshape(ROWS, BLOCK_SIZE // 2, 2))
    at = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(codes + at, (high * 16 + low).to(tl.uint8), mask=at < n_bytes)
