"""The data types that the studies compare, as one function: a matrix, and what a data type makes of it.

float32, bfloat16, float16    no scales
int8, int4, fp4, nf4          block-wise: the largest magnitude of a tensor, a row, or a block is the scale
affine int4                   a step and a least number instead
… + DQ                        the same with scales in 8 bits                                 (double quantization)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minift.io.safetensors_file import SafetensorsFile
from minift.models.llama import LINEAR_MODULES
from minift.nn.weight import Params, dense
from minift.quant import affine, blockwise, codebooks, nf4, sixteen
from minift.quant.double_quant import compress_scales

CODEBOOKS = {"int8": codebooks.INT8, "int4": codebooks.INT4, "fp4": codebooks.FP4, "nf4": nf4.CODE}
DQ = " + DQ"


@dataclass(frozen=True)
class Format:
    """A data type, and who shares a scale: "tensor", "row", or a block size; "" for what has none."""

    data_type: str
    per: str | int = ""

    @property
    def scale(self) -> str:
        """As a table says it."""
        return f"block {self.per}" if isinstance(self.per, int) else self.per

    def __str__(self) -> str:
        return f"{self.data_type}, {self.scale}" if self.per else self.data_type


def round_trip(w: np.ndarray, how: Format) -> tuple[np.ndarray, float]:
    """What a data type makes of a float32 matrix, and its bits a parameter, scales included.

    ValueError for an unknown data type."""
    name = how.data_type.removesuffix(DQ)
    if name == "float32":
        return w, 32.0
    if name in ("bfloat16", "float16"):
        return sixteen.round_to(w, name).dense(), 16.0
    block_size = blockwise.numbers_per_scale(w.shape, how.per)
    if name == "affine int4":
        q = affine.quantize(w, 4, block_size)
        return affine.dequantize(q), q.bits_per_parameter
    if name not in CODEBOOKS:
        raise ValueError(f"data type {name!r}, needed one of float32, bfloat16, float16, {', '.join(CODEBOOKS)}")
    coded = blockwise.quantize(w, CODEBOOKS[name], block_size)
    scale_bytes = coded.absmax.nbytes
    if how.data_type.endswith(DQ):
        scales = compress_scales(coded.absmax)
        coded, scale_bytes = replace(coded, absmax=scales.decode()), scales.nbytes
    return blockwise.dequantize(coded), (8 if name == "int8" else 4) + 8 * scale_bytes / w.size


def linear_layers(params: Params) -> dict[str, np.ndarray]:
    """The matrices that QLoRA quantizes, dense: those of the blocks, not the embeddings, norms or head."""
    return {name: dense(w) for name, w in params.items() if is_linear(name)}


def is_linear(name: str) -> bool:
    return name.split(".")[-2] in LINEAR_MODULES


def encoder_layers(folder: Path) -> dict[str, np.ndarray]:
    """The matrices in the blocks of a BERT-like encoder, such as MiniLM."""
    file = SafetensorsFile(folder / "model.safetensors")
    names = [name for name in file.names() if "encoder.layer" in name and len(file.shape(name)) == 2]
    return {name: file.read(name).astype(np.float32, copy=False) for name in names}


def share_on_a_grid(matrices: dict[str, np.ndarray], block: int = 32, values: int = 16) -> float:
    """Which share of all blocks holds no more than 16 different values: nearly 1 for weights that were in 4 bits
    before, 0 for others, as 32 numbers of 24 bits hardly ever agree."""
    on_grid = blocks = 0
    for w in matrices.values():
        rows = np.sort(w[..., : w.shape[-1] // block * block].reshape(-1, block), axis=1)
        distinct = 1 + np.count_nonzero(np.diff(rows, axis=1), axis=1)
        on_grid, blocks = on_grid + int(np.count_nonzero(distinct <= values)), blocks + len(rows)
    return on_grid / max(blocks, 1)
