"""NF4 quantization kernels, each wrong in one way: the properties must reject every one of them."""

import triton
import triton.language as tl

WRONG = (
    "divides",  # fl(w / a) instead of fl(w · fl(1/a)): one code in millions
    "ties up",  # a number on a threshold gets the higher code
    "half",  # scaled in float16
    "NaN dropped",  # as `max` does by itself
    "nibbles swapped",
    "filled with 0",  # the unused nibble is 0, not 7
    "not tiny",  # 1/a overflows
    "signed max",  # max w instead of max |w|
    "next scale",  # every block's scale one place later
)

MIDPOINTS = tl.constexpr(
    (-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
     -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
     0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011)
)  # fmt: skip


@triton.jit
def quantize(codes, absmax, w, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WRONG: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * (TILE // BLOCK_SIZE) + tl.arange(0, TILE // BLOCK_SIZE)
    weight = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(w + weight, mask=weight < n, other=0).to(tl.float32)
    a = tl.max(x, axis=1) if WRONG == "signed max" else tl.max(tl.abs(x), axis=1)
    holds_nan = tl.max((x != x).to(tl.int32), axis=1) != 0
    stored = a if WRONG == "NaN dropped" else tl.where(holds_nan, float("nan"), a)
    last = (n - 1) // BLOCK_SIZE
    at = tl.minimum(block + 1, last) if WRONG == "next scale" else block
    tl.store(absmax + at, stored, mask=block * BLOCK_SIZE < n)

    one, tiny = tl.full(a.shape, 1.0, tl.float32), tl.full(a.shape, 1e-38, tl.float32)
    a = a if WRONG == "not tiny" else tl.maximum(a, tiny)
    if WRONG == "divides":
        scaled = tl.math.div_rn(x, a[:, None] + tl.zeros_like(x))
    else:
        scaled = x * tl.math.div_rn(one, a)[:, None]
    if WRONG == "half":
        scaled = scaled.to(tl.float16).to(tl.float32)
    code = tl.full(x.shape, 0, tl.int32)
    for i in tl.static_range(15):
        code += (scaled >= MIDPOINTS[i] if WRONG == "ties up" else scaled > MIDPOINTS[i]).to(tl.int32)
    if WRONG == "filled with 0":
        code = tl.where(weight < n, code, 0)
    high, low = tl.split(code.reshape(TILE // BLOCK_SIZE, BLOCK_SIZE // 2, 2))
    byte = low * 16 + high if WRONG == "nibbles swapped" else high * 16 + low
    place = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(codes + place, byte.to(tl.uint8), mask=place < n_bytes)
