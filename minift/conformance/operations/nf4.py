"""NF4: 4-bit codes, two a byte, and a float32 scale for every block. Bit for bit bitsandbytes', ties included."""

from __future__ import annotations

import numpy as np

from minift.conformance import strategies
from minift.conformance.dequantizers import dequantizer
from minift.conformance.operation import Operation
from minift.conformance.quantizers import quantizer, results, unpacked
from minift.conformance.strategies import Codes, Numbers, battery
from minift.quant import nf4
from minift.quant.nf4 import BLOCK_SIZES, NF4Tensor

f32 = np.float32

# bitsandbytes' own numbers, copied from its sources (functional.py `get_4bit_type`, csrc/kernels.cu `dQuantizeNF4`)
TABLE = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], f32)  # fmt: skip
THRESHOLDS = np.array(
    [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
     -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
     0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011],
    f32)  # fmt: skip
NORMAL = 1 << 16  # numbers from a normal distribution: what is known of their errors is a statistic
MEAN, DEVIATION = 0.072798, 7.4e-5  # of mean |ŵ − w|, block size 64: bitsandbytes' published figures (its tests)


def call(f, w, case):
    return f(w, case.block_size)


def many_codes(f, w, case) -> tuple[np.ndarray, np.ndarray]:
    codes, absmax = results(call(f, w.copy(), case), "codes", "absmax")
    assert codes.size == w.size // 2, f"{codes.size} codes, needed {w.size // 2} bytes, two codes each"
    codes = unpacked(codes.reshape(-1).astype(np.uint8), w.size)
    return codes, TABLE[codes] * np.repeat(absmax.reshape(-1), case.block_size)[: w.size]


def error_of_normal_numbers(f, case):
    """Mean |ŵ − w| on N(0, 1) is bitsandbytes' published figure, neither more nor less, to five standard errors."""
    if len(case.w) == NORMAL:
        w = case.array()
        error = np.abs(many_codes(f, w, case)[1] - w)
        allowed = 5 * np.hypot(DEVIATION, float(error.std()) / NORMAL**0.5)
        assert abs(error.mean() - MEAN) <= allowed, f"{error.mean():.6f}, needed {MEAN} ± {allowed:.6f}"


def is_not_symmetric(f, case):
    """NF4(−w) = −NF4(w) for 12 % of normal numbers: the table has one more positive entry than negative ones."""
    if len(case.w) == NORMAL:
        w = case.array()
        (plus, w_plus), (minus, w_minus) = many_codes(f, w, case), many_codes(f, -w, case)
        mirrored, odd = np.mean(plus + minus == 15), np.mean(w_plus == -w_minus)
        assert 0.40 < mirrored < 0.46, f"{mirrored:.1%} of the codes mirror, needed 43 %"
        assert 0.10 < odd < 0.14, f"{odd:.1%} of the numbers mirror, needed 12 %"


def _normal(n: int, block_size: int, dtype: str = "float32") -> Numbers:
    return Numbers.of(np.random.default_rng(7).standard_normal(n), block_size, dtype=dtype)


FIXED = (
    *(Numbers.of(x, block_size) for _, x, block_size in battery(THRESHOLDS, (64,))),
    Numbers.of(strategies.every_threshold(THRESHOLDS, 32), 32),
    *(_normal(2 * block_size + 77, block_size) for block_size in BLOCK_SIZES),
    *(_normal(n, 32, dtype) for n in (1, 130) for dtype in ("float16", "float64", "bfloat16")),
    _normal(NORMAL, 64),
)


def _decoded(n: int, block_size: int, shape: tuple[int, ...] | None = None, dtype: str = "float32") -> Codes:
    scale = np.array([1, 0.75, 0, 1e-39, 123.456, 3e-5], f32)[np.arange(-(-n // block_size)) % 6]
    return Codes(tuple((np.arange(n) * 7 % 16).tolist()), tuple(scale.tolist()), block_size, shape, dtype)


def every_byte() -> Codes:
    return Codes(tuple(unpacked(np.arange(256), 512).tolist()), (1.0,) * 8)


DECODED = (
    every_byte(),
    *(_decoded(n, 64) for n in (0, 1, 2, 7, 63, 64, 65, 129, 400)),
    *(_decoded(2 * block_size + 77, block_size) for block_size in BLOCK_SIZES),
    *(_decoded(192, 64, shape) for shape in ((2, 96), (96, 2), (3, 64), (4, 6, 8), (1, 192))),  # a block over two rows
    _decoded(1, 64, ()),
    _decoded(0, 64, (3, 0)),
    *(_decoded(200, 32, (2, 100), dtype) for dtype in ("float16", "float64", "bfloat16")),
)


def _packed(case: Codes) -> tuple[np.ndarray, np.ndarray]:
    codes, absmax = case.arrays()
    both = np.append(codes, np.full(codes.size % 2, nf4.ZERO, np.uint8)).reshape(-1, 2)
    return both[:, 0] * np.uint8(16) + both[:, 1], absmax


def _decode(f, codes, absmax, case):
    return f(codes, absmax, case.size(), case.block_size, *[case.dtype] * (case.dtype != "float32"))


def _reference(codes, absmax, shape, block_size, dtype="float32"):
    return nf4.dequantize(NF4Tensor(codes, absmax, shape, block_size), dtype)


OPERATIONS = (
    Operation(
        "nf4.quantize",
        nf4.quantize,
        "f(w, block_size) -> (codes, absmax), or an object with .codes and .absmax. w: any shape; codes: uint8 "
        "(ceil(n / 2),), two a byte, the first in the high nibble, an odd last one paired with 7; absmax: float32 "
        "(ceil(n / block_size),), in row-major order. The last block may be short",
        lambda dtypes: strategies.numbers(tuple(THRESHOLDS.tolist()), (64, 32, 128), dtypes),
        FIXED,
        (*quantizer(call, lambda case: TABLE, packed=True), error_of_normal_numbers, is_not_symmetric),
    ),
    Operation(
        "nf4.dequantize",
        _reference,
        "f(codes, absmax, shape, block_size) -> w, float32 of that shape, from codes and absmax as quantize gives "
        "them; for other types f(codes, absmax, shape, block_size, dtype) with the type's name, such as 'float16'",
        lambda dtypes: strategies.codes(16, (64, 32, 128), dtypes),
        DECODED,
        dequantizer(_decode, lambda case: TABLE, _packed),
    ),
)
