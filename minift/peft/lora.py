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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import mode
from typing import Any

import numpy as np
from jaxtyping import Float

from minift.nn.dropout import dropout
from minift.nn.linear import rows
from minift.nn.weight import Arrays, Frozen, Params, Weight, freeze, trainable
from minift.peft.targets import pattern_values, saved, short_targets, targets
from minift.peft.tuned import UNTIE, Tuned, tied
from minift.quant.nf4 import NF4Tensor

A_NAME, B_NAME = "lora_A.weight", "lora_B.weight"


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
        return self.scaling * (self.B @ self.A)

    def dense(self, dtype=None) -> np.ndarray:
        """W' = W + s B A. A quantized W is the dequantized one: what the adapter was trained on."""
        merged = self.base.dense() + self.delta()
        return merged if dtype is None else merged.astype(dtype)

    def __repr__(self) -> str:
        learned = self.A.size + self.B.size
        return f"LoRA(r={len(self.A)}, lora_alpha={self.lora_alpha:g}, {learned:,} numbers on {self.base!r})"


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds: the learned arrays under PEFT's names, and how to apply them.

    Layers may differ in rank, which their matrices say themselves, and in alpha."""

    arrays: Arrays  # "….q_proj.lora_A.weight" and so on; "lm_head.weight" for a weight that was trained in full
    r: int  # of most layers
    lora_alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    lora_dropout: float = 0.0
    over_nf4: bool = False  # learned on top of 4-bit weights (QLoRA), so it belongs to those
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # path of a layer -> its alpha, if not lora_alpha

    @property
    def ranks(self) -> dict[str, int]:
        """The path of every adapted layer, and its rank."""
        suffix = f".{A_NAME}"
        return {full.removesuffix(suffix): len(A) for full, A in self.arrays.items() if full.endswith(suffix)}

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The paths of the modules that were trained in full."""
        whole = (full for full in self.arrays if not full.endswith((f".{A_NAME}", f".{B_NAME}")))
        return tuple(full.removesuffix(".weight") for full in whole)

    def scaling(self, path: str) -> float:
        """s of the layer of this path."""
        r = len(self.arrays[f"{path}.{A_NAME}"])
        return scaling(self.alpha_pattern.get(path, self.lora_alpha), r, self.use_rslora)

    def __repr__(self) -> str:
        size = sum(a.size for a in self.arrays.values())
        nbytes = sum(a.nbytes for a in self.arrays.values())
        where = ", ".join((*self.target_modules, *(f"all of {path}" for path in self.modules_to_save)))
        return f"Adapter(r={self.r}, lora_alpha={self.lora_alpha:g}, {where}: {size:,} numbers, {nbytes:,} bytes)"


def scaling(lora_alpha: float, r: int, use_rslora: bool = False) -> float:
    """s = α / r, or α / √r for rsLoRA."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


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
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora_dropout}, needed 0 <= lora_dropout < 1")
    frozen = freeze(params)
    _refuse_tied(params, modules_to_save := tuple(modules_to_save))
    whole = saved(params, modules_to_save)
    paths = {name: name.removesuffix(".weight") for name in targets(params, target_modules) if name not in whole}
    ranks = dict.fromkeys(paths.values(), r) | _pattern("rank_pattern", rank_pattern, paths.values())
    alphas = dict.fromkeys(paths.values(), lora_alpha) | _pattern("alpha_pattern", alpha_pattern, paths.values())
    for rank in (r, *ranks.values()):
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
            raise ValueError(f"r is {rank}, needed a rank of at least 1, a whole number")
    for alpha in (lora_alpha, *alphas.values()):
        if not 0 < alpha < math.inf:
            raise ValueError(f"lora_alpha is {alpha}, needed a positive number")
    for name, path in paths.items():
        base, rank = frozen[name], ranks[path]
        (d_out, d_in), dtype = base.shape, base.array.dtype if isinstance(base, Frozen) else np.float32
        bound = 1 / math.sqrt(d_in)
        A = rng.uniform(-bound, bound, (rank, d_in)).astype(dtype)
        B = np.zeros((d_out, rank), dtype)
        frozen[name] = LoRA(base, A, B, alphas[path], use_rslora, lora_dropout)
    return frozen | {name: Tuned(frozen[name], frozen[name].dense().copy()) for name in whole}


def detach(params: Params) -> tuple[dict[str, Any], Adapter]:
    """Take the adapter off: the frozen base and the adapter. ValueError where there is none, or where layers differ in
    what PEFT has one setting for: use_rslora, lora_dropout."""
    loras = {name.removesuffix(".weight"): w for name, w in _loras(params).items()}
    settings = {(w.use_rslora, w.lora_dropout) for w in loras.values()}
    if len(settings) > 1:
        raise ValueError(f"layers differ in (use_rslora, lora_dropout): {sorted(settings)}")
    ((use_rslora, lora_dropout),) = settings
    learned = {name: w for name, w in params.items() if isinstance(w, LoRA | Tuned)}
    base = bare(params)
    lora_alpha = mode(w.lora_alpha for w in loras.values())
    return base, Adapter(
        arrays=trainable(learned),
        r=mode(len(w.A) for w in loras.values()),
        lora_alpha=lora_alpha,
        target_modules=short_targets(base, loras),
        use_rslora=use_rslora,
        lora_dropout=lora_dropout,
        over_nf4=any(isinstance(w.base, NF4Tensor) for w in loras.values()),
        alpha_pattern={path: w.lora_alpha for path, w in loras.items() if w.lora_alpha != lora_alpha},
    )


def bare(params: Params) -> dict[str, Any]:
    """The parameters without an adapter, if they carry one: the base's own arrays."""
    return {name: w.base if isinstance(w, LoRA | Tuned) else w for name, w in params.items()}


def insert(params: Params, adapter: Adapter) -> dict[str, Any]:
    """Put an adapter on a model, in place of one that it may carry. Copies no weights.

    KeyError for a layer that the model does not have or of which only one matrix is there, ValueError for one of
    another shape, or for a weight to be trained in full that is tied to another."""
    carried = freeze(bare(params))
    left = dict(adapter.arrays)
    for path in adapter.ranks:
        name, full, partner = f"{path}.weight", f"{path}.{A_NAME}", f"{path}.{B_NAME}"
        if name not in carried or partner not in left:
            raise KeyError(f"{full}: the model has no {name}" if name not in carried else f"{partner} is missing")
        alpha = adapter.alpha_pattern.get(path, adapter.lora_alpha)
        A, B = left.pop(full), left.pop(partner)
        carried[name] = LoRA(carried[name], A, B, alpha, adapter.use_rslora, adapter.lora_dropout)
    _refuse_tied(params, [name.removesuffix(".weight") for name in left])
    for name, array in left.items():
        if name not in carried:
            raise KeyError(f"{name} is not the A or B of a layer, and the model has no weight of that name")
        carried[name] = Tuned(carried[name], array)
    return carried


def mix(adapters: Iterable[tuple[Adapter, float]]) -> Adapter:
    """One adapter that is a weighted sum of several: Σ_i c_i s_i B_i A_i, exactly, by concatenating ranks.

        [c₁s₁B₁ … cₙsₙBₙ] [A₁; …; Aₙ] = Σ_i c_i s_i B_i A_i                                             (4)

    A layer's rank is the sum over the adapters that have it, its scaling 1. (Averaging A and B separately, as PEFT's
    "linear" combination does, adds cross terms B_i A_j that no adapter has learned.) ValueError for an empty list, a
    weight that is not finite, an adapter with whole weights, or adapters of which only some were learned over NF4."""
    parts = list(adapters)
    if not parts:
        raise ValueError("nothing to mix: pass at least one (adapter, weight)")
    for adapter, weight in parts:
        if not math.isfinite(weight):
            raise ValueError(f"an adapter's weight is {weight}, needed a finite number")
        if adapter.modules_to_save:
            raise ValueError(
                f"{adapter.modules_to_save[0]} was trained in full: that is a weight, not a difference, and does not "
                "add up; merge this adapter into the base and mix the others"
            )
    bases = {adapter.over_nf4 for adapter, _ in parts}
    if len(bases) > 1:
        raise ValueError(
            "some of the adapters were learned over NF4 weights and some over the original ones, needed one base; "
            "if you mean to mix them, say which with dataclasses.replace(adapter, over_nf4=...)"
        )
    blocks: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}  # c s B and A of each layer
    for adapter, weight in parts:
        for path in adapter.ranks:
            A, B = (adapter.arrays[f"{path}.{part}"] for part in (A_NAME, B_NAME))
            blocks.setdefault(path, []).append((weight * adapter.scaling(path) * B, A))
    arrays: Arrays = {}
    for path, of_layer in blocks.items():
        arrays[f"{path}.{A_NAME}"] = np.concatenate([A for _, A in of_layer], axis=0)
        arrays[f"{path}.{B_NAME}"] = np.concatenate([B for B, _ in of_layer], axis=1)
    ranks = {path: sum(len(A) for _, A in of_layer) for path, of_layer in blocks.items()}
    r = mode(ranks.values())
    return Adapter(
        arrays,
        r,
        lora_alpha=float(r),
        target_modules=tuple(sorted({target for adapter, _ in parts for target in adapter.target_modules})),
        over_nf4=bases.pop(),
        alpha_pattern={path: float(rank) for path, rank in ranks.items() if rank != r},
    )


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


def _pattern(what: str, pattern: Mapping[str, Any] | None, paths: Collection[str]) -> dict[str, Any]:
    for key, value in (pattern or {}).items():
        if not pattern_values({key: value}, paths):
            raise ValueError(f"{what}: {key!r} matches no target")
    return pattern_values(pattern or {}, paths)


def _refuse_tied(params: Params, paths: Iterable[str]) -> None:
    if (path := tied(params, paths)) is not None:
        raise ValueError(f"{path}: the model's output matrix is its table of embeddings, needed two; {UNTIE}")
