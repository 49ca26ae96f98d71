"""LoRA: leave W as it is and learn a difference of low rank.                         (Hu et al. 2021, arXiv 2106.09685)

    W' = W + s B A        s = α / r        A (r, in), B (out, r), r ≪ min(in, out)                      (1)

The paper writes column vectors, W x; here a row is an example, so every matrix multiplies transposed, x Wᵀ. The forward
pass never forms BA: x goes through A, then B, at r (in + out) multiplications a row instead of in · out.
B starts at zero, so the first step sees exactly the base model; A starts at random, so that B has something to learn
from (at the start ∂L/∂A = 0 and ∂L/∂B ≠ 0; with both at zero nothing would ever move).

Conventions differ between libraries; here they are the paper's and PEFT's. α is `lora_alpha`; rank-stabilized LoRA
(Kalajdzievski 2023, arXiv 2312.03732) divides it by √r instead of r. A is uniform in ±1/√in, as PEFT and loralib draw
it (the paper says Gaussian). mlx-lm calls s itself `scale` and stores both matrices transposed.

Adapters are values. `attach` puts a fresh one on a model, `detach` takes it off as an `Adapter`, `insert` puts that on
again, or another one, on the same base: switching copies no weights. `mix` adds several up by concatenating their
ranks, which is exact. `merge` forms W' once and for all. Layers may differ in rank and in α, and a weight that no
difference of low rank suits, a head or a norm, may learn in full beside them (`Tuned`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from minift.nn.dropout import dropout
from minift.nn.linear import rows
from minift.nn.weight import Arrays, Frozen, Params, Weight, freeze, trainable
from minift.peft.adapter import A_NAME, B_NAME, Adapter, described, mixed, placed, plan, scaling
from minift.peft.targets import targets
from minift.peft.tuned import Tuned
from minift.quant.nf4 import NF4Tensor

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
    x: Float[np.ndarray, "*rows d_in"],
    W: Float[np.ndarray, "d_out d_in"] | Weight,
    A: Float[np.ndarray, "r d_in"],
    B: Float[np.ndarray, "d_out r"],
    scaling: float = 1.0,
    p: float = 0.0,
    dropout_key: int | None = None,
) -> tuple[Float[np.ndarray, "*rows d_out"], Callable]:
    """The base layer plus a detour of rank r.                                 (Hu et al. 2021, arXiv 2106.09685, eq. 3)

        y = x Wᵀ + h Bᵀ        h = s x̃ Aᵀ        x̃ = dropout(x, p), on the detour only                  (2)

    `vjp(dy) -> dx, dW, dA, dB`:

        dh = s dy B        dA = dhᵀ x̃        dB = dyᵀ h        dx = dy W + dropout_vjp(dh A)            (3)

    dW is None: W is frozen, and the product dyᵀ x that full fine-tuning spends a third of its time on is never formed.
    No dropout without a `dropout_key`.
    """
    base = Frozen(W) if isinstance(W, np.ndarray) else W
    y, base_vjp = base.linear(x)
    if p and dropout_key is not None:
        x_tilde, dropout_vjp = dropout(x, p, dropout_key)
    else:
        x_tilde, dropout_vjp = x, lambda dx_tilde: dx_tilde
    h = x_tilde @ A.T  # (..., r)
    h *= scaling
    y += h @ B.T  # (..., d_out)

    def vjp(dy):
        dx, _ = base_vjp(dy)
        dh = scaling * (dy @ B)  # (..., r)
        dA = rows(dh).T @ rows(x_tilde)
        dB = rows(dy).T @ rows(h)
        dx += dropout_vjp(dh @ A)
        return dx, None, dA, dB

    return y, vjp


@dataclass(frozen=True)
class LoRA:
    """A frozen weight and what was learned on top of it. With a quantized base this is QLoRA."""

    base: Weight
    A: np.ndarray  # (r, in)
    B: np.ndarray  # (out, r)
    lora_alpha: float
    use_rslora: bool = False
    lora_dropout: float = 0.0

    def __post_init__(self):
        (r, d_in), (d_out, r_b) = self.A.shape, self.B.shape
        if r != r_b or (d_out, d_in) != tuple(self.base.shape):
            raise ValueError(f"A {self.A.shape} and B {self.B.shape} do not fit a weight of shape {self.base.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.A.nbytes + self.B.nbytes

    @property
    def scaling(self) -> float:
        return scaling(self.lora_alpha, len(self.A), self.use_rslora)

    def linear(self, x, dropout_key=None):
        y, forward_vjp = forward(x, self.base, self.A, self.B, self.scaling, self.lora_dropout, dropout_key)

        def vjp(dy):
            dx, _, dA, dB = forward_vjp(dy)
            return dx, {A_NAME: dA, B_NAME: dB}

        return y, vjp

    def arrays(self) -> Arrays:
        return {A_NAME: self.A, B_NAME: self.B}

    def with_arrays(self, arrays: Arrays) -> LoRA:
        return dataclasses.replace(self, A=arrays[A_NAME], B=arrays[B_NAME])

    def delta(self) -> Float[np.ndarray, "d_out d_in"]:
        """ΔW = s B A."""
        return self.scaling * (self.B @ self.A)  # the second term of (1)

    def dense(self, dtype=None) -> np.ndarray:
        """W' = W + s B A. A quantized W is the dequantized one: what the adapter was trained on."""
        merged = self.base.dense() + self.delta()  # W' of (1)
        return merged if dtype is None else merged.astype(dtype)

    def __repr__(self) -> str:
        learned = self.A.size + self.B.size
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

    `target_modules`: names such as "q_proj" or whole paths (both match from the end, at a dot), one regular expression
    that must match the whole path, or "all-linear". `rank_pattern` and `alpha_pattern` give layers an r or an alpha of
    their own: the first key decides that matches the end of a layer's path, as a regular expression.
    `modules_to_save` learn in full, as copies: all modules whose path ends in one of these, and no adapter on them.

    ValueError for a name or key that matches nothing (a table of embeddings is no target: no adapter fits it), a rank
    that is not a whole number from 1 on, an alpha that is not positive, a dropout outside [0, 1), a module to save that
    is tied to another, or parameters that carry an adapter already."""
    frozen = freeze(params)
    chosen, whole = plan(
        params, target_modules, r, lora_alpha, lora_dropout, rank_pattern, alpha_pattern, modules_to_save
    )
    for name, (rank, alpha) in chosen.items():
        base = frozen[name]
        (d_out, d_in), dtype = base.shape, base.array.dtype if isinstance(base, Frozen) else np.float32
        bound = 1 / math.sqrt(d_in)
        A = rng.uniform(-bound, bound, (rank, d_in)).astype(dtype)
        B = np.zeros((d_out, rank), dtype)
        frozen[name] = LoRA(base, A, B, alpha, use_rslora, lora_dropout)
    return frozen | {name: Tuned(frozen[name], frozen[name].dense().copy()) for name in whole}


def detach(params: Params) -> tuple[dict[str, Any], Adapter]:
    """Take the adapter off: the frozen base and the adapter. ValueError where there is none, or where layers differ in
    what PEFT has one setting for: use_rslora, lora_dropout."""
    loras = {name.removesuffix(".weight"): w for name, w in _loras(params).items()}
    learned = {name: w for name, w in params.items() if isinstance(w, LoRA | Tuned)}
    over_nf4 = any(isinstance(w.base, NF4Tensor) for w in loras.values())
    base = bare(params)
    return base, described(base, loras, trainable(learned), over_nf4)


def bare(params: Params) -> dict[str, Any]:
    """The parameters without an adapter, if they carry one: the base's own arrays."""
    return {name: w.base if isinstance(w, LoRA | Tuned) else w for name, w in params.items()}


def insert(params: Params, adapter: Adapter) -> dict[str, Any]:
    """Put an adapter on a model, in place of one that it may carry. Copies no weights.

    KeyError for a layer that the model does not have or of which only one matrix is there, ValueError for one of
    another shape, or for a weight to be trained in full that is tied to another."""
    return placed(freeze(bare(params)), adapter, LoRA, Tuned)


def mix(adapters: Iterable[tuple[Adapter, float]]) -> Adapter:
    """One adapter that is a weighted sum of several: Σ_i c_i s_i B_i A_i, exactly, by concatenating ranks.

        [c₁s₁B₁ … cₙsₙBₙ] [A₁; …; Aₙ] = Σ_i c_i s_i B_i A_i                                             (4)

    A layer's rank is the sum over the adapters that have it, its scaling 1. (Averaging A and B separately, as PEFT's
    "linear" combination does, adds cross terms B_i A_j that no adapter has learned.) ValueError for an empty list, a
    weight that is not finite, an adapter with whole weights, or adapters of which only some were learned over NF4."""
    return mixed(adapters, np.concatenate)


def merge(params: Params) -> dict[str, Any]:
    """W' = W + s B A in place of each adapter; the model then runs at the base model's speed. Nothing learns.

    A quantized base is dequantized first, since that is the W which the adapter was trained on: the merged model equals
    the unmerged one. ValueError where there is no adapter, so that nothing is merged twice."""
    _loras(params)
    return {name: Frozen(w.dense()) if isinstance(w, LoRA | Tuned) else w for name, w in params.items()}


def unmerge(params: Params, adapter: Adapter) -> dict[str, Any]:
    """W = W' − s B A, up to the rounding of the two; to get W back bit for bit, keep it. ValueError for an adapter with
    weights that were trained in full: what they replaced is not in it."""
    if adapter.modules_to_save:
        raise ValueError(f"{adapter.modules_to_save[0]} was replaced as a whole; to get it back, keep the base")
    carried = insert(params, adapter)
    return {name: Frozen(w.base.dense() - w.delta()) if isinstance(w, LoRA) else w for name, w in carried.items()}


def trainable_parameters(d_out: int, d_in: int, r: int) -> int:
    """r (in + out): for a square matrix 2·d·r, against d² of the matrix itself.      (Hu et al. 2021, §4.1 and table 4)

    It saves nothing once r ≥ d_out·d_in / (d_out + d_in), half of d for a square matrix."""
    return r * (d_in + d_out)


def _loras(params: Params) -> dict[str, LoRA]:
    loras = {name: w for name, w in params.items() if isinstance(w, LoRA)}
    if not loras:
        raise ValueError("these parameters carry no adapter: attach or insert one first (or was it merged already?)")
    return loras
