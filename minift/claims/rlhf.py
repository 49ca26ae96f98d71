"""What is said of learning from comparisons: pairs in a batch, the first step of PPO, the KL of best-of-n."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from minift.claims.claim import Claim, depends, holds, rounded
from minift.io import load_llama
from minift.rlhf import ppo
from minift.rlhf.logprobs import answers, counts, sequence_log_probs
from minift.rlhf.measure import best_of
from minift.rlhf.reward_model import pairwise_loss

INSTRUCT = "InstructGPT (Ouyang et al. 2022, arXiv 2203.02155)"
SUMMARIZE = "Learning to summarize (Stiennon et al. 2020, arXiv 2009.01325)"
PPO = "PPO (Schulman et al. 2017, arXiv 1707.06347)"
N = 16  # of best-of-n


def comparisons_in_a_batch() -> Claim:
    """A batch of 64 prompts with up to 9 ranked answers each has up to 2,304 comparisons: 64·C(9, 2)."""
    found = 64 * math.comb(9, 2)
    return Claim("2,304 comparisons in a batch", INSTRUCT, 2304, found, holds(found == 2304), "64·9·8/2", "appendix C")


def reward_has_no_zero() -> Claim:
    """The reward model's loss is invariant to shifts of the reward: only differences of rewards are in it.

    The loss of 1,000 random pairs, and after adding 7 to every reward."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.standard_normal((2, 1000))
    found = float(abs(pairwise_loss(chosen + 7, rejected + 7)[0] - pairwise_loss(chosen, rejected)[0]))
    how = "change of the loss in float64, whose rounding is 1e-16"
    return Claim("a shift of all rewards changes no loss", INSTRUCT, 0.0, found, holds(found < 1e-12), how, "§3.5")


def first_ratio() -> Claim:
    """At the first step of PPO the policy is the old policy, so the ratio ρ is 1.

    Log-probabilities of random answers under the built-in model, once as they are kept with the answers (without
    activations), and once as the first step computes them: every ρ must be 1 to the bit."""
    config, params = load_llama("tiny")
    rng = np.random.default_rng(0)
    batch = answers(rng.integers(0, config.vocab_size, (4, 24)), np.array([5, 6, 7, 8]), np.array([24, 20, 18, 22]))
    (old, _), _ = sequence_log_probs(params, batch, config, recompute=True)
    (new, _), _ = sequence_log_probs(params, batch, config)
    mask = counts(batch)
    ratio = ppo.ratio(new, old, mask)[mask]
    how = f"ρ of {ratio.size} tokens, all of them {ratio.min():g} to the bit" if (ratio == 1).all() else "ρ differs"
    return Claim("the first ratio is 1", PPO, 1, float(ratio.max()), holds(bool((ratio == 1).all())), how, "§3")


def kl_of_best_of_n() -> Claim:
    """The best of n answers is at a KL of log n − (n − 1)/n from the policy that gave them.

    The best of n has probability F(x)ⁿ − F(x−)ⁿ. For a million equally likely answers of different rewards the KL is
    summed up exactly."""
    claimed = best_of(np.zeros((N, 1)))[1]
    found = _kl(1_000_000)
    how = f"log {N} − {N - 1}/{N}; Σ p log(p / p₀) over 10⁶ answers"
    return Claim(
        f"best of {N}: KL = log n − (n − 1)/n", SUMMARIZE, claimed, found, rounded(claimed, found, 4), how, "G.3"
    )


def kl_with_few_answers() -> Claim:
    """The same for a policy that knows few answers: the formula is an upper bound, reached only without ties.

    With m equally likely answers the KL cannot exceed log m.                 (Beirami et al. 2024, arXiv 2401.01879)"""
    claimed = best_of(np.zeros((N, 1)))[1]
    kl = {m: _kl(m) for m in (4, 16, 256)}
    on = "on how many answers there are: " + ", ".join(f"{value:.3f} with {m}" for m, value in kl.items())
    how = f"Σ p log(p / p₀) over 4 answers, at most log 4 = {math.log(4):.3f}"
    return Claim("… also of a policy with few answers", SUMMARIZE, claimed, kl[4], depends(on), how, "G.3")


CLAIMS: dict[str, Callable[[], Claim]] = {
    "comparisons-in-a-batch": comparisons_in_a_batch,
    "reward-has-no-zero": reward_has_no_zero,
    "first-ratio": first_ratio,
    "kl-of-best-of-n": kl_of_best_of_n,
    "kl-with-few-answers": kl_with_few_answers,
}


def _kl(m: int) -> float:
    """KL of the best of N from m equally likely answers, no two of the same reward."""
    at_most = np.arange(m + 1) / m
    p = np.diff(at_most**N)
    return float(np.sum(p[p > 0] * np.log(p[p > 0] * m)))
