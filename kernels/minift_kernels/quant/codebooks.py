"""Codebooks on torch tensors: the twin of `minift.quant.codebooks`, which says what each is.

The tables are made once, in NumPy, and imported; `on_device` gives one as a tensor where it is needed:

    q = blockwise.quantize(x, on_device(DYNAMIC, x.device))
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, FP4_BY_CODE, INT4, INT8

__all__ = ["DYNAMIC", "DYNAMIC_UNSIGNED", "FP4", "FP4_BY_CODE", "INT4", "INT8", "fp4_codes", "on_device"]

# Where each of FP4's 15 values is in FP4_BY_CODE; of zero's two codes, 0 and 8, the positive one.
_FP4_CODE_OF_RANK = np.array([FP4_BY_CODE.tolist().index(value) for value in FP4.tolist()], np.uint8)


def on_device(code: Float32[np.ndarray, " entries"], device: torch.device | str) -> Float32[Tensor, " entries"]:
    """A codebook as a tensor: one on each device, shared by all who ask for it."""
    return _constant(code.tobytes(), torch.device(device))


@cache
def _constant(values: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.float32).to(device)


def fp4_codes(ranks: UInt8[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """bitsandbytes' 4-bit codes from indices into `FP4`, which is in ascending order; `FP4_BY_CODE[codes]` decodes."""
    table = torch.from_numpy(_FP4_CODE_OF_RANK.copy()).to(ranks.device)
    return table[ranks.to(torch.int64)]
