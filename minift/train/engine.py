"""Where the numbers of a run live: in NumPy arrays, or in torch tensors on some device.

The loop, the data, the settings and the files are the same. What differs is in here, and nowhere else: how parameters
get there and back, the loss, and the optimizer. `minift_kernels.train.engine.on(device)` is the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minift.nn.weight import trainable
from minift.optim.adamw import AdamW, clip_by_global_norm
from minift.optim.adamw8bit import AdamW8bit
from minift.optim.paged import PagedAdamW
from minift.optim.pager import Pager
from minift.train import sft
from minift.train.parallel import side_by_side

Optimizer = Literal["adamw", "adamw8bit", "paged-adamw8bit"]


def _as_it_is(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Engine:
    """Functions that agree on what an array is. Parameters and files are NumPy's on the near side."""

    place: Callable[[Any], Any]  # NumPy parameters -> the engine's
    trainable: Callable[[Any], Any]  # the engine's parameters -> its arrays that learn, which the optimizer writes into
    send: Callable[[Any], Any]  # {name: NumPy array} -> the engine's, e.g. the moments of a checkpoint
    fetch: Callable[[Any], Any]  # and back
    optimizer: Callable[..., Any]  # (name, page_budget, folder, **state) -> AdamW, AdamW8bit or PagedAdamW
    clip_by_global_norm: Callable[[Any, float], tuple[Any, float]]
    loss: Callable[..., tuple[Any, Callable]]  # sft.loss, with the rows shared out as suits the engine
    value: Callable[..., float]  # (params, batch, config, normalizer) -> the loss alone: nothing is kept for a pullback


def _optimizer(name: Optimizer, page_budget: int, folder: Path | None, **state: Any) -> Any:
    """`state` is what `AdamW` is made from; the pages that exceed the budget lie in a file in `folder`."""
    if name == "adamw":
        return AdamW(**state)
    if name == "adamw8bit":
        return AdamW8bit(**state)
    return PagedAdamW(AdamW8bit(**state), Pager(page_budget, folder))


def _loss(params, batch, config, normalizer=None, dropout_key=None, recompute=False):
    shared = side_by_side(lambda p, part, whole, key: sft.loss(p, part, config, whole, key, recompute))
    return shared(params, batch, normalizer, dropout_key)


def _value(params, batch, config, normalizer):
    return float(_loss(params, batch, config, normalizer, recompute=True)[0])


NUMPY = Engine(_as_it_is, trainable, _as_it_is, _as_it_is, _optimizer, clip_by_global_norm, _loss, _value)
