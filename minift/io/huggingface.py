"""Llama and GPT-2 checkpoints in Hugging Face folders: config.json and safetensors, in one file or in shards.

Reading is strict: every parameter of the model must be there, in its shape, and nothing else. transformers fills what
is missing with random numbers and a warning; a model that is half random looks like a model that learns badly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minift.io import bitsandbytes4, gpt2_config, llama_config
from minift.io.atomic import atomic_folder, atomic_write
from minift.io.errors import FormatError, shown
from minift.io.json_file import Fields, json_bytes, read_json
from minift.io.safetensors_file import SafetensorsFile, require_finite, write_safetensors
from minift.io.tokenizer import Tokenizer
from minift.models import Config, gpt2, llama, module_of
from minift.nn.weight import Frozen, Params, dense
from minift.quant.nf4 import NF4Tensor
from minift.quant.sixteen import Dtype, SixteenBitTensor, stored, to_bfloat16

FLOATS = ("F32", "F16", "BF16")
CONSTANTS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # which old checkpoints carry along
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Places = dict[str, tuple[SafetensorsFile, str]]  # our name → the file, and the name in it


def load_model(
    folder: Path | str, keep_quantized: bool = False, dtype: Dtype = "float32"
) -> tuple[Config, dict[str, Any]]:
    """The configuration and the parameters, float32 arrays under Hugging Face's names, of a checkpoint.

    bfloat16, float16 and bitsandbytes' NF4 and FP4 are decoded, one tensor at a time; with `keep_quantized` an NF4
    weight stays an NF4Tensor, which does not learn, and an FP4 weight is refused. With `dtype` "bfloat16" or "float16"
    the others become SixteenBitTensors, which do not learn either, and no more than one of them is ever float32. Raises
    FormatError for whatever is missing, surplus, misshapen or NaN.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    config = _config_format(values.get("model_type")).parse_config(values, folder / "config.json")
    model = module_of(config)
    _refuse_other_quantization(folder / "config.json", values)
    places = _places(folder, model.PREFIX)
    if config.num_hidden_layers > len(places):  # before every one of them is named
        found, needed = config.num_hidden_layers, f"no more layers than the {len(places)} tensors of the weights"
        raise FormatError(folder / "config.json", "num_hidden_layers", found, needed)
    expected = model.shapes(config)
    quantized = {base for name in places if (base := bitsandbytes4.base_name(name)) is not None}
    if config.tie_word_embeddings and model.HEAD in places:
        _require_equal(places, model.HEAD, model.EMBEDDING, expected[model.EMBEDDING])
        del places[model.HEAD]
    for name, (file, _) in places.items():
        if name not in expected and bitsandbytes4.base_name(name) not in expected:
            raise FormatError(file.path, name, "a tensor that this model does not have", "only its own parameters")
    if missing := [name for name in expected if name not in places]:
        raise FormatError(folder, missing[0], f"nothing ({len(missing)} parameters are missing)", "every parameter")
    params = {}
    for name, shape in expected.items():
        read = partial(_read_quantized, keep=keep_quantized) if name in quantized else _read
        params[name] = stored(name, read(places, name, shape), dtype)
    return config, params


def save_model(
    folder: Path | str,
    config: Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Write a folder that `load_model` and transformers read: config, weights, generation settings, tokenizer.

    `dtype` is "float32", "bfloat16" (rounded to nearest, ties to even) or "float16". NF4 weights are written as
    bitsandbytes does, with their codes and scales as they are; to them, `dtype` is what they are dequantized to. The
    folder appears whole or not at all. Raises FormatError for parameters that are not those of `config`, carry an
    adapter, or are not finite in `dtype`, and for a folder that is not empty, unless `overwrite`.
    """
    folder = Path(folder)
    if dtype not in bitsandbytes4.DTYPES:
        raise FormatError(folder, "dtype", repr(dtype), " or ".join(map(repr, bitsandbytes4.DTYPES)))
    _check(folder, config, params)
    tensors: dict[str, np.ndarray] = {}
    rounded = set()
    for name, weight in params.items():
        if isinstance(weight, NF4Tensor):
            require_finite(f"{folder} as {dtype}", name, bitsandbytes4.rounded(weight.scales(), dtype))  # |codes| <= 1
            tensors |= bitsandbytes4.pack_tensor(name, weight, dtype)
            continue
        array = _turned(name, _thawed(weight))
        require_finite(folder, name, array)
        if dtype == "bfloat16":
            tensors[name] = to_bfloat16(array)
            rounded.add(name)
        else:
            with np.errstate(over="ignore"):  # found by the next line
                tensors[name] = array.astype(dtype, copy=False)
            require_finite(f"{folder} as {dtype}", name, tensors[name])

    ids = _token_ids(tokenizer)
    values = _config_format(_model_type(config)).format_config(config, dtype, ids) | _quantization_config(params, dtype)
    with atomic_folder(folder, overwrite) as new:
        atomic_write(new / "config.json", json_bytes(values))
        atomic_write(new / "generation_config.json", json_bytes({"_from_model_config": True, **ids}))
        write_safetensors(new / SINGLE, tensors, bfloat16=rounded)
        if tokenizer is not None:
            tokenizer.save(new)


def as_stored(params: Params, dtype: str = "float32") -> dict[str, np.ndarray]:
    """What `load_model` will read from the folder that `save_model` writes: float32 numbers, rounded to `dtype`.

    Raises FormatError for what is not finite in `dtype`."""
    stored = {}
    for name, weight in params.items():
        stored[name] = bitsandbytes4.rounded(dense(weight), dtype)
        require_finite(f"the weights as {dtype}", name, stored[name])
    return stored


def stored_bytes(params: Params, dtype: str = "float32") -> int:
    """Bytes of the tensors that `save_model` writes: what the weights take on the disk, up to a header."""
    width = 4 if dtype == "float32" else 2
    return sum(
        sum(part.nbytes for part in bitsandbytes4.pack_tensor(name, weight, dtype).values())
        if isinstance(weight, NF4Tensor)
        else width * math.prod(weight.shape)
        for name, weight in params.items()
    )


def _config_format(model_type: Any) -> Any:
    """The module that reads and writes config.json of this type of model; of others, Llama's, which refuses them."""
    return gpt2_config if model_type == "gpt2" else llama_config


def _model_type(config: Config) -> str:
    return "gpt2" if isinstance(config, gpt2.Config) else "llama"


def _is_turned(name: str) -> bool:
    """Whether files hold this weight as (in, out): Conv1D of GPT-2. One in 4 bits is (out, in) there too."""
    return name.endswith(tuple(f".{module}.weight" for module in gpt2.LINEAR_MODULES))


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """From the file's orientation to ours, and back."""
    return np.ascontiguousarray(array.T) if _is_turned(name) else array


# --- reading ----------------------------------------------------------------------------------------------------------


def _places(folder: Path, prefix: str) -> Places:
    """Where every tensor is, under names with the prefix that files of the bare network leave out."""
    places: Places = {}
    for file in _files(folder):
        for raw in file.names():
            if raw.endswith(CONSTANTS):
                continue
            name = raw if raw.startswith((prefix, "lm_head.")) else f"{prefix}{raw}"
            if name in places:
                raise FormatError(file.path, raw, f"the same parameter as in {places[name][0].path}", "it once")
            places[name] = (file, raw)
    return places


def _files(folder: Path) -> list[SafetensorsFile]:
    if (folder / SINGLE).exists():
        return [SafetensorsFile(folder / SINGLE)]
    if not (folder / INDEX).exists():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {', '.join(pickled)}, which are pickles and can run code" if pickled else "no weights"
        raise FormatError(folder, "", found, f"{SINGLE} or {INDEX}")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise FormatError(folder / INDEX, "weight_map", type(index).__name__, "an object {tensor: file}")
    files = []
    for shard in sorted(set(index.values())):
        if not re.fullmatch(r"[\w .-]+\.safetensors", shard):  # no other folder, no NUL, no half a surrogate pair
            raise FormatError(
                folder / INDEX, "weight_map", shown(shard), "the name of a .safetensors file in this folder"
            )
        files.append(SafetensorsFile(folder / shard))
        promised = {name for name, where in index.items() if where == shard}
        if different := promised ^ set(files[-1].names()):
            name = min(different)
            found = "a tensor" if name not in promised else "nothing"
            raise FormatError(folder / shard, name, found, f"what {INDEX} says")
    return files


def _read(places: Places, name: str, shape: tuple[int, ...]) -> np.ndarray:
    file, raw = places[name]
    if file.dtype(raw) not in FLOATS:
        raise FormatError(file.path, raw, f"dtype {file.dtype(raw)}", " or ".join(FLOATS))
    needed = shape[::-1] if _is_turned(name) else shape
    if file.shape(raw) != needed:
        raise FormatError(file.path, name, f"shape {shown(file.shape(raw))}", f"shape {needed}")
    array = file.read(raw).astype(np.float32, copy=False)
    require_finite(file.path, raw, array)
    return _turned(name, array)


def _read_quantized(places: Places, name: str, shape: tuple[int, ...], keep: bool) -> np.ndarray | NF4Tensor:
    file, raw = places[name]
    if not _is_linear(name):
        raise FormatError(file.path, raw, "a 4-bit tensor", "one in a linear layer: others are not quantized")
    keys = [name, *(f"{name}.{part}" for part in bitsandbytes4.PARTS)]
    tensors = {key: places[key][0].read(places[key][1]) for key in keys[1:] if key in places}
    tensors[name] = file.raw(raw)  # the bytes; `bnb_4bit_quant_storage` may call them bfloat16
    settings = bitsandbytes4.read_settings(name, tensors, file.path).values
    if tuple(settings["shape"]) != shape:
        raise FormatError(file.path, name, f"shape {shown(tuple(settings['shape']))}", f"shape {shape}")
    q = bitsandbytes4.unpack_tensor(name, tensors, file.path)
    if keep:
        if isinstance(q, NF4Tensor):
            return q
        raise FormatError(file.path, raw, "bitsandbytes' FP4, which is only decoded", "NF4, to keep its 4 bits")
    array = bitsandbytes4.dequantize(q, settings["dtype"])
    require_finite(file.path, raw, array)
    return array


def _require_equal(places: Places, head: str, embedding: str, shape: tuple[int, ...]) -> None:
    """A tied model needs no output matrix; a file that has one anyway must have the same numbers in it."""
    if embedding in places and not np.array_equal(_read(places, head, shape), _read(places, embedding, shape)):
        found = f"other numbers than in {embedding}"
        raise FormatError(places[head][0].path, head, found, "the same, because config.json ties the two")


def _refuse_other_quantization(path: Path, values: dict[str, Any]) -> None:
    settings = values.get("quantization_config")
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise FormatError(path, "quantization_config", type(settings).__name__, "an object")
    inner = Fields(f"{path}: quantization_config", settings)
    inner.refuse("quant_method", ("bitsandbytes",), "'bitsandbytes'")
    inner.refuse("load_in_8bit", (False,), "false: LLM.int8 is not supported")


# --- writing ----------------------------------------------------------------------------------------------------------


def _thawed(weight: Any) -> Any:
    return dense(weight) if isinstance(weight, Frozen | SixteenBitTensor) else weight


def _check(folder: Path, config: Config, params: Params) -> None:
    expected = module_of(config).shapes(config)
    if different := set(expected) ^ set(params):
        name = min(different)
        found, needed = (
            ("nothing", "an array") if name in expected else ("a parameter", "none in a model of this config")
        )
        raise FormatError(folder, name, found, needed)
    for name, weight in params.items():
        if not isinstance(_thawed(weight), np.ndarray | NF4Tensor):
            raise FormatError(folder, name, repr(weight), "plain weights: lora.merge, or save_adapter, first")
        if isinstance(weight, NF4Tensor) and not _is_linear(name):
            raise FormatError(folder, name, repr(weight), "an array: transformers reads 4-bit linear layers only")
        if tuple(weight.shape) != expected[name]:
            raise FormatError(folder, name, f"shape {tuple(weight.shape)}", f"shape {expected[name]}")


def _is_linear(name: str) -> bool:
    modules = {*llama.LINEAR_MODULES, *gpt2.LINEAR_MODULES}
    return name == llama.HEAD or (name.endswith(".weight") and name.split(".")[-2] in modules)


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stops = list(tokenizer.stop_token_ids)
    eos = stops if len(stops) > 1 else stops[0] if stops else None
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}


def _quantization_config(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    quantized = {name: w for name, w in params.items() if isinstance(w, NF4Tensor)}
    if not quantized:
        return {}
    plain = {name.removesuffix(".weight") for name in params if _is_linear(name) and name not in quantized}
    if llama.HEAD not in quantized:
        plain.add("lm_head")
    settings = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(not isinstance(q.absmax, np.ndarray) for q in quantized.values()),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if plain == {"lm_head"} else sorted(plain),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    return {"quantization_config": settings}
