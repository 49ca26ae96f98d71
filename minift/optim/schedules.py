"""The learning rate as a function of the step: up in a straight line, then down along a line or a cosine."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, peak: float, total_steps: int, warmup_steps: int = 0, schedule: Schedule = "cosine", floor: float = 0.0
) -> float:
    """η of step 1 … total_steps.                            (cosine: Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)

        warm-up     η = peak · step / warmup_steps                            step ≤ warmup_steps       (1)
        then        η = floor + (peak − floor) · f(progress)                                            (2)
        linear      f(p) = 1 − p            cosine      f(p) = ½ (1 + cos πp)

    `progress` runs from 0 after the warm-up to 1 at the last step. The first step already moves: at step 1 of a
    warm-up of n the rate is peak / n, not 0. ValueError for an unknown schedule or a step below 1."""
    if step < 1:
        raise ValueError(f"step is {step}, needed 1 or more")
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {schedule!r}, needed one of {get_args(Schedule)}")
    if step <= warmup_steps:
        return peak * (step / warmup_steps)  # exactly peak at its end
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return floor + (peak - floor) * (1 - progress)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
