"""The reward model's loss, advantages, PPO and DPO, on two tokens or two pairs."""

from __future__ import annotations

import numpy as np

from minift.rlhf import advantages, dpo, ppo
from minift.rlhf.reward_model import pairwise_loss
from minift.step.lessons.lesson import Lesson, Question, Scene
from minift.step.recorder import step

MASK = np.array([[False, True, True, True]])  # a prompt of one token, an answer of three


def reward_lesson() -> Lesson:
    chosen, rejected = np.array([np.log(3.0), 0.0]), np.array([0.0, 0.0])
    margin = np.array([np.log(3.0), 0.0])
    return Lesson(
        "reward",
        "The reward model: which answer was better",
        "Two pairs of answers. The first chosen one scores ln 3 more than its rival, the second as much as its rival.",
        (
            Scene(
                "Forward and backward",
                "Nobody says what an answer is worth, only which is better; σ(r_w − r_l) is how likely that is.",
                step(pairwise_loss, chosen, rejected, cotangent=1.0),
                (
                    Question(
                        "loss =",
                        "σ(ln 3) = ¾ and σ(0) = ½. Which of the two pairs has the larger loss: 1 or 2?",
                        lambda r: int(np.argmax(np.logaddexp(0, -(r.args[0] - r.args[1])))) + 1,
                        "ln 2 against ln 4/3. The loss is their mean.",
                    ),
                    Question(
                        "dd =",
                        "With 2 pairs, what is the gradient of the second chosen reward?",
                        lambda r: float(r.gradients[0][1]),
                        "−σ(−d) / P = −½ / 2. A pair that is clear pulls less: −¼ / 2 for the first.",
                    ),
                    Question(
                        "return dd",
                        "Add 10 to all four rewards. Does the loss change?",
                        lambda r: (
                            "no" if np.isclose(pairwise_loss(r.args[0] + 10, r.args[1] + 10)[0], r.value[0]) else "yes"
                        ),
                        "Only differences count, so the gradients of a pair add up to zero and the zero drifts.",
                    ),
                ),
            ),
            Scene(
                "With a margin",
                "The rater said that the first pair is clear, by ln 3.",
                step(pairwise_loss, chosen, rejected, margin, cotangent=1.0),
                (
                    Question(
                        "loss =",
                        "What is d of the first pair now?",
                        lambda r: float(r.value_of("d", "pairwise_loss")[0]),
                        "Its lead is just what was asked for, so it pulls as hard as a tie.",
                    ),
                ),
            ),
        ),
    )


def gae_lesson() -> Lesson:
    kl = np.array([[0.0, 1.0, 0.0, 2.0]])
    rewards = step(advantages.token_rewards, np.array([3.0]), kl, MASK, 0.5)
    values = np.array([[9.0, 1.0, 1.0, 2.0]])
    found = step(advantages.gae_1, rewards.value, values, MASK, 1.0, 0.5)
    return Lesson(
        "gae",
        "From one score to an advantage for each token",
        "A prompt of one token, an answer of three. It scores 3; its tokens' KL to the reference is 1, 0 and 2.",
        (
            Scene(
                "What each token earns",
                "A leash on all of them, β = ½ a nat, and the score on the last one.",
                rewards,
                (
                    Question(
                        "rewards[np.arange",
                        "What does the last token earn in the end?",
                        lambda r: float(r.value[0, 3]),
                        "The score 3 less ½ · 2.",
                    ),
                ),
            ),
            Scene(
                "What each token was better than promised",
                "The values promised 1, 1 and 2. γ = 1, λ = ½. What stands outside the answer (the 9) must not matter.",
                found,
                (
                    Question(
                        "advantages, carried",
                        "δ = r + V_next − V: what is δ of the last token, behind which there is nothing?",
                        lambda r: float(r.value_of("delta")[0, 3]),
                        "2 + 0 − 2: exactly as promised.",
                    ),
                    Question(
                        "return advantages",
                        "δ is [−½, 1, 0]. With γλ = ½, what is the advantage of the first token?",
                        lambda r: float(r.value[0, 1]),
                        "−½ + ½ · (1 + ½ · 0) = 0. The token before is given half of what came later.",
                    ),
                ),
            ),
        ),
    )


def ppo_lesson() -> Lesson:
    mask = np.array([[True, True, True, True]])
    old = np.log(np.array([[0.5, 0.5, 0.5, 0.5]]))
    new = np.log(np.array([[0.75, 0.75, 0.25, 0.25]]))  # ratios 1.5, 1.5, 0.5, 0.5
    better = np.array([[1.0, -1.0, 1.0, -1.0]])
    settings = ppo.Settings(vf_coef=0.5, cliprange_value=None)
    values, returns = np.array([[1.0, 1.0, 1.0, 1.0]]), np.array([[3.0, 1.0, 1.0, 1.0]])
    whole = (new, np.zeros((1, 4)), values, old, values, better, returns, mask, settings)
    return Lesson(
        "ppo",
        "PPO: how far one may go on what was sampled",
        "Four tokens. The policy has moved since it wrote them: the ratios are 1.5, 1.5, 0.5, 0.5.",
        (
            Scene(
                "The clipped objective",
                "ε = 0.2. What would pay for going on in the same direction is cut off; what undoes a mistake is not.",
                step(ppo.policy_loss, new, old, better, mask, 0.2, depth=2, cotangent=1.0),
                (
                    Question(
                        "free, clipped",
                        "ρ = [1.5, 1.5, 0.5, 0.5] and Â = [1, −1, 1, −1]. What is −clip(ρ) Â of the first token?",
                        lambda r: float(r.value_of("clipped")[0, 0]),
                        "ρ is clipped to 1.2.",
                    ),
                    Question(
                        "return np.maximum(free",
                        "Two of the four tokens still get a gradient. Which: 1 2, 2 3 or 3 4?",
                        lambda r: np.flatnonzero(r.gradients) + 1,
                        "The second was made likelier though it is bad, the third less likely though it is good.",
                    ),
                ),
            ),
            Scene(
                "With the values",
                "The whole loss of a minibatch: policy, values (c_v = ½), and no entropy bonus.",
                step(ppo.minibatch_loss, *whole, cotangent=1.0),
                (
                    Question(
                        "loss = of_policy",
                        "One of four values is off by 2. What is ½ mean (V − R)²?",
                        lambda r: float(r.value_of("of_values")),
                        "½ · 4 / 4.",
                    ),
                ),
            ),
        ),
    )


def dpo_lesson() -> Lesson:
    reference = np.array([-10.0, -10.0]), np.array([-12.0, -12.0])
    chosen, rejected = np.array([-10.0, -9.0]), np.array([-12.0, -13.0])
    recording = step(dpo.preference_loss, chosen, rejected, *reference, beta=0.5, cotangent=1.0)
    return Lesson(
        "dpo",
        "DPO: the policy is its own reward model",
        "Two pairs of answers and their log-probabilities. In the first nothing has moved since the reference; "
        "in the second the chosen answer is likelier by 1 nat and the rejected one less likely by 1.",
        (
            Scene(
                "Forward and backward",
                "β = ½. There is no reward to learn, and nothing to sample.",
                recording,
                (
                    Question(
                        "h =",
                        "What is h, how much further apart the two answers are than at the start, for the two pairs?",
                        lambda r: r.value_of("h"),
                    ),
                    Question(
                        "each = kept",
                        "The loss of the first pair, for which h = 0?",
                        lambda r: float(r.value_of("each")[0]),
                        "ln 2, where every training begins.",
                    ),
                    Question(
                        "return dh",
                        "Which pair pulls harder: 1 or 2?",
                        lambda r: int(np.argmax(np.abs(r.gradients[0]))) + 1,
                        "The one that is not yet in order. What is in order already is left alone more and more.",
                    ),
                ),
            ),
            Scene(
                "What it is in rewards",
                "β (log π − log π_ref), up to what depends on the prompt only.",
                step(dpo.implicit_rewards, chosen, reference[0], 0.5),
            ),
        ),
    )
