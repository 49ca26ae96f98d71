"""AdamW, and AdamW with its moments in 8 bits, on four numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from minift.optim.adamw import adamw_1
from minift.optim.adamw8bit import adamw8bit_1, zero_moments
from minift.step.lessons.lesson import Lesson, Question, Scene
from minift.step.recorder import Recording, step

THETA = np.array([1.0, 1.0, 1.0, 1.0])
GRADIENT = np.array([4.0, -0.5, 0.001, 0.0])
SETTINGS: dict[str, Any] = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99}


def adamw_lesson() -> Lesson:
    zero = np.zeros(4)
    first = step(adamw_1, THETA, GRADIENT, zero, zero, 1, weight_decay=0.1, **SETTINGS)
    second = step(adamw_1, first.value[0], -GRADIENT, *first.value[1:], 2, weight_decay=0.1, **SETTINGS)
    return Lesson(
        "adamw",
        "AdamW: every parameter moves by about the learning rate",
        "Four parameters at 1, with gradients 4, −0.5, 0.001 and 0. η = 0.1, β₁ = 0.9, β₂ = 0.99, λ = 0.1.",
        (
            Scene(
                "The first step",
                "Both moments start at zero, and are corrected for that.",
                first,
                (
                    Question("m =", "g = 4, m = 0, β₁ = 0.9: what is the new m?", lambda r: float(r.value[1][0])),
                    Question(
                        "m_hat =",
                        "And m̂ = m / (1 − β₁)?",
                        lambda r: float(r.value_of("m_hat")[0]),
                        "At step 1 the correction gives back the gradient itself.",
                    ),
                    Question(
                        "theta =",
                        "The gradients 4 and 0.001 differ by a factor of 4,000. And the two steps?",
                        lambda r: _moved(r, 0) / _moved(r, 2),
                        "m̂ / √v̂ is ±1 for both: only the sign is left. Both move by η, and decay by ηλ = 0.01.",
                    ),
                    Question(
                        "return theta",
                        "The last parameter has no gradient. What has become of its 1?",
                        lambda r: float(r.value[0][3]),
                        "It shrinks by exactly 1 − ηλ: the decay does not pass through Adam's division.",
                    ),
                ),
            ),
            Scene(
                "The second step, with the opposite gradient",
                "The moments remember the first one.",
                second,
                (
                    Question(
                        "theta =",
                        "Will the first parameter move by as much as before, less, or more?",
                        lambda r: "less" if abs(r.value[0][0] - r.args[0][0] * 0.99) < 0.1 else "more",
                        "Two gradients of opposite sign nearly cancel in m, but add up in v.",
                    ),
                ),
            ),
        ),
    )


def _moved(recording: Recording, at: int) -> float:
    """How far a parameter at 1 was moved, apart from its decay."""
    return round(abs(float(recording.value[0][at]) - 0.99), 4)


def adamw8bit_lesson() -> Lesson:
    theta, gradient = THETA.astype(np.float32), GRADIENT.astype(np.float32)
    m, v = zero_moments(theta, block_size=4, min_8bit_size=0)
    first = step(adamw8bit_1, theta, gradient, m, v, 1, depth=0, into=("adamw_1", "quantize_second"), **SETTINGS)
    second = step(adamw8bit_1, first.value[0], gradient, *first.value[1:], 2, depth=0, **SETTINGS)
    return Lesson(
        "adamw8bit",
        "AdamW in 8 bits: open the moments, step, close them",
        "The same four gradients; m and v are kept as codes of one byte, in one block of four (256 in practice).",
        (
            Scene(
                "The first step",
                "θ moves with moments in full precision, and only then are they rounded.",
                first,
                (
                    Question(
                        "def adamw8bit_1",
                        "How many bytes do both moments of four numbers take here? In float32 it is 32.",
                        lambda r: r.args[2].nbytes + r.args[3].nbytes,
                        "A byte a number and a float32 a block, twice. In blocks of 256: 2 + 8/256 bytes a number.",
                    ),
                    Question(
                        "np.maximum(q.codes",
                        "v of the third is (0.001 / 4)² = 6e-8 of the largest; the map begins at 3.3e-7. Which code?",
                        lambda r: int(r.value[2].codes[2]),
                        "The nearest entry is zero, code 0; but with v = 0 the next step would be η m̂ / ε. So what is "
                        "not zero gets at least code 1.",
                    ),
                    Question(
                        "return q",
                        "And the fourth, whose gradient is exactly zero: which code does its v get?",
                        lambda r: int(r.value[2].codes[3]),
                        "Zero stays zero, bit for bit.",
                        "quantize_second",
                    ),
                ),
            ),
            Scene(
                "The second step",
                "What was rounded is read now.",
                second,
                (
                    Question(
                        "theta, new_m, new_v",
                        "v of the third is now larger than it should be. Does it move too far, or too little?",
                        lambda r: "too little" if abs(r.value[0][2] - r.args[0][2]) < 0.1 else "too far",
                        "Too little is harmless.",
                    ),
                ),
            ),
        ),
    )
