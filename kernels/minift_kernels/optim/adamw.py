"""AdamW on torch tensors: the twin of `minift.optim.adamw`, where the equations are.

Parameters and gradients are float32 or 16 bits wide, moments float32; arithmetic is float32, with one more rounding to
the type of a 16-bit parameter. float64 has float64 moments, in plain PyTorch only.

On a GPU `AdamW.update` is one launch for all parameters of one type, and float32 parameters are the reference's, bit
for bit. Plain PyTorch comes as close as its operations: its root on a CPU is not always the nearest number, and on a
GPU its quotient by a Python number is a product with the reciprocal.

What is updated here is a leaf of autograd: everything runs under `no_grad`, and the tensors' versions are counted up,
so that a backward pass through a graph from before the step is refused by PyTorch instead of silently wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.nn.weight import Tensors

KERNELS = "minift_kernels.optim.adamw_kernels"


def adamw_1(
    theta: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    m: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step, as the paper writes it: θ, m, v -> θ′, m′, v′.     (Loshchilov & Hutter 2019, arXiv 1711.05101, alg. 2)

    m′ = β₁ m + (1 − β₁) g        v′ = β₂ v + (1 − β₂) g²                                           (1)
    m̂ = m′ / (1 − β₁ᵗ)            v̂ = v′ / (1 − β₂ᵗ)                                                (2)
    θ′ = (1 − ηλ) θ − η m̂ / (√v̂ + ε)                                                                (3)
    """
    wide, g = backends.widened(theta), gradient.to(m.dtype)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    wide = (1 - learning_rate * weight_decay) * wide - learning_rate * m_hat / (v_hat.sqrt() + eps)
    return wide.to(theta.dtype), m, v


@torch.no_grad()
def adamw_2(
    theta: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    m: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """The same in place: θ, m and v, contiguous tensors, are overwritten.

    ValueError for θ, m or v in another memory order, for shapes that differ, and for moments of another type than
    float32 (float64 for float64 parameters, which no kernel takes)."""
    how = checked("theta", theta, gradient, (m, v), backend)
    settings = step, learning_rate, beta1, beta2, eps, weight_decay
    if how == "torch":
        for old, new in zip((theta, m, v), adamw_1(theta, gradient, m, v, *settings), strict=True):
            old.copy_(new)
        return
    _step_one(theta, m, v, gradient, scalars(*settings), how)
    torch.autograd.graph.increment_version((theta, m, v))


@dataclass
class AdamW:
    """The optimizer's state: two moments of the size of each parameter, and the number of steps taken.

    Matrices decay; one-dimensional tensors (gains of norms, biases) do not, as is the field's habit."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: int = 0
    m: Tensors = field(default_factory=dict, repr=False)
    v: Tensors = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def update(self, arrays: Tensors, gradients: Tensors, learning_rate: float, *, backend: str | None = None) -> None:
        """One step on every tensor, in place: the bits of `adamw_2` for each, in one launch for each pair of types of
        parameter and gradient. KeyError where a gradient has no tensor or a tensor no gradient; ValueError as
        `adamw_2`. Nothing has moved then."""
        check_names(arrays, gradients)
        groups: dict[tuple, list[str]] = {}  # what one launch can take
        for name, theta in arrays.items():
            moments = [state[name] for state in (self.m, self.v) if name in state]
            how = checked(name, theta, gradients[name], moments, backend)
            groups.setdefault((how, theta.device, theta.dtype, gradients[name].dtype), []).append(name)
        self.step += 1
        for state in (self.m, self.v):
            state.update({name: zero_moment(theta) for name, theta in arrays.items() if name not in state})
        betas = self.beta1, self.beta2, self.eps
        for (how, *_), names in groups.items():
            lists = [[tensors[name] for name in names] for tensors in (arrays, self.m, self.v, gradients)]
            if how == "torch":
                for theta, m, v, gradient in zip(*lists, strict=True):
                    decay = self.weight_decay if theta.dim() >= 2 else 0.0
                    adamw_2(theta, gradient, m, v, self.step, learning_rate, *betas, decay, backend=how)
                continue
            _step_all(*lists, scalars(self.step, learning_rate, *betas, self.weight_decay), how)
            torch.autograd.graph.increment_version([t for tensors in lists[:3] for t in tensors])

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for moments in (self.m, self.v) for a in moments.values())


def check_names(arrays: Tensors, gradients: Tensors) -> None:
    """KeyError where a gradient has no tensor or a tensor no gradient."""
    if arrays.keys() != gradients.keys():
        raise KeyError(f"arrays and gradients differ in {sorted(arrays.keys() ^ gradients.keys())[:3]}")


def clip_by_global_norm(gradients: Tensors, max_norm: float, *, backend: str | None = None) -> tuple[Tensors, float]:
    """Scale all gradients by one factor so that their common length is at most `max_norm`; returns the length before.

        g′ = g · min(1, max_norm / ‖g‖)    ‖g‖² = Σ over every tensor of Σ g²     (Pascanu et al. 2013, arXiv 1211.5063)

    The length is a Python number, for which the GPU is waited for, once for each type of gradient. Squares are float32
    and summed in float64, in the kernel from the seventeenth on: their sum is within γ₁₇ relatively, and the same bits
    every time.
    ValueError when the length is not a finite number."""
    norm = math.sqrt(sum(total.item() for total in _sums_of_squares(gradients, backend)))
    if not math.isfinite(norm):
        broken = [name for name, g in gradients.items() if not torch.isfinite(g).all()] or ["the sum of squares"]
        raise ValueError(f"the gradient is not finite, first in {broken[0]}: lower the learning rate")
    if norm <= max_norm:
        return gradients, norm
    scaled = torch._foreach_mul(list(gradients.values()), max_norm / norm)
    return dict(zip(gradients, scaled, strict=True)), norm


def _sums_of_squares(gradients: Tensors, backend: str | None) -> list[Tensor]:
    """float64 numbers whose sum is Σ g², one for each device and type."""
    groups: dict[tuple, list[Tensor]] = {}
    for g in gradients.values():
        groups.setdefault((backends.choose(backend, g.device, g.dtype), g.device, g.dtype), []).append(g)
    return [
        torch.stack([backends.widened(g).square().sum(dtype=torch.float64) for g in group]).sum()
        if how == "torch" or dtype == torch.float64
        else _squares(group, how).sum()
        for (how, _, dtype), group in groups.items()
    ]


def zero_moment(theta: Tensor) -> Tensor:
    """Zeros for one moment of a parameter."""
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    return torch.zeros_like(theta, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)


def checked(name: str, theta: Tensor, gradient: Tensor, moments, backend: str | None) -> str:
    """The backend for this step; ValueError unless everything fits."""
    if not all(a.is_contiguous() for a in (theta, *moments)):
        raise ValueError(f"AdamW writes into {name} and its moments: needed contiguous tensors, see Tensor.contiguous")
    how = backends.choose(backend, theta.device, theta.dtype)
    if how != "torch" and theta.dtype == torch.float64:
        raise ValueError(f"{name}: float64, but kernels compute in float32: use backend='torch' or another type")
    if how != "torch" and gradient.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the gradient of {name}: {gradient.dtype}, needed float32, float16 or bfloat16 for a kernel")
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    for what, a in (("gradient", gradient), *(("moment", m) for m in moments)):
        if a.shape != theta.shape or a.device != theta.device:
            found, needed = (f"{tuple(x.shape)} on {x.device}" for x in (a, theta))
            raise ValueError(f"the {what} of {name}: {found}, needed {needed}, as the parameter")
        if what == "moment" and a.dtype != dtype:
            raise ValueError(f"the moment of {name}: {a.dtype}, needed {dtype} for parameters in {theta.dtype}")
    return how


# In Triton: one tensor, or a table of addresses for all.


def scalars(step, learning_rate, beta1, beta2, eps, weight_decay) -> list[float]:
    """What the kernels are given, in their order, computed in float64."""
    corrections = 1 - beta1**step, 1 - beta2**step
    return [1 - learning_rate * weight_decay, learning_rate, beta1, 1 - beta1, beta2, 1 - beta2, eps, *corrections]


def step_launch(theta: Tensor, m: Tensor, v: Tensor, gradient: Tensor, numbers: list[float], backend: str) -> Launch:
    """One step of one tensor, in place; everything is contiguous."""
    kernels = backends.load(KERNELS, backend)
    options = {"TILE": kernels.TILE, "num_warps": kernels.WARPS, **kernels.OPTIONS}
    arguments = theta, m, v, gradient, theta.numel(), *numbers
    return Launch(kernels.step_one, (-(-theta.numel() // kernels.TILE),), arguments, options, outputs=3, in_place=True)


def update_launch(
    thetas: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    gradients: list[Tensor],
    numbers: list[float],
    backend: str,
) -> Launch:
    """One step of all tensors, in place; everything is contiguous, on one device, and each list of one type.

    What it writes is not among its arguments, which are addresses: the caller keeps the tensors."""
    kernels = backends.load(KERNELS, backend)
    decays = [theta.dim() >= 2 for theta in thetas]
    table, tiles, aligned = addresses([thetas, gradients, ms, vs], decays, kernels.TILE)
    options = {
        "THETA": kernels.TYPES[str(thetas[0].dtype).removeprefix("torch.")],
        "GRADIENT": kernels.TYPES[str(gradients[0].dtype).removeprefix("torch.")],
        "ALIGNED": aligned,
        "COLUMNS": kernels.COLUMNS,
        "TILE": kernels.TILE,
        "num_warps": kernels.WARPS,
        **kernels.OPTIONS,
    }
    return Launch(kernels.step_all, (len(tiles),), (table, tiles, *numbers), options, outputs=0)


def squares_launch(partials: Tensor, gradients: list[Tensor], backend: str) -> Launch:
    """Partial sums of squares, one for each tile of each gradient; these are contiguous and of one type."""
    kernels = backends.load(KERNELS, backend)
    table, tiles, aligned = addresses([gradients] * 4, [False] * len(gradients), kernels.SQUARES_TILE)
    options = {
        "GRADIENT": kernels.TYPES[str(gradients[0].dtype).removeprefix("torch.")],
        "ALIGNED": aligned,
        "COLUMNS": kernels.COLUMNS,
        "TILE": kernels.SQUARES_TILE,
        "BLOCK": kernels.SQUARES_BLOCK,
        "num_warps": kernels.WARPS,
        **kernels.OPTIONS,
    }
    return Launch(kernels.squares, (len(tiles),), (partials, table, tiles), options)


def addresses(columns: list[list[Tensor]], decays: list[bool], tile: int) -> tuple[Tensor, Tensor, bool]:
    """`table` and `tiles` of `adamw_kernels`, on the tensors' device, and whether 16 divides every address.

    A row holds the addresses of one tensor of each column, how many elements that of the first has, and whether it
    decays."""
    first = columns[0]
    rows = [
        [*(t.data_ptr() for t in row), row[0].numel(), int(decay)] for *row, decay in zip(*columns, decays, strict=True)
    ]
    aligned = all(address % 16 == 0 for row in rows for address in row[:-2])
    table = torch.tensor(rows, dtype=torch.int64)
    if first[0].is_cuda:
        table = table.pin_memory()  # so that the copy does not wait for the GPU
    tiles = _tiles(tuple(t.numel() for t in first), tile, first[0].device)
    return table.to(first[0].device, non_blocking=True), tiles, aligned


@lru_cache(maxsize=16)
def _tiles(sizes: tuple[int, ...], tile: int, device: torch.device) -> Tensor:
    """(tensor, tile of that tensor) for every program: int32 (programs, 2)."""
    counts = torch.tensor([-(-size // tile) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = (counts.cumsum(0) - counts)[owner]  # of the owner's programs
    return torch.stack([owner, torch.arange(len(owner)) - first], dim=1).to(device, torch.int32)


def _run_one(theta, m, v, gradient, numbers, backend):
    """The operator `minift::adamw_step`."""
    step_launch(theta, m, v, gradient.contiguous(), numbers, backend).run(theta.device)


def _run_all(thetas, ms, vs, gradients, numbers, backend):
    """The operator `minift::adamw_update`."""
    contiguous = [g.contiguous() for g in gradients]
    update_launch(thetas, ms, vs, contiguous, numbers, backend).run(thetas[0].device)


def _run_squares(gradients, backend):
    """The operator `minift::sums_of_squares`."""
    partials = _like_squares(gradients, backend)
    if partials.numel():
        contiguous = [g.contiguous() for g in gradients]
        squares_launch(partials, contiguous, backend).run(partials.device)
    return partials


def _like_squares(gradients, backend):
    tile = backends.load(KERNELS, backend).SQUARES_TILE
    programs = sum(-(-g.numel() // tile) for g in gradients)
    return gradients[0].new_empty(programs, dtype=torch.float64)


_step_one = backends.operator(
    "adamw_step(Tensor(a!) theta, Tensor(b!) m, Tensor(c!) v, Tensor gradient, float[] numbers, str backend) -> ()",
    _run_one,
    fake=lambda theta, m, v, gradient, numbers, backend: None,
)
_step_all = backends.operator(
    "adamw_update(Tensor(a!)[] thetas, Tensor(b!)[] ms, Tensor(c!)[] vs, Tensor[] gradients, float[] numbers,"
    " str backend) -> ()",
    _run_all,
    fake=lambda thetas, ms, vs, gradients, numbers, backend: None,
)
_squares = backends.operator("sums_of_squares(Tensor[] gradients, str backend) -> Tensor", _run_squares, _like_squares)
