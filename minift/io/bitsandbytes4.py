"""4-bit tensors in a state dict, as bitsandbytes and transformers write them.

One quantized matrix `….weight` is several tensors in the file:

    ….weight                                    two codes a byte, (ceil(n/2), 1), the first in the high nibble
    ….weight.absmax                             one float32 scale a block, or, double-quantized, one byte
    ….weight.quant_map                          the sixteen values of the codes
    ….weight.nested_absmax                      double-quantized only: one float32 for each 256 scales
    ….weight.nested_quant_map                   double-quantized only: the 256 values of the bytes
    ….weight.quant_state.bitsandbytes__nf4      JSON as bytes: block sizes, the shape, the dtype before quantization,
                                                and nested_offset, the mean that the scales were centered on

bitsandbytes has two tables of sixteen values. NF4 is read and written. FP4, which is what its `bnb_4bit_quant_type`
means when nobody sets it, is read only: its codes are decoded, by `codebooks.FP4_BY_CODE`, and not kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minift.io.errors import FormatError
from minift.io.json_file import Fields, parse_json
from minift.io.safetensors_file import require_finite
from minift.quant import blockwise, nf4
from minift.quant.blockwise import BlockwiseTensor
from minift.quant.codebooks import FP4, FP4_BY_CODE
from minift.quant.double_quant import DoubleQuantizedScales
from minift.quant.nf4 import CODE, NF4Tensor
from minift.quant.sixteen import from_bfloat16, to_bfloat16

STATE = "quant_state.bitsandbytes__nf4"
FP4_STATE = "quant_state.bitsandbytes__fp4"
TABLES = {"nf4": CODE, "fp4": FP4_BY_CODE}
FP4_RANKS = np.searchsorted(FP4, FP4_BY_CODE).astype(np.uint8)  # where each code's value stands in the sorted table
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE, FP4_STATE)
SETTINGS = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
DTYPES = ("float32", "float16", "bfloat16")
FLOAT32_MAX = float(np.finfo(np.float32).max)


def pack_tensor(name: str, q: NF4Tensor, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The tensors that stand for `q` in a state dict; `name` ends in ".weight".

    `dtype` is what bitsandbytes will dequantize to: "float32", "float16" or "bfloat16"."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": q.block_size, "dtype": dtype, "shape": list(q.shape)}
    tensors = {name: q.codes.reshape(-1, 1), f"{name}.quant_map": np.array(CODE)}
    if isinstance(q.absmax, DoubleQuantizedScales):
        nested = q.absmax
        state |= {"nested_blocksize": nested.block_size, "nested_dtype": "float32"}
        state |= {"nested_offset": float(nested.offset)}
        tensors |= {f"{name}.absmax": nested.codes, f"{name}.nested_absmax": nested.absmax}
        tensors[f"{name}.nested_quant_map"] = np.array(nested.code)
    else:
        tensors[f"{name}.absmax"] = q.scales()
    tensors[f"{name}.{STATE}"] = np.frombuffer(json.dumps(state).encode("utf-8"), dtype=np.uint8)
    return tensors


def unpack_tensor(
    name: str, tensors: Mapping[str, np.ndarray], path: Path | str = "state dict"
) -> NF4Tensor | BlockwiseTensor:
    """The tensor called `name` ("….weight") among these: an NF4Tensor, or FP4 as a BlockwiseTensor, a byte a code.

    Its codes are uint8 of any shape. `path` is for error messages. Raises FormatError for another table, or for parts
    that are missing or do not fit."""
    settings = read_settings(name, tensors, path)
    quant_type, shape = settings.values["quant_type"], tuple(settings.values["shape"])
    codes = _part(tensors, path, name, np.uint8).reshape(-1)
    table = _part(tensors, path, f"{name}.quant_map", np.float32)
    if not np.array_equal(table, TABLES[quant_type]):
        found, needed = f"another table, {table[:16].tolist()}", f"the sixteen {quant_type.upper()} values"
        raise FormatError(path, f"{name}.quant_map", found, needed)
    if "nested_blocksize" in settings.values:
        offset = settings.values.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) <= FLOAT32_MAX:
            raise settings.error("nested_offset", "a finite float32 number")
        absmax: np.ndarray | DoubleQuantizedScales = _nested(name, tensors, path, settings, np.float32(offset))
    else:
        absmax = _part(tensors, path, f"{name}.absmax", np.float32)
        if not (np.isfinite(absmax).all() and (absmax >= 0).all()):
            raise FormatError(path, f"{name}.absmax", "a negative or infinite scale, or NaN", "scales >= 0")
    block_size = settings.whole("blocksize")
    try:
        if quant_type == "nf4":
            return NF4Tensor(codes, absmax, shape, block_size)
        return _fp4_tensor(codes, absmax, shape, block_size)
    except ValueError as error:
        raise FormatError(path, name, error, "parts that fit each other") from error


def read_settings(name: str, tensors: Mapping[str, np.ndarray], path: Path | str) -> Fields:
    """The JSON beside a 4-bit tensor, checked."""
    quant_type, key = ("fp4", FP4_STATE) if f"{name}.{FP4_STATE}" in tensors else ("nf4", STATE)
    key = f"{name}.{key}"
    if quant_type == "fp4" and f"{name}.{STATE}" in tensors:
        raise FormatError(path, key, f"FP4 beside {STATE}", "one of the two")
    settings = Fields(f"{path}: {key}", parse_json(_part(tensors, path, key, np.uint8).tobytes(), path, key))
    settings.values.setdefault("quant_type", None)
    if settings.values["quant_type"] != quant_type:
        raise settings.error("quant_type", repr(quant_type))
    if unknown := set(settings.values) - SETTINGS:
        raise settings.error(min(unknown), "no such setting")
    shape = settings.values.get("shape")
    if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
        raise settings.error("shape", "a list of sizes")
    if settings.values.get("dtype") not in DTYPES:
        raise settings.error("dtype", " or ".join(DTYPES))
    return settings


def dequantize(q: NF4Tensor | BlockwiseTensor, dtype: str) -> np.ndarray:
    """What bitsandbytes' `dequantize_4bit` gives, as float32: rounded to the dtype that the quantized matrix had."""
    return rounded(nf4.dequantize(q) if isinstance(q, NF4Tensor) else blockwise.dequantize(q), dtype)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers as a file of this dtype has them, as float32 again. What is too large becomes infinity."""
    if dtype == "float16":
        with np.errstate(over="ignore"):  # for the caller to find
            return x.astype(np.float16).astype(np.float32)
    return from_bfloat16(to_bfloat16(x)) if dtype == "bfloat16" else x


def base_name(key: str) -> str | None:
    """ "….weight" for the name of a part such as "….weight.absmax"; None for any other name."""
    for part in PARTS:
        if key.endswith(f".weight.{part}"):
            return key.removesuffix(f".{part}")
    return None


def _fp4_tensor(codes, absmax, shape, block_size) -> BlockwiseTensor:
    """FP4's sixteen codes do not ascend, and zero has two: 0 and 8. The sorted table has fifteen values."""
    n = blockwise.element_count(shape)
    nf4.check_block_size(block_size)
    blockwise.check_vector("codes", codes, np.uint8, (n + 1) // 2, f"two of the {n} elements of shape {shape} a byte")
    scales = absmax if isinstance(absmax, np.ndarray) else absmax.decode()
    return BlockwiseTensor(FP4_RANKS[nf4.unpack(codes, n)], scales, FP4, shape, block_size)


def _nested(name, tensors, path, settings: Fields, offset: np.float32) -> DoubleQuantizedScales:
    nested = _part(tensors, path, f"{name}.nested_absmax", np.float32)
    if not (np.isfinite(nested).all() and (nested >= 0).all()):
        raise FormatError(path, f"{name}.nested_absmax", "a negative or infinite scale, or NaN", "scales >= 0")
    try:
        scales = DoubleQuantizedScales(
            codes=_part(tensors, path, f"{name}.absmax", np.uint8),
            absmax=nested,
            offset=offset,
            block_size=settings.whole("nested_blocksize"),
            code=_part(tensors, path, f"{name}.nested_quant_map", np.float32),
        )
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(path, f"{name}.absmax", error, "double-quantized scales that fit each other") from error
    with np.errstate(over="ignore", invalid="ignore"):
        require_finite(path, f"{name}.absmax, decoded", scales.decode())
    return scales


def _part(tensors: Mapping[str, np.ndarray], path: Path | str, key: str, dtype: type) -> np.ndarray:
    if key not in tensors:
        raise FormatError(path, key, "nothing", "a part of a 4-bit tensor")
    if tensors[key].dtype != dtype:
        raise FormatError(path, key, f"dtype {tensors[key].dtype}", f"{np.dtype(dtype)}")
    return tensors[key]
