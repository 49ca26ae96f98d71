"""Double quantization: the scales of a quantized tensor are quantized too.     (Dettmers et al. 2023, arXiv 2305.14314)

With one float32 scale for 64 weights, scales cost half a bit a weight. They are all positive and much alike, so their
mean is taken off and the rest kept in 8 bits, block-wise, with the signed dynamic map c (`codebooks.DYNAMIC`):

    offset    ā = mean(a)                                                                               (1)
    codes     s = blockwise.quantize(a − ā), blocks of 256, each with a scale a₂                        (2)
    decoded   â = fl( fl(c_s · a₂) + ā )                                                                (3)

fl is rounding to float32: two roundings, not one (a fused multiply-add gives other numbers). The mean is computed in
float64 and rounded once. Overhead per weight, for blocks of B = 64 weights and B₂ = 256 scales (`overhead_bits`):

    32 / B = 0.5        becomes        8 / B + 32 / (B B₂) = 0.126953125,        a saving of 0.373046875 bits   (4)

(and 32 bits a tensor for ā). The paper calls the 8-bit type FP8; its authors' code, and all files, use the dynamic map.

**The trap.** (3) adds a rounded difference to the mean, so a scale far below the mean can come back *negative*, and all
weights of its block with the opposite sign. The codes are as far as 0.0140625 a₂ apart, so this can happen to scales
below 0.00704 a₂. It is prevented here, when compressing: where the nearest entry decodes to a negative scale, the
smallest entry that does not is taken instead. That is the one deviation from bitsandbytes' choice, and it happens only
where theirs is negative. Decoding clamps nothing: existing files decode to what they have always decoded to.

An all-zero block stays all zero whatever its scale becomes, because its weights have the code of 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32

from minift.quant import blockwise
from minift.quant.blockwise import BlockwiseTensor
from minift.quant.codebooks import DYNAMIC
from minift.quant.nf4 import NF4Tensor


@dataclass(frozen=True, eq=False)
class DoubleQuantizedScales:
    """One byte a scale, one float32 for each `block_size` scales, and their common offset.

    `code` is the 8-bit map; files carry their own, and it may differ from ours in last bits. Raises ValueError if the
    parts do not fit each other."""

    codes: np.ndarray  # uint8 (n_scales,)
    absmax: np.ndarray  # float32 (ceil(n_scales / block_size),): a₂
    offset: np.float32  # ā
    block_size: int = 256
    code: np.ndarray = field(default_factory=lambda: DYNAMIC)  # float32 (256,)

    def __post_init__(self):
        self._centered()
        if not isinstance(self.offset, np.float32):
            raise ValueError(f"offset: {self.offset!r}, needed a np.float32")

    def _centered(self) -> BlockwiseTensor:
        return BlockwiseTensor(self.codes, self.absmax, self.code, (self.codes.size,), self.block_size)

    def decode(self) -> Float32[np.ndarray, " n_scales"]:
        """The float32 scales: equation (3). Never clamped: a file may hold negative ones."""
        return blockwise.dequantize(self._centered()) + self.offset  # (3)

    @property
    def size(self) -> int:
        return self.codes.size

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes

    def __repr__(self) -> str:
        return f"DoubleQuantizedScales({self.size}, blocks of {self.block_size}, {self.nbytes:,} bytes)"


def compress(q: NF4Tensor, block_size: int = 256) -> NF4Tensor:
    """The same tensor with its scales in 8 bits: equations (1) and (2). The weights' codes are kept as they are.

    No scale decodes to a negative number (the trap, above). `block_size` is how many scales share a nested scale.
    Raises ValueError if the scales are compressed already, or a scale is negative, infinite or NaN.
    """
    if not isinstance(q.absmax, np.ndarray):
        raise ValueError(f"{q!r} is double-quantized already: decompress it first")
    return replace(q, absmax=compress_scales(q.absmax, block_size))


def decompress(q: NF4Tensor) -> NF4Tensor:
    """The same tensor with float32 scales: what the compressed ones decode to, not what they were compressed from."""
    return replace(q, absmax=q.scales())


def compress_scales(scales: Float32[np.ndarray, " n_scales"], block_size: int = 256) -> DoubleQuantizedScales:
    """Equations (1) and (2) for any non-negative scales, with the smallest non-negative entry where needed.

    c ↦ â is increasing in each nested block, so the entries to avoid are the first few: they are counted, and smaller
    codes raised to that count. The largest entry, +1, is never among them, because ā ≥ 0."""
    bad = ~(np.isfinite(scales) & (scales >= 0))
    if bad.any():
        raise ValueError(f"scales: {scales[bad][0]} at index {int(np.argmax(bad))}, an absmax is finite and >= 0")
    offset = np.float32(scales.mean(dtype=np.float64)) if scales.size else np.float32(0)  # (1)
    nearest = blockwise.quantize(scales - offset, DYNAMIC, block_size)  # (2)
    with np.errstate(over="ignore"):  # entries far above any scale
        decoded = DYNAMIC * nearest.absmax[:, None] + offset  # (nested blocks, 256): every entry's scale, as in (3)
    lowest = np.count_nonzero(decoded < 0, axis=1).astype(np.uint8)
    codes = np.maximum(nearest.codes, np.repeat(lowest, block_size)[: scales.size])
    return DoubleQuantizedScales(codes, nearest.absmax, offset, block_size)


def overhead_bits(block_size: int = 64, nested_block_size: int | None = 256) -> float:
    """Bits a weight that the scales cost: equation (4); `None` for float32 scales."""
    if nested_block_size is None:
        return 32 / block_size
    return 8 / block_size + 32 / (block_size * nested_block_size)
