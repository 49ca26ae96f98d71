"""Classifiers as folders that transformers' AutoModelForSequenceClassification reads, and their encoded texts.

config.json names the architecture and the labels (`id2label`), model.safetensors holds the trunk and the head under
the names that they have here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minift.io import encoder, llama_config
from minift.io.atomic import atomic_folder, atomic_write
from minift.io.errors import FormatError
from minift.io.json_file import json_bytes
from minift.io.safetensors_file import require_finite, write_safetensors
from minift.io.tokenizer import Tokenizer
from minift.models import llama
from minift.models.classifier import BIAS, SCORE, WEIGHT, Config
from minift.nn.weight import Params, dense

FEATURES = "classifier.safetensors"


def save_classifier(
    folder: Path | str,
    config: Config,
    params: Params,
    labels: Sequence[str],
    tokenizer: Tokenizer,
    overwrite: bool = False,
) -> None:
    """Write trunk, head, labels and tokenizer. The folder appears whole or not at all.

    FormatError for as many labels as the head has not, for numbers that are not finite, and for a folder that is not
    empty, unless `overwrite`."""
    folder, arrays = Path(folder), {name: dense(w).astype(np.float32, copy=False) for name, w in params.items()}
    _check(folder, arrays, arrays[SCORE if isinstance(config, llama.Config) else WEIGHT], labels)
    if isinstance(config, llama.Config):
        ids = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
        values = llama_config.format_config(config, "float32", ids)
        values["architectures"] = ["LlamaForSequenceClassification"]
    else:
        values = encoder.format_config(config) | {"architectures": ["BertForSequenceClassification"]}
    values["id2label"] = {str(i): label for i, label in enumerate(labels)}
    values["label2id"] = {label: i for i, label in enumerate(labels)}
    values["problem_type"] = "single_label_classification"
    with atomic_folder(folder, overwrite) as new:
        atomic_write(new / "config.json", json_bytes(values))
        write_safetensors(new / encoder.WEIGHTS, arrays)
        tokenizer.save(new)


def save_feature_classifier(folder: Path | str, params: Params, labels: Sequence[str], overwrite: bool = False) -> None:
    """Write a linear classifier on frozen features: `classifier.weight` (classes, d) and `classifier.bias`, and beside
    them labels.json. Errors as `save_classifier`."""
    folder, arrays = Path(folder), {name: dense(params[name]) for name in (WEIGHT, BIAS)}
    _check(folder, arrays, arrays[WEIGHT], labels)
    with atomic_folder(folder, overwrite) as new:
        write_safetensors(new / FEATURES, arrays)
        atomic_write(new / "labels.json", json_bytes({"labels": list(labels)}))


def _check(folder: Path, arrays: dict[str, np.ndarray], head: np.ndarray, labels: Sequence[str]) -> None:
    if len(head) != len(labels) or len(set(labels)) != len(labels):
        raise FormatError(
            folder, "labels", f"{len(set(labels))} different labels", f"{len(head)}, one a row of the head"
        )
    for name, array in arrays.items():
        require_finite(folder, name, array)
