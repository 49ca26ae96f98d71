"""config.json of a GPT-2 checkpoint ↔ `minift.models.gpt2.Config`.

What is missing has GPT2Config's default. What this library's model does not compute (other activations, other scales of
the scores, cross-attention) is refused rather than ignored; dropout is ignored, as it says nothing about the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minift.io.json_file import Fields
from minift.models.gpt2 import Config

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function


def parse_config(values: dict[str, Any], path: Path | str) -> Config:
    """The Config that a config.json describes. Raises FormatError for a wrong value or an unsupported feature."""
    fields = Fields(path, values)
    fields.refuse("activation_function", TANH_GELU, " or ".join(map(repr, TANH_GELU)))
    fields.refuse("scale_attn_weights", (True,), "true: scores are divided by the root of head_dim")
    fields.refuse("scale_attn_by_inverse_layer_idx", (False,), "false: scores of all layers have one scale")
    fields.refuse("add_cross_attention", (False,), "false: there is no encoder to look at")
    hidden_size, heads = fields.whole("n_embd", 768), fields.whole("n_head", 12)
    if hidden_size % heads:
        raise fields.error("n_embd", f"a multiple of n_head = {heads}")
    return Config(
        vocab_size=fields.whole("vocab_size", 50257),
        hidden_size=hidden_size,
        intermediate_size=fields.whole("n_inner", 4 * hidden_size),
        num_hidden_layers=fields.whole("n_layer", 12),
        num_attention_heads=heads,
        max_position_embeddings=fields.whole("n_positions", 1024),
        layer_norm_epsilon=fields.real("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
    )


def format_config(config: Config, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """The config.json for this Config, in the spellings of transformers 4 and 5. `token_ids`: bos, eos, pad."""
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        **token_ids,
        "dtype": dtype,
        "embd_pdrop": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": "gpt2",
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_positions": config.max_position_embeddings,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
