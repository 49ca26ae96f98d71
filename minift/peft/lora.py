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
ranks, which is exact. `merge` forms W' once and for all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from minift.nn.dropout import dropout
from minift.nn.linear import rows
from minift.nn.weight import Arrays, Frozen, Params, Weight, freeze
from minift.quant.nf4 import NF4Tensor

A_NAME, B_NAME = "lora_A.weight", "lora_B.weight"
TABLES = ("embed_tokens", "wte", "wpe")  # rows are looked up, nothing is multiplied: no adapter fits
NOT_LINEAR = (*TABLES, "lm_head", "score")  # tables and heads: not meant by "all-linear"


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
    """What an adapter file holds: the learned arrays under PEFT's names, and how to apply them."""

    arrays: Arrays  # "model.layers.0.self_attn.q_proj.lora_A.weight" and so on
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    lora_dropout: float = 0.0
    over_nf4: bool = False  # learned on top of 4-bit weights (QLoRA), so it belongs to those

    def __repr__(self) -> str:
        size = sum(a.size for a in self.arrays.values())
        nbytes = sum(a.nbytes for a in self.arrays.values())
        where = ", ".join(self.target_modules)
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
) -> dict[str, Any]:
    """The same parameters with a fresh adapter on each target; everything else is frozen.

    `target_modules`: names such as "q_proj" or whole paths (both match from the end, at a dot), one regular expression
    that must match the whole path, or "all-linear". ValueError for a name that matches nothing (a table of embeddings
    is none: no adapter fits it), a rank below 1, an alpha that is not positive, a dropout outside [0, 1), or parameters
    that carry an adapter already."""
    if r < 1:
        raise ValueError(f"r is {r}, needed a rank of at least 1")
    if not 0 < lora_alpha < math.inf:
        raise ValueError(f"lora_alpha is {lora_alpha}, needed a positive number")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora_dropout}, needed 0 <= lora_dropout < 1")
    frozen = freeze(params)
    for name in targets(params, target_modules):
        base = frozen[name]
        (d_out, d_in), dtype = base.shape, base.array.dtype if isinstance(base, Frozen) else np.float32
        bound = 1 / math.sqrt(d_in)
        A = rng.uniform(-bound, bound, (r, d_in)).astype(dtype)
        B = np.zeros((d_out, r), dtype)
        frozen[name] = LoRA(base, A, B, lora_alpha, use_rslora, lora_dropout)
    return frozen


def targets(params: Params, target_modules: str | Iterable[str]) -> list[str]:
    """The names of the weights that `target_modules` means; see `attach`."""
    paths = {name: name.removesuffix(".weight") for name, w in params.items() if len(w.shape) == 2}
    linear = {name: path for name, path in paths.items() if path.split(".")[-1] not in TABLES}
    if target_modules == "all-linear":
        return [name for name, path in linear.items() if path.split(".")[-1] not in NOT_LINEAR]
    if isinstance(target_modules, str):
        chosen = {name for name, path in linear.items() if re.fullmatch(target_modules, path)}
        if not chosen:
            raise ValueError(
                f"target_modules={target_modules!r}, a regular expression, matches none of {_leaves(linear)}"
            )
    else:
        chosen = set()
        for target in target_modules:
            matched = {name for name, path in linear.items() if f".{path}".endswith(f".{target}")}
            if not matched:
                raise ValueError(f"target_modules: {target!r} matches no linear layer; there are {_leaves(linear)}")
            chosen |= matched
    return [name for name in params if name in chosen]


def detach(params: Params) -> tuple[dict[str, Any], Adapter]:
    """Take the adapter off: the frozen base and the adapter. ValueError where there is none, or a mixed one."""
    loras = _loras(params)
    settings = {(len(w.A), w.lora_alpha, w.use_rslora, w.lora_dropout) for w in loras.values()}
    if len(settings) > 1:
        raise ValueError(f"layers differ in (r, lora_alpha, use_rslora, lora_dropout): {sorted(settings)}")
    ((r, lora_alpha, use_rslora, lora_dropout),) = settings
    arrays = {
        name.removesuffix("weight") + part: array for name, w in loras.items() for part, array in w.arrays().items()
    }
    base = {name: w.base if isinstance(w, LoRA) else w for name, w in params.items()}
    over_nf4 = any(isinstance(w.base, NF4Tensor) for w in loras.values())
    target_modules = _short_targets(base, list(loras))
    return base, Adapter(arrays, r, lora_alpha, target_modules, use_rslora, lora_dropout, over_nf4)


def insert(params: Params, adapter: Adapter) -> dict[str, Any]:
    """Put an adapter on a model, in place of one that it may carry. Copies no weights.

    KeyError for a layer that the model does not have or of which only one matrix is there, ValueError for one of
    another shape."""
    base = freeze({name: w.base if isinstance(w, LoRA) else w for name, w in params.items()})
    left = dict(adapter.arrays)
    for full in adapter.arrays:
        if full.endswith(A_NAME):
            name = full.removesuffix(A_NAME) + "weight"
            partner = full.removesuffix(A_NAME) + B_NAME
            if name not in base or partner not in left:
                raise KeyError(f"{full}: the model has no {name}" if name not in base else f"{partner} is missing")
            A, B = left.pop(full), left.pop(partner)
            base[name] = LoRA(base[name], A, B, adapter.lora_alpha, adapter.use_rslora, adapter.lora_dropout)
    if left:
        raise KeyError(f"{sorted(left)[0]} is not the A or B of a layer")
    return base


def mix(adapters: Iterable[tuple[Adapter, float]]) -> Adapter:
    """One adapter that is a weighted sum of several: Σ_i c_i s_i B_i A_i, exactly, by concatenating ranks.

        [c₁s₁B₁ … cₙsₙBₙ] [A₁; …; Aₙ] = Σ_i c_i s_i B_i A_i                                             (4)

    The result has r = Σ r_i and scaling 1. A layer that an adapter leaves alone gets zeros of its rank. (Averaging A
    and B separately, as PEFT's "linear" combination does, adds cross terms B_i A_j that no adapter has learned.)
    ValueError for an empty list."""
    parts = list(adapters)
    if not parts:
        raise ValueError("nothing to mix: pass at least one (adapter, weight)")
    shapes = {full: array.shape for adapter, _ in parts for full, array in adapter.arrays.items()}
    r = sum(adapter.r for adapter, _ in parts)
    arrays: Arrays = {}
    for full, shape in shapes.items():
        is_b, blocks = full.endswith(B_NAME), []
        for adapter, weight in parts:
            s = weight * scaling(adapter.lora_alpha, adapter.r, adapter.use_rslora)
            empty = np.zeros((shape[0], adapter.r) if is_b else (adapter.r, shape[1]), np.float32)
            blocks.append((s if is_b else 1) * adapter.arrays.get(full, empty))
        arrays[full] = np.concatenate(blocks, axis=1 if is_b else 0)
    modules = tuple(sorted({target for adapter, _ in parts for target in adapter.target_modules}))
    return Adapter(arrays, r, lora_alpha=float(r), target_modules=modules)


def merge(params: Params) -> dict[str, Any]:
    """W' = W + s B A in place of each adapter; the model then runs at the base model's speed. Nothing learns.

    A quantized base is dequantized first, since that is the W which the adapter was trained on: the merged model equals
    the unmerged one. ValueError where there is no adapter, so that nothing is merged twice."""
    loras = _loras(params)
    return {name: Frozen(loras[name].dense()) if name in loras else w for name, w in params.items()}


def unmerge(params: Params, adapter: Adapter) -> dict[str, Any]:
    """W = W' − s B A, up to the rounding of the two; to get W back bit for bit, keep it."""
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


def _leaves(linear: dict[str, str]) -> list[str]:
    return sorted({path.split(".")[-1] for path in linear.values()})


def _short_targets(base: Params, names: list[str]) -> tuple[str, ...]:
    """The shortest `target_modules` that means exactly these weights: module names if they do, else whole paths."""
    paths = [name.removesuffix(".weight") for name in names]
    leaves = sorted({path.split(".")[-1] for path in paths})
    return tuple(leaves if set(targets(base, leaves)) == set(names) else paths)
