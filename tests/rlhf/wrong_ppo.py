"""PPO and GRPO, wrong in the ways they have been wrong in published code."""

import numpy as np

from minift.rlhf import ppo
from minift.rlhf.advantages import kl_penalty
from minift.rlhf.masked import masked_mean
from nn.wrong_nn import variants


def _masked_mean(x, mask, masks, over, normalizer):
    """(mean, its pullback), wrong in what is summed or in what it is divided by."""
    counted = {"where": np.where(mask, x, 0), "times": x * mask, "nothing": x}[masks]
    n = float(max(mask.sum(), 1)) if normalizer is None or over == "own tokens" else normalizer
    n = float(mask.size) if over == "padding too" else n
    keep = np.ones_like(mask) if masks == "nothing" else mask
    return x.dtype.type(counted.sum() / n), lambda d: (keep * d / n).astype(x.dtype)


def _policy(
    logp,
    old_logp,
    advantages,
    mask,
    cliprange=0.2,
    normalizer=None,
    *,
    rho="new/old",
    takes="min",
    edges="both",
    slope="rho",
    passes="free",
    sign=1,
    masks="where",
    over="tokens",
):
    if masks == "where":
        logp, old_logp, advantages = (np.where(mask, x, 0) for x in (logp, old_logp, advantages))
    ratio = np.exp({"new/old": logp - old_logp, "old/new": old_logp - logp}[rho])
    low, high = {"both": (1 - cliprange, 1 + cliprange), "upper": (0, 1 + cliprange), "log": (0, 0)}[edges]
    if edges == "log":
        low, high = np.exp(-cliprange), np.exp(cliprange)
    free, clipped = -ratio * advantages, -np.clip(ratio, low, high) * advantages
    if takes == "clipped only":
        each, through = clipped, (ratio >= low) & (ratio <= high)
    elif takes == "max":
        each, through = np.minimum(free, clipped), free <= clipped
    elif takes == "free":
        each, through = free, np.ones_like(mask)
    else:
        each, through = np.maximum(free, clipped), free >= clipped
    by = -advantages if slope == "one" else (free if rho == "new/old" else -free)
    by = by if passes == "all" else np.where(through, by, 0)
    loss, mean_vjp = _masked_mean(each, mask, masks, over, normalizer)
    return loss * sign, lambda dloss: mean_vjp(dloss * sign) * by


POLICY = variants(
    _policy,
    rho="old/new",
    takes=("clipped only", "max", "free"),
    edges=("upper", "log"),
    slope="one",
    passes="all",
    sign=-1,
    masks=("times", "nothing"),
    over=("own tokens", "padding too"),
)


def _value(
    values,
    old_values,
    returns,
    mask,
    cliprange_value=0.2,
    normalizer=None,
    *,
    takes="max",
    half=0.5,
    around="old",
    passes="free",
    clips=True,
    masks="where",
    over="tokens",
):
    if masks == "where":
        values, old_values, returns = (np.where(mask, x, 0) for x in (values, old_values, returns))
    error = worst = values - returns
    if cliprange_value is not None and clips:
        center = {"old": old_values, "returns": returns, "zero": 0 * returns}[around]
        clipped = np.clip(values, center - cliprange_value, center + cliprange_value) - returns
        pick = {"max": np.abs(clipped) > np.abs(error), "min": np.abs(clipped) < np.abs(error), "clipped": True}[takes]
        worst = np.where(pick, clipped, error)
    loss, mean_vjp = _masked_mean(half * worst * worst, mask, masks, over, normalizer)
    slope = 2 * half * (worst if passes == "clipped too" else np.where(worst == error, error, 0))
    return loss, lambda dloss: mean_vjp(dloss) * slope


VALUE = variants(
    _value,
    takes=("min", "clipped"),
    half=1.0,
    around=("returns", "zero"),
    passes="clipped too",
    clips=False,
    masks=("times", "nothing"),
    over=("own tokens", "padding too"),
)


def _minibatch(
    logp,
    entropy,
    values,
    old_logp,
    old_values,
    advantages,
    returns,
    mask,
    settings,
    normalizer=None,
    *,
    bonus=-1,
    bonus_slope=-1,
    weighs_values=True,
    value_slope="weighed",
    clips="its own",
):
    value_range = settings.cliprange if clips == "the policy's" else settings.cliprange_value
    policy, policy_vjp = ppo.policy_loss(logp, old_logp, advantages, mask, settings.cliprange, normalizer)
    value, value_vjp = ppo.value_loss(values, old_values, returns, mask, value_range, normalizer)
    mean, mean_vjp = masked_mean(entropy, mask, normalizer)
    c_v = settings.vf_coef if weighs_values else 1.0
    loss = policy + c_v * value + bonus * settings.entropy_coef * mean
    back = settings.vf_coef if value_slope == "weighed" else 1.0

    def vjp(dloss):
        return policy_vjp(dloss), mean_vjp(bonus_slope * settings.entropy_coef * dloss), value_vjp(back * dloss)

    return loss, vjp


MINIBATCH = variants(
    _minibatch,
    bonus=(1, 0),
    bonus_slope=(1, 0),
    weighs_values=False,
    value_slope="not weighed",
    clips="the policy's",
)


def _group(rewards, *, scale=True, ddof=1, over="group", eps="outside", divides=True):
    mean = rewards.mean(1, keepdims=True) if over != "everything" else rewards.mean()
    std = rewards.std(1, ddof=ddof, keepdims=True) if over == "group" else rewards.std(ddof=ddof)
    divisor = {"outside": std + 1e-4, "inside": np.sqrt(std**2 + 1e-4), "none": std}[eps]
    return (rewards - mean) / divisor if scale and divides else rewards - mean


GROUP = variants(_group, ddof=0, over=("everything", "group's mean, std of all"), eps=("inside", "none"), divides=False)


def _grpo(
    logp,
    old_logp,
    ref_logp,
    advantages,
    mask,
    *,
    cliprange=0.2,
    beta=0.04,
    aggregation="sequence",
    normalizer=None,
    lengths="answer",
    kl="k3",
    kl_slope="its own",
    turned=False,
    sign=1,
    divides="rows",
    masks="where",
):
    n_tokens = mask.sum(1, keepdims=True) if lengths == "answer" else np.full((len(mask), 1), mask.shape[1])
    if lengths == "longest":
        n_tokens = np.full((len(mask), 1), mask.sum(1).max(initial=0))
    if aggregation == "sequence":
        weight = (
            1 / np.maximum(n_tokens, 1) / (len(mask) if normalizer is None or divides == "own rows" else normalizer)
        )
    else:
        weight = np.full((len(mask), 1), 1 / (max(mask.sum(), 1) if normalizer is None else normalizer))
    each, slope = ppo.clipped_objective(logp, old_logp, advantages[:, None], mask, cliprange)
    pair = (ref_logp, logp) if turned else (logp, ref_logp)
    penalty, kl_vjp = kl_penalty(*(np.where(mask, x, 0) if masks == "where" else x for x in pair), kl)
    share = np.where(mask, weight, 0)

    def vjp(dloss):
        by = share * dloss * slope
        dkl = kl_vjp(beta * share * dloss)[0] * (-1 if turned else 1)
        return (by + (0 if kl_slope == "none" else dkl)).astype(logp.dtype)

    return logp.dtype.type((share * (each + sign * beta * penalty)).sum()), vjp


GRPO = variants(
    _grpo,
    lengths=("width", "longest"),
    kl=("k1", "k2"),
    kl_slope="none",
    turned=True,
    sign=-1,
    divides="own rows",
    masks="nothing",
)
