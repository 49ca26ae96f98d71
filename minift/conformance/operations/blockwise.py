"""Block-wise quantization with any table: int8, FP4 (in ascending order), bitsandbytes' dynamic map."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from minift.conformance import strategies
from minift.conformance.dequantizers import dequantizer
from minift.conformance.operation import Operation
from minift.conformance.quantizers import quantizer, thresholds_of
from minift.conformance.strategies import Codes, Numbers, battery
from minift.quant import blockwise, codebooks
from minift.quant.blockwise import BlockwiseTensor

f32 = np.float32
TABLES = {"dynamic": codebooks.DYNAMIC, "int8": codebooks.INT8, "fp4": codebooks.FP4, "int4": codebooks.INT4}


def table_of(case: Numbers | Codes) -> np.ndarray:
    return TABLES[case.table]


def thresholds(name: str) -> tuple[float, ...]:
    return thresholds_of(TABLES[name].tobytes())


def _fixed(name: str) -> list[Numbers]:
    """Everything for the dynamic map; for the others all kinds of blocks at once, and every threshold."""
    levels = np.array(thresholds(name), f32)
    found = [(x, size) for what, x, size in battery(levels, (64,)) if name == "dynamic" or what.startswith("all")]
    found.append((strategies.every_threshold(levels, 256), 256))
    return [Numbers.of(x, block_size, table=name) for x, block_size in found]


def quantize_cases(dtypes):
    kinds = [strategies.numbers(thresholds(t), (16, 64, 256), dtypes, table=t) for t in TABLES]
    return st.one_of(kinds)


def dequantize_cases(dtypes):
    return st.one_of([strategies.codes(TABLES[t].size, (16, 64, 256), dtypes, table=t) for t in TABLES])


def _scaled_codes(name: str, n: int, block_size: int, shape=None, dtype: str = "float32") -> Codes:
    scale = (np.array([1, 0.75, 0, 1e-39, 123.456, 3e-5], f32)[np.arange(-(-n // block_size)) % 6]).tolist()
    codes = (np.arange(n) * 7 % TABLES[name].size).tolist()
    return Codes(tuple(codes), tuple(scale), block_size, shape, dtype, name)


DECODED = (
    *(_scaled_codes(t, n, 64) for t in TABLES for n in (0, 1, 2, 63, 65, 400)),
    *(_scaled_codes("dynamic", 512, b) for b in (32, 256, 4096)),
    *(_scaled_codes("dynamic", n, 64, shape) for n, shape in ((1, ()), (66, (1, 66)), (105, (3, 5, 7)), (0, (3, 0)))),
    *(_scaled_codes(t, 200, 64, (2, 100), dtype) for t in TABLES for dtype in ("float16", "float64")),
)


def _reference(codes, absmax, code, shape, block_size, dtype="float32"):
    return blockwise.dequantize(BlockwiseTensor(codes, absmax, code, shape, block_size), dtype)


OPERATIONS = (
    Operation(
        "blockwise.quantize",
        blockwise.quantize,
        "f(x, code, block_size) -> (codes, absmax), or an object with .codes and .absmax. x: any shape; code: the "
        "table, float32, ascending, up to 256 entries; codes: uint8 (n,), indices into it, in row-major order; absmax: "
        "float32 (ceil(n / block_size),). The last block may be short",
        quantize_cases,
        tuple(case for name in TABLES for case in _fixed(name)),
        quantizer(lambda f, x, case: f(x, table_of(case), case.block_size), table_of, packed=False),
    ),
    Operation(
        "blockwise.dequantize",
        _reference,
        "f(codes, absmax, code, shape, block_size) -> x, float32 of that shape; for other types "
        "f(codes, absmax, code, shape, block_size, dtype) with the type's name, such as 'float16'",
        dequantize_cases,
        DECODED,
        dequantizer(
            lambda f, codes, absmax, case: f(
                codes, absmax, table_of(case), case.size(), case.block_size, *[case.dtype] * (case.dtype != "float32")
            ),
            table_of,
        ),
    ),
)
