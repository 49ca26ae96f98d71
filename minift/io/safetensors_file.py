"""safetensors files for NumPy, with bfloat16.

A file is the length of its header in eight bytes, the header in JSON, and the numbers. The library checks files (no
holes, no overlap, nothing past the end), but its NumPy side does not know bfloat16, and it writes metadata in another
order each time; written here, equal content makes equal files.

bfloat16 tensors are rounded and decoded by `minift.quant.sixteen`.

Tensors are read one at a time, so that a file may be larger than memory, and checked against the digest that
`checksum` explains, if the file has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from minift.io import checksum
from minift.io.atomic import atomic_write
from minift.io.errors import FormatError, shown
from minift.io.json_file import parse_json
from minift.quant.sixteen import from_bfloat16

DTYPES: dict[str, type] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,  # decoded by `read`
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "BOOL": np.bool_,
}
SPELLINGS = {np.dtype(found): spelled for spelled, found in DTYPES.items() if spelled != "BF16"}
HEADER_LIMIT = 10_000_000  # bytes of JSON: names and shapes, not numbers


class SafetensorsFile:
    """An open safetensors file: names and shapes now, numbers when they are asked for.

    Raises FormatError for a file that is missing, truncated, or not safetensors, and for checksums of other tensors.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np"), open(self.path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > HEADER_LIMIT:
                    raise FormatError(self.path, "", f"a header of {size:,} bytes", f"at most {HEADER_LIMIT:,}")
                header = parse_json(file.read(size), self.path)
        except (SafetensorError, OSError) as error:
            raise FormatError(self.path, "", error, "a complete safetensors file") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries = header
        self._data_start = 8 + size
        self._digests = self._take_digests()

    def names(self) -> list[str]:
        return list(self.entries)

    def dtype(self, name: str) -> str:
        """As the file spells it: "F32", "BF16", "U8", …"""
        return self.entries[name]["dtype"]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, flat uint8, copied out of the file. FormatError where they are not what was written."""
        begin, end = self.entries[name]["data_offsets"]
        with open(self.path, "rb") as file:
            file.seek(self._data_start + begin)
            data = np.fromfile(file, dtype=np.uint8, count=end - begin)
        if self._digests is not None:
            digest = checksum.of_tensor(name, self.dtype(name), self.shape(name), data)
            if digest != self._digests[name]:
                raise self._damaged(name)
        return data

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype, bfloat16 as float32."""
        dtype = self.dtype(name)
        if dtype not in DTYPES:
            raise FormatError(self.path, name, f"dtype {dtype}", f"one of {', '.join(DTYPES)}")
        raw = self.raw(name)
        if dtype == "BOOL" and raw.max(initial=0) > 1:
            raise FormatError(self.path, name, f"the byte {raw.max()}", "0 or 1, which are false and true")
        try:
            array = raw.view(np.dtype(DTYPES[dtype]).newbyteorder("<")).reshape(self.shape(name))
        except ValueError as error:  # more dimensions than NumPy has, or [0, 2^62, 2^62]
            raise FormatError(self.path, name, f"shape {shown(self.shape(name))}", f"a shape: {error}") from error
        return from_bfloat16(array) if dtype == "BF16" else array

    def _take_digests(self) -> dict[str, Any] | None:
        """The checksums out of the metadata, if there are any: one for each tensor, and the metadata's own is right."""
        entry = self.metadata.pop(checksum.ENTRY, None)
        if entry is None:
            return None
        digests = parse_json(entry.encode("utf-8"), self.path, checksum.ENTRY)
        if different := digests.keys() ^ (self.entries.keys() | {checksum.REST}):
            name = min(different)
            parts = ["a checksum", "a tensor"]
            found, missing = parts if name in digests else parts[::-1]
            raise FormatError(self.path, name, f"{found} without {missing}", "both: the file is damaged, copy it again")
        if digests[checksum.REST] != checksum.of_metadata(self.metadata):
            raise self._damaged(checksum.REST)
        return digests

    def _damaged(self, name: str) -> FormatError:
        found = "something else than was written: the file is damaged, or another program has changed it"
        return FormatError(
            self.path, name, found, "what its checksum says; copy the file again, or take an earlier one"
        )


def write_safetensors(
    path: Path | str,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    bfloat16: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Write arrays in their own dtype, and checksums; those named in `bfloat16` are uint16, from `to_bfloat16`. Atomic.

    FormatError for a dtype that the format does not have."""
    metadata = {key: value for key, value in (metadata or {"format": "pt"}).items() if key != checksum.ENTRY}
    digests = {checksum.REST: checksum.of_metadata(metadata)}
    header: dict[str, Any] = {"__metadata__": metadata}
    widest_first = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # each at a multiple of its size
    end = 0
    for name in widest_first:
        array = arrays[name]
        dtype = "BF16" if name in bfloat16 else SPELLINGS.get(array.dtype.newbyteorder("="))
        if dtype is None:
            raise FormatError(path, name, f"dtype {array.dtype}", f"one of {', '.join(DTYPES)}")
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        digests[name] = checksum.of_tensor(name, dtype, array.shape, _bytes_of(array))
        end += array.nbytes
    metadata[checksum.ENTRY] = json.dumps(digests)

    def write(temporary: Path) -> None:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in widest_first:
                file.write(_bytes_of(arrays[name]).data)

    atomic_write(path, write)


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """Flat uint8, little-endian, in C order: a view wherever the array lies so already."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8)


def require_finite(path: Path | str, name: str, array: np.ndarray) -> None:
    """Raises FormatError for a NaN or an infinity, naming the first and how many there are."""
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        at = int(np.argmin(finite))
        what = f"{array.flat[at]} at flat index {at} ({math.prod(array.shape) - int(finite.sum()):,} not finite)"
        raise FormatError(path, name, what, "finite numbers")
