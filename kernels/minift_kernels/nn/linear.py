"""The linear map on torch tensors: the twin of `minift.nn.linear`.

The product of two matrices is the library's (cuBLAS, rocBLAS, oneDNN) in every backend: nothing here is faster. What a
weight is made of decides the rest, and `backend` is for it: an `NF4Tensor` decodes itself, a `LoRA` adds its adapter.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from minift_kernels import backend as backends
from minift_kernels.nn.weight import Weight, unwrap


def linear(
    x: Float[Tensor, "*rows d_in"],
    weight: Float[Tensor, "d_out d_in"] | Weight,
    bias: Float[Tensor, " d_out"] | Weight | None = None,
    *,
    dropout_key: int | None = None,
    backend: str | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """y = x Wᵀ + b; the weight may be quantized or carry an adapter. `dropout_key` reaches a LoRA's dropout.

    W and b of another type than x's are rounded to it, and their gradients come back in their own: weights that learn
    in float32 multiply in 16 bits."""
    backends.choose(backend, x.device, x.dtype)
    shift = None if bias is None else unwrap(bias)[0].to(x.dtype)
    if isinstance(weight, Tensor):
        weight = weight.to(x.dtype)
        flat = functional.linear(backends.rows(x), weight, shift)  # a matrix: then the bias is added before rounding
        return flat.view(*x.shape[:-1], len(weight))
    y = weight.linear(x, dropout_key, backend=backend)
    return y if shift is None else y + shift
