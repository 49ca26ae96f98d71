"""k-bit block-wise quantization on torch tensors: NF4 (`nf4`, its kernels in `nf4_kernels`), `double_quant`."""

from minift_kernels.quant import double_quant, nf4

__all__ = ["double_quant", "nf4"]
