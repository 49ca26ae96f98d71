"""An adapter as a value: what its file holds, which layers it is for, and the sum of several.

Here are names, ranks and scales only. Of an array this asks no more than its shape, its bytes and a product with a
number; so the same functions serve arrays and, in the twin, tensors on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from statistics import mode
from typing import Any

from minift.peft.targets import pattern_values, saved, short_targets, targets
from minift.peft.tuned import UNTIE, tied

A_NAME, B_NAME = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds: the learned arrays under PEFT's names, and how to apply them.

    Layers may differ in rank, which their matrices say themselves, and in alpha."""

    arrays: dict[str, Any]  # "….q_proj.lora_A.weight" and so on; "lm_head.weight" for a weight that was trained in full
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
        return tuple(dict.fromkeys(full.rpartition(".")[0] for full in whole))

    def scaling(self, path: str) -> float:
        """s of the layer of this path."""
        r = len(self.arrays[f"{path}.{A_NAME}"])
        return scaling(self.alpha_pattern.get(path, self.lora_alpha), r, self.use_rslora)

    def __repr__(self) -> str:
        size = sum(math.prod(a.shape) for a in self.arrays.values())
        nbytes = sum(a.nbytes for a in self.arrays.values())
        where = ", ".join((*self.target_modules, *(f"all of {path}" for path in self.modules_to_save)))
        return f"Adapter(r={self.r}, lora_alpha={self.lora_alpha:g}, {where}: {size:,} numbers, {nbytes:,} bytes)"


def scaling(lora_alpha: float, r: int, use_rslora: bool = False) -> float:
    """s = α / r, or α / √r for rsLoRA."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def plan(
    params: Mapping[str, Any],
    target_modules: str | Iterable[str],
    r: Any,
    lora_alpha: float,
    lora_dropout: float,
    rank_pattern: Mapping[str, Any] | None,
    alpha_pattern: Mapping[str, float] | None,
    modules_to_save: Iterable[str],
) -> tuple[dict[str, tuple[int, float]], list[str]]:
    """What `lora.attach` is going to do: {weight: (its rank, its alpha)}, and the weights that learn in full.

    ValueError as `lora.attach` describes."""
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora_dropout}, needed 0 <= lora_dropout < 1")
    _refuse_tied(params, modules_to_save := tuple(modules_to_save))
    whole = saved(params, modules_to_save)
    paths = {name: name.removesuffix(".weight") for name in targets(params, target_modules) if name not in whole}
    ranks = dict.fromkeys(paths.values(), r) | _pattern("rank_pattern", rank_pattern, paths.values())
    alphas = dict.fromkeys(paths.values(), lora_alpha) | _pattern("alpha_pattern", alpha_pattern, paths.values())
    for rank in (r, *ranks.values()):
        if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
            raise ValueError(f"r is {rank}, needed a rank of at least 1, a whole number")
    for alpha in (lora_alpha, *alphas.values()):
        if not 0 < alpha < math.inf:
            raise ValueError(f"lora_alpha is {alpha}, needed a positive number")
    return {name: (ranks[path], alphas[path]) for name, path in paths.items()}, whole


def described(base: Mapping[str, Any], loras: Mapping[str, Any], arrays: dict[str, Any], over_nf4: bool) -> Adapter:
    """The adapter that these layers, {path: LoRA}, carry over `base`, with all learned arrays under their full names.

    ValueError where layers differ in what PEFT has one setting for: use_rslora, lora_dropout."""
    settings = {(w.use_rslora, w.lora_dropout) for w in loras.values()}
    if len(settings) > 1:
        raise ValueError(f"layers differ in (use_rslora, lora_dropout): {sorted(settings)}")
    ((use_rslora, lora_dropout),) = settings
    lora_alpha = mode(w.lora_alpha for w in loras.values())
    return Adapter(
        arrays=arrays,
        r=mode(len(w.A) for w in loras.values()),
        lora_alpha=lora_alpha,
        target_modules=short_targets(base, loras),
        use_rslora=use_rslora,
        lora_dropout=lora_dropout,
        over_nf4=over_nf4,
        alpha_pattern={path: w.lora_alpha for path, w in loras.items() if w.lora_alpha != lora_alpha},
    )


def placed(
    carried: Mapping[str, Any], adapter: Adapter, lora: Callable[..., Any], tuned: Callable[..., Any]
) -> dict[str, Any]:
    """Frozen weights with the adapter on them: `lora(base, A, B, alpha, use_rslora, lora_dropout)` in place of each
    weight that it adapts, `tuned(base, array)` in place of each that was trained in full.

    KeyError and ValueError as `lora.insert` describes."""
    carried, left = dict(carried), dict(adapter.arrays)
    for path in adapter.ranks:
        name, full, partner = f"{path}.weight", f"{path}.{A_NAME}", f"{path}.{B_NAME}"
        if name not in carried or partner not in left:
            raise KeyError(f"{full}: the model has no {name}" if name not in carried else f"{partner} is missing")
        alpha = adapter.alpha_pattern.get(path, adapter.lora_alpha)
        A, B = left.pop(full), left.pop(partner)
        carried[name] = lora(carried[name], A, B, alpha, adapter.use_rslora, adapter.lora_dropout)
    _refuse_tied(carried, [name.rpartition(".")[0] for name in left])
    for name, array in left.items():
        if name not in carried:
            raise KeyError(f"{name} is not the A or B of a layer, and the model has no weight of that name")
        carried[name] = tuned(carried[name], array)
    return carried


def mixed(adapters: Iterable[tuple[Adapter, float]], concatenate: Callable[..., Any]) -> Adapter:
    """One adapter that is a weighted sum of several, for the arrays that `concatenate(arrays, axis=…)` puts in a row.

    The equation, and what is refused, are those of `lora.mix`."""
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
    blocks: dict[str, list[tuple[Any, Any]]] = {}  # c s B and A of each layer
    for adapter, weight in parts:
        for path in adapter.ranks:
            A, B = (adapter.arrays[f"{path}.{part}"] for part in (A_NAME, B_NAME))
            blocks.setdefault(path, []).append((weight * adapter.scaling(path) * B, A))
    arrays = {}
    for path, of_layer in blocks.items():
        arrays[f"{path}.{A_NAME}"] = concatenate([A for _, A in of_layer], axis=0)
        arrays[f"{path}.{B_NAME}"] = concatenate([B for B, _ in of_layer], axis=1)
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


def _pattern(what: str, pattern: Mapping[str, Any] | None, paths: Collection[str]) -> dict[str, Any]:
    for key, value in (pattern or {}).items():
        if not pattern_values({key: value}, paths):
            raise ValueError(f"{what}: {key!r} matches no target")
    return pattern_values(pattern or {}, paths)


def _refuse_tied(params: Mapping[str, Any], paths: Iterable[str]) -> None:
    if (path := tied(params, paths)) is not None:
        raise ValueError(f"{path}: the model's output matrix is its table of embeddings, needed two; {UNTIE}")
