"""The loss of language-model training: supervised fine-tuning and pre-training differ only in which labels count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minift.data.batches import Batch
from minift.models import Config, module_of
from minift.nn.losses import IGNORE_INDEX, linear_cross_entropy
from minift.nn.weight import Params, gradients


def loss(
    params: Params,
    batch: Batch,
    config: Config,
    normalizer: float | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[np.floating, Callable]:
    """Mean cross-entropy of the next token, in nats, over the labels that count.

        loss = −(1/N) Σ_{t : label_{t+1} counts} log p(label_{t+1} | tokens_{≤ t})                      (1)

    `vjp(dloss) -> {name: gradient}`. N is the number of labels in this batch, or `normalizer` (see `cross_entropy`).
    Only positions whose next label counts are multiplied by the head: with loss on the answers alone, a fraction
    of the logits is formed. `recompute` is that of `llama.backbone` and `linear_cross_entropy`.
    """
    model = module_of(config)
    hidden, backbone_vjp = model.backbone(
        params,
        batch.tokens,
        config,
        lengths=batch.lengths,
        segments=batch.segments,
        dropout_key=dropout_key,
        recompute=recompute,
    )
    next_labels = batch.labels[:, 1:]  # position t predicts token t + 1
    counting = np.nonzero(next_labels != IGNORE_INDEX)  # (rows, positions)
    name = model.head_name(config)
    value, loss_vjp = linear_cross_entropy(
        hidden[counting], params[name], next_labels[counting], normalizer, recompute=recompute
    )

    def vjp(dloss):
        drows, dhead = loss_vjp(dloss)
        dhidden = np.zeros_like(hidden)
        dhidden[counting] = drows
        _, _, below = backbone_vjp(dhidden)
        return gradients([*below.items(), (name, dhead)])

    return value, vjp
