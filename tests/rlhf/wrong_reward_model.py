"""Reward models and their losses, wrong in the ways they have been wrong in published code."""

import math

import numpy as np

from minift.models import llama
from minift.models.classifier import SCORE
from minift.nn.linear import linear
from minift.nn.weight import gradients
from minift.rlhf.reward_model import preferred
from nn.wrong_nn import variants


def _pairwise(
    chosen,
    rejected,
    margin=None,
    normalizer=None,
    *,
    stable=True,
    swapped=False,
    margin_is="subtracted",
    over="pairs",
    slope="-sigma(-d)",
    rejected_slope="opposite",
    margin_slope="with",
):
    d = rejected - chosen if swapped else chosen - rejected
    bare = d
    if margin is not None and margin_is != "ignored":
        d = d - margin if margin_is == "subtracted" else d + margin
    n = float(max(len(d), 1)) if normalizer is None or over == "own pairs" else normalizer
    n = 1.0 if over == "nothing" else n
    each = np.logaddexp(0, -d) if stable else -np.log(1 / (1 + np.exp(-d)))
    at = d if margin_slope == "with" else bare

    def vjp(dloss):
        dd = {"-sigma(-d)": -preferred(-at), "-sigma(d)": -preferred(at), "+": preferred(-at)}[slope] * dloss / n
        dd = (-dd if swapped else dd).astype(chosen.dtype)
        return dd, {"opposite": -dd, "same": dd, "none": 0 * dd}[rejected_slope], None

    return chosen.dtype.type(each.sum() / n), vjp


PAIRWISE = variants(
    _pairwise,
    stable=False,
    swapped=True,
    margin_is=("ignored", "added"),
    over=("own pairs", "nothing"),
    slope=("-sigma(d)", "+"),
    rejected_slope=("same", "none"),
    margin_slope="without",
)


def _ranking(rewards, ranks, normalizer=None, *, over="pairs", pairs="all", ties="dropped", prompts="equal", slope=1):
    n = float(max(len(rewards), 1)) if normalizer is None else normalizer
    if pairs == "in the order given":
        ranks = np.broadcast_to(np.arange(ranks.shape[1]), ranks.shape)
    if pairs == "larger is better":
        ranks = -ranks
    better = ranks[:, :, None] < ranks[:, None, :]
    if pairs == "neighbors":
        better = ranks[:, :, None] + 1 == ranks[:, None, :]
    if ties == "kept":
        better = (ranks[:, :, None] <= ranks[:, None, :]) & ~np.eye(ranks.shape[1], dtype=bool)
    k = ranks.shape[1]
    share = {"pairs": np.maximum(better.sum((1, 2), keepdims=True), 1), "K": k, "K(K-1)": max(k * (k - 1), 1)}
    share["C(K,2) with ties"] = max(math.comb(k, 2), 1)
    weight = better / (share[over] if prompts == "equal" else max(better.sum() / max(len(rewards), 1), 1)) / n
    d = rewards[:, :, None] - rewards[:, None, :]

    def vjp(dloss):
        dd = -weight * preferred(-d) * dloss
        return (dd.sum(2) - slope * dd.sum(1)).astype(rewards.dtype)

    return rewards.dtype.type((weight * np.logaddexp(0, -d)).sum()), vjp


RANKING = variants(
    _ranking,
    over=("K", "K(K-1)", "C(K,2) with ties"),
    pairs=("in the order given", "larger is better", "neighbors"),
    ties="kept",
    prompts="by pairs",
    slope=(0, -1),
)


def _score(params, batch, config, *, at="lengths", head="once", down="to the trunk", **options):
    hidden, backbone_vjp = llama.backbone(params, batch.tokens, config, **options)
    rows, width = batch.tokens.shape
    places = {
        "lengths": batch.lengths - 1,
        "last column": np.full(rows, width - 1),
        "one late": np.minimum(batch.lengths, width - 1),
        "one early": np.maximum(batch.lengths - 2, 0),
        "not the padding token": width - 1 - np.argmax((batch.tokens != batch.tokens[:, -1:])[:, ::-1], axis=1),
        "first": np.zeros(rows, int),
    }
    index = np.arange(rows), places[at if at in places else "lengths"]
    rewards, head_vjp = linear(hidden[index], params[SCORE])
    shown = hidden.mean(1) @ params[SCORE][0] if at == "mean" else rewards[:, 0]

    def vjp(drewards):
        drows, dhead, _ = head_vjp(drewards[:, None])
        dhidden = np.zeros_like(hidden)
        if down == "to every token":
            dhidden += drows[:, None]
        else:
            dhidden[index] = drows
        if down == "nowhere":
            dhidden[:] = 0
        _, _, below = backbone_vjp(dhidden)
        return gradients([*below.items(), (SCORE, dhead if head == "once" else 2 * dhead)])

    return shown, vjp


SCORES = variants(
    _score,
    at=("last column", "one late", "one early", "not the padding token", "first", "mean"),
    head="twice",
    down=("to every token", "nowhere"),
)
