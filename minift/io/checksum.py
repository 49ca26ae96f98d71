"""Checksums: what was damaged on its way is noticed when it is read.

A number with a flipped bit is still a number, and safetensors files have no checksum. So each one that is written here
carries an entry `minift.sha256` in its metadata: a digest for every tensor (of name, dtype, shape and bytes) and one
for the rest of the metadata. Other programs pass over it. A tensor is checked when it is read, one at a time; one that
does not match is refused, since nobody changes tensors by hand.

A folder that is written as a whole also holds `SHA256SUMS`, so that `sha256sum -c SHA256SUMS` checks everything in it.
Readers look there for the JSON files, the tokenizer and the chat template: an adapter's `lora_alpha` is as important
as its tensors. But these files people do change by hand, and may: where one is not as it was written there is a
warning, and reading goes on.

With the processor's instructions for SHA-256 this takes 0.3 to 0.5 s for a model of 540 MB: once when its tensors are
read, twice when its folder is written. A training step waits for none of it but at a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ENTRY, SUMS = "minift.sha256", "SHA256SUMS"
REST = "__metadata__"  # in the entry: the rest of the metadata. No tensor can have this name
SUMS_LIMIT = 1_000_000  # bytes of SHA256SUMS that are looked at


def of_tensor(name: str, dtype: str, shape: tuple[int, ...], data: np.ndarray) -> str:
    """SHA-256 of a tensor's name, dtype as safetensors spells it, shape and bytes (flat uint8), in hexadecimal."""
    sha256 = hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode())
    sha256.update(data.data)
    return sha256.hexdigest()


def of_metadata(metadata: Mapping[str, str]) -> str:
    """SHA-256 of everything in a safetensors file's metadata but the checksums themselves."""
    return hashlib.sha256(json.dumps(sorted(metadata.items())).encode()).hexdigest()


def write_sums(folder: Path) -> None:
    """`SHA256SUMS` for the files of a folder, as the command sha256sum writes it."""
    lines = []
    for path in sorted(filter(Path.is_file, folder.iterdir())):
        with open(path, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that may be changed by hand; a UserWarning if they are not those in `SHA256SUMS` beside it.

    Raises OSError."""
    data = path.read_bytes()
    expected = _sums(path.parent).get(path.name)
    if expected is not None and expected != hashlib.sha256(data).hexdigest():
        warnings.warn(
            f"{path}: not as it was written, says {SUMS} beside it: damaged, if nobody changed it by hand (copy it "
            "again); if somebody did, delete its line there",
            stacklevel=2,
        )
    return data


def _sums(folder: Path) -> dict[str, str]:
    """{file: digest}, also where lines are something else, or the file is not there."""
    try:
        with open(folder / SUMS, "rb") as file:
            lines = file.read(SUMS_LIMIT).decode("utf-8", "replace").split("\n")
    except OSError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
