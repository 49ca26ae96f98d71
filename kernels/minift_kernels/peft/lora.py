"""LoRA on torch tensors: the twin of `minift.peft.lora`, where the derivation and the conventions are.

    y = x Wᵀ + h Bᵀ        h = s x̃ Aᵀ        x̃ = dropout(x, p), on the detour only                          (1)

A and B are kept as they were given, usually in float32, and are rounded to the type of x where they are multiplied;
their gradients come back in their own type.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minift.peft.adapter import A_NAME, B_NAME, Adapter, described, mixed, placed, plan, scaling
from minift.peft.lora import trainable_parameters
from minift.peft.targets import targets
from minift_kernels import backend as backends
from minift_kernels.backend import Launch, power_of_two, rows
from minift_kernels.nn.dropout import dropout
from minift_kernels.nn.weight import Frozen, Params, Tensors, Weight, freeze, trainable
from minift_kernels.peft.tuned import Tuned
from minift_kernels.quant.nf4 import NF4Tensor

__all__ = [
    "A_NAME",
    "B_NAME",
    "Adapter",
    "LoRA",
    "attach",
    "bare",
    "detach",
    "forward",
    "insert",
    "merge",
    "mix",
    "scaling",
    "targets",
    "trainable_parameters",
    "unmerge",
]

KERNELS = "minift_kernels.peft.lora_kernels"


def forward(
    x: Float[Tensor, "*rows d_in"],
    W: Float[Tensor, "d_out d_in"] | Weight,
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    scaling: float = 1.0,
    p: float = 0.0,
    dropout_key: int | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """The base layer plus a detour of rank r: equation (1). W gets no gradient. No dropout without a `dropout_key`.

    ValueError for shapes that do not fit each other. float64 is computed in plain PyTorch, whatever the backend."""
    base = Frozen(W.detach()) if isinstance(W, Tensor) else W
    check_shapes(x, tuple(base.shape), tuple(A.shape), tuple(B.shape))
    how = backends.choose(backend, x.device, x.dtype)
    p, key = (p, _signed(dropout_key)) if dropout_key is not None else (0.0, 0)
    if how == "torch" or x.dtype == torch.float64:
        return _forward_torch(x, base.linear(x, backend=how), A, B, scaling, p, key)
    passed, h = _Down.apply(x, A, scaling / (1 - p), p, key, how)
    return _Up.apply(base.linear(passed if x.requires_grad else x, backend=how), h, B, how)


def check_shapes(x: Tensor, W: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...]) -> None:
    """ValueError unless A (r, in) and B (out, r) fit W (out, in), and x (..., in): a kernel would read beyond them."""
    if A[:1] != B[1:] or B[:1] + A[1:] != W or tuple(x.shape[-1:]) != A[1:]:
        raise ValueError(f"x {tuple(x.shape)}, W {W}, A {A}, B {B}: needed (…, in), (out, in), (r, in), (out, r)")


def _forward_torch(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float, p: float, key: int) -> Tensor:
    """y + s x̃ Aᵀ Bᵀ, in float32 or float64, rounded once."""
    wide, A, B = (backends.widened(part.to(x.dtype)) for part in (x, A, B))
    if p:
        wide = dropout(wide, p, key, backend="torch")
    h = scaling * (wide @ A.T)  # (..., r)
    return (backends.widened(y) + h @ B.T).to(x.dtype)


# In Triton: three operators for the products in which one side has r columns, and two functions of autograd.


class _Down(torch.autograd.Function):
    """x ↦ x and h. x passes through on its way to the base, so on the way back the base's cotangent of x arrives here,
    and the detour's is added to it in one launch."""

    @staticmethod
    def forward(ctx, x, A, factor, p, key, backend):
        ctx.save_for_backward(x, A)
        ctx.dropout = factor, p, key, backend
        ctx.set_materialize_grads(False)
        return x.view_as(x), _down(x, A, factor, p, key, backend)

    @staticmethod
    def backward(ctx, dx_base, g):
        x, A = ctx.saved_tensors
        dA = _outer(g, x, *ctx.dropout).to(A.dtype) if ctx.needs_input_grad[1] else None
        dx = _up(dx_base, g, A.T, *ctx.dropout) if ctx.needs_input_grad[0] else None
        return dx, dA, None, None, None, None


class _Up(torch.autograd.Function):
    """y₀, h ↦ y₀ + h Bᵀ. The cotangent of y₀ is that of y: the same tensor."""

    @staticmethod
    def forward(ctx, base, h, B, backend):
        ctx.save_for_backward(h, B)
        ctx.no_dropout = 1.0, 0.0, 0, backend
        return _up(base, h, B, *ctx.no_dropout)

    @staticmethod
    def backward(ctx, dy):
        h, B = ctx.saved_tensors
        g = _down(dy, B.T, *ctx.no_dropout)
        dB = _outer(h, dy, *ctx.no_dropout).T.to(B.dtype) if ctx.needs_input_grad[2] else None
        return dy, g, dB, None


def _signed(key: int) -> int:
    """The same 64 bits as an operator's integer."""
    return (key + (1 << 63)) % (1 << 64) - (1 << 63)


def _tile(table: dict, x: Tensor, r: int, dropout: bool, widest: int) -> dict[str, Any]:
    ROWS, FEATURES, num_warps, num_stages = table[min(x.element_size(), 4), dropout]
    RANKS = min(max(power_of_two(r), 16), widest)
    return {
        "DROPOUT": dropout,
        "ROWS": ROWS,
        "FEATURES": FEATURES,
        "RANKS": RANKS,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _run_down(x: Tensor, A: Tensor, factor: float, p: float, key: int, backend: str) -> Tensor:
    """The operator `minift::lora_down`: factor · (m x) Aᵀ, (..., r) in the type of x, for x (..., d) and A (r, d)."""
    matrix, r = rows(x), len(A)
    kernels = backends.load(KERNELS, backend)
    options = _tile(kernels.DOWN, x, r, p > 0, kernels.RANKS)
    blocks = -(-len(matrix) // options["ROWS"]) * -(-r // options["RANKS"])
    shares = max(min(kernels.PROGRAMS // max(blocks, 1), -(-matrix.shape[1] // options["FEATURES"])), 1)
    parts = x.new_empty(shares, len(matrix), r, dtype=x.dtype if shares == 1 else torch.float32)
    down_launch(parts, matrix, A, factor, p, key, backend).run(x.device)
    h = parts[0] if shares == 1 else parts.sum(dim=0).to(x.dtype)
    return h.view(*x.shape[:-1], r)


def down_launch(parts: Tensor, x: Tensor, A: Tensor, factor: float, p: float, key: int, backend: str) -> Launch:
    """Kind (3) of `lora_kernels`, a share of the features for each matrix of `parts`; x's rows have neighbors."""
    kernels = backends.load(KERNELS, backend)
    (n_rows, n_features), r = x.shape, len(A)
    options = _tile(kernels.DOWN, x, r, p > 0, kernels.RANKS)
    grid = -(-n_rows // options["ROWS"]), -(-r // options["RANKS"]), len(parts)
    turns = -(-n_features // options["FEATURES"])
    a_part = -(-turns // len(parts)) * options["FEATURES"]
    sizes = x.stride(0), *A.stride(), n_rows, n_features, r, a_part
    return Launch(kernels.down, grid, (parts, x, A, *sizes, factor, p, key), options)


def _run_up(base: Tensor, h: Tensor, B: Tensor, factor: float, p: float, key: int, backend: str) -> Tensor:
    """The operator `minift::lora_up`: base + factor · m (h Bᵀ) for base (..., d), h (..., r) and B (d, r)."""
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    up_launch(rows(y), rows(base), rows(h).contiguous(), B, factor, p, key, backend).run(base.device)
    return y


def up_launch(y: Tensor, base: Tensor, h: Tensor, B: Tensor, factor: float, p: float, key: int, backend: str) -> Launch:
    """Kind (4) of `lora_kernels`; `base` is a matrix of rows whose elements are neighbors, y and h contiguous."""
    kernels = backends.load(KERNELS, backend)
    (n_rows, n_features), r = base.shape, h.shape[1]
    options = _tile(kernels.UP, base, r, p > 0, kernels.RANKS)
    grid = -(-n_rows // options["ROWS"]), -(-n_features // options["FEATURES"])
    sizes = base.stride(0), B.stride(1), B.stride(0), n_rows, n_features, r
    return Launch(kernels.up, grid, (y, base, h, B, *sizes, factor, p, key), options)


def _run_outer(h: Tensor, x: Tensor, factor: float, p: float, key: int, backend: str) -> Tensor:
    """The operator `minift::lora_outer`: factor · hᵀ (m x), float32 (r, d), for h (..., r) and x (..., d)."""
    h, x = rows(h).contiguous(), rows(x)
    kernels = backends.load(KERNELS, backend)
    options = _tile(kernels.OUTER, x, h.shape[1], p > 0, kernels.RANKS)
    blocks = -(-x.shape[1] // options["FEATURES"])
    shares = min(-(-kernels.PROGRAMS // max(blocks, 1)), -(-len(x) // options["ROWS"]))
    parts = x.new_empty(shares, h.shape[1], x.shape[1], dtype=torch.float32)
    outer_launch(parts, h, x, factor, p, key, backend).run(x.device)
    return parts.sum(dim=0)


def outer_launch(parts: Tensor, h: Tensor, x: Tensor, factor: float, p: float, key: int, backend: str) -> Launch:
    """Kind (5) of `lora_kernels`, a share of the rows for each matrix of `parts`."""
    kernels = backends.load(KERNELS, backend)
    (n_rows, n_features), (shares, r, _) = x.shape, parts.shape
    options = _tile(kernels.OUTER, x, r, p > 0, kernels.RANKS)
    grid = -(-n_features // options["FEATURES"]), -(-r // options["RANKS"]), shares
    sizes = x.stride(0), n_rows, n_features, r, -(-n_rows // max(shares, 1))
    return Launch(kernels.outer, grid, (parts, h, x, *sizes, factor, p, key), options)


_DROPOUT = "float factor, float p, int key, str backend"
_down = backends.operator(
    f"lora_down(Tensor x, Tensor A, {_DROPOUT}) -> Tensor",
    _run_down,
    lambda x, A, factor, p, key, backend: x.new_empty(*x.shape[:-1], A.shape[0]),
)
_up = backends.operator(
    f"lora_up(Tensor base, Tensor h, Tensor B, {_DROPOUT}) -> Tensor",
    _run_up,
    lambda base, h, B, factor, p, key, backend: torch.empty_like(base, memory_format=torch.contiguous_format),
)
_outer = backends.operator(
    f"lora_outer(Tensor h, Tensor x, {_DROPOUT}) -> Tensor",
    _run_outer,
    lambda h, x, factor, p, key, backend: x.new_empty(h.shape[-1], x.shape[-1], dtype=torch.float32),
)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A frozen weight and what was learned on top of it. With a quantized base this is QLoRA."""

    base: Weight
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    lora_alpha: float
    use_rslora: bool = False
    lora_dropout: float = 0.0

    def __post_init__(self):
        (r, d_in), (d_out, r_b) = self.A.shape, self.B.shape
        if r != r_b or (d_out, d_in) != self.shape:
            A, B = tuple(self.A.shape), tuple(self.B.shape)
            raise ValueError(f"A {A} and B {B} do not fit a weight of shape {self.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.A.nbytes + self.B.nbytes

    @property
    def scaling(self) -> float:
        return scaling(self.lora_alpha, len(self.A), self.use_rslora)

    def linear(self, x: Tensor, dropout_key: int | None = None, *, backend: str | None = None) -> Tensor:
        return forward(x, self.base, self.A, self.B, self.scaling, self.lora_dropout, dropout_key, backend=backend)

    def arrays(self) -> Tensors:
        return {A_NAME: self.A, B_NAME: self.B}

    def with_arrays(self, arrays: Tensors) -> LoRA:
        return dataclasses.replace(self, A=arrays[A_NAME], B=arrays[B_NAME])

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """ΔW = s B A."""
        return self.scaling * (self.B @ self.A)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' = W + s B A. A quantized W is the dequantized one: what the adapter was trained on."""
        merged = self.base.dense() + self.delta()
        return merged if dtype is None else merged.to(dtype)

    def __repr__(self) -> str:
        learned = self.A.numel() + self.B.numel()
        return f"LoRA(r={len(self.A)}, lora_alpha={self.lora_alpha:g}, {learned:,} numbers on {self.base!r})"


def attach(
    params: Params,
    target_modules: str | Iterable[str] = "all-linear",
    r: int = 8,
    lora_alpha: float = 16,
    *,
    rng: np.random.Generator,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Iterable[str] = (),
) -> dict[str, Any]:
    """The same parameters with a fresh adapter on each target; everything else is frozen.

    A and B are float32 (float64 over float64) whatever the base is, beside it, and learn. From one `rng` A has the
    reference's numbers, bit for bit. Settings and ValueErrors are the reference's."""
    frozen = freeze(params)
    chosen, whole = plan(
        params, target_modules, r, lora_alpha, lora_dropout, rank_pattern, alpha_pattern, modules_to_save
    )
    for name, (rank, alpha) in chosen.items():
        base = frozen[name]
        place = base.array if isinstance(base, Frozen) else base.codes
        dtype = torch.float64 if place.dtype == torch.float64 else torch.float32
        (d_out, d_in), bound = base.shape, 1 / math.sqrt(base.shape[1])
        A = torch.from_numpy(rng.uniform(-bound, bound, (rank, d_in))).to(place.device, dtype).requires_grad_()
        B = torch.zeros(d_out, rank, dtype=dtype, device=place.device, requires_grad=True)
        frozen[name] = LoRA(base, A, B, alpha, use_rslora, lora_dropout)
    return frozen | {name: Tuned(frozen[name], _learning_copy(frozen[name].dense())) for name in whole}


def detach(params: Params) -> tuple[dict[str, Any], Adapter]:
    """Take the adapter off: the frozen base and the adapter. ValueError where there is none, or where layers differ in
    what PEFT has one setting for: use_rslora, lora_dropout."""
    loras = {name.removesuffix(".weight"): w for name, w in _loras(params).items()}
    learned = {name: w for name, w in params.items() if isinstance(w, LoRA | Tuned)}
    over_nf4 = any(isinstance(w.base, NF4Tensor) for w in loras.values())
    base = bare(params)
    return base, described(base, loras, trainable(learned), over_nf4)


def bare(params: Params) -> dict[str, Any]:
    """The parameters without an adapter, if they carry one: the base's own tensors."""
    return {name: w.base if isinstance(w, LoRA | Tuned) else w for name, w in params.items()}


def insert(params: Params, adapter: Adapter) -> dict[str, Any]:
    """Put an adapter on a model, in place of one that it may carry. Copies no weights.

    KeyError for a layer that the model does not have or of which only one matrix is there, ValueError for one of
    another shape, or for a weight to be trained in full that is tied to another."""
    return placed(freeze(bare(params)), adapter, LoRA, Tuned)


def mix(adapters: Iterable[tuple[Adapter, float]]) -> Adapter:
    """One adapter that is a weighted sum of several: Σ_i c_i s_i B_i A_i, exactly, by concatenating ranks.

    ValueError for an empty list, a weight that is not finite, an adapter with whole weights, or adapters of which only
    some were learned over NF4."""
    with torch.no_grad():
        return mixed(adapters, torch.concatenate)


def merge(params: Params) -> dict[str, Any]:
    """W' = W + s B A in place of each adapter; nothing learns. ValueError where there is no adapter."""
    _loras(params)
    return {name: Frozen(w.dense().detach()) if isinstance(w, LoRA | Tuned) else w for name, w in params.items()}


def unmerge(params: Params, adapter: Adapter) -> dict[str, Any]:
    """W = W' − s B A, up to the rounding of the two; to get W back bit for bit, keep it. ValueError for an adapter with
    weights that were trained in full: what they replaced is not in it."""
    if adapter.modules_to_save:
        raise ValueError(f"{adapter.modules_to_save[0]} was replaced as a whole; to get it back, keep the base")
    carried = insert(params, adapter)
    return {
        name: Frozen((w.base.dense() - w.delta()).detach()) if isinstance(w, LoRA) else w for name, w in carried.items()
    }


def _loras(params: Params) -> dict[str, LoRA]:
    loras = {name: w for name, w in params.items() if isinstance(w, LoRA)}
    if not loras:
        raise ValueError("these parameters carry no adapter: attach or insert one first (or was it merged already?)")
    return loras


def _learning_copy(array: Tensor) -> Tensor:
    wide = backends.widened(array)
    return (wide.clone() if wide is array else wide).requires_grad_()
