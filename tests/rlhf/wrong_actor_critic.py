"""Actor and critic, wrong in the ways they have been wrong in published code."""

import numpy as np

from minift.models import llama
from minift.nn.linear import linear
from minift.nn.weight import freeze, gradients
from minift.peft import lora
from minift.rlhf.actor_critic import VALUE, Rollouts
from minift.rlhf.advantages import gae_1, kl_penalty, last, token_rewards, whiten
from minift.rlhf.logprobs import at_answers, counts, sequence_log_probs
from nn.wrong_nn import variants


def _forward(
    params,
    batch,
    config,
    *,
    temperature=1.0,
    dropout_key=None,
    recompute=False,
    before=1,
    outside="zero",
    cool=False,
    value_slope="into the trunk",
    policy_slope="into the trunk",
    entropy="its own",
):
    hidden, backbone_vjp = llama.backbone(params, batch.tokens, config, dropout_key=dropout_key, recompute=recompute)
    name, mask = llama.head_name(config), counts(batch)
    (logp, h), answers_vjp = at_answers(hidden, params[name], batch, 1.0 if cool else temperature)
    ahead, value_vjp = linear(hidden, params[VALUE])
    values = np.zeros_like(logp)
    values[:, before:] = ahead[:, : ahead.shape[1] - before, 0]
    if outside == "zero":
        values = np.where(mask, values, 0)

    def vjp(dlogp, dentropy, dvalues):
        dhidden, dhead = answers_vjp(dlogp, dentropy if entropy == "its own" else None)
        if policy_slope == "head only":
            dhidden = np.zeros_like(dhidden)
        dahead = np.zeros_like(ahead)
        dahead[:, : ahead.shape[1] - before, 0] = np.where(mask, dvalues, 0)[:, before:]
        dbefore, dvalue, _ = value_vjp(dahead)
        if value_slope == "into the trunk":
            dhidden = dhidden + dbefore
        _, _, below = backbone_vjp(dhidden)
        return gradients([*below.items(), (name, dhead), (VALUE, dvalue)])

    return (logp, h, values), vjp


FORWARD = variants(
    _forward,
    before=0,
    outside="left",
    cool=True,
    value_slope="head only",
    policy_slope="head only",
    entropy="forgotten",
)


def _assess(
    params,
    batch,
    scores,
    config,
    settings,
    *,
    kl_coef=None,
    ended=None,
    reference="bare",
    reads="in front of the token",
    counted="answers",
    place="last token",
    leash="costs",
    strength="given",
    estimator="its own",
    cool="both",
    end="counts",
    whitens="as set",
    targets="of plain advantages",
    decay="in order",
    reports="nats",
):
    mask = counts(batch)
    if counted == "one early":
        mask = np.roll(mask, -1, axis=1)
    if counted == "padding too":
        mask = mask | (np.arange(mask.shape[1]) >= batch.lengths[:, None])
    before = 1 if reads == "in front of the token" else 0
    (logp, _, values), _ = _forward(params, batch, config, temperature=settings.temperature, before=before)
    policy = {name: weight for name, weight in params.items() if name != VALUE}
    other = policy if reference == "adapter on" else freeze(lora.bare(policy))
    tau = settings.temperature if cool == "both" else 1.0
    (ref_logp, _), _ = sequence_log_probs(other, batch, config, temperature=tau)
    kl, _ = kl_penalty(logp, ref_logp, "k1" if estimator == "k1" else settings.kl_estimator)
    beta = settings.kl_coef if kl_coef is None or strength == "of the settings" else kl_coef
    penalty = settings.missing_eos_penalty if end == "counts" else 0.0
    gone = ~ended if end == "inverted" and ended is not None else ended
    beta = -beta if leash == "pays" else beta
    rewards = token_rewards(scores, kl, mask, beta, ended=gone, missing_eos_penalty=penalty)
    if place != "last token":
        at = np.arange(len(mask))
        rewards[at, last(mask)] -= scores
        rewards[at, 0 * at - 1 if place == "last column" else np.argmax(mask, axis=1)] += scores
    if settings.whiten_rewards or whitens == "rewards anyway":
        rewards = whiten(rewards, mask, shift_mean=whitens == "rewards to mean 0")
    gamma, lam = (settings.gamma, settings.lam) if decay == "in order" else (settings.lam, settings.gamma)
    advantages = gae_1(rewards, values, mask, gamma, lam)
    kept = advantages
    if settings.whiten_advantages or whitens == "advantages anyway":
        advantages = whiten(advantages, np.ones_like(mask) if whitens == "over padding" else mask)
    found = (advantages if targets == "of whitened advantages" else kept) + values
    shown = kl if reports == "penalties" else logp - ref_logp
    if reports == "nats a token":
        shown = shown / mask.sum(axis=1, keepdims=True)
    old = ref_logp if reports == "the reference as old" else logp
    return Rollouts(batch, old, values, advantages, found), np.where(mask, shown, 0).sum(axis=1)


ASSESS = variants(
    _assess,
    reference="adapter on",
    reads="behind the token",
    counted=("one early", "padding too"),
    place=("last column", "first token"),
    leash="pays",
    strength="of the settings",
    estimator="k1",
    cool="the policy only",
    end=("inverted", "ignored"),
    whitens=("rewards anyway", "rewards to mean 0", "advantages anyway", "over padding"),
    targets="of whitened advantages",
    decay="swapped",
    reports=("penalties", "nats a token", "the reference as old"),
)
