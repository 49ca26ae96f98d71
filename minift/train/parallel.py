"""Data parallelism: sequences never look at each other, so each core takes some of them.

    L(rows) = L(rows₁) + L(rows₂) + …        ∂L = ∂L₁ + ∂L₂ + …                                         (1)

provided that every part is divided by the number of labels in the *whole* batch. On many machines each part would have
its own copy of the weights, and the sum would go over a network; here threads share the weights and only read them.

Why not leave it to the threads inside the matrix product? They help there and nowhere else: element-wise functions run
on one core while the others wait. Here each core does everything for its own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from minift.nn import threads as cores
from minift.nn.dropout import fold_in
from minift.nn.weight import Params, add, trainable

LARGE = 1 << 28  # bytes of gradients
Loss = Callable[[Params, Any, float | None, int | None], tuple[np.floating, Callable]]


def side_by_side(loss: Loss, threads: int | None = None) -> Loss:
    """The same loss, and up to the order of a sum the same gradient, with the rows shared out among `threads`.

    `threads` is by default what BLAS may use. Each part draws its own dropout. The parts depend on the batch and
    `threads` only, and are added up in order: two runs on one machine agree in every bit. Each thread has gradients of
    its own, so where these are large (LARGE) nothing is shared out: then adding them up costs what was gained, and
    memory besides. ValueError below one thread.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, needed at least 1")

    def shared(params, batch, normalizer, key):
        n = cores.count() if threads is None else threads
        learned = sum(array.nbytes for array in trainable(params).values())
        parts = share(batch, n) if learned < LARGE else [batch]
        if len(parts) == 1:
            return loss(params, batch, normalizer, key)
        whole = float(max(batch.count, 1)) if normalizer is None else normalizer
        keys = [None if key is None else fold_in(key, i) for i in range(len(parts))]
        with cores.one_core_each(n) as each:
            results = each(lambda part, key: loss(params, part, whole, key), parts, keys)
            values, pullbacks = zip(*results, strict=True)

        def vjp(dloss):
            with cores.one_core_each(n) as each:
                total, *others = each(lambda pullback: pullback(dloss), pullbacks)
                list(each(lambda name: reduce(add, (part[name] for part in others), total[name]), total))
                return total

        return sum(values), vjp

    return shared


def share(batch: Any, parts: int) -> list[Any]:
    """The rows dealt out like cards, so that long and short ones mix, each part cut to its own longest row."""
    rows = np.arange(len(batch))
    dealt = [batch.take(rows[first::parts]) for first in range(min(parts, len(rows)))]
    return [part.cut(int(part.lengths.max())) for part in dealt]
