"""LoRA adapters as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

A tensor's name is `base_model.model.`, the path of the layer in the base model, and `lora_A.weight` (r, in) or
`lora_B.weight` (out, r); a module that was trained in full (`modules_to_save`) is there under its own name. The scaling
α/r (or α/√r) is not in the tensors, it is in the configuration. PEFT only warns when a tensor is missing and ignores
surplus ones, so that an adapter may do nothing, silently; here both are errors.

PEFT keeps several adapters of one model in one folder: the one called `default` in the folder itself, every other in a
folder of its name inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from minift.io.atomic import atomic_folder, atomic_write
from minift.io.errors import FormatError, shown
from minift.io.json_file import json_bytes, read_json
from minift.io.peft_config import CLASSIFIERS, PeftConfig, format_config, parse_config
from minift.io.safetensors_file import SafetensorsFile, require_finite, write_safetensors
from minift.nn.weight import Arrays, Params
from minift.peft.lora import A_NAME, B_NAME, Adapter
from minift.peft.targets import Selection, linear_layers
from minift.peft.tuned import UNTIE, tied

PREFIX = "base_model.model."
CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
WHOLE = (".weight", ".bias")  # of a module that was trained in full
DEFAULT = "default"
BASE = "minift.base"  # in the metadata of WEIGHTS, where PEFT does not look: "nf4" for an adapter of QLoRA


def save_adapter(
    folder: Path | str,
    adapter: Adapter,
    base_model_name_or_path: str = "",
    overwrite: bool = False,
    name: str | None = None,
) -> None:
    """Write an adapter that PEFT's `PeftModel.from_pretrained` reads. The folder appears whole or not at all.

    With a `name`, into a folder of that name inside, where PEFT keeps an adapter that is not the only one; `default`
    lies in `folder` itself and is written first. Raises FormatError for arrays that are not pairs of (r, in) and
    (out, r) or weights of layers without a pair, and for a folder that is not empty, unless `overwrite`.
    """
    folder = _place(Path(folder), name)
    check_adapter(folder, adapter)
    arrays = {f"{PREFIX}{full}": array.astype(np.float32, copy=False) for full, array in adapter.arrays.items()}
    with atomic_folder(folder, overwrite) as new:
        atomic_write(new / CONFIG, json_bytes(format_config(adapter, base_model_name_or_path)))
        base = {BASE: "nf4"} if adapter.over_nf4 else {}
        write_safetensors(new / WEIGHTS, arrays, metadata={"format": "pt"} | base)


def load_adapter(folder: Path | str, params: Params | None = None, name: str | None = None) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote; `name` if the folder holds several.

    Raises FormatError for a variant other than plain (or rank-stabilized) LoRA, for a target module without tensors, a
    tensor outside the target modules, half a pair, or a rank that is not the configured one. Given the base model's
    `params`, also unless every layer that the configuration means, and no other, has its tensors in the right shapes.
    """
    folder = _place(Path(folder), name)
    if folder.name == DEFAULT and not folder.exists() and (folder.parent / CONFIG).exists():
        folder = folder.parent  # so FOLDER/NAME is right for every name
    config = parse_config(_read_config(folder), folder / CONFIG)
    file = SafetensorsFile(weights_file(folder))
    arrays = _read_arrays(file, config.selection)
    paths = sorted(full.removesuffix(f".{A_NAME}") for full in arrays if full.endswith(f".{A_NAME}"))
    _check_arrays(file.path, arrays, config.ranks(paths))
    whole = tuple(full.rpartition(".")[0] for full in arrays if not full.endswith((f".{A_NAME}", f".{B_NAME}")))
    _check_saved(config, whole)
    adapter = Adapter(
        arrays=arrays,
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=_targets(config, paths, whole),
        use_rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
        over_nf4=file.metadata.get(BASE) == "nf4",
        alpha_pattern=config.alphas(paths),
    )
    if params is not None:
        _check_against(file.path, adapter, config.selection, params)
    return adapter


def load_adapters(folder: Path | str, params: Params | None = None) -> dict[str, Adapter]:
    """Every adapter in a folder, by name: `default` is the one in the folder itself, others lie in folders inside.

    Raises FormatError for what `load_adapter` refuses, and where there is none."""
    folder = Path(folder)
    if not (names := adapter_names(folder)):
        raise FormatError(folder, "", "no adapter", f"{CONFIG} in it, or in folders in it")
    return {name: load_adapter(folder, params, name) for name in names}


def adapter_names(folder: Path | str) -> list[str]:
    """The adapters in a folder, as PEFT calls them; none for a folder of something else."""
    inside = sorted(path.parent.name for path in Path(folder).glob(f"*/{CONFIG}"))
    return [DEFAULT] * (Path(folder) / CONFIG).exists() + inside


def adapter_kind(source: Path | str) -> Literal["peft", "mlx"] | None:
    """Whose adapter lies in a folder, also if it is several; None for a model, or where there is neither."""
    folder = Path(source)
    if (folder / MLX_WEIGHTS).exists() and not (folder / WEIGHTS).exists():
        return "mlx"
    alone = not (folder / "config.json").exists()
    return "peft" if (folder / CONFIG).exists() or (alone and adapter_names(folder)) else None


def _place(folder: Path, name: str | None) -> Path:
    """The folder of the adapter of this name."""
    if name is None or name == DEFAULT:
        return folder
    if name in ("", ".", "..") or Path(name).name != name:
        raise FormatError(folder, "", f"the name {name!r} for an adapter", "one that a folder can have")
    return folder / name


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists() and (names := adapter_names(folder)):
        raise FormatError(folder, "", f"no adapter but inside: {', '.join(names)}", f"one of them: {folder / names[0]}")
    values = read_json(folder / CONFIG)
    if "peft_type" not in values and (folder / MLX_WEIGHTS).exists():
        raise FormatError(folder, "", "an adapter of mlx-lm", "one of PEFT, as `minift convert` makes of it")
    return values


def weights_file(folder: Path) -> Path:
    """Where an adapter's tensors are; FormatError where they are a pickle."""
    path = folder / WEIGHTS
    if not path.exists() and path.with_suffix(".bin").exists():
        raise FormatError(path.with_suffix(".bin"), "", "a pickle, which can run code", WEIGHTS)
    return path


def _read_arrays(file: SafetensorsFile, selection: Selection) -> Arrays:
    arrays = {}
    for name in file.names():
        full = name.removeprefix(PREFIX)
        whole = full.endswith(WHOLE) and selection.saves(full.rpartition(".")[0])
        if "lora_embedding_" in name:
            needed = "adapters on linear layers: leave embed_tokens out of target_modules, or merge it with PEFT"
            raise FormatError(file.path, name, "an adapter on a table of embeddings", needed)
        if not name.startswith(PREFIX) or not (whole or full.endswith((f".{A_NAME}", f".{B_NAME}"))):
            needed = f"{PREFIX}….{A_NAME}, ….{B_NAME} and the weights of modules_to_save only"
            raise FormatError(file.path, name, "a surplus tensor", needed)
        if file.dtype(name) not in ("F32", "F16", "BF16"):
            raise FormatError(file.path, name, f"dtype {file.dtype(name)}", "F32, F16 or BF16")
        array = file.read(name).astype(np.float32, copy=False)
        require_finite(file.path, name, array)
        arrays[full] = array
    return arrays


def check_adapter(path: Path, adapter: Adapter) -> None:
    """FormatError for what no file should hold: half a pair, ranks that disagree, NaN, an alpha for no layer."""
    matrices = ((full, B) for full, B in adapter.arrays.items() if full.endswith(f".{B_NAME}"))
    _check_arrays(path, adapter.arrays, {full.removesuffix(f".{B_NAME}"): B.shape[-1] for full, B in matrices})
    if unknown := adapter.alpha_pattern.keys() - adapter.ranks.keys():
        raise FormatError(path, "alpha_pattern", min(unknown), "adapted layers only")
    for full, array in adapter.arrays.items():
        require_finite(path, full, array)


def _check_arrays(path: Path, arrays: Arrays, ranks: dict[str, int]) -> None:
    """Pairs of (r, in) and (out, r), each of its own r, and whole weights of other layers."""
    if not any(full.endswith((f".{A_NAME}", f".{B_NAME}")) for full in arrays):
        raise FormatError(path, "", "no tensors", "at least one adapted layer")
    for full, array in arrays.items():
        is_a, is_b = full.endswith(f".{A_NAME}"), full.endswith(f".{B_NAME}")
        if not is_a and not is_b:
            if not full.endswith(WHOLE) or full.rpartition(".")[0] in ranks:
                raise FormatError(path, full, "a surplus tensor", f"….{A_NAME} or ….{B_NAME} only")
            continue
        layer = full.removesuffix(f".{A_NAME}" if is_a else f".{B_NAME}")
        partner = f"{layer}.{B_NAME if is_a else A_NAME}"
        if partner not in arrays:
            raise FormatError(path, partner, "nothing", f"the other half of {full}")
        r = ranks[layer]
        if array.ndim != 2 or array.shape[0 if is_a else 1] != r:
            raise FormatError(path, full, f"shape {shown(array.shape)}", f"({r}, in)" if is_a else f"(out, {r})")


def _targets(config: PeftConfig, paths: list[str], whole: tuple[str, ...]) -> tuple[str, ...]:
    """What means exactly the layers for which there are tensors: names where these suffice, else the paths."""
    selection, fields = config.selection, config.fields
    for path in paths:
        if not selection.adapts(path):
            needed = f"what means the adapted layer {path}, after exclude_modules, layers_to_transform, modules_to_save"
            raise fields.error("target_modules", needed)
    names = selection.target_modules
    if isinstance(names, str) or selection.exclude_modules or selection.layers_to_transform:
        return tuple(paths)
    without = [name for name in names if not any(Selection((name,)).adapts(path) for path in paths)]
    for name in without:
        if not any(Selection((name,)).adapts(path) for path in whole):
            raise fields.error("target_modules", f"no {shown(name)}, for which there are no tensors")
    return tuple(paths if without else sorted(names))


def _check_saved(config: PeftConfig, whole: tuple[str, ...]) -> None:
    names = config.selection.modules_to_save
    found = {name for name in names if any(Selection(modules_to_save=(name,)).saves(path) for path in whole)}
    for name in names:
        if name not in found and not (name in CLASSIFIERS and found & CLASSIFIERS):
            raise config.fields.error("modules_to_save", f"no {shown(name)}, for which there are no tensors")


def _check_against(path: Path, adapter: Adapter, selection: Selection, params: Params) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in linear_layers(params).items():
        if selection.adapts(layer):
            d_out, d_in = params[name].shape
            expected |= {f"{layer}.{A_NAME}": (-1, d_in), f"{layer}.{B_NAME}": (d_out, -1)}
    for name, weight in params.items():
        if selection.saves(name.rpartition(".")[0]):
            expected[name] = tuple(weight.shape)
    if (both := tied(params, adapter.modules_to_save)) is not None:
        found = "a weight that is the model's table of embeddings and its output matrix at once"
        raise FormatError(path, f"{both}.weight", found, f"a model with two: {UNTIE}")
    if missing := [name for name in expected if name not in adapter.arrays]:
        raise FormatError(path, missing[0], f"nothing ({len(missing)} tensors are missing)", "every adapted layer")
    for name, array in adapter.arrays.items():
        if name not in expected:
            raise FormatError(path, name, "a surplus tensor", "layers of this model only")
        needed = expected[name]
        if len(needed) != array.ndim or any(n not in (-1, size) for n, size in zip(needed, array.shape, strict=True)):
            shape = f"({', '.join('r' if n < 0 else str(n) for n in needed)})"
            raise FormatError(path, name, f"shape {array.shape}", shape)
