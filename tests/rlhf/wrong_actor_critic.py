"""Actor and critic, wrong in the ways they have been wrong in published code."""

import numpy as np

from minift.models import llama
from minift.nn.linear import linear
from minift.nn.weight import gradients
from minift.rlhf.actor_critic import VALUE
from minift.rlhf.logprobs import at_answers, counts
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
