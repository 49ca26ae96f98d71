"""SwiGLU and GELU on torch tensors: the twin of `minift.nn.mlp`, where the derivation is.

The kernels compute in float32 and round once, to the type of the input. In plain PyTorch, 16-bit numbers are raised to
float32 for the same reason; float64 stays float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from minift_kernels import backend as backends
from minift_kernels.backend import Launch

KERNELS = "minift_kernels.nn.mlp_kernels"


def sigmoid(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """σ(x) = 1 / (1 + e^−x). PyTorch's own, in every backend: the kernels have theirs inside."""
    return torch.sigmoid(x)


def swiglu(
    gate: Float[Tensor, "*rows d"], up: Float[Tensor, "*rows d"], *, backend: str | None = None
) -> Float[Tensor, "*rows d"]:
    """The gated unit of Llama's feed-forward block: y = silu(g) u, silu(g) = g σ(g)."""
    how = backends.choose(backend, gate.device, gate.dtype)
    if how == "torch":
        return (functional.silu(backends.widened(gate)) * up).to(gate.dtype)
    return _swiglu(gate, up, how)


def gelu(x: Float[Tensor, "*shape"], *, backend: str | None = None) -> Float[Tensor, "*shape"]:
    """Weigh x by the share of a standard normal below it: y = x Φ(x). The exact form (BERT)."""
    return _either_gelu(x, False, backend)


def gelu_tanh(x: Float[Tensor, "*shape"], *, backend: str | None = None) -> Float[Tensor, "*shape"]:
    """GELU with a tanh for the error function, "gelu_new" of GPT-2: y = ½ x (1 + tanh z)."""
    return _either_gelu(x, True, backend)


def erf(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The error function: PyTorch has one."""
    return torch.erf(x)


def _either_gelu(x: Tensor, tanh: bool, backend: str | None) -> Tensor:
    how = backends.choose(backend, x.device, x.dtype)
    if how == "torch":
        return functional.gelu(backends.widened(x), approximate="tanh" if tanh else "none").to(x.dtype)
    return _gelu(x, tanh, how)


# In Triton.


def _swiglu_forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    """The operator `minift::swiglu`."""
    y = _like(gate)
    swiglu_launch(y, gate.contiguous(), up.contiguous(), backend).run(gate.device)
    return y


def swiglu_launch(y: Tensor, gate: Tensor, up: Tensor, backend: str) -> Launch:
    """Equation (1) of `mlp_kernels`; all are contiguous."""
    return _launch("swiglu", (y,), (gate, up), {}, backend)


def _swiglu_pullback(dy: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The operator `minift::swiglu_backward`: dgate, dup."""
    gradients = _like(gate), _like(up)
    swiglu_backward_launch(gradients, dy.contiguous(), gate.contiguous(), up.contiguous(), backend).run(gate.device)
    return gradients


def swiglu_backward_launch(
    gradients: tuple[Tensor, Tensor], dy: Tensor, gate: Tensor, up: Tensor, backend: str
) -> Launch:
    """The pullback of equation (1); all are contiguous."""
    return _launch("swiglu_backward", gradients, (dy, gate, up), {}, backend)


def _gelu_forward(x: Tensor, tanh: bool, backend: str) -> Tensor:
    """The operator `minift::gelu`."""
    y = _like(x)
    gelu_launch(y, x.contiguous(), tanh, backend).run(x.device)
    return y


def gelu_launch(y: Tensor, x: Tensor, tanh: bool, backend: str) -> Launch:
    """Equation (2) of `mlp_kernels`, or (3); both are contiguous."""
    return _launch("gelu", (y,), (x,), {"TANH": tanh}, backend)


def _gelu_pullback(dy: Tensor, x: Tensor, tanh: bool, backend: str) -> Tensor:
    """The operator `minift::gelu_backward`."""
    dx = _like(x)
    gelu_backward_launch(dx, dy.contiguous(), x.contiguous(), tanh, backend).run(x.device)
    return dx


def gelu_backward_launch(dx: Tensor, dy: Tensor, x: Tensor, tanh: bool, backend: str) -> Launch:
    """The pullback of (2) or (3); all are contiguous."""
    return _launch("gelu_backward", (dx,), (dy, x), {"TANH": tanh}, backend)


def _launch(name: str, outputs: tuple, inputs: tuple, options: dict, backend: str) -> Launch:
    kernels = backends.load(KERNELS, backend)
    n = outputs[0].numel()
    block, warps = kernels.TILES[outputs[0].element_size()]
    options = {**options, "BLOCK": block, "num_warps": warps}
    return Launch(getattr(kernels, name), (-(-n // block),), (*outputs, *inputs, n), options, outputs=len(outputs))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_swiglu(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_swiglu(ctx, dy):
    return *_swiglu_backward(dy, *ctx.saved_tensors, ctx.backend), None


def _save_gelu(ctx, inputs, output):
    x, ctx.tanh, ctx.backend = inputs
    ctx.save_for_backward(x)


def _differentiate_gelu(ctx, dy):
    return _gelu_backward(dy, *ctx.saved_tensors, ctx.tanh, ctx.backend), None, None


_swiglu = backends.operator(
    "swiglu(Tensor gate, Tensor up, str backend) -> Tensor",
    _swiglu_forward,
    lambda gate, up, backend: _like(gate),
    _differentiate_swiglu,
    _save_swiglu,
)
_swiglu_backward = backends.operator(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)",
    _swiglu_pullback,
    lambda dy, gate, up, backend: (_like(gate), _like(up)),
)
_gelu = backends.operator(
    "gelu(Tensor x, bool tanh, str backend) -> Tensor",
    _gelu_forward,
    lambda x, tanh, backend: _like(x),
    _differentiate_gelu,
    _save_gelu,
)
_gelu_backward = backends.operator(
    "gelu_backward(Tensor dy, Tensor x, bool tanh, str backend) -> Tensor",
    _gelu_pullback,
    lambda dy, x, tanh, backend: _like(x),
)
