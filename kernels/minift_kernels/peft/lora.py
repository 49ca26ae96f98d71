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

from minift.nn.dropout import uniform
from minift.peft.adapter import A_NAME, B_NAME, Adapter, described, mixed, placed, plan, scaling
from minift.peft.lora import trainable_parameters
from minift.peft.targets import targets
from minift_kernels import backend as backends
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
    """The base layer plus a detour of rank r: equation (1). W gets no gradient. No dropout without a `dropout_key`."""
    base = Frozen(W.detach()) if isinstance(W, Tensor) else W
    how = backends.choose(backend, x.device, x.dtype)
    p = p if dropout_key is not None else 0.0
    y = base.linear(x, backend=how)
    return _forward_torch(x, y, A, B, scaling, p, dropout_key or 0)


def _forward_torch(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float, p: float, key: int) -> Tensor:
    """y + s x̃ Aᵀ Bᵀ, in float32 or float64, rounded once."""
    wide, A, B = (backends.widened(part.to(x.dtype)) for part in (x, A, B))
    if p:
        keep = torch.from_numpy(uniform(key, np.arange(x.numel(), dtype=np.uint64)) > np.float32(p))
        wide = wide * (keep.view(x.shape).to(x.device) * wide.new_tensor(1 / (1 - p)))
    h = scaling * (wide @ A.T)  # (..., r)
    return (backends.widened(y) + h @ B.T).to(x.dtype)


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
