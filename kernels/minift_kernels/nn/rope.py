"""Rotary position embedding on torch tensors: the twin of `minift.nn.rope`, where the derivation is.

Angles are made by plain PyTorch operations in float64, once a step for all layers. Turning is a kernel, which computes
in float32 and rounds once, to the type of x.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from minift.nn.rope import RopeScaling as RopeScaling  # numbers of a config.json: the same class
from minift_kernels import backend as backends
from minift_kernels.backend import Launch, power_of_two

KERNELS = "minift_kernels.nn.rope_kernels"


def frequencies(
    head_dim: int, rope_theta: float = 10000.0, scaling: RopeScaling | None = None
) -> Float[Tensor, " half"]:
    """ω_i = rope_theta^(−2i / d) for i < d/2, in float64 and on the CPU.

    ValueError for an odd head_dim or an unknown kind of scaling."""
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, needed an even number: features turn in pairs")
    omega = rope_theta ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    if scaling is None:
        return omega
    if scaling.rope_type == "linear":
        return omega / scaling.factor
    if scaling.rope_type == "llama3":
        turns = scaling.original_max_position_embeddings * omega / (2 * math.pi)  # over the original context
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)  # 1: many turns, kept; 0: less than one turn, stretched
        return omega * (keep + (1 - keep) / scaling.factor)
    raise ValueError(f"rope_type {scaling.rope_type!r} is not known; known are 'linear' and 'llama3'")


def rotations(
    positions: Integer[Tensor, "*rows"], omega: Float[Tensor, " half"], dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "*rows half"], Float[Tensor, "*rows half"]]:
    """cos φ and sin φ of φ = mω, on the positions' device. The angle is formed in float64: in float32 it is off by
    0.008 at position 131,071. The kernels take float32 angles for 16-bit x too."""
    phi = positions[..., None] * omega.to(positions.device, torch.float64)
    return phi.cos().to(dtype), phi.sin().to(dtype)


def rope(
    x: Float[Tensor, "batch heads tokens d"],
    cos: Float[Tensor, "#batch tokens half"],
    sin: Float[Tensor, "#batch tokens half"],
    *,
    backend: str | None = None,
) -> Float[Tensor, "batch heads tokens d"]:
    """Turn every pair of features by its position's angle; no gradient reaches the angles.

    y₁ = x₁ cos φ − x₂ sin φ, y₂ = x₂ cos φ + x₁ sin φ, with x₁, x₂ the first and second half of each head."""
    how = backends.choose(backend, x.device, x.dtype)
    return _rope_torch(x, cos.detach(), sin.detach()) if how == "torch" else _rope(x, cos, sin, 1.0, how)


def _rope_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]  # (batch, 1, tokens, half): the same for every head
    first, second = backends.widened(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# In Triton: the operator's own gradient is the operator with the other sign.


def _forward(x: Tensor, cos: Tensor, sin: Tensor, sign: float, backend: str) -> Tensor:
    """The operator `minift::rope`."""
    y = _like_forward(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    launch(y, x, cos.contiguous(), sin.contiguous(), sign, backend).run(x.device)
    return y


def _like_forward(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def launch(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: float, backend: str) -> Launch:
    """Equation (1) of `rope_kernels`; features of x are neighbors in memory, cos and sin contiguous."""
    kernels = backends.load(KERNELS, backend)
    (batch, heads, tokens, _), half = x.shape, x.shape[-1] // 2
    heads_a_program = min(kernels.HEADS, power_of_two(heads))
    head_tiles, token_tiles = -(-heads // max(heads_a_program, 1)), -(-tokens // kernels.TOKENS)
    angle_strides = (cos.stride(0) if cos.shape[0] > 1 else 0), cos.stride(1)
    strides = y.stride()[:3], x.stride()[:3], angle_strides
    arguments = (y, x, cos, sin, *strides, heads, tokens, head_tiles, token_tiles, sign)
    options = {"HALF": half, "BLOCK": power_of_two(half), "HEADS": heads_a_program, "TOKENS": kernels.TOKENS}
    options["num_warps"] = kernels.LANES // backends.warp_size()
    return Launch(kernels.turn, (head_tiles * token_tiles * batch,), arguments, options)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.sign, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dy):
    return _rope(dy, *ctx.saved_tensors, -ctx.sign, ctx.backend), None, None, None, None


_rope = backends.operator(
    "rope(Tensor x, Tensor cos, Tensor sin, float sign, str backend) -> Tensor",
    _forward,
    _like_forward,
    _differentiate,
    _save,
)
