"""What learns in each way of fine-tuning: one line of arithmetic apart, and everything else the same.

full     everything
head     the output matrix alone
lora     adapters of rank r on frozen linear layers
qlora    the same on linear layers of 4 bits
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np

from minift.models import llama
from minift.nn.weight import Params, dense, freeze
from minift.peft import lora, qlora

Method = Literal["full", "head", "lora", "qlora"]


def prepare(
    method: Method,
    params: Params,
    config: llama.Config,
    *,
    rng: np.random.Generator,
    target_modules: str | Iterable[str] = "all-linear",
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> tuple[dict[str, Any], llama.Config]:
    """The parameters with what the method trains free to learn and the rest frozen.

    `head` unties tied embeddings, since the input table is not to move with the output matrix; therefore a
    configuration comes back too. ValueError for an unknown method."""
    options: dict[str, Any] = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "rng": rng,
    }
    if method == "full":
        return dict(params), config
    if method == "head":
        head = dense(params[llama.head_name(config)])
        return freeze(params) | {llama.HEAD: head.copy()}, dataclasses.replace(config, tie_word_embeddings=False)
    if method == "lora":
        return lora.attach(params, target_modules, **options), config
    if method == "qlora":
        return qlora.attach(params, target_modules, **options), config
    raise ValueError(f"method is {method!r}, needed one of {get_args(Method)}")
