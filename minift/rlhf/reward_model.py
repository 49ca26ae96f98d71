"""The reward model: a language model whose head is one row, and a loss that knows only which answer was better.

    r(x, y) = w · hidden[last token of x y]                                                             (1)
    P(y_w preferred to y_l) = σ(r_w − r_l)                            (Bradley & Terry 1952)             (2)
    loss = −log σ(r_w − r_l − m)                  (Stiennon et al. 2020, arXiv 2009.01325; m: Touvron et al. 2023b)  (3)

The trunk may be trained in full, carry a LoRA, or lie under it in 4 bits; the head has no bias, as in transformers'
sequence classification, under its name `score.weight`. Only differences of rewards are learned, so their zero drifts
where it will: a penalty on the sum of both (`centering`) holds it, or a normalization afterwards puts it somewhere.

All losses are formed with log(1 + e^−d) in its stable form: log σ(d) of float32 is −∞ from d = −104 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from minift.data.batches import Batch
from minift.models import classifier, llama
from minift.nn.weight import Params
from minift.rlhf.pairs import Pairs


def with_head(params: Params, rng: np.random.Generator) -> dict[str, Any]:
    """The parameters with a fresh scalar head in place of the output matrix: a classifier of one class.

    It learns; beside an adapter, attach that afterwards with modules_to_save=["score"], which keeps it learning."""
    return classifier.with_score(params, 1, rng)


def score(
    params: Params,
    batch: Batch,
    config: llama.Config,
    *,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[Float[np.ndarray, " batch"], Callable]:
    """Equation (1): one reward a row, read at its last real token;  `vjp(drewards) -> {name: gradient}`.

    Which token that is, `batch.lengths` says, not a look for padding: an end-of-text token that also pads is real once.
    ValueError for packed rows, and for a row without a token."""
    if batch.segments is not None:
        raise ValueError("a packed row holds several texts, needed one a row: use `pad`")
    if not (batch.lengths >= 1).all():
        raise ValueError(f"row {int(np.argmin(batch.lengths))} has no token, so there is nothing to score")
    logits, logits_vjp = classifier.logits(
        params, batch.tokens, batch.lengths, config, dropout_key=dropout_key, recompute=recompute
    )

    def vjp(drewards):
        return logits_vjp(drewards[:, None])

    return logits[:, 0], vjp


# --- losses -----------------------------------------------------------------------------------------------------------


def preferred(d: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """σ(d), equation (2): P(the first is preferred) where its reward is higher by d. 0 only where e^d is."""
    return np.exp(-np.logaddexp(0, -d))  # (2)


def pairwise_loss(
    chosen: Float[np.ndarray, " pairs"],
    rejected: Float[np.ndarray, " pairs"],
    margin: Float[np.ndarray, " pairs"] | None = None,
    normalizer: float | None = None,
) -> tuple[np.floating, Callable]:
    """Equation (3), its mean over pairs, or the sum divided by `normalizer`.

        loss = (1/P) Σ softplus(−d)        d = r_w − r_l − m                                            (4)

    `vjp(dloss) -> dchosen, drejected, None`:  dr_w = −σ(−d) dloss / P,  dr_l = −dr_w.
    """
    d = chosen - rejected
    if margin is not None:
        d = d - margin
    n = float(max(len(d), 1)) if normalizer is None else normalizer
    loss = d.dtype.type(np.logaddexp(0, -d).sum() / n)

    def vjp(dloss):
        dd = -preferred(-d) * (d.dtype.type(dloss) / n)
        return dd, -dd, None

    return loss, vjp


def ranking_loss_1(
    rewards: Float[np.ndarray, "prompts k"], ranks: Integer[np.ndarray, "prompts k"], normalizer: float | None = None
) -> tuple[np.floating, Callable]:
    """K answers to a prompt, put in order by a rater: the mean of (3) over all pairs of a prompt, then over prompts.

        loss = (1/N) Σ_prompts (1/C(K,2)) Σ_{y_i better than y_j} −log σ(r_i − r_j)                        (5)

                                                          (Ouyang et al. 2022, InstructGPT, arXiv 2203.02155, eq. 1)
    Here one pair after the other. `ranks`: the smaller the better; a tie says nothing, and the pairs that remain share
    the weight of the prompt, 1/C(K,2) each where there is none. `vjp(dloss) -> drewards`.
    """
    n = float(max(len(rewards), 1)) if normalizer is None else normalizer
    total, slope = 0.0, np.zeros_like(rewards)
    for row, rank, drow in zip(rewards, ranks, slope, strict=True):
        pairs = [(i, j) for i in range(len(row)) for j in range(len(row)) if rank[i] < rank[j]]
        for i, j in pairs:
            value, pair_vjp = pairwise_loss(row[i : i + 1], row[j : j + 1])
            total += float(value) / (len(pairs) * n)
            dchosen, drejected, _ = pair_vjp(1 / (len(pairs) * n))
            drow[i] += dchosen[0]
            drow[j] += drejected[0]

    def vjp(dloss):
        return rewards.dtype.type(dloss) * slope

    return rewards.dtype.type(total), vjp


def ranking_loss_2(
    rewards: Float[np.ndarray, "prompts k"], ranks: Integer[np.ndarray, "prompts k"], normalizer: float | None = None
) -> tuple[np.floating, Callable]:
    """Equation (5) with all pairs at once: each answer went through the model once, not K − 1 times."""
    n = float(max(len(rewards), 1)) if normalizer is None else normalizer
    better = ranks[:, :, None] < ranks[:, None, :]  # (N, K, K)
    pairs = np.maximum(better.sum(axis=(1, 2), keepdims=True), 1).astype(rewards.dtype)
    d = rewards[:, :, None] - rewards[:, None, :]
    weight = better / pairs / n
    loss = rewards.dtype.type((weight * np.logaddexp(0, -d)).sum())

    def vjp(dloss):
        dd = -weight * preferred(-d) * rewards.dtype.type(dloss)
        return dd.sum(axis=2) - dd.sum(axis=1)

    return loss, vjp


def centering(
    chosen: Float[np.ndarray, " pairs"], rejected: Float[np.ndarray, " pairs"], normalizer: float | None = None
) -> tuple[np.floating, Callable]:
    """(1/P) Σ (r_w + r_l)², to be added with a small factor: it holds the zero that (3) leaves free.

                                                                         (Eisenstein et al. 2023, arXiv 2312.09244)
    `vjp(dloss) -> dchosen, drejected`: both 2 (r_w + r_l) dloss / P."""
    total = chosen + rejected
    n = float(max(len(total), 1)) if normalizer is None else normalizer

    def vjp(dloss):
        dtotal = 2 * total * (total.dtype.type(dloss) / n)
        return dtotal, dtotal.copy()

    return total.dtype.type((total * total).sum() / n), vjp


def loss(
    params: Params,
    pairs: Pairs,
    config: llama.Config,
    normalizer: float | None = None,
    dropout_key: int | None = None,
    *,
    center: float = 0.0,
) -> tuple[np.floating, Callable]:
    """`pairwise_loss` of a whole model, plus `center` times `centering`; `vjp(dloss) -> {name: gradient}`."""
    rewards, score_vjp = score(params, pairs.batch, config, dropout_key=dropout_key)
    chosen, rejected = rewards[0::2], rewards[1::2]
    value, pairwise_vjp = pairwise_loss(chosen, rejected, pairs.margin, normalizer)
    centered, centering_vjp = centering(chosen, rejected, normalizer)

    def vjp(dloss):
        dchosen, drejected, _ = pairwise_vjp(dloss)
        drewards = np.stack([dchosen, drejected], axis=1)
        drewards += np.stack(centering_vjp(center * dloss), axis=1)
        return score_vjp(drewards.reshape(-1))

    return value + rewards.dtype.type(center) * centered, vjp


# --- what a reward is worth -------------------------------------------------------------------------------------------


def normalization(scores: Float[np.ndarray, " n"], *, scale: bool = True) -> tuple[float, float]:
    """(gain, bias): gain · r + bias has mean 0 and variance 1 over these scores; without `scale` the gain is 1.

    Scores of demonstrations and scale=False: InstructGPT's, whose human answers score 0 on average. Samples of the
    policy and scale=True: OpenAI's earlier `reward_gain` and `reward_bias` (Ziegler et al. 2019, §2.1). ValueError for
    no scores, or to be scaled though all are equal."""
    if not len(scores):
        raise ValueError("no scores to normalize by: needed some, of demonstrations or samples")
    mean, std = float(np.mean(scores)), float(np.std(scores))
    if scale and not std > 0:
        raise ValueError(f"all {len(scores)} scores are {mean:g}: no gain gives them variance 1")
    gain = 1 / std if scale else 1.0
    return gain, -gain * mean


def accuracy(chosen: Float[np.ndarray, " pairs"], rejected: Float[np.ndarray, " pairs"]) -> float:
    """The share of pairs whose preferred answer scores higher; a tie is no success, so a constant model has 0."""
    return float(np.mean(chosen > rejected))


def calibration(
    chosen: Float[np.ndarray, " pairs"], rejected: Float[np.ndarray, " pairs"], bins: int = 5
) -> list[tuple[float, float, int]]:
    """How often raters agree with the model where it is how sure: (expected, observed, pairs) of each bin in use.

    The model prefers one answer of each pair with p = σ(|r_w − r_l|), between ½ and 1, equation (2). Bins divide that
    range evenly; expected is the mean p, observed the share in which the rater preferred the same one, a tie counting
    half. ValueError below one bin."""
    if bins < 1:
        raise ValueError(f"bins is {bins}, needed at least 1")
    d = chosen - rejected
    p = preferred(np.abs(d))
    agreed = (np.sign(d) + 1) / 2
    index = np.minimum(((p - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        (float(p[index == i].mean()), float(agreed[index == i].mean()), int((index == i).sum()))
        for i in np.unique(index).tolist()
    ]
