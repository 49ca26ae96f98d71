"""The loss of language-model training on torch tensors: the twin of `minift.train.sft`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minift.data.batches import Batch
from minift.nn.losses import IGNORE_INDEX
from minift_kernels.models import Config, module_of
from minift_kernels.nn.losses import linear_cross_entropy
from minift_kernels.nn.weight import Params, dense, trainable


def loss(
    params: Params,
    batch: Batch,
    config: Config,
    normalizer: float | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Callable]:
    """Mean cross-entropy of the next token, in nats, over the labels that count: equation (1) of the reference.

    `vjp(dloss) -> {name: gradient}`, as the training loop wants it, is autograd's. The batch is NumPy's and is moved to
    the parameters' device; `dtype` is that of the activations (`llama.backbone`). Only positions whose next label
    counts reach the head."""
    model = module_of(config)
    device = dense(params[model.EMBEDDING]).device

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(array, np.int64)).to(device)

    next_labels = batch.labels[:, 1:]  # position t predicts token t + 1
    rows, positions = np.nonzero(next_labels != IGNORE_INDEX)
    hidden = model.backbone(
        params,
        moved(batch.tokens),
        config,
        segments=None if batch.segments is None else moved(batch.segments),
        dropout_key=dropout_key,
        recompute=recompute,
        dtype=dtype,
        backend=backend,
    )
    counting = hidden[moved(rows), moved(positions)]
    labels = moved(next_labels[rows, positions])
    head = params[model.head_name(config)]
    value = linear_cross_entropy(counting, head, labels, normalizer, recompute=recompute, backend=backend)

    def vjp(dloss: float) -> dict[str, Tensor]:
        learned = trainable(params)
        found = torch.autograd.grad(value, list(learned.values()), torch.full_like(value, dloss))
        return dict(zip(learned, found, strict=True))

    return value.detach(), vjp
