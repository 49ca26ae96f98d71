"""Everything a training run needs to go on as if nothing had happened, in one file.

There is little: what learns, the optimizer's two moments, the step. Moments in 8 bits are kept as they are, as
`NAME.codes` and `NAME.absmax`, so that not a bit is rounded again. Data order, dropout masks and learning rate are
pure functions of (settings, step), so there is no generator to save. The file is written under another name and then
renamed; a run that is killed while it writes keeps the checkpoint before. It carries checksums, and nothing in it is
NaN: a run goes on from what was saved, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minift.io.errors import FormatError, shown
from minift.io.json_file import Fields, parse_json
from minift.io.safetensors_file import SafetensorsFile, require_finite, write_safetensors
from minift.nn.weight import Arrays
from minift.optim.adamw8bit import Moment
from minift.quant.blockwise import BlockwiseTensor

NAME = "checkpoint.safetensors"
_GROUPS = ("parameter", "first_moment", "second_moment", "best")


@dataclass
class Checkpoint:
    step: int
    identity: dict[str, Any]  # what the run was asked to do: another run must not go on from here
    parameters: Arrays
    m: dict[str, Moment]
    v: dict[str, Moment]
    best: Arrays = field(default_factory=dict)
    best_loss: float | None = None
    updates: int | None = None  # of the optimizer, where that is not one a step


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint.safetensors` in `folder`, atomically. FormatError for NaN: the one before stays."""
    groups = (checkpoint.parameters, _flat(checkpoint.m), _flat(checkpoint.v), checkpoint.best)
    arrays = {f"{group}/{n}": a for group, named in zip(_GROUPS, groups, strict=True) for n, a in named.items()}
    for name, array in arrays.items():
        require_finite(folder / NAME, name, array)
    facts = {"step": checkpoint.step, "identity": checkpoint.identity, "best_loss": checkpoint.best_loss}
    facts |= {} if checkpoint.updates is None else {"updates": checkpoint.updates}
    write_safetensors(folder / NAME, arrays, metadata={"minift": json.dumps(facts)})


def load(
    folder: Path,
    identity: dict[str, Any],
    like: Arrays,
    moments: Mapping[str, tuple[Moment, Moment]] | None = None,
) -> Checkpoint:
    """Read it back for a run of the same identity. FormatError where there is none, it is damaged or another run's.

    `moments` are m and v before the first step, which say how they are kept; by default as `like`, the parameters."""
    path = folder / NAME
    if not path.exists():
        raise FormatError(path, "", "no checkpoint", "one to resume from; start without --resume first")
    file = SafetensorsFile(path)
    if "minift" not in file.metadata:
        raise FormatError(path, "__metadata__", "nothing of minift", "a checkpoint of minift")
    facts = Fields(path, parse_json(file.metadata["minift"].encode("utf-8"), path, "__metadata__"))
    step, saved, best_loss = facts.whole("step", least=0), facts.values.get("identity"), facts.values.get("best_loss")
    if not isinstance(saved, dict):
        raise facts.error("identity", "an object: what the run was asked to do")
    if best_loss is not None and (type(best_loss) is not float or not math.isfinite(best_loss)):
        raise facts.error("best_loss", "a finite number or null")
    for key in sorted(identity.keys() | saved.keys()):
        if identity.get(key) != saved.get(key):
            needed = f"{shown(saved.get(key))}, as the run was started, or another --out"
            raise FormatError(path, key, shown(identity.get(key)), needed)
    updates = facts.whole("updates", least=0) if "updates" in facts.values else None
    before = [{n: a if moments is None else moments[n][i] for n, a in like.items()} for i in (0, 1)]
    expected = dict(zip(_GROUPS, (like, *map(_flat, before), like), strict=True))
    groups: dict[str, Arrays] = {group: {} for group in _GROUPS}
    for full in file.names():
        group, _, name = full.partition("/")
        if group not in groups or name not in expected[group]:
            raise FormatError(path, full, "an array that this run does not train", f"arrays such as {next(iter(like))}")
        array, wanted = file.read(full), expected[group][name]
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise FormatError(path, full, f"{array.dtype} {shown(array.shape)}", f"{wanted.dtype} {wanted.shape}")
        require_finite(path, full, array)
        groups[group][name] = array
    whole = _GROUPS[:3] if step else _GROUPS[:1]  # there are no moments before the first step
    if groups["best"]:
        whole = (*whole, "best")
    for group in whole:
        if missing := expected[group].keys() - groups[group].keys():
            raise FormatError(path, f"{group}/{min(missing)}", "nothing", "an array for everything that learns")
    m, v = (_as(kind, groups[group]) if step else {} for kind, group in zip(before, _GROUPS[1:3], strict=True))
    return Checkpoint(step, saved, groups["parameter"], m, v, groups["best"], best_loss, updates)


def _flat(moments: Mapping[str, Moment]) -> Arrays:
    """Arrays only: a quantized moment is its codes and its scales."""
    flat: Arrays = {}
    for name, moment in moments.items():
        if isinstance(moment, BlockwiseTensor):
            flat |= {f"{name}.codes": moment.codes, f"{name}.absmax": moment.absmax}
        else:
            flat[name] = moment
    return flat


def _as(like: Mapping[str, Moment], flat: Arrays) -> dict[str, Moment]:
    """The inverse of `_flat`, for moments of the kinds of `like`."""
    return {
        name: dataclasses.replace(moment, codes=flat[f"{name}.codes"], absmax=flat[f"{name}.absmax"])
        if isinstance(moment, BlockwiseTensor)
        else flat[name]
        for name, moment in like.items()
    }


def copy(arrays: Arrays) -> Arrays:
    return {name: np.array(array, order="C") for name, array in arrays.items()}
