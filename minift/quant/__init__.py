"""k-bit quantization: block-wise with any codebook, NF4, scales in 8 bits, affine, 8-bit products, 16 bits."""

from minift.quant import affine, blockwise, codebooks, double_quant, int8_vectorwise, nf4, sixteen

__all__ = ["affine", "blockwise", "codebooks", "double_quant", "int8_vectorwise", "nf4", "sixteen"]
