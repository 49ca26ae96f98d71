"""config.json of a Llama checkpoint ↔ `minift.models.llama.Config`.

transformers 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 writes `rope_parameters` and
`dtype`. Both are read, both are written. What is missing has LlamaConfig's default. What this library's model does
not compute (biases, other activations, other position encodings) is refused rather than ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minift.io.errors import shown
from minift.io.json_file import Fields
from minift.models.llama import Config
from minift.nn.rope import RopeScaling

ROPE_KEYS = {
    "default": {"rope_type", "type", "rope_theta"},
    "linear": {"rope_type", "type", "rope_theta", "factor"},
    "llama3": {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"}
    | {"original_max_position_embeddings"},
}


def parse_config(values: dict[str, Any], path: Path | str) -> Config:
    """The Config that a config.json describes. Raises FormatError for a wrong value or an unsupported feature."""
    fields = Fields(path, values)
    if values.get("model_type") != "llama":
        raise fields.error("model_type", "'llama' or 'gpt2'")
    fields.refuse("hidden_act", ("silu",), "'silu'")
    fields.refuse("attention_bias", (False,), "false: projections with a bias are not supported")
    fields.refuse("mlp_bias", (False,), "false: projections with a bias are not supported")
    fields.refuse("partial_rotary_factor", (1, 1.0), "1: every feature of a head turns")

    heads = fields.whole("num_attention_heads", 32)
    kv_heads = fields.whole("num_key_value_heads", heads)
    hidden_size = fields.whole("hidden_size", 4096)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if values.get("head_dim") is None and hidden_size % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads = {heads}, or head_dim")
    head_dim = fields.whole("head_dim", hidden_size // heads)
    if head_dim % 2:
        raise fields.error("head_dim", "an even number: features turn in pairs")
    positions = fields.whole("max_position_embeddings", 2048)
    rope_theta, rope_scaling = _rope(fields, positions)
    return Config(
        vocab_size=fields.whole("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=fields.whole("intermediate_size", 11008),
        num_hidden_layers=fields.whole("num_hidden_layers", 32),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=fields.real("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
    )


def format_config(config: Config, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """The config.json for this Config, in the spellings of transformers 4 and 5. `token_ids`: bos, eos, pad."""
    scaling = _scaling_fields(config.rope_scaling)
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **token_ids,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_scaling": scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _rope(fields: Fields, positions: int) -> tuple[float, RopeScaling | None]:
    old, new = fields.values.get("rope_scaling"), fields.values.get("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise fields.error(key, "an object")
    key = "rope_scaling" if old else "rope_parameters"
    inner = Fields(f"{fields.path}: {key}", dict(old or new or {}))
    outer_theta = fields.real("rope_theta", 10000.0)
    rope_theta = inner.real("rope_theta", outer_theta)
    if fields.values.get("rope_theta") is not None and rope_theta != outer_theta:
        raise fields.error("rope_theta", f"the {rope_theta} that {key} has")
    scaling = _scaling(inner, positions)
    if old and new:
        other = _scaling(Fields(f"{fields.path}: rope_parameters", dict(new)), positions)
        if other != scaling or new.get("rope_theta", rope_theta) != rope_theta:
            raise fields.error("rope_parameters", f"what rope_scaling says: {shown(old)}")
    return rope_theta, scaling


def _scaling(inner: Fields, positions: int) -> RopeScaling | None:
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    inner.values.setdefault("rope_type", kind)
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise inner.error("rope_type", " or ".join(map(repr, ROPE_KEYS)))
    inner.refuse("partial_rotary_factor", (1, 1.0), "1: every feature of a head turns")
    if unknown := set(inner.values) - ROPE_KEYS[kind] - {"partial_rotary_factor"}:
        raise inner.error(min(unknown), f"no such key for rope_type {kind!r}")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", inner.real("factor"))
    low, high = inner.real("low_freq_factor"), inner.real("high_freq_factor")
    if high <= low:
        raise inner.error("high_freq_factor", f"more than low_freq_factor = {low}")
    original = inner.whole("original_max_position_embeddings", positions)
    return RopeScaling("llama3", inner.real("factor"), low, high, original)


def _scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.rope_type,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
