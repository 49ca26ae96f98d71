"""adapter_config.json of PEFT ↔ what `minift.peft` knows of it: which layers, which rank, which scale.

PEFT's LoraConfig has more than forty settings. Here they are of four kinds: those that are read; those that say nothing
about what the tensors mean; those that must be unset, because they make another function of the layer than
W x + s B A x; and those that nobody here has heard of, which are refused like the third kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.io.errors import FormatError
from minift.io.json_file import Fields
from minift.models import gpt2
from minift.peft.lora import Adapter
from minift.peft.targets import ALL_LINEAR, Selection, as_pattern, expression, pattern_values

READ = {
    "alpha_pattern",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
NO_MATTER = {  # for what the tensors mean
    "auto_mapping",
    "fan_in_fan_out",  # how the base lies in memory; PEFT itself sets it right where it is not
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
UNUSED: tuple[object, ...] = (None, False, "none", {}, [])  # any other key must have one of these values
NOT_SUPPORTED = "it unset: this variant of LoRA is not supported; merge it with PEFT and load the merged model"
INSTEAD = {
    "ensure_weight_tying": "false: untie the model's embeddings, and train one of the two",
}
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # ways to initialize that also alter W
CONVERTED = (
    "a way that leaves the base model as it was; PEFT makes such an adapter of it: "
    "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
)
CLASSIFIERS = {"classifier", "score"}  # PEFT adds both to modules_to_save for a classifier, which has one of them


@dataclass(frozen=True)
class PeftConfig:
    """A configuration of plain or rank-stabilized LoRA, checked; `fields` is for errors about it."""

    fields: Fields
    selection: Selection
    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float

    def ranks(self, paths: list[str]) -> dict[str, int]:
        """The rank of each adapted layer."""
        return dict.fromkeys(paths, self.r) | _pattern(self.fields, "rank_pattern", paths)

    def alphas(self, paths: list[str]) -> dict[str, float]:
        """The layers whose alpha is not `lora_alpha`, and theirs."""
        found = _pattern(self.fields, "alpha_pattern", paths)
        return {path: alpha for path, alpha in found.items() if alpha != self.lora_alpha}


def parse_config(values: dict[str, Any], path: Path) -> PeftConfig:
    """What an adapter_config.json says. Raises FormatError for a wrong value and for every other variant of LoRA."""
    fields = Fields(path, values)
    _refuse_variants(fields)
    dropout = values.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise fields.error("lora_dropout", "a probability below 1")
    return PeftConfig(
        fields,
        _selection(fields),
        r=fields.whole("r", 8),
        lora_alpha=fields.real("lora_alpha", 8),
        use_rslora=fields.flag("use_rslora"),
        lora_dropout=float(dropout),
    )


def format_config(adapter: Adapter, base_model_name_or_path: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter. Its patterns mean exactly the layers whose rank or alpha differs."""
    ranks = adapter.ranks
    classifies = any(path.split(".")[-1] in CLASSIFIERS for path in adapter.modules_to_save)
    return {
        "alpha_pattern": as_pattern(adapter.alpha_pattern, ranks),
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": any(path.split(".")[-1] in gpt2.LINEAR_MODULES for path in ranks),  # in transformers' GPT-2
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "modules_to_save": sorted(adapter.modules_to_save) or None,
        "peft_type": "LORA",
        "r": adapter.r,
        "rank_pattern": as_pattern({path: r for path, r in ranks.items() if r != adapter.r}, ranks),
        "revision": None,
        "target_modules": sorted(adapter.target_modules),
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.use_rslora,
    }


def _refuse_variants(fields: Fields) -> None:
    values = fields.values
    if values.get("peft_type") != "LORA":
        raise fields.error("peft_type", "'LORA'")
    for key in sorted(values.keys() - READ - NO_MATTER):
        if not any(type(values[key]) is type(unused) and values[key] == unused for unused in UNUSED):
            raise fields.error(key, INSTEAD.get(key, NOT_SUPPORTED))
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGE_THE_BASE):
        raise fields.error("init_lora_weights", CONVERTED)


def _selection(fields: Fields) -> Selection:
    target_modules = _choice(fields, "target_modules")
    if not target_modules:
        raise fields.error("target_modules", "a list of module names")
    layers = fields.values.get("layers_to_transform")
    layers = [] if layers is None else layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise fields.error("layers_to_transform", "the number of a block, or a list of them")
    pattern = _choice(fields, "layers_pattern")
    for key, given in (("layers_to_transform", layers), ("layers_pattern", pattern)):
        if given and isinstance(target_modules, str):
            raise fields.error(key, "it unset, since target_modules is one regular expression")
    if pattern and not layers:
        raise fields.error("layers_pattern", "layers_to_transform with it")
    return Selection(
        target_modules=ALL_LINEAR if str(target_modules).lower() == ALL_LINEAR else target_modules,
        exclude_modules=_choice(fields, "exclude_modules"),
        layers_to_transform=tuple(layers),
        layers_pattern=(pattern,) if isinstance(pattern, str) and pattern else tuple(pattern),
        modules_to_save=_names(fields, "modules_to_save"),
    )


def _choice(fields: Fields, key: str) -> str | tuple[str, ...]:
    """One regular expression, or names."""
    value = fields.values.get(key)
    names = (value,) if isinstance(value, str) else _names(fields, key)
    for text in names if isinstance(value, str) or key == "layers_pattern" else ():
        try:
            expression(f"(?:{text})")
        except ValueError as error:
            raise fields.error(key, f"a regular expression ({error})") from error
    return value if isinstance(value, str) else names


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    value = fields.values.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise fields.error(key, "a list of module names")
    return tuple(value)


def _pattern(fields: Fields, key: str, paths: list[str]) -> dict[str, Any]:
    """What the pattern says about each adapted layer."""
    pattern = fields.values.get(key) or {}
    if not isinstance(pattern, dict):
        raise fields.error(key, "an object {layers: number}")
    inner = Fields(f"{fields.path}: {key}", pattern)
    numbers = {layers: inner.whole(layers) if key == "rank_pattern" else inner.real(layers) for layers in pattern}
    try:
        return pattern_values(numbers, paths)
    except ValueError as error:
        raise FormatError(fields.path, key, error, "names of layers, or regular expressions") from error
