"""DPO, wrong in the ways it has been wrong in published code."""

import numpy as np

from minift.rlhf.reward_model import preferred
from nn.wrong_nn import variants


def _dpo(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    beta=0.1,
    label_smoothing=0.0,
    loss_type="sigmoid",
    normalizer=None,
    *,
    margin="both ratios",
    scales="inside",
    smooths="the loss",
    stable=True,
    target="1/2beta",
    slope="right",
    over="pairs",
    refuses=True,
):
    if refuses and not (beta > 0 and 0 <= label_smoothing < 0.5 and loss_type in ("sigmoid", "ipo")):
        raise ValueError
    h = {
        "both ratios": (chosen - ref_chosen) - (rejected - ref_rejected),
        "no reference": chosen - rejected,
        "reference added": (chosen + ref_chosen) - (rejected + ref_rejected),
        "swapped": (rejected - ref_rejected) - (chosen - ref_chosen),
        "chosen only": chosen - ref_chosen,
    }[margin]
    n = float(max(len(h), 1)) if normalizer is None or over == "own pairs" else normalizer
    eps = {"the loss": label_smoothing, "nothing": 0.0, "the other label": 1 - label_smoothing}[smooths]
    if loss_type == "ipo":
        aim = {"1/2beta": 1 / (2 * beta), "1/beta": 1 / beta, "beta": beta}[target]
        each, by = (h - aim) ** 2, 2 * (h - aim)
    else:
        z = beta * h if scales == "inside" else h
        each = (1 - eps) * np.logaddexp(0, -z) + eps * np.logaddexp(0, z)
        if not stable:
            each = -(1 - eps) * np.log(1 / (1 + np.exp(-z))) - eps * np.log(1 / (1 + np.exp(z)))
        by = beta * (eps * preferred(z) - (1 - eps) * preferred(-z))
        each = beta * each if scales == "outside" else each
    by = {"right": by, "without beta": by / beta, "negative": -by}[slope] * (-1 if margin == "swapped" else 1)

    def vjp(dloss):
        dh = (by * dloss / n).astype(h.dtype)
        return dh, 0 * dh if margin == "chosen only" else -dh, None, None

    return h.dtype.type(each.sum() / n), vjp


DPO = variants(
    _dpo,
    margin=("no reference", "reference added", "swapped", "chosen only"),
    scales=("outside", "nowhere"),
    smooths=("nothing", "the other label"),
    stable=False,
    target=("1/beta", "beta"),
    slope=("without beta", "negative"),
    over="own pairs",
    refuses=False,
)
