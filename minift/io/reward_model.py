"""A whole reward model as a Hugging Face folder: LlamaForSequenceClassification with one label.

It is a Llama without an output matrix and with one row in its place, `score.weight` (1, d). transformers reads the
score at the last token that is not `pad_token_id`; here it is read at the end of the text, as its length says. The two
agree where no text ends with the padding token. A reward model that is an adapter goes through `save_adapter`: PEFT
knows it as one of type SEQ_CLS.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minift.io.atomic import atomic_folder, atomic_write
from minift.io.errors import FormatError, shown
from minift.io.json_file import Fields, json_bytes, read_json
from minift.io.llama_config import format_config, parse_config
from minift.io.safetensors_file import SafetensorsFile, require_finite, write_safetensors
from minift.io.tokenizer import Tokenizer
from minift.models import llama
from minift.models.classifier import SCORE
from minift.nn.weight import Params, dense

ARCHITECTURE = "LlamaForSequenceClassification"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # how transformers writes num_labels = 1


def save_reward_model(
    folder: Path | str,
    config: llama.Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Write a trunk and its score head, in float32, so that transformers' AutoModelForSequenceClassification reads it.

    Every weight is written as the matrix that it stands for: adapters merged, 4 bits decoded. The padding token is the
    tokenizer's. The folder appears whole or not at all. Raises FormatError for parameters that are not those of a
    reward model of this `config`, are not finite, or for a folder that is not empty, unless `overwrite`."""
    folder = Path(folder)
    arrays = {name: dense(weight).astype(np.float32, copy=False) for name, weight in params.items()}
    _check(folder, {name: array.shape for name, array in arrays.items()}, config)
    for name, array in arrays.items():
        require_finite(folder, name, array)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids["pad_token_id"] = tokenizer.pad_token_id
    values = format_config(config, "float32", ids) | ONE_LABEL | {"architectures": [ARCHITECTURE]}
    with atomic_folder(folder, overwrite) as new:
        atomic_write(new / CONFIG, json_bytes(values))
        write_safetensors(new / WEIGHTS, arrays)
        if tokenizer is not None:
            tokenizer.save(new)


def load_reward_model(folder: Path | str) -> tuple[llama.Config, dict[str, Any]]:
    """(config, params) of such a folder, float32 arrays. Raises FormatError for a model of another kind, with more
    labels than one, or with a tensor that is missing, surplus, misshapen or not finite."""
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    if values.get("architectures") != [ARCHITECTURE]:
        needed = f"['{ARCHITECTURE}'], which `minift reward --whole` and transformers write"
        raise Fields(folder / CONFIG, values).error("architectures", needed)
    config = parse_config(values, folder / CONFIG)
    file = SafetensorsFile(folder / WEIGHTS)
    _check(file.path, {name: file.shape(name) for name in file.names()}, config)
    params = {}
    for name in (*llama.shapes(config), SCORE):
        if name != llama.HEAD:
            params[name] = file.read(name).astype(np.float32, copy=False)
            require_finite(file.path, name, params[name])
    return config, params


def is_reward_model(folder: Path | str) -> bool:
    """Whether a whole reward model lies there, and not an adapter, or nothing."""
    return (Path(folder) / CONFIG).exists() and (Path(folder) / WEIGHTS).exists()


def _check(path: Path, found: dict[str, tuple[int, ...]], config: llama.Config) -> None:
    """FormatError unless these are the tensors of a reward model of these sizes."""
    needed = llama.shapes(config) | {SCORE: (1, config.hidden_size)}
    needed.pop(llama.HEAD, None)
    for name in [*needed, *found]:
        if name not in found:
            raise FormatError(path, name, "nothing", f"shape {needed[name]}")
        if name not in needed:
            raise FormatError(path, name, "a tensor that a reward model does not have", "only its own parameters")
        if tuple(found[name]) != needed[name]:
            raise FormatError(path, name, f"shape {shown(tuple(found[name]))}", f"shape {needed[name]}")
