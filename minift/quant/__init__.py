"""k-bit block-wise quantization: any codebook (`blockwise`, `codebooks`), NF4, scales in 8 bits (`double_quant`)."""

from minift.quant import blockwise, codebooks, double_quant, nf4, sixteen

__all__ = ["blockwise", "codebooks", "double_quant", "nf4", "sixteen"]
