"""What learns in each way of fine-tuning: one line of arithmetic apart, and everything else the same.

full     everything
head     the output matrix alone
lora     adapters of rank r on frozen linear layers
qlora    the same on linear layers of 4 bits
prompt   embeddings of virtual tokens before the text
prefix   their keys and values in every layer
p-tuning their embeddings too, through a network that is dropped afterwards
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np

from minift.models import Config, llama, module_of
from minift.nn.weight import Params, dense, freeze
from minift.peft import lora, p_tuning, prefix_tuning, prompt_tuning, qlora

Method = Literal["full", "head", "lora", "qlora", "prompt", "prefix", "p-tuning"]
SOFT_PROMPTS = ("prompt", "prefix", "p-tuning")


def prepare(
    method: Method,
    params: Params,
    config: Config,
    *,
    rng: np.random.Generator,
    target_modules: str | Iterable[str] = "all-linear",
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    num_virtual_tokens: int = 20,
    prompt_tokens: np.ndarray | None = None,
    encoder: p_tuning.Encoder = "MLP",
    encoder_hidden_size: int | None = None,
) -> tuple[dict[str, Any], Config]:
    """The parameters with what the method trains free to learn and the rest frozen.

    `head` unties tied embeddings, since the input table is not to move with the output matrix; therefore a
    configuration comes back too. `prompt_tokens` are those of the text that `prompt` starts from. ValueError for an
    unknown method, and for a soft prompt before a model that is not Llama."""
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
        model = module_of(config)
        head = dense(params[model.head_name(config)])
        return freeze(params) | {model.HEAD: head.copy()}, dataclasses.replace(config, tie_word_embeddings=False)
    if method == "lora":
        return lora.attach(params, target_modules, **options), config
    if method == "qlora":
        return qlora.attach(params, target_modules, **options), config
    if method in SOFT_PROMPTS and not isinstance(config, llama.Config):
        raise ValueError(f"method is {method!r}, and soft prompts stand before Llama models only: use 'lora'")
    if method == "prompt":
        start = {"rng": rng} if prompt_tokens is None else {"tokens": prompt_tokens}
        return prompt_tuning.attach(params, num_virtual_tokens, **start), config
    if method == "prefix":
        return prefix_tuning.attach(
            params, num_virtual_tokens, rng=rng, encoder_hidden_size=encoder_hidden_size
        ), config
    if method == "p-tuning":
        made = p_tuning.attach(
            params, num_virtual_tokens, rng=rng, encoder=encoder, encoder_hidden_size=encoder_hidden_size
        )
        return made, config
    raise ValueError(f"method is {method!r}, needed one of {get_args(Method)}")
