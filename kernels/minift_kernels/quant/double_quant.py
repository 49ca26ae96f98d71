"""Scales in 8 bits, on torch tensors: the twin of `minift.quant.double_quant`, where the scheme is explained.

    decoded   â = fl( fl(c_s · a₂) + ā )                                                                (1)

Two roundings, here as in the reference and in every file: neither a kernel nor the compiler may fuse them into one.
`nf4.dequantize` decodes the scales inside of its kernel; `decode` gives them by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float32
from torch import Tensor

from minift.quant import blockwise
from minift.quant.blockwise import TINY, block_count
from minift.quant.codebooks import DYNAMIC
from minift.quant.double_quant import overhead_bits
from minift_kernels import backend
from minift_kernels.quant import nf4
from minift_kernels.quant.blockwise import check_device, check_vector
from minift_kernels.quant.nf4 import NF4Tensor

__all__ = ["DoubleQuantizedScales", "compress", "compress_scales", "decompress", "overhead_bits"]


def _dynamic() -> Tensor:
    return torch.from_numpy(DYNAMIC.copy())


@dataclass(frozen=True, eq=False)
class DoubleQuantizedScales:
    """One byte a scale, one float32 for each `block_size` scales, and their common offset.

    `code` is the 8-bit map; files carry their own. Raises ValueError if the parts do not fit each other, lie on
    different devices or require a gradient."""

    codes: Tensor  # uint8 (n_scales,)
    absmax: Tensor  # float32 (ceil(n_scales / block_size),): a₂
    offset: Tensor  # float32 (): ā
    block_size: int = 256
    code: Tensor = field(default_factory=_dynamic)  # float32 (256,)

    def __post_init__(self):
        n = self.codes.numel()
        blocks = block_count(n, self.block_size)
        check_vector("codes", self.codes, torch.uint8, n, "one byte a scale")
        check_vector("absmax", self.absmax, torch.float32, blocks, f"one for each block of {self.block_size}")
        check_vector("code", self.code, torch.float32, 256, "one for every byte")
        if self.offset.dtype != torch.float32 or self.offset.numel() != 1 or self.offset.requires_grad:
            raise ValueError(f"offset: {self.offset!r}, needed one float32 number that does not learn")
        for name in ("absmax", "offset", "code"):
            check_device(name, getattr(self, name), self.codes)

    def decode(self) -> Float32[Tensor, " n_scales"]:
        """The float32 scales: equation (1). Never clamped: a file may hold negative ones."""
        return _decode(self.codes, self.absmax, self.code, self.offset, self.block_size)

    @property
    def size(self) -> int:
        return self.codes.numel()

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes

    def __repr__(self) -> str:
        return f"DoubleQuantizedScales({self.size}, blocks of {self.block_size}, {self.nbytes:,} bytes)"


_decode = backend.operator(
    "double_quant_decode(Tensor codes, Tensor absmax, Tensor code, Tensor offset, int block_size) -> Tensor",
    nf4.decode_scales,
    fake=lambda codes, absmax, code, offset, block_size: absmax.new_empty(codes.shape),
)


def compress(q: NF4Tensor, block_size: int = 256) -> NF4Tensor:
    """The same tensor with its scales in 8 bits. The weights' codes are kept as they are.

    No scale decodes to a negative number. Raises ValueError if the scales are compressed already, or a scale is
    negative, infinite or NaN."""
    if not isinstance(q.absmax, Tensor):
        raise ValueError(f"{q!r} is double-quantized already: decompress it first")
    return replace(q, absmax=compress_scales(q.absmax, block_size))


def decompress(q: NF4Tensor) -> NF4Tensor:
    """The same tensor with float32 scales: what the compressed ones decode to, not what they were compressed from."""
    return replace(q, absmax=q.scales())


def compress_scales(scales: Float32[Tensor, " n_scales"], block_size: int = 256) -> DoubleQuantizedScales:
    """The nearest code of every scale minus their mean, or the smallest that does not decode to a negative scale.

    The mean is summed in float64 and rounded once: where its order of summation matters after that, the offset's last
    bit may differ from the reference's."""
    bad = ~(torch.isfinite(scales) & (scales >= 0))
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(f"scales: {scales[index].item()} at index {index}, an absmax is finite and >= 0")
    n, blocks = scales.numel(), block_count(scales.numel(), block_size)
    code = _dynamic().to(scales.device)
    thresholds = torch.from_numpy(blockwise.midpoints(DYNAMIC)).to(scales.device)
    offset = scales.mean(dtype=torch.float64).to(torch.float32) if n else scales.new_zeros(())
    rows = torch.nn.functional.pad(scales - offset, (0, blocks * block_size - n)).view(blocks, block_size)
    absmax = rows.abs().amax(dim=1)
    nearest = torch.bucketize(rows * (1 / absmax.clamp(min=float(TINY)))[:, None], thresholds, out_int32=True)
    lowest = (code * absmax[:, None] + offset < 0).sum(dim=1, dtype=torch.int32)  # entries that decode to less than 0
    codes = torch.maximum(nearest, lowest[:, None]).to(torch.uint8).view(-1)[:n]
    return DoubleQuantizedScales(codes.contiguous(), absmax, offset, block_size, code)
