"""Advantages, wrong in the ways they have been wrong in published code."""

import numpy as np

from minift.rlhf.advantages import last
from nn.wrong_nn import variants


def _gae(
    rewards,
    values,
    mask,
    gamma=1.0,
    lam=0.95,
    bootstrap=None,
    *,
    tail="nothing",
    decay="both",
    discounts="next",
    ends="zero",
    masks="where",
    cut="bootstrap",
):
    if masks == "where":
        rewards, values = np.where(mask, rewards, 0), np.where(mask, values, 0)
    if masks == "times":
        rewards, values = rewards * mask, values * mask
    following = np.zeros_like(values)
    following[:, :-1] = values[:, 1:]
    at = np.arange(len(mask)), last(mask)
    if ends == "its own value":
        following[at] = values[at]
    if bootstrap is not None and cut == "bootstrap":
        following[at] = bootstrap
    if bootstrap is not None and cut == "not discounted":
        following[at] = bootstrap / gamma
    delta = rewards + (gamma if discounts == "next" else 1) * following - values
    factor = {"both": gamma * lam, "lam": lam, "gamma": gamma}[decay]
    advantages, carried = np.zeros_like(delta), np.zeros(len(delta), delta.dtype)
    for t in reversed(range(delta.shape[1])):
        carried = delta[:, t] + factor * carried
        if masks != "nothing":
            if tail == "nothing":
                carried = np.where(mask[:, t], carried, 0)
            elif tail == "carried on":
                carried = np.where(mask[:, t], carried, carried / (factor or 1))
        advantages[:, t] = carried
    return np.where(mask, advantages, 0)


GAE = variants(
    _gae,
    tail=("carried on", "kept"),
    decay=("lam", "gamma"),
    discounts="nothing",
    ends="its own value",
    masks=("times", "nothing"),
    cut=("ignored", "not discounted"),
)


def _token_rewards(
    scores,
    kl,
    mask,
    kl_coef,
    *,
    ended=None,
    missing_eos_penalty=0.0,
    at="last",
    sign=-1,
    penalty="not ended",
    adds=True,
    masks="where",
):
    if not mask.any(axis=1).all() or (missing_eos_penalty and ended is None):
        raise ValueError
    leash = sign * kl_coef * kl
    rewards = np.where(mask, leash, 0) if masks == "where" else leash * (mask if masks == "times" else 1)
    if ended is not None and penalty != "nobody":
        scores = np.where(ended if penalty == "not ended" else ~ended, scores, scores - missing_eos_penalty)
    columns = {"last": last(mask), "first": np.argmax(mask, 1), "width": np.full(len(mask), mask.shape[1] - 1)}
    columns["padding"] = np.minimum(last(mask) + 1, mask.shape[1] - 1)
    index = np.arange(len(mask)), columns[at]
    rewards[index] = scores + (rewards[index] if adds else 0)
    return rewards


REWARDS = variants(
    _token_rewards,
    at=("first", "width", "padding"),
    sign=1,
    penalty=("ended", "nobody"),
    adds=False,
    masks=("times", "nothing"),
)


def _kl(logp, ref_logp, estimator="k1", *, turned=False, half=True, k3="expm1", slope="right", k1="signed"):
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError
    ell = logp - ref_logp if turned else ref_logp - logp
    if estimator == "k1":
        kl, by = (-ell if k1 == "signed" else np.abs(ell)), np.ones_like(ell)
    elif estimator == "k2":
        kl, by = ell * ell * (0.5 if half else 1), -ell * (1 if half else 2)
    else:
        kl = np.exp(ell) - 1 - ell if k3 == "exp" else np.expm1(ell) - ell
        if k3 == "without the linear part":
            kl = np.expm1(ell)
        kl, by = np.maximum(kl, 0) if k3 == "expm1" else kl, -np.expm1(ell)
    by = {"right": by, "negative": -by, "one": np.ones_like(by)}[slope]
    return kl, lambda dkl: (dkl * by, None)


KL = variants(
    _kl,
    turned=True,
    half=False,
    k3=("exp", "without the linear part"),
    slope=("negative", "one"),
    k1="absolute",
)


def _whiten(x, mask, *, shift_mean=True, over="mask", ddof=0, inverted=False, eps=1e-8, outside="zero"):
    chosen = x[mask] if over == "mask" else x
    mean, std = chosen.mean(), np.sqrt(chosen.var(ddof=min(ddof, chosen.size - 1)) + eps)
    whitened = (x - mean) / std
    if shift_mean == inverted:
        whitened = whitened + mean
    return np.where(mask, whitened, 0).astype(x.dtype) if outside == "zero" else whitened


WHITEN = variants(_whiten, over="everything", ddof=1, inverted=True, eps=1e-2, outside="left")
