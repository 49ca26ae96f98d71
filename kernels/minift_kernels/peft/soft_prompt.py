"""Soft prompts on torch tensors: the twin of `minift.peft.soft_prompt`, which says how the three kinds differ.

They are a few more entries of the parameters, under the same names, tensors that learn in float32 beside frozen
weights. `llama.backbone` finds them and calls `prepend`, which rounds them to the type of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from minift.peft.soft_prompt import TABLES, Kind, bare, kind, length
from minift_kernels.nn.attention import KVCache
from minift_kernels.nn.weight import Params, Tensors, dense, freeze
from minift_kernels.peft import p_tuning, prefix_tuning, prompt_tuning
from minift_kernels.peft.reparameterization import ENCODER

__all__ = ["TABLES", "Kind", "SoftPrompt", "bare", "detach", "encode", "fold", "insert", "kind", "length", "prepend"]


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """What a file holds: which of the three, and its table, (p, d) or for a prefix (p, L · 2 · kv heads · head_dim)."""

    kind: Kind
    table: Float[Tensor, "prompt numbers"]

    def __repr__(self) -> str:
        p, row = self.table.shape
        return f"SoftPrompt({self.kind}, {p} virtual tokens of {row:,} numbers, {self.table.nbytes:,} bytes)"


def encode(params: Params) -> Float[Tensor, "prompt numbers"]:
    """The table: as it is stored, or what the encoder makes. ValueError where there is no soft prompt."""
    arrays = _parts(params)
    stored = next((name for name in TABLES if name in arrays), None)
    if stored is not None:
        return arrays[stored]
    return (prefix_tuning if kind(params) == "PREFIX_TUNING" else p_tuning).encode(arrays)


def prepend(
    params: Params,
    x: Float[Tensor, "batch tokens d"],
    kv_heads: int,
    head_dim: int,
    *,
    lengths: Integer[Tensor, " batch"] | None = None,
    segments: Integer[Tensor, "batch tokens"] | None = None,
    prefix: Float[Tensor, "layers 2 kv_heads prefix head_dim"] | None = None,
    cache: KVCache | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Put the parameters' soft prompt before embedded texts: x, lengths and prefix as the blocks get them.

    In generation only the first pass, the one with an empty cache, begins with it. ValueError where a prefix is passed
    besides, and for a prompt of embeddings before a packed row, in which one prompt would have to stand before each
    text: use `pad`."""
    which = kind(params)
    if which is None:
        return x, lengths, prefix
    if prefix is not None:
        raise ValueError("a prefix, and a soft prompt in the parameters: needed one of the two")
    if cache is not None and cache.lengths.any():
        return x, lengths, None
    made = encode(params).to(x.dtype)
    if which == "PREFIX_TUNING":
        learned = prefix_tuning.split(made, kv_heads, head_dim)
        if cache is None:
            return x, lengths, learned
        cache.put_prefix(learned)
        return x, lengths, None
    if segments is not None:
        raise ValueError("a soft prompt of embeddings and packed rows, needed one text a row: use `pad`")
    batch, p = len(x), len(made)
    if made.shape[1] != x.shape[2]:
        raise ValueError(f"the soft prompt has rows of {made.shape[1]} numbers, the model's embeddings {x.shape[2]}")
    x = torch.cat([made.expand(batch, *made.shape), x], dim=1)  # (B, p + T, d)
    return x, None if lengths is None else lengths + p, None


def fold(params: Params) -> dict[str, Any]:
    """The same model with the encoder replaced by the table that it makes, which learns. ValueError for no prompt."""
    table = encode(params).detach().clone().requires_grad_()
    name = prefix_tuning.TABLE if kind(params) == "PREFIX_TUNING" else prompt_tuning.TABLE
    return bare(params) | {name: table}


def detach(params: Params) -> tuple[dict[str, Any], SoftPrompt]:
    """Take the soft prompt off: the frozen base, and the prompt, folded. ValueError for no prompt."""
    table = encode(params).detach().clone()
    which = kind(params)
    assert which is not None
    return bare(params), SoftPrompt(which, table)


def insert(params: Params, prompt: SoftPrompt) -> dict[str, Any]:
    """Put a soft prompt on a model, in place of one that it may carry; it goes on learning from there.

    ValueError for one of another width, or for parameters of which some learn behind an adapter."""
    base = freeze(bare(params))
    if prompt.kind == "PREFIX_TUNING":
        what, name, needed = "2 · layers · kv heads · head_dim", prefix_tuning.TABLE, prefix_tuning.width(base)
    else:
        what, name, needed = "hidden_size", prompt_tuning.TABLE, prompt_tuning.embeddings(base).shape[1]
    if prompt.table.shape[1] != needed:
        raise ValueError(f"{prompt!r} does not fit: this model needs rows of {what} = {needed:,}")
    return base | {name: prompt.table.detach().clone().requires_grad_()}


def _parts(params: Params) -> Tensors:
    parts = {name: dense(w) for name, w in params.items() if name in TABLES or name.startswith(ENCODER)}
    if not parts:
        raise ValueError("these parameters carry no soft prompt: attach or insert one first")
    return parts
