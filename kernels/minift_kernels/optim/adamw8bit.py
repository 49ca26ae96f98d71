"""AdamW with its moments in 8 bits, on torch tensors: the twin of `minift.optim.adamw8bit`, which explains it.

Codes and scales are the reference's, bit for bit, in every backend; float32 parameters are so too on a GPU, where a
step of all of them is one launch (`adamw8bit_kernels`). In plain PyTorch they come as close as in `adamw`. Parameters
and gradients may have 16 bits; arithmetic is float32, with one more rounding to the type of the parameter.

A gradient that is not finite is refused before anything moves, as in the reference. For that the GPU is waited for,
once a step, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minift.optim import adamw8bit as reference
from minift.optim.adamw8bit import BLOCK_SIZE, LARGEST_GRADIENT, MIN_8BIT_SIZE
from minift.quant.blockwise import block_count
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.nn.weight import Tensors
from minift_kernels.optim.adamw import AdamW, adamw_1, adamw_2, addresses, check_names, checked, scalars, zero_moment
from minift_kernels.quant import blockwise
from minift_kernels.quant.blockwise import BlockwiseTensor
from minift_kernels.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, on_device

__all__ = ["BLOCK_SIZE", "LARGEST_GRADIENT", "MIN_8BIT_SIZE", "AdamW8bit", "Moment", "adamw8bit_1", "adamw8bit_2"]
__all__ += ["check_gradient", "piece", "quantize_second", "step_in_place", "zero_moments"]

KERNELS = "minift_kernels.optim.adamw8bit_kernels"

Moment = Tensor | BlockwiseTensor


def adamw8bit_1(
    theta: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    m: BlockwiseTensor,
    v: BlockwiseTensor,
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, BlockwiseTensor, BlockwiseTensor]:
    """One step, as it is written: open both moments, `adamw_1`, close them.      (Dettmers et al. 2022, 2110.02861, §2)

        θ′, m′, v′ = AdamW(θ, g, m̃, ṽ)        m̃, ṽ: what the codes stand for                            (2)

    In plain PyTorch. ValueError for a gradient that is not finite, or so large that its square is not."""
    check_gradient(gradient)
    return _stepped(theta, gradient, m, v, (step, learning_rate, beta1, beta2, eps, weight_decay))


def _stepped(theta, gradient, m, v, settings):
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    open_m, open_v = (blockwise.dequantize(q, dtype, backend="torch") for q in (m, v))
    theta, new_m, new_v = adamw_1(theta, gradient, open_m, open_v, *settings)
    first = blockwise.quantize(new_m, on_device(DYNAMIC, theta.device), m.block_size, backend="torch")
    return theta, first, quantize_second(new_v, v.block_size, backend="torch")


@torch.no_grad()
def adamw8bit_2(
    theta: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    m: BlockwiseTensor,
    v: BlockwiseTensor,
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """The same in place: θ, and the codes and scales of m and v, contiguous tensors, are overwritten.

    ValueError as `adamw8bit_1`, for what does not fit θ or lies in another memory order, for moments over other maps
    than `zero_moments` has or in blocks of two sizes, and in a kernel for blocks longer than 4,096. Nothing has moved
    then."""
    how = _checked("theta", theta, gradient, (m, v), backend)
    check_gradient(gradient)
    overwrite(theta, gradient, m, v, (step, learning_rate, beta1, beta2, eps, weight_decay), how)


def overwrite(
    theta: Tensor, gradient: Tensor, m: BlockwiseTensor, v: BlockwiseTensor, settings: tuple, how: str
) -> None:
    """`adamw8bit_2` of what has been checked, `how` the backend: waits for nothing."""
    if how != "torch":
        _update([theta], [gradient], [m], [v], [True], settings, how)
        return
    new_theta, *moments = _stepped(theta, gradient, m, v, settings)
    theta.copy_(new_theta)
    for q, new in zip((m, v), moments, strict=True):
        q.codes.copy_(new.codes)
        q.absmax.copy_(new.absmax)


def piece(q: BlockwiseTensor, elements: slice, blocks: slice) -> BlockwiseTensor:
    """A view of some consecutive blocks: what is written into it is written into `q`."""
    codes = q.codes[elements]
    return BlockwiseTensor(codes, q.absmax[blocks], q.code, tuple(codes.shape), q.block_size)


def quantize_second(
    v: Float[Tensor, "*shape"], block_size: int = BLOCK_SIZE, *, backend: str | None = None
) -> BlockwiseTensor:
    """v over the unsigned map, nearest, but nothing except zero becomes zero: equation (1) of the reference."""
    q = blockwise.quantize(v, on_device(DYNAMIC_UNSIGNED, v.device), block_size, backend=backend)
    torch.maximum(q.codes, (v.reshape(-1) > 0).to(torch.uint8), out=q.codes)
    return q


def check_gradient(gradient: Float[Tensor, "*shape"], name: str = "the parameter") -> None:
    """ValueError for NaN, infinities, and what has no finite square: one such number would destroy its whole block."""
    check_gradients({name: gradient})


def check_gradients(gradients: Tensors) -> None:
    """The GPU is waited for once; where something is wrong, the reference says what and where."""
    groups: dict[tuple, list[Tensor]] = {}
    for g in gradients.values():
        if g.numel():
            groups.setdefault((g.device, g.dtype), []).append(g)
    largest = [torch.stack(torch._foreach_norm(group, torch.inf)) for group in groups.values()]
    if all((found.double() <= LARGEST_GRADIENT).all() for found in largest):  # 1e19 is infinite in float16
        return
    for name, g in gradients.items():
        reference.check_gradient(backends.widened(g.detach()).cpu().numpy(), name)


def zero_moments(
    theta: Float[Tensor, "*shape"], block_size: int = BLOCK_SIZE, min_8bit_size: float = MIN_8BIT_SIZE
) -> tuple[Moment, Moment]:
    """m and v before the first step: in 8 bits, or in 32 where θ has fewer than `min_8bit_size` numbers."""
    if theta.numel() < min_8bit_size:
        return zero_moment(theta), zero_moment(theta)
    blocks = block_count(theta.numel(), block_size)

    def zeros(code, zero):
        codes = torch.full((theta.numel(),), zero, dtype=torch.uint8, device=theta.device)
        absmax = torch.zeros(blocks, device=theta.device)
        return BlockwiseTensor(codes, absmax, on_device(code, theta.device), tuple(theta.shape), block_size)

    return zeros(DYNAMIC, int(DYNAMIC.searchsorted(0))), zeros(DYNAMIC_UNSIGNED, 0)


def step_in_place(
    theta: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    m: Moment,
    v: Moment,
    *settings: float,
    backend: str | None = None,
) -> None:
    """`adamw8bit_2` or `adamw_2`, as the moments are; `settings` are what comes after them."""
    operation: Callable = adamw8bit_2 if isinstance(m, BlockwiseTensor) else adamw_2
    operation(theta, gradient, m, v, *settings, backend=backend)


@dataclass
class AdamW8bit:
    """The optimizer's state, as `AdamW` has it, in blocks of `block_size`.

    Matrices decay; one-dimensional tensors (gains of norms, biases) do not, as is the field's habit."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: int = 0
    m: dict[str, Moment] = field(default_factory=dict, repr=False)
    v: dict[str, Moment] = field(default_factory=dict, repr=False)
    block_size: int = BLOCK_SIZE
    min_8bit_size: float = MIN_8BIT_SIZE

    @torch.no_grad()
    def update(self, arrays: Tensors, gradients: Tensors, learning_rate: float, *, backend: str | None = None) -> None:
        """One step on every tensor, in place: the bits of `step_in_place` for each. One launch for each pair of types
        of parameter and gradient, and one for those of them whose moments have 32 bits.

        KeyError where a gradient has no tensor or a tensor no gradient; ValueError as `adamw8bit_2`. Nothing has moved
        then."""
        check_names(arrays, gradients)
        check_gradients(gradients)
        groups: dict[tuple, list[str]] = {}  # what one launch can take
        moments = {}
        for name, theta in arrays.items():
            there = name in self.m and name in self.v
            m, v = (self.m[name], self.v[name]) if there else self._zeros(theta)
            how = _checked(name, theta, gradients[name], (m, v), backend)
            kind = m.block_size if isinstance(m, BlockwiseTensor) else 0
            groups.setdefault((kind, how, theta.device, theta.dtype, gradients[name].dtype), []).append(name)
            moments[name] = m, v
        for name, (m, v) in moments.items():
            self.m[name], self.v[name] = m, v
        betas = self.beta1, self.beta2, self.eps
        for (kind, how, *_), names in groups.items():
            if not kind:
                self._update_in_32_bits(names, arrays, gradients, learning_rate, how)
                continue
            lists: list[list[Any]] = [[x[name] for name in names] for x in (arrays, gradients, self.m, self.v)]
            thetas, slopes, ms, vs = lists
            decays = [theta.dim() >= 2 for theta in thetas]
            settings = self.step + 1, learning_rate, *betas
            if how != "torch":
                _update(thetas, slopes, ms, vs, decays, (*settings, self.weight_decay), how)
                continue
            for theta, slope, m, v, decay in zip(*lists, decays, strict=True):
                overwrite(theta, slope, m, v, (*settings, self.weight_decay if decay else 0.0), how)
        self.step += 1

    @property
    def nbytes(self) -> int:
        return sum(moment.nbytes for moments in (self.m, self.v) for moment in moments.values())

    def _update_in_32_bits(self, names: list[str], arrays, gradients, learning_rate: float, how: str) -> None:
        """The step of `AdamW`, of a state that is part of this one."""
        of: list[dict[str, Any]] = [{name: x[name] for name in names} for x in (arrays, gradients, self.m, self.v)]
        thetas, slopes, m, v = of
        small = AdamW(self.beta1, self.beta2, self.eps, self.weight_decay, self.step, m, v)
        small.update(thetas, slopes, learning_rate, backend=how)

    def _zeros(self, theta: Tensor) -> tuple[Moment, Moment]:
        return zero_moments(theta, self.block_size, self.min_8bit_size)


def _checked(name: str, theta: Tensor, gradient: Tensor, moments, backend: str | None) -> str:
    """The backend for this step; ValueError unless everything fits."""
    quantized = [q for q in moments if isinstance(q, BlockwiseTensor)]
    if not quantized:
        return checked(name, theta, gradient, moments, backend)
    how = checked(name, theta, gradient, (), backend)
    for q in quantized:
        if tuple(q.shape) != tuple(theta.shape) or q.codes.device != theta.device:
            found, needed = (f"{tuple(s)} on {d}" for s, d in ((q.shape, q.codes.device), (theta.shape, theta.device)))
            raise ValueError(f"the moment of {name}: {found}, needed {needed}, as the parameter")
        if not (q.codes.is_contiguous() and q.absmax.is_contiguous()):
            raise ValueError(f"AdamW writes into the moments of {name}: needed contiguous codes and scales")
    m, v = quantized
    check_moments(m, v, name)
    if how != "torch":
        check_block_size(quantized[0].block_size, how)
    return how


def check_moments(m: BlockwiseTensor, v: BlockwiseTensor, name: str = "the parameter") -> None:
    """ValueError unless both are over the maps of `zero_moments`, and in blocks of one size: so a step closes them."""
    for q, code in ((m, DYNAMIC), (v, DYNAMIC_UNSIGNED)):
        own = on_device(code, q.code.device)
        if q.code is not own and not torch.equal(q.code, own):
            raise ValueError(f"the moments of {name}: another map than `zero_moments` has, which the step closes with")
    if m.block_size != v.block_size:
        raise ValueError(f"the moments of {name}: blocks of {m.block_size:,} and {v.block_size:,}, needed one size")


def check_block_size(block_size: int, how: str) -> None:
    """ValueError for blocks that are too long for a kernel."""
    if block_size > (longest := backends.load(KERNELS, how).LONGEST_BLOCK):
        raise ValueError(f"block_size: {block_size:,}, a kernel holds blocks of up to {longest:,}: use backend='torch'")


# In Triton: a table of addresses for all.


def _update(thetas, gradients, ms, vs, decays, settings, backend) -> None:
    """One launch for all of these, whose blocks are of one size."""
    codes_and_scales = [[getattr(q, part) for q in x] for part in ("codes", "absmax") for x in (ms, vs)]
    numbers, block_size = scalars(*settings), ms[0].block_size
    _step_blocks(thetas, *codes_and_scales, gradients, decays, numbers, block_size, backend)
    torch.autograd.graph.increment_version([*thetas, *(t for part in codes_and_scales for t in part)])


def update_launch(
    thetas: list[Tensor],
    m_codes: list[Tensor],
    v_codes: list[Tensor],
    m_scales: list[Tensor],
    v_scales: list[Tensor],
    gradients: list[Tensor],
    decays: list[bool],
    numbers: list[float],
    block_size: int,
    backend: str,
) -> Launch:
    """One step of all tensors, in place; everything is contiguous, on one device, and each list of one type.

    What it writes is not among its arguments, which are addresses: the caller keeps the tensors."""
    kernels = backends.load(KERNELS, backend)
    width = backends.power_of_two(block_size)
    rows = max(kernels.TILE // width, 1)
    columns = [thetas, gradients, m_codes, v_codes, m_scales, v_scales]
    table, tiles, aligned = addresses(columns, decays, rows * block_size)
    options = {
        "THETA": kernels.TYPES[str(thetas[0].dtype).removeprefix("torch.")],
        "GRADIENT": kernels.TYPES[str(gradients[0].dtype).removeprefix("torch.")],
        "ALIGNED": aligned and block_size % 16 == 0,
        "COLUMNS": kernels.COLUMNS,
        "BLOCK_SIZE": block_size,
        "WIDTH": width,
        "ROWS": rows,
        "NEIGHBORS": min(16 // thetas[0].element_size(), block_size & -block_size),
        "ENTRIES": kernels.ENTRIES,
        "PADDED": kernels.PADDED,
        "num_warps": kernels.WARPS,
        **kernels.OPTIONS,
    }
    arguments = table, tiles, _tables(thetas[0].device), *numbers
    return Launch(kernels.step_blocks, (len(tiles),), arguments, options, outputs=0)


@cache
def _tables(device: torch.device) -> Tensor:
    """Both maps, then their thresholds with an infinity on either side: what the kernel looks up."""
    maps = [on_device(code, "cpu") for code in (DYNAMIC, DYNAMIC_UNSIGNED)]
    end = torch.tensor([torch.inf])
    return torch.cat([*maps, *(torch.cat([-end, blockwise.midpoints(code), end]) for code in maps)]).to(device)


def _run_all(thetas, m_codes, v_codes, m_scales, v_scales, gradients, decays, numbers, block_size, backend):
    """The operator `minift::adamw8bit_update`."""
    contiguous = [g.contiguous() for g in gradients]
    launch = update_launch(
        thetas, m_codes, v_codes, m_scales, v_scales, contiguous, decays, numbers, block_size, backend
    )
    launch.run(thetas[0].device)


_step_blocks = backends.operator(
    "adamw8bit_update(Tensor(a!)[] thetas, Tensor(b!)[] m_codes, Tensor(c!)[] v_codes, Tensor(d!)[] m_scales,"
    " Tensor(e!)[] v_scales, Tensor[] gradients, bool[] decays, float[] numbers, int block_size, str backend) -> ()",
    _run_all,
    fake=lambda *_: None,
)
