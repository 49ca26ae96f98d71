"""RMSNorm, attention and cross-entropy, on numbers whose roots and logarithms are simple."""

from __future__ import annotations

import numpy as np

from minift.nn.attention import attention_1, causal_mask
from minift.nn.losses import IGNORE_INDEX, cross_entropy
from minift.nn.norms import rms_norm
from minift.step.lessons.lesson import Lesson, Question, Scene
from minift.step.recorder import step


def rms_norm_lesson() -> Lesson:
    x, gain = np.array([[1.0, 7.0]]), np.array([1.0, 2.0])
    recording = step(rms_norm, x, gain, 0.0, cotangent=np.array([[1.0, 0.0]]))
    along = step(rms_norm, x, np.ones(2), 0.0, cotangent=np.array([[1.0, 7.0]]))
    return Lesson(
        "rms_norm",
        "RMSNorm: every row gets the same size",
        "x = [1, 7] has the root mean square √((1 + 49) / 2) = 5. The gain is [1, 2], ε is 0.",
        (
            Scene(
                "Forward and backward",
                "The mean is not subtracted. The backward pass differentiates through the statistic.",
                recording,
                (
                    Question(
                        "inv_rms =",
                        "What is 1 / rms of [1, 7]?",
                        lambda r: float(r.value_of("inv_rms")[0, 0]),
                    ),
                    Question("y = x_hat", "x̂ = [0.2, 1.4] and the gain is [1, 2]: what is y?", lambda r: r.value[0]),
                    Question(
                        "dx *= inv_rms",
                        "dy is [1, 0]: only the first output is asked about. Does the second input get a gradient?",
                        lambda r: "yes" if r.gradients[0][0, 1] else "no",
                        "Both inputs are in the root mean square.",
                    ),
                ),
            ),
            Scene(
                "A cotangent along x",
                "A larger x along itself gives the same x̂, so nothing can come of it.",
                along,
                (
                    Question(
                        "dx = dx_hat",
                        "With the gain 1 and dy = [1, 7], a multiple of x: what will dx be?",
                        lambda r: r.gradients[0].round(12) + 0.0,
                        "Up to rounding: RMSNorm forgets the size of x, and the gradient knows it.",
                    ),
                ),
            ),
        ),
    )


def attention_lesson() -> Lesson:
    ln3 = float(np.log(3))
    q = np.array([[[[1.0], [1.0]]]])  # one head of one number, two tokens
    k, v = np.array([[[[0.0], [ln3]]]]), np.array([[[[4.0], [8.0]]]])
    mask = step(causal_mask, np.array([[0, 1]]), 2)
    recording = step(attention_1, q, k, v, mask.value, cotangent=np.array([[[[0.0], [1.0]]]]))
    return Lesson(
        "attention",
        "Attention: a mean of values, weighted by how well keys fit a query",
        "One head of one number, two tokens. The keys are 0 and ln 3, so that the exponentials are 1 and 3.",
        (
            Scene(
                "Who may look at whom",
                "A token sees itself and what came before.",
                mask,
                (
                    Question(
                        "return visible",
                        "How many of the four pairs are visible?",
                        lambda r: int(r.value.sum()),
                    ),
                ),
            ),
            Scene(
                "Forward and backward",
                "`attention_1` takes one head of one sequence at a time; the faster forms are tested against it.",
                recording,
                (
                    Question(
                        "p = probabilities",
                        "The second token's scores are 0 and ln 3. What are its two probabilities?",
                        lambda r: r.value_of("p", "attention_1")[1],
                        "1 / (1 + 3) and 3 / (1 + 3).",
                    ),
                    Question(
                        "y[b, h] =",
                        "The values are 4 and 8. What does the second token get?",
                        lambda r: float(r.value[0][0, 0, 1, 0]),
                        "¼ · 4 + ¾ · 8. The first sees only itself: 4.",
                    ),
                    Question(
                        "dscores =",
                        "dy asks about the second token only. What do its two dscores add up to?",
                        lambda r: float(r.value_of("dscores")[1].sum()),
                        "Adding the same number to all scores changes no probability.",
                    ),
                ),
            ),
        ),
    )


def cross_entropy_lesson() -> Lesson:
    logits = np.log(np.array([[1.0, 2.0, 1.0], [5.0, 1.0, 2.0], [1.0, 1.0, 2.0]]))
    labels = np.array([1, IGNORE_INDEX, 2])
    recording = step(cross_entropy, logits, labels, cotangent=1.0)
    return Lesson(
        "cross_entropy",
        "Cross-entropy: how surprised the model is by the next token",
        "Three positions, three tokens. The logits are logarithms of [1, 2, 1], [5, 1, 2] and [1, 1, 2], so that the "
        "probabilities are quarters and eighths. The second position does not count.",
        (
            Scene(
                "Forward and backward",
                "The labels are 1, −100 (does not count) and 2.",
                recording,
                (
                    Question(
                        "n =",
                        "How many positions does the mean go over?",
                        lambda r: int((r.args[1] != IGNORE_INDEX).sum()),
                    ),
                    Question(
                        "loss =",
                        "Both labels have the probability ½. What is the loss?",
                        lambda r: float(r.value[0]),
                        "ln 2: the surprise of a coin toss.",
                    ),
                    Question(
                        "dlogits[~counts]",
                        "What gradient does the position that does not count get?",
                        lambda r: r.gradients[1],
                        "Exactly zero, whatever its logits are. In the other rows (p − onehot) / N adds up to zero.",
                    ),
                ),
            ),
        ),
    )
