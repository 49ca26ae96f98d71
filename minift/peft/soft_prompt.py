"""Soft prompts: numbers that stand before the text, learned by gradient, while the model stays as it is.

Three methods bear similar names and are mixed up a lot. All three learn p "virtual tokens" that every text begins with:

                        what learns                            where it enters          kept afterwards
    prompt tuning       p embeddings                           before layer 0           p·d numbers
    P-tuning            a network that makes p embeddings      before layer 0           its output, p·d numbers
    prefix tuning       p keys and values of every layer       in each attention        2·L·p·d numbers
                        (or a network that makes them)

*Prompt tuning and P-tuning compute the same function.* They differ while training: P-tuning moves all virtual tokens
at once through an LSTM or MLP, which is dropped in the end. A folded P-tuning is a prompt tuning, to the bit.

*Prefix tuning computes another one.* Virtual tokens at the input go through the whole model: each layer sees of them
what the layers below have made, and p more positions are multiplied by every weight (in generation once, then they lie
in the cache). A prefix is put into the cache directly: no work in the feed-forward blocks, and each layer's p slots
hold what it needs, not what some token could have caused. Every soft prompt at the input is some prefix (run it, and
keep the cache); hardly any prefix is a soft prompt at the input. P-tuning v2 (Liu et al. 2022) is prefix tuning again.

What is the same: the text's own positions begin at p, as behind a typed prompt of p tokens; every token of the text
sees all virtual tokens; virtual tokens predict nothing, they have no labels. Forgetting one of these three is how
implementations go wrong.

And neither is an adapter: no weight changes, nothing can be merged, and p positions of the context are spent.

In here a soft prompt is a few more entries of the parameters, arrays that learn beside frozen weights, under PEFT's
names (`prefix_embeddings` is ours: PEFT calls both kinds of table `prompt_embeddings`). `llama.backbone` finds them and
calls `prepend`, so training, checkpoints and generation need no code of their own. `detach` takes the prompt off as a
value for a file, `insert` puts it on, `fold` replaces an encoder by its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer

from minift.nn.attention import KVCache
from minift.nn.weight import Arrays, Params, dense, freeze, learns
from minift.peft import p_tuning, prefix_tuning, prompt_tuning
from minift.peft.reparameterization import EMBEDDING, ENCODER

Kind = Literal["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"]  # PEFT's names
TABLES = (prompt_tuning.TABLE, prefix_tuning.TABLE)


@dataclass(frozen=True)
class SoftPrompt:
    """What a file holds: which of the three, and its table, (p, d) or for a prefix (p, L · 2 · kv heads · head_dim)."""

    kind: Kind
    table: Float[np.ndarray, "prompt numbers"]

    def __repr__(self) -> str:
        p, row = self.table.shape
        return f"SoftPrompt({self.kind}, {p} virtual tokens of {row:,} numbers, {self.table.nbytes:,} bytes)"


def kind(params: Mapping[str, Any]) -> Kind | None:
    """Which soft prompt these parameters carry; None for none. A folded P-tuning is a prompt tuning."""
    if prompt_tuning.TABLE in params:
        return "PROMPT_TUNING"
    if prefix_tuning.TABLE in params or f"{prefix_tuning.TRANSFORM}.0.weight" in params:
        return "PREFIX_TUNING"
    return "P_TUNING" if EMBEDDING in params else None


def length(params: Mapping[str, Any]) -> int:
    """Positions that the soft prompt takes before the text; 0 without one."""
    return next((params[name].shape[0] for name in (*TABLES, EMBEDDING) if name in params), 0)


def encode(params: Params) -> tuple[Float[np.ndarray, "prompt numbers"], Callable]:
    """The table: as it is stored, or what the encoder makes;  `vjp(dtable) -> (name, gradient) pairs` for what learns.

    ValueError where there is no soft prompt."""
    arrays = _parts(params)
    stored = next((name for name in TABLES if name in arrays), None)
    if stored is not None:
        made, made_vjp = arrays[stored], lambda dtable: {stored: dtable}
    elif kind(params) == "PREFIX_TUNING":
        made, made_vjp = prefix_tuning.encode(arrays)
    else:
        made, made_vjp = p_tuning.encode(arrays)

    def vjp(dtable):
        return [(name, gradient) for name, gradient in made_vjp(dtable).items() if learns(params[name])]

    return made, vjp


def prepend(
    params: Params,
    x: Float[np.ndarray, "batch tokens d"],
    kv_heads: int,
    head_dim: int,
    *,
    lengths: Integer[np.ndarray, " batch"] | None = None,
    segments: Integer[np.ndarray, "batch tokens"] | None = None,
    prefix: Float[np.ndarray, "layers 2 kv_heads prefix head_dim"] | None = None,
    cache: KVCache | None = None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, Callable]:
    """Put the parameters' soft prompt before embedded texts: x, lengths and prefix as the blocks get them.

    `vjp(dx, dprefix) -> dx, dprefix, (name, gradient) pairs`, dx and dprefix for what was passed in. Every text begins
    with the same prompt, so its gradient is the sum over the batch. In generation only the first pass, the one with an
    empty cache, begins with it. ValueError where a prefix is passed besides, and for a prompt of embeddings before a
    packed row, in which one prompt would have to stand before each text: use `pad`."""

    def untouched(dx, dprefix):
        return dx, dprefix, []

    unchanged = x, lengths, prefix, untouched
    which = kind(params)
    if which is None:
        return unchanged
    if prefix is not None:
        raise ValueError("a prefix, and a soft prompt in the parameters: needed one of the two")
    if cache is not None and cache.lengths.any():
        return unchanged
    made, encode_vjp = encode(params)
    if which == "PREFIX_TUNING":
        learned = prefix_tuning.split(made, kv_heads, head_dim)
        if cache is not None:
            cache.put_prefix(learned)
            return unchanged
        return x, lengths, learned, lambda dx, dprefix: (dx, None, encode_vjp(prefix_tuning.table(dprefix)))
    if segments is not None:
        raise ValueError("a soft prompt of embeddings and packed rows, needed one text a row: use `pad`")
    batch, p = len(x), len(made)
    if made.shape[1] != x.shape[2]:
        raise ValueError(f"the soft prompt has rows of {made.shape[1]} numbers, the model's embeddings {x.shape[2]}")

    def vjp(dx, dprefix):
        return dx[:, p:], None, encode_vjp(dx[:, :p].sum(axis=0))

    x = np.concatenate([np.broadcast_to(made, (batch, *made.shape)), x], axis=1)  # (B, p + T, d)
    return x, None if lengths is None else lengths + p, None, vjp


def fold(params: Params) -> dict[str, Any]:
    """The same model with the encoder replaced by the table that it makes, which learns. ValueError for no prompt."""
    table, _ = encode(params)
    name = prefix_tuning.TABLE if kind(params) == "PREFIX_TUNING" else prompt_tuning.TABLE
    return bare(params) | {name: table.copy()}


def detach(params: Params) -> tuple[dict[str, Any], SoftPrompt]:
    """Take the soft prompt off: the frozen base, and the prompt, folded. ValueError for no prompt."""
    table, _ = encode(params)
    which = kind(params)
    assert which is not None
    return bare(params), SoftPrompt(which, table.copy())


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
    return base | {name: prompt.table}


def bare(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without a soft prompt, if they carry one."""
    return {name: w for name, w in params.items() if name not in TABLES and not name.startswith(ENCODER)}


def _parts(params: Params) -> Arrays:
    parts = {name: dense(w) for name, w in params.items() if name in TABLES or name.startswith(ENCODER)}
    if not parts:
        raise ValueError("these parameters carry no soft prompt: attach or insert one first")
    return parts
