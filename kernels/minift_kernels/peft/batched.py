"""Many adapters on one base, in one batch, on torch tensors: the twin of `minift.peft.batched`.

    y_i = x_i Wᵀ + s_a (x_i A_aᵀ) B_aᵀ        a = index_i, and for index_i = −1 the base alone              (1)

Nothing here waits for the GPU. So an index that is on one, and names no adapter, is an assertion that fails there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from minift_kernels import backend as backends
from minift_kernels.backend import Launch, power_of_two, rows
from minift_kernels.nn.weight import Frozen, Weight
from minift_kernels.peft.lora import check_shapes

KERNELS = "minift_kernels.peft.batched_kernels"


@dataclass(frozen=True, eq=False)
class Stack:
    """Adapters of one layer, by number. ValueError where the parts do not fit each other."""

    A: Tensor  # (n, r, in), r the largest rank
    B: Tensor  # (n, out, r)
    scaling: Tensor  # (n,): s of each

    def __post_init__(self):
        n, r, _ = self.A.shape
        if (self.B.shape[0], self.B.shape[2]) != (n, r) or self.scaling.shape != (n,):
            shapes = tuple(self.A.shape), tuple(self.B.shape), tuple(self.scaling.shape)
            raise ValueError("A {}, B {}, scaling {}: needed (n, r, in), (n, out, r), (n,)".format(*shapes))

    def __repr__(self) -> str:
        return f"Stack({len(self.A)} adapters, r <= {self.A.shape[1]}, {self.A.nbytes + self.B.nbytes:,} bytes)"


def stack(adapters: Sequence[tuple[Tensor, Tensor, float]]) -> Stack:
    """A `Stack` of (A, B, scaling), in this order: `[(w.A, w.B, w.scaling) for w in loras]`.

    Gradients reach the adapters' own tensors. ValueError for none, or for adapters of layers of different shapes."""
    shapes = {(A.shape[1], B.shape[0]) for A, B, _ in adapters}
    if len(shapes) != 1:
        raise ValueError(f"adapters: for layers of shapes (in, out) {sorted(shapes)}, needed one shape")
    r = max(len(A) for A, _, _ in adapters)
    A_stack = torch.stack([pad(A, (0, 0, 0, r - len(A))) for A, _, _ in adapters])
    B_stack = torch.stack([pad(B, (0, r - len(A))) for A, B, _ in adapters])
    dtype = torch.float64 if A_stack.dtype == torch.float64 else torch.float32
    return Stack(A_stack, B_stack, torch.tensor([s for _, _, s in adapters], dtype=dtype, device=A_stack.device))


def forward(
    x: Float[Tensor, "*rows d_in"],
    W: Float[Tensor, "d_out d_in"] | Weight,
    adapters: Stack,
    index: Int[Tensor, "*some"],
    *,
    backend: str | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """Equation (1): the base for all rows at once, each adapter for its rows. W gets no gradient.

    `index` has a number for each row, or for each of x's leading axes, such as one a sequence. ValueError for an index
    or shapes that do not fit, or an index that names no adapter of the stack."""
    base = Frozen(W.detach()) if isinstance(W, Tensor) else W
    check_shapes(x, tuple(base.shape), tuple(adapters.A.shape[1:]), tuple(adapters.B.shape[1:]))
    how = backends.choose(backend, x.device, x.dtype)
    of_row = of_rows(index, tuple(x.shape), len(adapters.A))
    if how == "torch" or x.dtype == torch.float64:
        return _forward_torch(x, base.linear(x, backend=how), adapters, of_row)
    segments = _segments(of_row, len(adapters.A), backends.load(KERNELS, how).ROWS)
    scaling = adapters.scaling.detach()
    passed, h = _Down.apply(x, adapters.A, scaling, *segments, how)
    return _Up.apply(base.linear(passed if x.requires_grad else x, backend=how), h, adapters.B, scaling, *segments, how)


def of_rows(index: Int[Tensor, "*some"], shape: tuple[int, ...], n: int) -> Int[Tensor, " N"]:
    """The adapter of each row of an x of this shape. ValueError for an index that does not fit."""
    if tuple(index.shape) != shape[: index.ndim] or index.ndim >= len(shape):
        raise ValueError(f"index: shape {tuple(index.shape)}, needed the first axes of x's rows, {shape[:-1]}")
    if index.device.type != "cpu":
        torch._assert_async(((index >= -1) & (index < n)).all(), f"index: needed -1 (none) to {n - 1}")
    elif index.numel() and not (index.min() >= -1 and index.max() < n):
        raise ValueError(f"index: from {index.min()} to {index.max()}, needed -1 (none) to {n - 1}")
    alone = index.reshape(tuple(index.shape) + (1,) * (len(shape) - 1 - index.ndim))
    return alone.expand(shape[:-1]).reshape(-1)


def _forward_torch(x: Tensor, y: Tensor, adapters: Stack, of_row: Tensor) -> Tensor:
    """Segment by segment; the detours in order of their adapters, then in the order of the rows."""
    wide, A, B = (backends.widened(part.to(x.dtype)) for part in (x, adapters.A, adapters.B))
    order = of_row.argsort(stable=True)
    counts = [int((of_row == a).sum()) for a in range(-1, len(A))]
    scaling = adapters.scaling.detach()
    alone, *segments = rows(wide)[order].split(counts)
    detours = [s * (part @ A_a.T) @ B_a.T for part, A_a, B_a, s in zip(segments, A, B, scaling, strict=True)]
    detour = torch.cat([alone.new_zeros(len(alone), y.shape[-1]), *detours])[order.argsort()]
    return (backends.widened(y) + detour.view(y.shape)).to(x.dtype)


# In Triton: three operators, and two functions of autograd as in `lora`.


def _segments(of_row: Tensor, n: int, rows_a_tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows sorted by adapter; where each segment begins, and the last one ends; and of every tile of the sorted
    rows its adapter, first and last place (3, tiles). There are as many tiles as could be needed; some are empty."""
    order = of_row.argsort(stable=True)
    numbers = torch.arange(-1, n + 1, device=of_row.device)
    starts = torch.searchsorted(of_row[order].long(), numbers)  # of −1, 0, …, n − 1, and the end
    tiles_before = ((starts.diff() + rows_a_tile - 1) // rows_a_tile).cumsum(0)
    tile = torch.arange(-(-len(order) // rows_a_tile) + n + 1, device=of_row.device)
    segment = torch.searchsorted(tiles_before, tile, right=True)
    found = segment.clamp(max=n)
    tiles_until = torch.nn.functional.pad(tiles_before, (1, 0))
    first = starts[found] + (tile - tiles_until[found]) * rows_a_tile
    last = torch.minimum(first + rows_a_tile, starts[found + 1])
    return order, starts[1:], torch.stack([found - 1, first, torch.where(segment > n, first, last)])


class _Down(torch.autograd.Function):
    """x ↦ x and h. x passes through on its way to the base, so on the way back the base's cotangent of x arrives here,
    and the detours' is added to it in one launch."""

    @staticmethod
    def forward(ctx, x, A, scaling, order, starts, tiles, backend):
        ctx.save_for_backward(x, A, order, starts, tiles)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return x.view_as(x), _down(x, A, scaling, order, tiles, backend)

    @staticmethod
    def backward(ctx, dx_base, dh):
        x, A, order, starts, tiles = ctx.saved_tensors
        dA = _outer(dh, x, order, starts, A.dtype, ctx.backend) if ctx.needs_input_grad[1] else None
        dx = _up(dx_base, dh, A.mT, order, tiles, ctx.backend) if ctx.needs_input_grad[0] else None
        return dx, dA, None, None, None, None, None


class _Up(torch.autograd.Function):
    """y₀, h ↦ y₀ + h Bᵀ. The cotangent of y₀ is that of y: the same tensor. What goes back to `_Down`, for h, is
    multiplied by s already, where it is a factor of a row."""

    @staticmethod
    def forward(ctx, base, h, B, scaling, order, starts, tiles, backend):
        ctx.save_for_backward(h, B, scaling, order, starts, tiles)
        ctx.backend = backend
        return _up(base, h, B, order, tiles, backend)

    @staticmethod
    def backward(ctx, dy):
        h, B, scaling, order, starts, tiles = ctx.saved_tensors
        dh = _down(dy, B.mT, scaling, order, tiles, ctx.backend)
        dB = _outer(h, dy, order, starts, B.dtype, ctx.backend).mT if ctx.needs_input_grad[2] else None
        return dy, dh, dB, None, None, None, None, None


def _tile(kernels, table: dict, x: Tensor, r: int) -> dict[str, int]:
    FEATURES, num_warps, num_stages = table[min(x.element_size(), 4)]
    ranks = min(max(power_of_two(r), 16), kernels.RANKS)
    tile = {"ROWS": kernels.ROWS, "FEATURES": FEATURES, "RANKS": ranks}
    return tile | {"num_warps": num_warps, "num_stages": num_stages}


def _run_down(x: Tensor, A: Tensor, scaling: Tensor, order: Tensor, tiles: Tensor, backend: str) -> Tensor:
    """The operator `minift::batched_down`: s_a x_i A_aᵀ, (..., r) in the type of x."""
    matrix, r = rows(x), A.shape[1]
    kernels = backends.load(KERNELS, backend)
    options = _tile(kernels, kernels.DOWN, x, r)
    blocks = tiles.shape[1] * -(-r // options["RANKS"])
    shares = max(min(kernels.PROGRAMS // blocks, -(-matrix.shape[1] // options["FEATURES"])), 1)
    parts = x.new_empty(shares, len(matrix), r, dtype=x.dtype if shares == 1 else torch.float32)
    down_launch(parts, matrix, A, scaling.contiguous(), order, tiles, backend).run(x.device)
    h = parts[0] if shares == 1 else parts.sum(dim=0).to(x.dtype)
    return h.view(*x.shape[:-1], r)


def down_launch(
    parts: Tensor, x: Tensor, A: Tensor, scaling: Tensor, order: Tensor, tiles: Tensor, backend: str
) -> Launch:
    """The first product of (1) in `batched_kernels`, a share of the features for each matrix of `parts`; x is a matrix
    of rows whose elements are neighbors."""
    kernels = backends.load(KERNELS, backend)
    (n_rows, n_features), r, n_tiles = x.shape, A.shape[1], tiles.shape[1]
    options = _tile(kernels, kernels.DOWN, x, r)
    turns = -(-n_features // options["FEATURES"])
    sizes = n_tiles, n_rows, n_features, r, -(-turns // len(parts)) * options["FEATURES"]
    arguments = (parts, x, A, scaling, order, tiles, x.stride(0), *A.stride(), *sizes)
    return Launch(kernels.down, (n_tiles, -(-r // options["RANKS"]), len(parts)), arguments, options)


def _run_up(base: Tensor, h: Tensor, B: Tensor, order: Tensor, tiles: Tensor, backend: str) -> Tensor:
    """The operator `minift::batched_up`: y₀_i + h_i B_aᵀ."""
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    up_launch(rows(y), rows(base), rows(h).contiguous(), B, order, tiles, backend).run(base.device)
    return y


def up_launch(y: Tensor, base: Tensor, h: Tensor, B: Tensor, order: Tensor, tiles: Tensor, backend: str) -> Launch:
    """The second product of (1) in `batched_kernels`; `base` is a matrix of rows whose elements are neighbors."""
    kernels = backends.load(KERNELS, backend)
    n_features, r, n_tiles = base.shape[1], h.shape[1], tiles.shape[1]
    options = _tile(kernels, kernels.UP, base, r)
    strides = base.stride(0), B.stride(0), B.stride(2), B.stride(1)
    arguments = (y, base, h, B, order, tiles, *strides, n_tiles, n_features, r)
    return Launch(kernels.up, (n_tiles, -(-n_features // options["FEATURES"])), arguments, options)


def _run_outer(h: Tensor, x: Tensor, order: Tensor, starts: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The operator `minift::batched_outer`: Σ_i h_iᵀ x_i over the rows of each adapter, (n, r, d)."""
    gradient = x.new_empty(len(starts) - 1, h.shape[-1], x.shape[-1], dtype=dtype)
    outer_launch(gradient, rows(h).contiguous(), rows(x), order, starts, backend).run(x.device)
    return gradient


def outer_launch(gradient: Tensor, h: Tensor, x: Tensor, order: Tensor, starts: Tensor, backend: str) -> Launch:
    """The sums of (2) in `batched_kernels`, a program for an adapter and a range of columns."""
    kernels = backends.load(KERNELS, backend)
    n, r, n_features = gradient.shape
    options = _tile(kernels, kernels.OUTER, x, r)
    grid = n, -(-n_features // options["FEATURES"]), -(-r // options["RANKS"])
    return Launch(kernels.outer, grid, (gradient, h, x, order, starts, x.stride(0), n_features, r), options)


_down = backends.operator(
    "batched_down(Tensor x, Tensor A, Tensor scaling, Tensor order, Tensor tiles, str backend) -> Tensor",
    _run_down,
    lambda x, A, scaling, order, tiles, backend: x.new_empty(*x.shape[:-1], A.shape[1]),
)
_up = backends.operator(
    "batched_up(Tensor base, Tensor h, Tensor B, Tensor order, Tensor tiles, str backend) -> Tensor",
    _run_up,
    lambda base, h, B, order, tiles, backend: torch.empty_like(base, memory_format=torch.contiguous_format),
)
_outer = backends.operator(
    "batched_outer(Tensor h, Tensor x, Tensor order, Tensor starts, ScalarType dtype, str backend) -> Tensor",
    _run_outer,
    lambda h, x, order, starts, dtype, backend: x.new_empty(starts.shape[0] - 1, h.shape[-1], x.shape[-1], dtype=dtype),
)
