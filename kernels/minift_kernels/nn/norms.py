"""RMSNorm and LayerNorm on torch tensors: the twin of `minift.nn.norms`, where the derivation is.

The kernels compute in float32 and round once, to the type of x. In plain PyTorch, 16-bit rows are raised to float32 for
the same reason; float64 stays float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from minift_kernels import backend as backends
from minift_kernels.backend import Launch, power_of_two, rows
from minift_kernels.nn.weight import Weight, unwrap

KERNELS = "minift_kernels.nn.norms_kernels"


def rms_norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"] | Weight, eps: float = 1e-6, *, backend: str | None = None
) -> Float[Tensor, "*rows d"]:
    """Divide each row by its root mean square: y = x̂ γ, x̂ = x / √(mean(x²) + ε)."""
    gain, _ = unwrap(weight)
    how = backends.choose(backend, x.device, x.dtype)
    return _rms_norm_torch(x, gain, eps) if how == "torch" else _norm(x, gain, None, eps, how)[0]


def layer_norm(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, " d"] | Weight,
    bias: Float[Tensor, " d"] | Weight,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*rows d"]:
    """Subtract each row's mean, divide by its standard deviation: y = x̂ γ + β, x̂ = (x − mean) / √(var + ε)."""
    (gain, _), (shift, _) = unwrap(weight), unwrap(bias)
    how = backends.choose(backend, x.device, x.dtype)
    return _layer_norm_torch(x, gain, shift, eps) if how == "torch" else _norm(x, gain, shift, eps, how)[0]


def _rms_norm_torch(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = backends.widened(x)
    x_hat = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (x_hat * gain).to(x.dtype)


def _layer_norm_torch(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    wide = backends.widened(x)
    centered = wide - wide.mean(dim=-1, keepdim=True)
    x_hat = centered * torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + eps)
    return (x_hat * gain + shift).to(x.dtype)


# In Triton: one operator for both norms. Without a bias it is RMSNorm.


def _forward(x: Tensor, gain: Tensor, shift: Tensor | None, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `minift::norm`: y, and of every row 1 / √(…) and the mean (RMSNorm: none)."""
    y, inv_std, mean = _like_forward(x, gain, shift, eps, backend)
    forward_launch(y, inv_std, mean, rows(x), gain.contiguous(), shift, eps, backend).run(x.device)
    return y, inv_std, mean


def _like_forward(x, gain, shift, eps, backend):
    n_rows = x.numel() // max(x.shape[-1], 1)
    statistics = [x.new_empty(n, dtype=torch.float32) for n in (n_rows, 0 if shift is None else n_rows)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *statistics


def forward_launch(
    y: Tensor, inv_std: Tensor, mean: Tensor, x: Tensor, gain: Tensor, shift: Tensor | None, eps: float, backend: str
) -> Launch:
    """Equation (1) of `norms_kernels`; x is a matrix of rows whose elements are neighbors."""
    kernels = backends.load(KERNELS, backend)
    n_rows, n_features = x.shape
    block = power_of_two(n_features)
    options = {"CENTERED": shift is not None, "BLOCK": block, "num_warps": kernels.warps(block)}
    bias = gain if shift is None else shift.contiguous()
    arguments = (y, inv_std, mean, x, gain, bias, x.stride(0), n_features, eps)
    return Launch(kernels.forward, (n_rows,), arguments, options, outputs=3)


def _backward(
    dy: Tensor, x: Tensor, gain: Tensor, inv_std: Tensor, mean: Tensor, centered: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `minift::norm_backward`: dx, dweight, dbias (RMSNorm: none)."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = min(backends.load(KERNELS, backend).PARTS, inv_std.numel())
    sums = [x.new_empty((n, x.shape[-1]), dtype=torch.float32) for n in (parts, parts if centered else 0)]
    gradients = dx, *sums
    launch = backward_launch(gradients, rows(dy), rows(x), gain.contiguous(), inv_std, mean, centered, backend)
    launch.run(x.device)
    dweight, dbias = (part.sum(dim=0).to(gain.dtype) for part in sums)
    return dx, dweight, dbias


def backward_launch(
    gradients: tuple[Tensor, ...],
    dy: Tensor,
    x: Tensor,
    gain: Tensor,
    inv_std: Tensor,
    mean: Tensor,
    centered: bool,
    backend: str,
) -> Launch:
    """Equation (2) of `norms_kernels`, a program for each row of the second gradient, dweight."""
    kernels = backends.load(KERNELS, backend)
    (n_rows, n_features), parts = x.shape, len(gradients[1])
    block = power_of_two(n_features)
    options = {"CENTERED": centered, "BLOCK": block, "num_warps": kernels.warps(block)}
    sizes = dy.stride(0), x.stride(0), n_rows, n_features, -(-n_rows // max(parts, 1))
    return Launch(kernels.backward, (parts,), (*gradients, dy, x, gain, inv_std, mean, *sizes), options, outputs=3)


def _save(ctx, inputs, output):
    x, gain, shift, _, ctx.backend = inputs
    ctx.centered = shift is not None
    ctx.save_for_backward(x, gain, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dy, *_):
    dx, dweight, dbias = _norm_backward(dy, *ctx.saved_tensors, ctx.centered, ctx.backend)
    return dx, dweight, dbias if ctx.centered else None, None, None


_norm = backends.operator(
    "norm(Tensor x, Tensor gain, Tensor? shift, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _like_forward,
    _differentiate,
    _save,
)
_norm_backward = backends.operator(
    "norm_backward(Tensor dy, Tensor x, Tensor gain, Tensor inv_std, Tensor mean, bool centered, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, x, gain, inv_std, mean, centered, backend: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(gain, memory_format=torch.contiguous_format),
        torch.empty_like(gain, memory_format=torch.contiguous_format),
    ),
)
