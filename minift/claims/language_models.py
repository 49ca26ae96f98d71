"""What everybody says of language models before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from minift.claims.claim import Claim, holds, rounded
from minift.io import load_llama
from minift.models import llama
from minift.nn.losses import cross_entropy

SOURCE = "Common knowledge of language models"


def loss_at_the_start() -> Claim:
    """The loss of a model that has learned nothing is log V.

    Small random weights give logits near zero, so every token has about the probability 1/V. The built-in model's
    sizes (V = 2,048) with fresh weights, on 256 random tokens."""
    config, _ = load_llama("tiny")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (4, 65))
    logits, _ = llama.forward(llama.initialize(config, rng), tokens[:, :-1], config)
    found = float(cross_entropy(logits, tokens[:, 1:])[0])
    claimed = math.log(config.vocab_size)
    how = f"log {config.vocab_size:,} = {claimed:.4f} nats; measured on 256 random tokens"
    return Claim("a fresh model has loss log V", SOURCE, claimed, found, rounded(claimed, found, 2), how)


def perplexity() -> Claim:
    """Perplexity e^loss is the number of words that a model hesitates between: for a uniform model, V of them."""
    vocabulary = 2048
    loss, _ = cross_entropy(np.zeros((5, vocabulary)), np.arange(5))
    found = math.exp(loss)
    how = "e^loss of equal logits, float64"
    true = abs(found - vocabulary) < 1e-9 * vocabulary
    return Claim("a uniform model has perplexity V", SOURCE, vocabulary, found, holds(true), how)


CLAIMS: dict[str, Callable[[], Claim]] = {"loss-at-the-start": loss_at_the_start, "perplexity": perplexity}
