"""From a score at the end of an answer to an advantage for each of its tokens.

Everything is (B, T), at the tokens as in `logprobs`. r_t is what token t earns, V_t the value of the text in front of
it, and Â_t how much better token t was than the value had promised. A mask says which tokens belong to an answer;
each run of such tokens in a row is an episode of its own, and nothing outside the mask matters, whatever stands there.

                                                    (Schulman et al. 2016, arXiv 1506.02438; notation of its eq. 11–16)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from minift.rlhf.masked import count

Estimator = Literal["k1", "k2", "k3"]


def kl_penalty(
    logp: Float[np.ndarray, "*shape"], ref_logp: Float[np.ndarray, "*shape"], estimator: Estimator = "k1"
) -> tuple[Float[np.ndarray, "*shape"], Callable]:
    """An estimate of KL(π, π_ref) from each token that π sampled.     (Schulman 2020, "Approximating KL divergence")

        ℓ = log π_ref − log π        k1 = −ℓ        k2 = ½ ℓ²        k3 = e^ℓ − 1 − ℓ                       (1)

    `vjp(dkl) -> dlogp, None`:  dlogp = dkl · (1, −ℓ, 1 − e^ℓ).  The reference does not learn.

    k1 is right on average, and negative for every other token; k3 is right on average and never negative; k2 is biased,
    but its *gradient* is right on average, where that of k3 is not and that of k1 is 0 on average. So k1 belongs into
    a reward, and k2 or k3 into a loss. ValueError for another estimator.
    """
    ell = ref_logp - logp
    if estimator == "k1":
        kl, slope = -ell, np.ones_like(ell)
    elif estimator == "k2":
        kl, slope = ell * ell / 2, -ell
    elif estimator == "k3":
        grown = np.expm1(ell)  # e^ℓ − 1 without the loss of digits near ℓ = 0
        kl, slope = np.maximum(grown - ell, 0), -grown
    else:
        raise ValueError(f"estimator is {estimator!r}, needed one of {get_args(Estimator)}")

    def vjp(dkl):
        return dkl * slope, None

    return kl, vjp


def token_rewards(
    scores: Float[np.ndarray, " batch"],
    kl: Float[np.ndarray, "batch width"],
    mask: Bool[np.ndarray, "batch width"],
    kl_coef: float,
    *,
    ended: Bool[np.ndarray, " batch"] | None = None,
    missing_eos_penalty: float = 0.0,
) -> Float[np.ndarray, "batch width"]:
    """What each token earns: a leash on all of them, and the score on the last one that is real.

        r_t = −β kl_t  +  1[t is the last token of the answer] (score − penalty · 1[the answer has no end])  (2)

                                              (Ziegler et al. 2019, arXiv 1909.08593, eq. 2; Stiennon et al. 2020, §3.4)
    The end-of-text token is a token like any other: it pays its KL and gets the score. `ended` says which answers have
    one; those that were cut off lose `missing_eos_penalty`, so that the policy learns to stop. ValueError for a row
    without an answer, or a penalty without `ended`.
    """
    if not mask.any(axis=1).all():
        raise ValueError(f"row {int(np.argmin(mask.any(axis=1)))} has no token that counts, so its score has no place")
    if missing_eos_penalty and ended is None:
        raise ValueError("missing_eos_penalty needs `ended`: which of the answers have their end-of-text token")
    rewards = np.where(mask, -kl_coef * kl, 0)  # the leash of (2)
    if ended is not None:
        scores = np.where(ended, scores, scores - missing_eos_penalty)
    rewards[np.arange(len(mask)), last(mask)] += scores  # the score of (2)
    return rewards


def gae_1(
    rewards: Float[np.ndarray, "batch width"],
    values: Float[np.ndarray, "batch width"],
    mask: Bool[np.ndarray, "batch width"],
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[np.ndarray, " batch"] | None = None,
) -> Float[np.ndarray, "batch width"]:
    """Generalized advantage estimation as a recursion, from the last token to the first, all rows at once.

        δ_t = r_t + γ V_{t+1} − V_t        Â_t = δ_t + γλ Â_{t+1}                                           (3)

    V behind the last token of an answer is 0: the text is over. Where it was only cut off, pass the value of what was
    there so far as `bootstrap`, one number a row, for its last token (Pardo et al. 2018, arXiv 1712.00378). λ = 0
    trusts the values (Â = δ), λ = 1 the rewards (for γ = 1: Â = their sum from here on, minus V_t).
    """
    delta = _residuals(rewards, values, mask, gamma, bootstrap)
    advantages, carried = np.zeros_like(delta), np.zeros_like(delta, shape=len(delta))
    for t in reversed(range(delta.shape[1])):
        carried = np.where(mask[:, t], delta[:, t] + gamma * lam * carried, 0)  # Â of (3)
        advantages[:, t] = carried
    return advantages


def gae_2(
    rewards: Float[np.ndarray, "batch width"],
    values: Float[np.ndarray, "batch width"],
    mask: Bool[np.ndarray, "batch width"],
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[np.ndarray, " batch"] | None = None,
) -> Float[np.ndarray, "batch width"]:
    """The same in closed form, one product with an upper triangular matrix: T² numbers for every row.

    Â_t = Σ_{s ≥ t} (γλ)^{s−t} δ_s        over the tokens s of the same episode                        (4)
    """
    delta = _residuals(rewards, values, mask, gamma, bootstrap)
    ahead = np.arange(delta.shape[1]) - np.arange(delta.shape[1])[:, None]  # (T, T): s − t
    decay = np.where(ahead >= 0, (gamma * lam) ** np.maximum(ahead, 0), 0.0).astype(delta.dtype)
    episode = np.cumsum(~mask, axis=1)  # goes up in every gap
    same = (episode[:, :, None] == episode[:, None, :]) & mask[:, :, None] & mask[:, None, :]  # (B, T, T)
    return np.einsum("bts,bs->bt", np.where(same, decay, 0), delta)


def _residuals(rewards, values, mask, gamma, bootstrap):
    """δ of (3), 0 outside the mask."""
    rewards, values = np.where(mask, rewards, 0), np.where(mask, values, 0)
    following = np.zeros_like(values)
    following[:, :-1] = values[:, 1:]
    if bootstrap is not None:
        following[np.arange(len(mask)), last(mask)] = bootstrap
    return np.where(mask, rewards + gamma * following - values, 0)  # δ of (3)


def returns(
    advantages: Float[np.ndarray, "batch width"], values: Float[np.ndarray, "batch width"]
) -> Float[np.ndarray, "batch width"]:
    """R_t = Â_t + V_t, what the values learn to predict: of advantages that are not whitened yet."""
    return advantages + values


def whiten(
    x: Float[np.ndarray, "batch width"], mask: Bool[np.ndarray, "batch width"], *, shift_mean: bool = True
) -> Float[np.ndarray, "batch width"]:
    """Variance 1 over the entries that count, and mean 0 unless the mean is kept; 0 elsewhere.

        (x − μ) / √(σ² + 10⁻⁸)  [+ μ if not shift_mean]        σ² = mean (x − μ)²                           (5)

    For advantages μ is taken away: half of the tokens should become likelier. For rewards it is kept, since their sign
    means something. The variance is OpenAI's, with 1/n; TRL divides by n − 1.
    """
    n = count(mask)
    mean = np.where(mask, x, 0).sum() / n
    centered = np.where(mask, x - mean, 0)
    variance = (centered * centered).sum() / n
    whitened = centered / np.sqrt(variance + 1e-8)
    return whitened if shift_mean else np.where(mask, whitened + mean, 0)


def last(mask: Bool[np.ndarray, "batch width"]) -> np.ndarray:
    """The last column that counts in each row."""
    return mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
