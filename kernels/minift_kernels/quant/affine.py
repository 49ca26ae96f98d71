"""Integers with a scale and a place to begin, on torch tensors: the twin of `minift.quant.affine`, where equations are.

Codes, steps and least numbers are the reference's, bit for bit, by the same operations in float32 and float64. It is a
data type of the studies: there is no kernel, and nothing multiplies with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from minift.quant.affine import check_bits
from minift.quant.blockwise import block_count, element_count, refuse_non_finite
from minift_kernels.quant.blockwise import check_device, check_vector

__all__ = ["AffineTensor", "check_bits", "dequantize", "quantize"]


@dataclass(frozen=True, eq=False)
class AffineTensor:
    """Codes, one a byte, and for each block of `block_size` elements in row-major order its step s and least number m.

    ValueError if the parts do not fit each other, lie on different devices or require a gradient. Unlike the reference
    it does not look for codes beyond the bits, which would wait for the GPU."""

    codes: Tensor  # uint8 (n,)
    step: Tensor  # float32 (ceil(n / block_size),)
    least: Tensor  # float32, the same
    shape: tuple[int, ...]
    block_size: int
    bits: int = 4

    def __post_init__(self):
        n = element_count(self.shape)
        blocks = block_count(n, self.block_size)
        check_bits(self.bits)
        check_vector("codes", self.codes, torch.uint8, n, f"one for each element of shape {self.shape}")
        for name, tensor in (("step", self.step), ("least", self.least)):
            check_vector(name, tensor, torch.float32, blocks, f"one for each block of {self.block_size}")
            check_device(name, tensor, self.codes)

    @property
    def bits_per_parameter(self) -> float:
        """Of codes that are packed; here they are not."""
        return self.bits + 64 * self.step.numel() / max(self.codes.numel(), 1)

    def __repr__(self) -> str:
        return f"AffineTensor({self.shape}, {self.bits} bits, blocks of {self.block_size})"


@torch.no_grad()
def quantize(x: Float[Tensor, "*shape"], bits: int = 4, block_size: int = 32) -> AffineTensor:
    """q = round((x − m) / s), ties to the even code. `x` is rounded to float32 first, `s` once; the rest is float64.

    Where all numbers of a block are equal, s is 0 and they come back as they were. ValueError for NaN and infinities,
    for bits other than 2 … 8, and for a block size that is not a positive integer."""
    check_bits(bits)
    n, blocks = x.numel(), block_count(x.numel(), block_size)
    flat = x.reshape(-1).to(torch.float32)
    whole = torch.cat([flat, flat[-1:].expand(blocks * block_size - n)])  # a number of the last block changes nothing
    table = whole.view(blocks, block_size).double()
    least, most = table.amin(dim=1), table.amax(dim=1)
    if not (torch.isfinite(least) & torch.isfinite(most)).all():
        refuse_non_finite(x.double().cpu().numpy())
    top = least.new_full((), 2**bits - 1)  # a tensor: a GPU multiplies by the reciprocal of a number
    step = ((most - least) / top).float()
    s = torch.where(step == 0, 1, step.double())[:, None]
    codes = torch.round((table - least[:, None]) / s).clamp(max=2**bits - 1).to(torch.uint8)
    return AffineTensor(codes.view(-1)[:n].clone(), step, least.float(), tuple(x.shape), block_size, bits)


def dequantize(q: AffineTensor) -> Float32[Tensor, "*shape"]:
    """x̂ = q s + m in float64, where the product is exact, rounded to float32."""
    s, m = (a.double().repeat_interleave(q.block_size)[: q.codes.numel()] for a in (q.step, q.least))
    return (q.codes * s + m).float().view(q.shape)
