"""Llama models in GGUF files, llama.cpp's format: one file with metadata, tokenizer and (quantized) tensors.

The names differ from Hugging Face's, and so does the order of the rows of W_q and W_k. Rotary position embedding turns
pairs of features: Hugging Face pairs feature i of a head with i + d/2, GGUF's Llama pairs 2i with 2i + 1. The converter
to GGUF therefore interleaves the two halves of each head,

    row (head, half, i)  →  row (head, i, half)              half ∈ {0, 1},  i < d/2                    (1)

and reading takes this back, per *query* head for W_q and per *key* head for W_k, of which there may be fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from minift.io.errors import FormatError, shown
from minift.io.gguf_tokenizer import tokenizer_from_fields
from minift.io.json_file import Fields
from minift.io.safetensors_file import require_finite
from minift.io.tokenizer import Tokenizer
from minift.models import llama
from minift.models.llama import Config
from minift.nn.rope import RopeScaling, frequencies
from minift.quant.sixteen import Dtype, stored

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ROPE_FREQS = "rope_freqs.weight"  # how much each frequency was divided by: Llama 3.1's stretching
MODEL_CLASS_LIMITS = ("expert_count", "attention.sliding_window")


def load_model(path: Path | str, dtype: Dtype = "float32") -> tuple[Config, dict[str, Any]]:
    """The configuration and float32 parameters of a Llama model in a GGUF file, under Hugging Face's names.

    Quantized tensors are decoded, one at a time, and kept in `dtype` (`minift.quant.sixteen`). Raises FormatError for
    another architecture, a truncated file, a missing, surplus or misshapen tensor.
    """
    path = Path(path)
    reader = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, reader, tensors)
    expected = llama.shapes(config)
    params: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name == ROPE_FREQS:
            continue  # read by _config
        key = hugging_face_name(name)
        if key not in expected:
            raise FormatError(path, name, "a tensor that a Llama model does not have", "only its own tensors")
        if (shape := _shape(tensor)) != expected[key]:
            raise FormatError(path, key, f"shape {shown(shape)}", f"shape {expected[key]}")
        params[key] = stored(key, _undo_interleaving(key, _dequantize(path, tensor), config), dtype)
    if missing := [key for key in expected if key not in params]:
        raise FormatError(path, missing[0], f"nothing ({len(missing)} tensors are missing)", "every parameter")
    return config, {key: params[key] for key in expected}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. Raises FormatError where it is not byte-level BPE of a known kind."""
    return tokenizer_from_fields(path, _metadata(Path(path), _open(Path(path))))


def hugging_face_name(name: str) -> str | None:
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight; None for a name that Llama does not have."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if prefix == "blk" and layer.isdecimal() and part in BLOCK_NAMES:
        return f"model.layers.{layer}.{BLOCK_NAMES[part]}"
    return None


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """Equation (1): rows of each head from half-split (Hugging Face) to interleaved pairs (GGUF)."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def half_split(w: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`: rows of each head from interleaved pairs (GGUF) to half-split (Hugging Face)."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """As NumPy has it: GGUF lists dimensions from the inside out."""
    return tuple(reversed(tensor.shape.tolist()))


def _undo_interleaving(key: str, w: np.ndarray, config: Config) -> np.ndarray:
    if key.endswith("q_proj.weight"):
        return half_split(w, config.num_attention_heads)
    if key.endswith("k_proj.weight"):
        return half_split(w, config.num_key_value_heads)
    return w


class _Reader(gguf.GGUFReader):
    """The library's reader, which past the end of a file reads nothing and goes on: an array that claims 10¹² numbers
    would be read without end."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if offset + np.dtype(dtype).itemsize * int(count) > self.data.size:
            raise ValueError(f"{int(count):,} values are said to begin at byte {offset:,}, which is past the end")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
        """Numbers in one piece, where the library makes an array of 600 bytes for each; others counted before."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, size = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        inner, start = gguf.GGUFValueType(kind[0]), orig_offs + 12
        if scalar := self.gguf_scalar_to_np.get(inner):
            numbers = self._get(start, scalar, size[0])
            return 12 + numbers.nbytes, [kind, size, numbers], [2], [gguf.GGUFValueType.ARRAY, inner]
        self._get(start, np.uint64, size[0])  # a string, or an array, begins with eight bytes of length at least
        return super()._get_field_parts(orig_offs, raw_type)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with np.errstate(over="raise"):  # an offset near 2^64 would come round to the beginning
            reader = _Reader(path)
        little = reader.endianess == gguf.GGUFEndian.LITTLE
    except Exception as error:  # the library indexes past the end of a truncated file in many ways
        raise FormatError(path, "", f"{type(error).__name__}: {error}", "a complete GGUF file") from error
    if not little:
        raise FormatError(path, "", "a big-endian file", "a little-endian one")
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: (tensor.data_offset, tensor.n_bytes)):
        if tensor.data_offset < end:  # a small file could claim the same numbers any number of times
            raise FormatError(path, tensor.name, f"numbers from byte {tensor.data_offset:,}", f"none before {end:,}")
        end = tensor.data_offset + tensor.n_bytes
    return reader


def _metadata(path: Path, reader: gguf.GGUFReader) -> dict[str, Callable[[], Any]]:
    """For each key a function that reads its value: decoding 100,000 tokens and merges takes a second."""

    def read(name: str) -> Any:
        try:
            return reader.fields[name].contents()
        except Exception as error:  # e.g. text that is not UTF-8
            raise FormatError(path, name, f"{type(error).__name__}: {error}", "a value of its type") from error

    return {name: partial(read, name) for name in reader.fields}


def _config(path: Path, reader: gguf.GGUFReader, tensors: dict[str, gguf.ReaderTensor]) -> Config:
    values = {name: read() for name, read in _metadata(path, reader).items() if not name.startswith("tokenizer.")}
    fields = Fields(path, values)
    if values.get("general.architecture") != "llama":
        raise fields.error("general.architecture", "'llama'")
    if values.get("split.count", 1) not in (0, 1):
        raise fields.error("split.count", "one file that holds the whole model")
    for name in MODEL_CLASS_LIMITS:
        if values.get(f"llama.{name}"):
            raise fields.error(f"llama.{name}", "nothing or 0: not supported")
    if "token_embd.weight" not in tensors:
        raise FormatError(path, "token_embd.weight", "nothing", "a tensor")
    if len(vocab := _shape(tensors["token_embd.weight"])) != 2 or not vocab[0]:
        raise FormatError(path, "token_embd.weight", f"shape {shown(vocab)}", "a row for each token")
    layers = fields.whole("llama.block_count")
    if layers > len(tensors):  # before every one of them is named
        raise fields.error("llama.block_count", f"no more layers than the {len(tensors)} tensors")
    heads = fields.whole("llama.attention.head_count")
    kv_heads = fields.whole("llama.attention.head_count_kv", heads)
    hidden_size = fields.whole("llama.embedding_length")
    head_dim = fields.whole(
        "llama.attention.key_length", fields.whole("llama.rope.dimension_count", hidden_size // heads)
    )
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.whole(name, head_dim) != head_dim:
            raise fields.error(name, f"the size of a head, {head_dim}")
    if head_dim % 2:
        raise FormatError(path, "llama.attention.key_length", f"heads of {head_dim} features", "an even number of them")
    if heads % kv_heads:
        raise fields.error("llama.attention.head_count_kv", f"a divisor of the {heads} heads")
    rope_theta = _shortest(fields, "llama.rope.freq_base", 10000.0)
    return Config(
        vocab_size=vocab[0],
        hidden_size=hidden_size,
        intermediate_size=fields.whole("llama.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.whole("llama.context_length", 2048),
        rms_norm_eps=_shortest(fields, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(path, fields, tensors, head_dim, rope_theta),
        tie_word_embeddings="output.weight" not in tensors,
    )


def _rope_scaling(
    path: Path, fields: Fields, tensors: dict[str, Any], head_dim: int, rope_theta: float
) -> RopeScaling | None:
    """Metadata know `linear`. Llama 3.1's is a tensor of divisors; its `factor` is the largest of them, the other
    three numbers are the same in all its models, and whether that is so here is computed and compared."""
    kind = fields.values.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise fields.error("llama.rope.scaling.type", "'none' or 'linear'")
    if kind == "linear":
        return RopeScaling("linear", _shortest(fields, "llama.rope.scaling.factor"))
    if ROPE_FREQS not in tensors:
        return None
    divisors = _dequantize(path, tensors[ROPE_FREQS]).astype(np.float64)
    if divisors.shape != (head_dim // 2,) or not (divisors > 0).all():
        found = f"shape {divisors.shape}, from {divisors.min(initial=1):g}"
        raise FormatError(path, ROPE_FREQS, found, f"{head_dim // 2} positive divisors")
    if np.all(divisors == 1):
        return None
    scaling = RopeScaling("llama3", float(divisors.max()))
    expected = frequencies(head_dim, rope_theta) / frequencies(head_dim, rope_theta, scaling)
    if not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise FormatError(path, ROPE_FREQS, f"divisors up to {divisors.max():g}", f"those of Llama 3.1: {scaling}")
    return scaling


def _dequantize(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # scales that are infinite or NaN are found below
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError, IndexError) as error:
        found = f"type {tensor.tensor_type.name} ({error})"
        raise FormatError(path, tensor.name, found, "a type that the gguf package can decode") from error
    array = np.array(array, dtype=np.float32)  # not a view of the memory map
    require_finite(path, tensor.name, array)
    return array


def _shortest(fields: Fields, key: str, default: float | None = None) -> float:
    """Metadata are float32: 1e-05 comes back as 9.999999747378752e-06. The shortest decimal that means the same."""
    with np.errstate(over="ignore", under="ignore"):
        x = float(str(np.float32(fields.real(key, default))))
    if x == 0 or np.isinf(x):
        raise fields.error(key, "a positive float32 number")
    return x
