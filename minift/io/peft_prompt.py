"""Soft prompts as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

There is one tensor, `prompt_embeddings`, and `peft_type` says what it is: embeddings (p, hidden_size) for prompt tuning
and P-tuning, keys and values (p, layers · 2 · kv heads · head_dim) for prefix tuning. A network that made them is not
in the file, so such a prompt can be used, and trained on as a table, but its encoder is gone. For a prefix PEFT calls
the length of a key `token_dim` and the number of key/value heads `num_attention_heads`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np

from minift.io.atomic import atomic_folder, atomic_write
from minift.io.errors import FormatError, shown
from minift.io.json_file import Fields, json_bytes, read_json
from minift.io.peft_adapter import CONFIG, WEIGHTS, weights_file
from minift.io.safetensors_file import SafetensorsFile, require_finite, write_safetensors
from minift.models.llama import Config
from minift.peft.soft_prompt import Kind, SoftPrompt

TENSOR = "prompt_embeddings"
SIZES = ("num_layers", "num_attention_heads", "token_dim")
NO_MATTER = {  # for what the tensor means: where it came from, or how it was trained
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "inference_mode",
    "init_weights",
    "peft_version",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "revision",
    "task_type",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}
READ = {"num_transformer_submodules", "num_virtual_tokens", "peft_type", *SIZES}


def save_prompt(
    folder: Path | str,
    prompt: SoftPrompt,
    config: Config,
    base_model_name_or_path: str = "",
    overwrite: bool = False,
) -> None:
    """Write a soft prompt that PEFT's `PeftModel.from_pretrained` reads. The folder appears whole or not at all.

    Raises FormatError for a table that does not fit a model of this `config`, has no rows (PEFT knows no such prompt)
    or holds NaN or infinity, and for a folder that is not empty, unless `overwrite`."""
    folder = Path(folder)
    _check(folder, prompt, config)
    if not len(prompt.table):
        raise FormatError(folder, TENSOR, "no virtual tokens", "at least one")
    values = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        **_sizes(prompt.kind, config),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(prompt.table),
        "peft_type": prompt.kind,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }
    with atomic_folder(folder, overwrite) as new:
        atomic_write(new / CONFIG, json_bytes(values))
        table = prompt.table.astype(np.float32, copy=False)
        write_safetensors(new / WEIGHTS, {TENSOR: table}, metadata={"format": "pt"})


def load_prompt(folder: Path | str, config: Config | None = None) -> SoftPrompt:
    """Read a soft prompt that PEFT or `save_prompt` wrote.

    Raises FormatError for another method, an option that changes what the tensor means, a number of rows that is not
    the configured one, a tensor too few or too many, NaN or infinity; given the base model's `config`, also for a
    prompt that was made for a model of other sizes."""
    folder = Path(folder)
    fields = Fields(folder / CONFIG, read_json(folder / CONFIG))
    kind = prompt_kind(folder)
    if kind is None:
        raise fields.error("peft_type", f"one of {', '.join(get_args(Kind))}")
    for key in sorted(fields.values.keys() - READ - NO_MATTER):
        fields.refuse(key, (False, "none", {}, []), "it unset: this variant is not supported")
    fields.refuse("num_transformer_submodules", (1,), "1: models of an encoder and a decoder are not supported")
    rows = fields.whole("num_virtual_tokens")
    file = SafetensorsFile(weights_file(folder))
    surplus = [name for name in file.names() if name != TENSOR]
    if surplus or TENSOR not in file.names():
        raise FormatError(file.path, (surplus or [TENSOR])[0], "a surplus tensor" if surplus else "nothing", TENSOR)
    if file.dtype(TENSOR) not in ("F32", "F16", "BF16"):
        raise FormatError(file.path, TENSOR, f"dtype {file.dtype(TENSOR)}", "F32, F16 or BF16")
    table = file.read(TENSOR).astype(np.float32, copy=False)
    if table.ndim != 2 or len(table) != rows:
        raise FormatError(file.path, TENSOR, f"shape {shown(table.shape)}", f"({rows}, numbers of a virtual token)")
    prompt = SoftPrompt(kind, table)
    require_finite(file.path, TENSOR, table)
    if config is not None:
        for key, needed in _sizes(kind, config).items():
            fields.refuse(key, (needed,), f"{needed}, as this model has")
        _check(file.path, prompt, config)
    return prompt


def prompt_kind(folder: Path | str) -> Kind | None:
    """Which soft prompt a folder holds; None for an adapter, or where there is none."""
    path = Path(folder) / CONFIG
    found = read_json(path).get("peft_type") if path.exists() else None
    return next((kind for kind in get_args(Kind) if kind == found), None)


def _sizes(kind: Kind, config: Config) -> dict[str, Any]:
    """The sizes of the model as PEFT writes them for this kind of prompt."""
    heads, width = config.num_attention_heads, config.hidden_size
    if kind == "PREFIX_TUNING":
        heads, width = config.num_key_value_heads, config.num_key_value_heads * config.head_dim
    return dict(zip(SIZES, (config.num_hidden_layers, heads, width), strict=True))


def _check(path: Path, prompt: SoftPrompt, config: Config) -> None:
    sizes = _sizes(prompt.kind, config)
    needed = sizes["token_dim"] * (2 * sizes["num_layers"] if prompt.kind == "PREFIX_TUNING" else 1)
    if prompt.table.shape[1] != needed:
        raise FormatError(path, TENSOR, f"shape {shown(prompt.table.shape)}", f"rows of {needed} numbers")
    require_finite(path, TENSOR, prompt.table)
