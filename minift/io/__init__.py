"""Other people's file formats, and atomic writing. The numbers know nothing of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minift.io import gguf as _gguf
from minift.io import huggingface as _huggingface
from minift.io import leftovers as _leftovers
from minift.io.atomic import atomic_folder, atomic_write, refuse_to_destroy, refuse_to_replace
from minift.io.encoder import encoder_folder, is_encoder, load_encoder
from minift.io.errors import FormatError
from minift.io.huggingface import save_model
from minift.io.mlx_adapter import load_mlx_adapter, save_mlx_adapter
from minift.io.peft_adapter import adapter_kind, adapter_names, load_adapter, load_adapters, save_adapter
from minift.io.peft_prompt import load_prompt, prompt_kind, save_prompt
from minift.io.reward_model import is_reward_model, load_reward_model, save_reward_model
from minift.io.tokenizer import Tokenizer
from minift.models import Config, llama, module_of
from minift.quant.sixteen import Dtype

__all__ = [
    "FormatError",
    "Tokenizer",
    "adapter_kind",
    "adapter_names",
    "atomic_folder",
    "atomic_write",
    "encoder_folder",
    "is_encoder",
    "is_reward_model",
    "load_adapter",
    "load_adapters",
    "load_encoder",
    "load_llama",
    "load_mlx_adapter",
    "load_model",
    "load_prompt",
    "load_reward_model",
    "load_tokenizer",
    "prompt_kind",
    "refuse_to_destroy",
    "refuse_to_replace",
    "save_adapter",
    "save_mlx_adapter",
    "save_model",
    "save_prompt",
    "save_reward_model",
]

TINY = Path(__file__).parent.parent / "assets" / "tiny"


def load_model(
    source: Path | str, keep_quantized: bool = False, dtype: Dtype = "float32"
) -> tuple[Config, dict[str, Any]]:
    """(config, params) of a model: a Hugging Face folder (Llama, GPT-2), a .gguf file, or "tiny", the built-in model.

    Parameters are float32 arrays; with `keep_quantized`, a folder's 4-bit weights stay NF4Tensors, and with `dtype`
    "bfloat16" or "float16" arrays become SixteenBitTensors. Neither learns. Raises FormatError."""
    path = _find(source)
    if path.is_file():
        return _gguf.load_model(path, dtype)
    return _huggingface.load_model(path, keep_quantized, dtype)


def load_llama(source: Path | str, dtype: Dtype = "float32") -> tuple[llama.Config, dict[str, Any]]:
    """`load_model` for what works with Llama models only. FormatError also for another kind of model."""
    config, params = load_model(source, dtype=dtype)
    if not isinstance(config, llama.Config):
        kind = module_of(config).__name__.rpartition(".")[2]
        raise FormatError(source, "model_type", kind, "llama: nothing else can be used here")
    return config, params


def load_tokenizer(source: Path | str) -> Tokenizer:
    """The tokenizer of a model that `load_model` reads, from the same place. Raises FormatError."""
    path = _find(source)
    return _gguf.load_tokenizer(path) if path.is_file() else Tokenizer.load(path)


def _find(source: Path | str) -> Path:
    path = TINY if source == "tiny" else Path(source)
    if not path.exists():
        _leftovers.require_not_aside(path)
        needed = "the built-in model, which this installation lacks" if source == "tiny" else "a folder or a .gguf file"
        raise FormatError(path, "", "nothing there", f"{needed}, or 'tiny'" if source != "tiny" else needed)
    if path.is_file() and path.suffix != ".gguf":
        raise FormatError(path, "", f"a file of type {path.suffix or 'unknown'!r}", "a folder or a .gguf file")
    return path
