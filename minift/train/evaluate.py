"""Held-out loss: how surprised the model is by answers that it has never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minift.data.batches import Encoded, count_labels, pad
from minift.models import Config
from minift.nn.weight import Params
from minift.train.engine import NUMPY


def held_out_loss(
    params: Params,
    examples: Sequence[Encoded],
    config: Config,
    batch_size: int = 16,
    value: Callable[..., float] = NUMPY.value,
) -> float:
    """Mean cross-entropy in nats over every label of every example: each token weighs the same.

    Neighbors in length share a batch, so that little is padding; no activations are kept. `value` is an engine's.
    ValueError for no examples.
    """
    if not examples:
        raise ValueError("nothing to evaluate on: the held-out set is empty")
    ordered = sorted(examples, key=lambda example: len(example[0]))
    total, labels = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        batch = pad(ordered[start : start + batch_size])
        total += value(params, batch, config, 1.0)
        labels += count_labels(batch)
    return total / labels
