"""Optimizer, clipping and schedules, wrong in the ways they have been wrong: each must be rejected by a property."""

import math

import numpy as np

from nn.wrong_nn import variants


def _adamw(
    theta,
    gradient,
    m,
    v,
    step,
    learning_rate,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    *,
    decay="decoupled",
    corrected=(True, True),
    eps_inside=False,
    swapped=False,
    step_from_zero=False,
    second="square",
    root=True,
    sign=-1,
    decay_after=False,
    eps_scaled=False,
    in_place=False,
    upcast=False,
    first="new",
    nesterov=False,
    no_first=False,
):
    """AdamW with switches; returns θ′, m′, v′."""
    g = gradient
    b1, b2 = (beta2, beta1) if swapped else (beta1, beta2)
    if decay == "coupled":
        g = g + weight_decay * theta
    if in_place:
        gradient *= 0.5
    m = b1 * m + ((1 - b1) if first == "new" else 1) * g
    v = b2 * v + (1 - b2) * (
        g * g if second == "square" else np.abs(g) if second == "abs" else gradient * g * 0 + (g.mean()) ** 2
    )
    t = step - 1 if step_from_zero and step > 1 else step
    m_hat = m / (1 - b1**t) if corrected[0] else m
    v_hat = v / (1 - b2**t) if corrected[1] else v
    if nesterov:
        m_hat = b1 * m_hat + (1 - b1) * g / (1 - b1**t)
    if eps_inside:
        denominator = np.sqrt(v_hat + eps)
    elif eps_scaled:
        denominator = (np.sqrt(v) + eps) / math.sqrt(1 - b2**t)  # ε before the correction, as in Adam's efficient form
    else:
        denominator = (np.sqrt(v_hat) if root else v_hat) + eps
    update = learning_rate * (np.sign(m_hat) if no_first else m_hat) / denominator
    factor = {
        "decoupled": 1 - learning_rate * weight_decay,
        "without lr": 1 - weight_decay,
        "none": 1.0,
        "coupled": 1.0,
        "squared": 1 - learning_rate * learning_rate * weight_decay,
        "grows": 1 + learning_rate * weight_decay,
    }[decay]
    theta = factor * (theta + sign * update) if decay_after else factor * theta + sign * update
    return theta.astype(np.float64) if upcast else theta, m, v


ADAMW = variants(
    _adamw,
    decay=("coupled", "without lr", "none", "squared", "grows"),
    corrected=((False, False),),
    eps_inside=True,
    swapped=True,
    step_from_zero=True,
    second=("abs", "mean"),
    root=False,
    sign=1,
    decay_after=True,
    eps_scaled=True,
    in_place=True,
    upcast=True,
    first="sum",
    nesterov=True,
    no_first=True,
)
ADAMW += tuple(w for pair in ((True, False), (False, True)) for w in variants(_adamw, corrected=(pair,)))


def _clip(gradients, max_norm, *, norm_of="all", returns="before", up=False, in_place=False, checks=True, eps=0.0,
          squared=False, upcast=False, elements=False, root=True):  # fmt: skip
    total = sum(float(np.vdot(g, g)) for g in gradients.values())
    norm = math.sqrt(total) if root else total
    if norm_of == "sum of norms":
        norm = sum(math.sqrt(float(np.vdot(g, g))) for g in gradients.values())
    if norm_of == "first":
        norm = math.sqrt(float(np.vdot(*[next(iter(gradients.values()))] * 2)))
    if norm_of == "largest":
        norm = max(float(np.abs(g).max(initial=0)) for g in gradients.values())
    if checks and not math.isfinite(norm):
        raise ValueError("not finite: lower the learning rate")
    factor = max_norm / (norm + eps) if norm else 1.0
    if not up:
        factor = min(1.0, factor)
    clipped = {}
    for name, g in gradients.items():
        own = factor
        if norm_of == "each":
            size = math.sqrt(float(np.vdot(g, g)))
            own = min(1.0, max_norm / size) if size else 1.0
        new = np.clip(g, -max_norm, max_norm) if elements else g * g.dtype.type(own * own if squared else own)
        if in_place:
            g *= g.dtype.type(own)
            new = g
        clipped[name] = new.astype(np.float64) if upcast else new
    return clipped, (norm if returns == "before" else min(norm, max_norm))


CLIP = variants(
    _clip,
    norm_of=("each", "sum of norms", "first", "largest"),
    returns="after",
    up=True,
    in_place=True,
    checks=False,
    eps=1e-3,
    squared=True,
    upcast=True,
    elements=True,
    root=False,
)


def _schedule(step, peak, total_steps, warmup_steps=0, schedule="cosine", floor=0.0, *, shift=0, warm_from_zero=False,
              floor_used=True, stays=True, whole=False, half=True, ends_late=False, checks=True, no_warmup=False,
              floor_in_warmup=False, degrees=1.0, squared=False):  # fmt: skip
    if checks and step < 1:
        raise ValueError("step is 0")
    if checks and schedule not in ("constant", "linear", "cosine"):
        raise ValueError("schedule")
    step = step + shift
    floor = floor if floor_used else 0.0
    if step <= warmup_steps and not no_warmup:
        start = floor if floor_in_warmup else 0.0
        return start + (peak - start) * (step - (1 if warm_from_zero else 0)) / max(warmup_steps, 1)
    span = total_steps - (0 if whole else warmup_steps) + (1 if ends_late else 0)
    progress = (step - warmup_steps) / max(span, 1)
    if stays:
        progress = min(progress, 1.0)
    if schedule == "linear":
        return floor + (peak - floor) * (1 - progress) ** (2 if squared else 1)
    if schedule == "cosine":
        f = 0.5 * (1 + math.cos(math.pi * progress * degrees)) if half else math.cos(math.pi / 2 * progress)
        return floor + (peak - floor) * f
    return peak


SCHEDULES = variants(
    _schedule,
    shift=(-1, 1),
    warm_from_zero=True,
    floor_used=False,
    stays=False,
    whole=True,
    half=False,
    ends_late=True,
    checks=False,
    no_warmup=True,
    floor_in_warmup=True,
    degrees=2.0,
    squared=True,
)
