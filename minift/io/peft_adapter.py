"""LoRA adapters as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

A tensor's name is `base_model.model.`, the path of the layer in the base model, and `lora_A.weight` (r, in) or
`lora_B.weight` (out, r). The scaling α/r (or α/√r) is not in the tensors, it is in the configuration. PEFT only warns
when a tensor is missing and ignores surplus ones, so that an adapter may do nothing, silently; here both are errors.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np

from minift.io.atomic import atomic_folder, atomic_write
from minift.io.errors import FormatError, shown
from minift.io.json_file import Fields, json_bytes, read_json
from minift.io.safetensors_file import SafetensorsFile, require_finite, write_safetensors
from minift.nn.weight import Params
from minift.peft import lora
from minift.peft.lora import A_NAME, B_NAME, Adapter

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "minift.base"  # in the metadata of WEIGHTS, where PEFT does not look: "nf4" for an adapter of QLoRA
READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "init_lora_weights"}
NO_MATTER = {  # for what the tensors mean
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
UNUSED: tuple[object, ...] = (
    None,
    False,
    "none",
    {},
    [],
)  # any other key must have one of these values: use_dora, rank_pattern, bias, …
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # ways to initialize that also alter W


def save_adapter(
    folder: Path | str, adapter: Adapter, base_model_name_or_path: str = "", overwrite: bool = False
) -> None:
    """Write an adapter that PEFT's `PeftModel.from_pretrained` reads. The folder appears whole or not at all.

    Raises FormatError for arrays that are not pairs of (r, in) and (out, r), and for a folder that is not empty, unless
    `overwrite`.
    """
    folder = Path(folder)
    _check_pairs(folder, adapter.arrays, adapter.r)
    for name, array in adapter.arrays.items():
        require_finite(folder, name, array)
    values: dict[str, object] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(adapter.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.use_rslora,
    }
    arrays = {f"{PREFIX}{name}": array.astype(np.float32, copy=False) for name, array in adapter.arrays.items()}
    with atomic_folder(folder, overwrite) as new:
        atomic_write(new / CONFIG, json_bytes(values))
        base = {BASE: "nf4"} if adapter.over_nf4 else {}
        write_safetensors(new / WEIGHTS, arrays, metadata={"format": "pt"} | base)


def load_adapter(folder: Path | str, params: Params | None = None) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote.

    Raises FormatError for a variant other than plain (or rank-stabilized) LoRA, for a target module without tensors, a
    tensor outside the target modules, half a pair, or a rank that is not `r`. Given the base model's `params`, also
    unless every layer that the targets mean, and no other, has its tensors in the right shapes.
    """
    folder = Path(folder)
    path = folder / CONFIG
    values = read_json(path)
    fields = Fields(path, values)
    if values.get("peft_type") != "LORA":
        raise fields.error("peft_type", "'LORA'")
    for key in sorted(values.keys() - READ - NO_MATTER):
        if not any(type(values[key]) is type(unused) and values[key] == unused for unused in UNUSED):
            raise fields.error(key, "it unset: not supported")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGE_THE_BASE):
        raise fields.error("init_lora_weights", "a way that leaves the base model as it was")
    r = fields.whole("r", 8)
    dropout = values.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise fields.error("lora_dropout", "a probability below 1")
    arrays = _read_arrays(folder / WEIGHTS)
    _check_pairs(folder / WEIGHTS, arrays, r)
    targets = _targets(fields, arrays)
    if params is not None:
        _check_against(folder / WEIGHTS, arrays, targets, params)
    return Adapter(
        arrays=arrays,
        r=r,
        lora_alpha=fields.real("lora_alpha", 8),
        target_modules=targets,
        use_rslora=fields.flag("use_rslora"),
        lora_dropout=float(dropout),
        over_nf4=SafetensorsFile(folder / WEIGHTS).metadata.get(BASE) == "nf4",
    )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists() and path.with_suffix(".bin").exists():
        raise FormatError(path.with_suffix(".bin"), "", "a pickle, which can run code", WEIGHTS)
    file = SafetensorsFile(path)
    arrays = {}
    for name in file.names():
        if not name.startswith(PREFIX) or not name.endswith((f".{A_NAME}", f".{B_NAME}")):
            raise FormatError(path, name, "a surplus tensor", f"{PREFIX}….{A_NAME} or ….{B_NAME} only")
        if file.dtype(name) not in ("F32", "F16", "BF16"):
            raise FormatError(path, name, f"dtype {file.dtype(name)}", "F32, F16 or BF16")
        array = file.read(name).astype(np.float32, copy=False)
        require_finite(path, name, array)
        arrays[name.removeprefix(PREFIX)] = array
    return arrays


def _check_pairs(path: Path, arrays: dict[str, np.ndarray], r: int) -> None:
    if not arrays:
        raise FormatError(path, "", "no tensors", "at least one adapted layer")
    for name, array in arrays.items():
        is_a = name.endswith(f".{A_NAME}")
        if not is_a and not name.endswith(f".{B_NAME}"):
            raise FormatError(path, name, "a surplus tensor", f"….{A_NAME} or ….{B_NAME} only")
        partner = name.removesuffix(A_NAME) + B_NAME if is_a else name.removesuffix(B_NAME) + A_NAME
        if partner not in arrays:
            raise FormatError(path, partner, "nothing", f"the other half of {name}")
        if array.ndim != 2 or array.shape[0 if is_a else 1] != r:
            raise FormatError(path, name, f"shape {array.shape}", f"({r}, in)" if is_a else f"(out, {r})")


def _targets(fields: Fields, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """target_modules; each names at least one adapted layer, and each adapted layer is named by one of them."""
    paths = sorted(name.removesuffix(f".{A_NAME}") for name in arrays if name.endswith(f".{A_NAME}"))
    targets = fields.values.get("target_modules")
    if isinstance(targets, str):  # a regular expression: keep what it meant
        try:
            with warnings.catch_warnings(action="ignore"):
                expression = re.compile(targets)
        except (re.error, OverflowError, RecursionError) as error:
            raise fields.error("target_modules", f"a regular expression ({error})") from error
        if unmatched := [path for path in paths if not expression.fullmatch(path)]:
            raise fields.error("target_modules", f"an expression that matches the adapted layer {unmatched[0]}")
        return tuple(paths)
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise fields.error("target_modules", "a list of module names")
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in paths):
            raise fields.error("target_modules", f"no {shown(target)}, for which there are no tensors")
    for path in paths:
        if not any(f".{path}".endswith(f".{target}") for target in targets):
            raise fields.error("target_modules", f"a name for the adapted layer {path}")
    return tuple(sorted(targets))


def _check_against(path: Path, arrays: dict[str, np.ndarray], targets: tuple[str, ...], params: Params) -> None:
    try:
        meant = lora.targets(params, targets)
    except ValueError as error:
        raise FormatError(path, "", error, "the adapter of this model") from error
    expected: dict[str, tuple[int, int]] = {}
    for name in meant:
        d_out, d_in = params[name].shape
        expected |= {
            name.removesuffix("weight") + A_NAME: (-1, d_in),
            name.removesuffix("weight") + B_NAME: (d_out, -1),
        }
    if missing := [name for name in expected if name not in arrays]:
        raise FormatError(path, missing[0], f"nothing ({len(missing)} tensors are missing)", "every adapted layer")
    for name, array in arrays.items():
        if name not in expected:
            raise FormatError(path, name, "a surplus tensor", "layers of this model only")
        if any(want not in (-1, found) for want, found in zip(expected[name], array.shape, strict=True)):
            found, want = array.shape, expected[name]
            raise FormatError(path, name, f"shape {found}", f"(r, {want[1]})" if want[0] < 0 else f"({want[0]}, r)")
