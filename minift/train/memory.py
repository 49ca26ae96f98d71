"""The bill of a method: how many bytes of what training needs, before anything is allocated.

    full        weights                       + gradients and optimizer state of everything
    head        weights                       + gradients and optimizer state of the output matrix
    lora        weights                       + adapters, their gradients and optimizer state
    qlora       4-bit weights and constants   + the same

Activations are what the pullbacks of `minift.models.llama` keep, and what is on its way at the highest point of a step,
the same for every method but for the part of the network that is not walked back through; a real step lies within a
tenth of them. Everything else is exact. Sizes in bytes; a GB is 10⁹ of them, as in the papers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minift.models import llama
from minift.nn.attention import TILE
from minift.nn.losses import ROWS
from minift.optim.adamw8bit import BLOCK_SIZE, MIN_8BIT_SIZE
from minift.peft.lora import trainable_parameters
from minift.peft.targets import NOT_LINEAR, targets
from minift.quant.blockwise import block_count
from minift.quant.double_quant import overhead_bits
from minift.train.engine import Optimizer
from minift.train.methods import Method


def _llama(hidden: int, ffn: int, layers: int, heads: int) -> llama.Config:
    return llama.Config(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
    )


SIZES = {  # LLaMA, the models of the QLoRA paper                      (Touvron et al. 2023, arXiv 2302.13971, table 2)
    "7B": _llama(4096, 11008, 32, 32),
    "13B": _llama(5120, 13824, 40, 40),
    "33B": _llama(6656, 17920, 60, 52),
    "65B": _llama(8192, 22016, 80, 64),
}

# name: parameters, layers, and hidden size of the models of the LoRA paper, which adapts W_q and W_v (d × d) only:
# rank and trainable parameters as its tables 2 to 4 print them
LORA_PAPER: dict[str, tuple[float, int, int, int, float]] = {
    "RoBERTa-base": (125.0e6, 12, 768, 8, 0.3e6),
    "RoBERTa-large": (355.0e6, 24, 1024, 8, 0.8e6),
    "DeBERTa-XXL": (1500.0e6, 48, 1536, 16, 4.7e6),
    "GPT-2-medium": (354.92e6, 24, 1024, 4, 0.35e6),
    "GPT-2-large": (774.03e6, 36, 1280, 4, 0.77e6),
    "GPT-3": (175255.8e6, 96, 12288, 1, 4.7e6),
    "GPT-3 (r=8)": (175255.8e6, 96, 12288, 8, 37.7e6),
}


@dataclass(frozen=True)
class Item:
    """One line of the bill: what, how many bytes, and the arithmetic in words."""

    name: str
    nbytes: float
    how: str


def bill(
    config: llama.Config,
    method: Method,
    *,
    r: int = 8,
    target_modules: Iterable[str] | str = "all-linear",
    batch_size: int = 1,
    seq_len: int = 512,
    weight_bits: int = 32,
    compute_bits: int | None = None,
    recompute: bool = False,
    optimizer: Optimizer = "adamw",
    page_budget: int = 1_000_000,
) -> list[Item]:
    """What training a model of these sizes needs, item by item.

    `weight_bits` is the precision of frozen weights that are not quantized, `compute_bits` (the same unless given) that
    of activations, of weights that learn and of their gradients: 16 and 32 is `minift finetune --dtype bfloat16`.
    Adapters are 32-bit. The optimizer's two moments are those of `optimizer`; in pages, `page_budget` bytes of them at
    most. ValueError for a target that is no linear layer of the model."""
    shapes = llama.shapes(config)
    linear = {n: s for n, s in shapes.items() if len(s) == 2 and _module(n) not in NOT_LINEAR}
    total, in_linear = _count(shapes), _count(linear)
    sizes = _learned(method, config, shapes, r, target_modules)
    learned = sum(sizes)
    width, computed = weight_bits / 8, (weight_bits if compute_bits is None else compute_bits) / 8

    items = []
    if method == "qlora":
        constants = overhead_bits(64, 256)
        items.append(Item("weights in 4 bits", in_linear / 2, f"{in_linear:,} · 4 bits"))
        note = f"{in_linear:,} · {constants:.4f} bits, double-quantized"
        items.append(Item("quantization constants", in_linear * constants / 8, note))
        items.append(_item("other weights", total - in_linear, width, "embeddings, norms, head"))
    else:
        untied = learned if method == "head" and config.tie_word_embeddings else 0  # the head leaves the input table
        learning = learned if method in ("full", "head") else 0
        if width == computed:
            items.append(_item("weights", total + untied, width))
        else:
            items.append(_item("frozen weights", total + untied - learning, width))
            items.append(_item("weights that learn", learning, computed))
    if method in ("lora", "qlora"):
        items.append(_item("adapters", learned, 4, f"r = {r}: r (in + out) each"))
    items.append(_item("gradients", learned, 4 if method in ("lora", "qlora") else computed))
    items.append(_moments(sizes, optimizer, page_budget))
    kept = activations(config, batch_size, seq_len, recompute)
    how = ", recomputed" if recompute else ""
    items.append(_item("activations", kept, computed, f"{batch_size} × {seq_len} tokens{how}"))
    return items


def activations(config: llama.Config, batch_size: int, seq_len: int, recompute: bool = False) -> int:
    """Numbers at the highest point of a step.

    For each token the pullbacks of a block keep what the two norms and their outputs hold (4 d), queries and their
    context, by tiles and joined (3 H·d_h), keys and values (2 G·d_h), a row of attention weights for each head (H times
    half of T, as what lies ahead is not formed), and gate, up and what silu(gate) up gives (3 f). Behind the last block
    there are its norm, what enters the loss, and the gradients of these (5 d).

    What is on its way comes on top. In the loss, for some rows at a time: logits, their exponentials and gradient
    (3 V). In the pullback of a block the larger of two: through the MLP σ(gate), three cotangents (4 f), 3 d;
    through attention two of x (2 d), those of context, queries, keys and values (2 H·d_h, 2 G·d_h), and for a tile its
    scores' and a second dk and dv (H times the tile, 2 G·d_h).

    With recomputation all blocks keep their input only (d each), and the loss comes when no whole block is there."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    block = 4 * d + 3 * queries + 2 * keys + heads * min(seq_len, (seq_len + TILE) // 2) + 3 * f
    through_mlp = 4 * f + 3 * d
    through_attention = 2 * d + 2 * queries + 4 * keys + heads * min(seq_len, TILE)
    on_the_way = max(through_mlp, through_attention)
    tokens = batch_size * seq_len
    in_the_loss = min(tokens, ROWS) * 3 * config.vocab_size
    if recompute:
        kept, highest = config.num_hidden_layers * d + 5 * d, max(tokens * (block + on_the_way), in_the_loss)
    else:
        kept, highest = config.num_hidden_layers * block + 5 * d, max(tokens * on_the_way, in_the_loss)
    return tokens * kept + highest


def lora_paper() -> list[dict[str, Any]]:
    """Trainable parameters of the LoRA paper's models by its own formula, beside what its tables print."""
    rows = []
    for name, (total, layers, hidden, r, printed) in LORA_PAPER.items():
        counted = 2 * layers * trainable_parameters(hidden, hidden, r)
        rows.append(
            {"model": name, "r": r, "parameters": total, "lora_parameters": counted, "printed": printed}
            | {"fewer": total / counted}
        )
    return rows


def _learned(method, config, shapes, r, target_modules) -> list[int]:
    """The numbers of each array that learns."""
    if method == "full":
        return [math.prod(shape) for shape in shapes.values()]
    if method == "head":
        return [config.vocab_size * config.hidden_size]
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}  # shapes without bytes
    return [r * width for name in targets(weights, target_modules) for width in reversed(shapes[name])]  # A, then B


def _moments(sizes: list[int], optimizer: Optimizer, page_budget: int) -> Item:
    if optimizer == "adamw":
        return _item("optimizer state", sum(sizes), 8, "two moments of 32 bits")
    small = sum(n for n in sizes if n < MIN_8BIT_SIZE)
    large = [n for n in sizes if n >= MIN_8BIT_SIZE]
    blocks = sum(block_count(n, BLOCK_SIZE) for n in large)
    total = 2 * sum(large) + 8 * blocks + 8 * small
    note = f"{sum(large):,} · 2 bytes, {blocks:,} blocks · 8"
    note += f", {small:,} · 8 in small arrays" if small else ""
    if optimizer == "adamw8bit":
        return Item("optimizer state", total, note)
    return Item("optimizer state", min(total, page_budget), f"at most {page_budget:,} of {total:,} bytes ({note})")


def _module(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj.weight."""
    return name.split(".")[-2]


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _item(name: str, count: int, width: float, note: str = "") -> Item:
    return Item(name, count * width, f"{count:,} · {width:g} bytes{f' ({note})' if note else ''}")
