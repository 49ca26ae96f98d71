"""What is said of soft prompts: how few numbers they are, and that their networks may be dropped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minift.claims.claim import Claim, depends, holds
from minift.io import load_llama
from minift.models import llama
from minift.nn.weight import trainable
from minift.peft import p_tuning, prefix_tuning, prompt_tuning, soft_prompt

PROMPT = "Prompt tuning (Lester et al. 2021, arXiv 2104.08691)"
PREFIX = "Prefix tuning (Li & Liang 2021, arXiv 2101.00190)"
P_TUNING = "P-tuning (Liu et al. 2021, arXiv 2103.10385)"
P_TUNING_V2 = "P-tuning v2 (Liu et al. 2022, arXiv 2110.07602)"
T5_XXL, T5_WIDTH = 11e9, 4096
ROBERTA_LARGE = 355e6, 24, 1024  # parameters, layers, d
GPT2_MEDIUM = 354.92e6, 24, 1024


def five_tokens() -> Claim:
    """A prompt of five tokens for T5-XXL is 20,480 numbers: p·d, counted on a real prompt of its width."""
    words = {"embed_tokens.weight": np.zeros((2, T5_WIDTH), np.float32)}
    prompted = prompt_tuning.attach(words, 5, rng=np.random.default_rng(0))
    found = sum(array.size for array in trainable(prompted).values())
    return Claim(
        "five tokens of T5-XXL: 20,480 numbers", PROMPT, 20_480, found, holds(found == 20_480), "5·4,096", "fig. 2"
    )


def hundredth_of_a_percent() -> Claim:
    """Prompt tuning learns less than 0.01 % of the parameters of models of over a billion: a hundred tokens of T5-XXL.

    The smallest T5 (60 million, d = 512) shows what the size of the model has to do with it."""
    found, smallest = (
        100 * prompt_tuning.trainable_parameters(100, d) / n for d, n in ((T5_WIDTH, T5_XXL), (512, 60e6))
    )
    how = f"100·4,096 of 11·10⁹, in %; of the smallest T5 it is {smallest:.3f} %"
    return Claim("less than 0.01 % learns", PROMPT, 0.01, found, holds(found < 0.01), how, "fig. 4")


def tenth_of_a_percent() -> Claim:
    """Prefix tuning learns 0.1 % of the parameters.

    2·L·p·d for GPT-2 medium. The paper's prefixes have 10 tokens for tables and 200 for summaries."""
    parameters, layers, d = GPT2_MEDIUM
    share = {p: 100 * prefix_tuning.trainable_parameters(p, layers, d) / parameters for p in (5, 10, 200)}
    on = "on the length: " + ", ".join(f"{value:.2g} % with {p} tokens" for p, value in share.items())
    how = f"2·{layers}·10·{d:,} of {parameters / 1e6:.0f}M, in %"
    return Claim("0.1 % of the parameters learns", PREFIX, 0.1, share[10], depends(on), how, "abstract")


def network_is_dropped() -> Claim:
    """After training the network that makes the prefix can be dropped: its output is kept, and is the same prefix.

    Logits of the built-in model with the network and with what it makes, compared bit for bit."""
    return _folded(PREFIX, "§4.3", prefix_tuning.attach)


def p_tuning_folds_too() -> Claim:
    """The prompt encoder of P-tuning is needed only in training; folded into its output, it is a prompt tuning."""
    return _folded(P_TUNING, "§3.2", p_tuning.attach)


def from_a_tenth_to_three_percent() -> Claim:
    """P-tuning v2, which is prefix tuning again, learns 0.1 to 3 % of the parameters.

    2·L·p·d for RoBERTa-large, with 20 tokens for easy tasks and 100 for hard ones."""
    parameters, layers, d = ROBERTA_LARGE
    few, many = (100 * prefix_tuning.trainable_parameters(p, layers, d) / parameters for p in (20, 100))
    how = f"2·{layers}·p·{d:,} of {parameters / 1e6:.0f}M, in %: {few:.2f} with 20 tokens, {many:.2f} with 100"
    true = 0.1 <= few <= many <= 3
    return Claim("0.1 to 3 % of the parameters learn", P_TUNING_V2, "0.1 … 3", many, holds(true), how, "abstract")


CLAIMS: dict[str, Callable[[], Claim]] = {
    "five-tokens": five_tokens,
    "hundredth-of-a-percent": hundredth_of_a_percent,
    "tenth-of-a-percent": tenth_of_a_percent,
    "network-is-dropped": network_is_dropped,
    "p-tuning-folds-too": p_tuning_folds_too,
    "from-a-tenth-to-three-percent": from_a_tenth_to_three_percent,
}


def _folded(source: str, place: str, attach: Callable) -> Claim:
    config, params = load_llama("tiny")
    with_network = attach(params, 6, rng=np.random.default_rng(0), encoder_hidden_size=16)
    tokens = np.array([[3, 1, 4, 1, 5]])
    whole, _ = llama.forward(with_network, tokens, config)
    folded, _ = llama.forward(soft_prompt.fold(with_network), tokens, config)
    found = int(np.count_nonzero(whole != folded))
    how = f"logits that differ, of {whole.size:,}"
    return Claim("its network can be dropped after training", source, 0, found, holds(found == 0), how, place)
