"""LoRA adapters as mlx-lm saves them: a folder with adapter_config.json and adapters.safetensors.

    y = x Wᵀ + scale · (x lora_a) lora_b        lora_a (in, r), lora_b (r, out)                           (1)

Both matrices lie transposed to PEFT's, A = lora_aᵀ and B = lora_bᵀ, and `scale` multiplies as it is: α = scale · r.
There is one rank and one scale for all layers. The layers are `keys` inside the last `num_layers` blocks (all blocks
if that is not positive), or whole paths, wherever they are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

from minift.io.atomic import atomic_folder, atomic_write
from minift.io.errors import FormatError, shown
from minift.io.json_file import Fields, json_bytes, read_json
from minift.io.peft_adapter import BASE, CONFIG, check_adapter
from minift.io.peft_adapter import MLX_WEIGHTS as WEIGHTS
from minift.io.safetensors_file import SafetensorsFile, require_finite, write_safetensors
from minift.nn.weight import Arrays, Params
from minift.peft.lora import A_NAME, B_NAME, Adapter
from minift.peft.targets import linear_layers, short_targets

MLX_A, MLX_B = "lora_a", "lora_b"
KEYS = ("self_attn.q_proj", "self_attn.v_proj")  # what mlx-lm means for a Llama where the file names none
BLOCK = re.compile(r"(.*\.)?layers\.(\d+)\.(.+)")


def save_mlx_adapter(folder: Path | str, adapter: Adapter, overwrite: bool = False) -> None:
    """Write an adapter that mlx-lm reads. The folder appears whole or not at all.

    Layers of a smaller rank than the largest are filled up with zeros, and where a layer's s is not the most common
    one, lora_b takes the quotient: s B A stays what it was, to rounding. Raises FormatError for weights that were
    trained in full, which mlx-lm has no place for, for NaN, and for a folder that is not empty, unless `overwrite`.
    """
    folder = Path(folder)
    if adapter.modules_to_save:
        found = "a weight trained in full"
        raise FormatError(folder, adapter.modules_to_save[0], found, "A and B only: mlx-lm has no place for more")
    check_adapter(folder, adapter)
    ranks = adapter.ranks
    r = max(ranks.values())
    scalings = [adapter.scaling(path) for path in ranks]
    scale = max(scalings, key=scalings.count)
    arrays: Arrays = {}
    for path, rank in ranks.items():
        A, B = (adapter.arrays[f"{path}.{part}"] for part in (A_NAME, B_NAME))
        quotient = adapter.scaling(path) / scale
        arrays[f"{path}.{MLX_A}"] = np.pad(A, ((0, r - rank), (0, 0))).T.astype(np.float32)
        arrays[f"{path}.{MLX_B}"] = (quotient * np.pad(B, ((0, 0), (0, r - rank)))).T.astype(np.float32)
    for name, array in arrays.items():
        require_finite(folder, name, array)  # a quotient may overflow
    blocks = {block[2] for path in ranks if (block := BLOCK.fullmatch(path))}
    values = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": adapter.lora_dropout, "keys": sorted(ranks), "rank": r, "scale": scale},
        "num_layers": len(blocks),
    }
    with atomic_folder(folder, overwrite) as new:
        atomic_write(new / CONFIG, json_bytes(values))
        base = {BASE: "nf4"} if adapter.over_nf4 else {}
        write_safetensors(new / WEIGHTS, arrays, metadata={"format": "mlx"} | base)


def load_mlx_adapter(folder: Path | str, params: Params | None = None) -> Adapter:
    """Read an adapter that mlx-lm or `save_mlx_adapter` wrote.

    Raises FormatError for DoRA and full fine-tuning, half a pair, another rank than the configured one, or a layer that
    the configuration does not mean. Given the base model's `params`, also unless every layer that it means, and no
    other, has its tensors in the right shapes.
    """
    folder = Path(folder)
    fields = Fields(folder / CONFIG, read_json(folder / CONFIG))
    fields.refuse("fine_tune_type", ("lora",), "'lora': DoRA and full fine-tuning are not supported; fuse the model")
    settings = fields.values.get("lora_parameters")
    if not isinstance(settings, dict):
        raise fields.error("lora_parameters", "an object: rank, scale, dropout, keys")
    inner = Fields(f"{fields.path}: lora_parameters", settings)
    inner.refuse("alpha", (), "it unset: early mlx-lm multiplied scale by alpha / rank, later ones do not; set scale")
    r, scale, dropout = inner.whole("rank"), inner.real("scale"), settings.get("dropout", 0.0)
    if not scale <= sys.float_info.max / r:
        raise inner.error("scale", "a number whose product with the rank is finite")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise inner.error("dropout", "a probability below 1")
    keys = _keys(inner)
    blocks = fields.values.get("num_layers")
    if isinstance(blocks, bool) or not isinstance(blocks, int):
        raise fields.error("num_layers", "how many of the last blocks have adapters, or -1 for all")
    file = SafetensorsFile(folder / WEIGHTS)
    tensors = _read_tensors(file, r, keys)
    if params is not None:
        _check_against(file.path, tensors, keys, blocks, params)
    arrays = {}
    for name, array in tensors.items():
        path, _, part = name.rpartition(".")
        arrays[f"{path}.{A_NAME if part == MLX_A else B_NAME}"] = np.ascontiguousarray(array.T)
    paths = sorted({name.rpartition(".")[0] for name in tensors})
    return Adapter(
        arrays,
        r,
        lora_alpha=scale * r,
        target_modules=tuple(paths) if params is None else short_targets(params, paths),
        lora_dropout=float(dropout),
        over_nf4=file.metadata.get(BASE) == "nf4",
    )


def _keys(inner: Fields) -> tuple[str, ...]:
    keys = inner.values.get("keys")
    keys = list(KEYS) if keys is None else keys
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key for key in keys):
        raise inner.error("keys", "a list of module names such as self_attn.q_proj")
    return tuple(keys)


def _read_tensors(file: SafetensorsFile, r: int, keys: tuple[str, ...]) -> Arrays:
    """lora_a (in, r) and lora_b (r, out) of each layer, as they lie in the file."""
    tensors: Arrays = {}
    for name in file.names():
        path, _, part = name.rpartition(".")
        if part not in (MLX_A, MLX_B) or not path:
            raise FormatError(file.path, name, "a surplus tensor", f"….{MLX_A} and ….{MLX_B} only")
        if not _means(keys, path):
            raise FormatError(file.path, name, "a surplus tensor", f"layers in keys: {shown(list(keys))}")
        partner = f"{path}.{MLX_B if part == MLX_A else MLX_A}"
        if partner not in file.entries:
            raise FormatError(file.path, partner, "nothing", f"the other half of {name}")
        if file.dtype(name) not in ("F32", "F16", "BF16"):
            raise FormatError(file.path, name, f"dtype {file.dtype(name)}", "F32, F16 or BF16")
        shape = file.shape(name)
        if len(shape) != 2 or shape[1 if part == MLX_A else 0] != r:
            needed = f"(in, {r})" if part == MLX_A else f"({r}, out)"
            raise FormatError(file.path, name, f"shape {shown(shape)}", needed)
        tensors[name] = file.read(name).astype(np.float32, copy=False)
        require_finite(file.path, name, tensors[name])
    if not tensors:
        raise FormatError(file.path, "", "no tensors", "at least one adapted layer")
    return tensors


def _means(keys: tuple[str, ...], path: str) -> bool:
    block = BLOCK.fullmatch(path)
    return path in keys or (block is not None and block[3] in keys)


def _check_against(path: Path, tensors: Arrays, keys: tuple[str, ...], blocks: int, params: Params) -> None:
    numbers = sorted({int(found[2]) for name in params if (found := BLOCK.fullmatch(name))})
    last = numbers[-blocks:] if blocks > 0 else numbers
    expected: dict[str, tuple[int, int]] = {}
    for name, layer in linear_layers(params).items():
        block = BLOCK.fullmatch(layer)
        if layer in keys or (block is not None and int(block[2]) in last and block[3] in keys):
            d_out, d_in = params[name].shape
            expected |= {f"{layer}.{MLX_A}": (d_in, -1), f"{layer}.{MLX_B}": (-1, d_out)}
    if missing := [name for name in expected if name not in tensors]:
        raise FormatError(path, missing[0], f"nothing ({len(missing)} tensors are missing)", "every adapted layer")
    for name, array in tensors.items():
        if name not in expected:
            raise FormatError(path, name, "a surplus tensor", f"layers that keys means in the last {len(last)} blocks")
        if any(size not in (-1, found) for size, found in zip(expected[name], array.shape, strict=True)):
            needed = ", ".join("r" if size < 0 else str(size) for size in expected[name])
            raise FormatError(path, name, f"shape {array.shape}", f"({needed})")
