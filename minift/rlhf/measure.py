"""What a policy's answers are worth: in gold, in reward, and in what both may hide.

A policy can climb any score by saying one thing always. So beside gold and reward stand the share of distinct answers,
the share that names the thing asked for, and the distance from the policy that it began as.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from minift.data.comparisons import as_text
from minift.io import Tokenizer
from minift.models import llama
from minift.nn.weight import Params
from minift.rlhf import rubric
from minift.rlhf.logprobs import sequence_log_probs
from minift.rlhf.rollouts import AT_ONCE, Answers, Prompt, Score, sample


@dataclass(frozen=True)
class Measured:
    """Answers to questions that nothing was learned from, one each, and what is known of each answer."""

    texts: tuple[str, ...]
    gold: Float[np.ndarray, " n"]  # NaN where the rubric is not for the question
    names: Float[np.ndarray, " n"]
    reward: Float[np.ndarray, " n"]
    kl: Float[np.ndarray, " n"]  # log π − log π_ref of the answer that π gave, in nats: one draw of KL(π, π_ref)
    tokens: Float[np.ndarray, " n"]
    ended: Float[np.ndarray, " n"]

    def record(self) -> dict[str, float]:
        """Means, and the standard error of gold."""
        return {
            "gold": float(self.gold.mean()),
            "gold_standard_error": standard_error(self.gold),
            "reward": float(self.reward.mean()),
            "reward_std": float(self.reward.std()),
            "distinct": len(set(self.texts)) / len(self.texts),
            "names": float(self.names.mean()),
            "kl": float(self.kl.mean()),
            "length": float(self.tokens.mean()),
            "ended": float(self.ended.mean()),
        }


def standard_error(x: Float[np.ndarray, " n"]) -> float:
    """Of the mean of independent numbers: s / √n."""
    return float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.inf


def measure(
    policy: Params,
    reference: Params,
    prompts: Sequence[Prompt],
    score: Score,
    config: llama.Config,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
) -> Measured:
    """Ask the policy each question once. With the same seed, two policies that agree give the same answers."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    said = sample(llama.fuse(policy), prompts, config, tokenizer, **options)
    return of_answers(said, policy, reference, prompts, score, config, temperature)


def of_answers(
    said: Answers,
    policy: Params,
    reference: Params,
    prompts: Sequence[Prompt],
    score: Score,
    config: llama.Config,
    temperature: float = 1.0,
) -> Measured:
    """The same for answers that were given already."""
    gold, names = rubric_scores(prompts, said.texts)
    kl = _log_probs(policy, said, config, temperature) - _log_probs(reference, said, config, temperature)
    return Measured(
        said.texts,
        gold,
        names,
        score(prompts, said.texts),
        kl,
        (said.batch.labels >= 0).sum(axis=1).astype(np.float64),
        said.ended.astype(np.float64),
    )


def rubric_scores(prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(gold, whether it names the thing asked) of each answer; NaN for questions that the rubric is not for."""
    gold, names = np.full(len(texts), math.nan), np.full(len(texts), math.nan)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        try:
            items = rubric.items(as_text(prompt), text)
        except ValueError:
            continue
        gold[i], names[i] = items.gold, items.names_it
    return gold, names


def best_of(scores: Float[np.ndarray, "n answers"]) -> tuple[np.ndarray, float]:
    """Which of the n answers to each question scores highest, and the KL of choosing so: log n − (n − 1)/n nats.

    (Stiennon et al. 2020, appendix G.3; an upper bound where answers tie, Beirami et al. 2024, arXiv 2401.01879)"""
    n = len(scores)
    return scores.argmax(axis=0), math.log(n) - (n - 1) / n


def _log_probs(params: Params, said: Answers, config: llama.Config, temperature: float) -> np.ndarray:
    """log π of each answer under the distribution that it was sampled from; a few rows at a time."""
    parts = [np.arange(first, min(first + AT_ONCE, len(said))) for first in range(0, len(said), AT_ONCE)]
    options: dict[str, Any] = {"temperature": temperature or 1.0, "recompute": True}
    found = [sequence_log_probs(params, said.batch.take(part), config, **options)[0][0] for part in parts]
    return np.concatenate([logp.sum(axis=1) for logp in found])
