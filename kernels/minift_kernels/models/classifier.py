"""A linear head over classes on torch tensors: the twin of `minift.models.classifier`, where the equations are.

The same names and the same draws: from one generator a fresh head has the reference's numbers. It learns in float32 at
least, and what it reads is raised to that type: logits are not rounded to 16 bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from minift.models.classifier import BIAS, SCORE, TRUNK, WEIGHT, Config, head_module
from minift_kernels import backend as backends
from minift_kernels.models import bert, llama
from minift_kernels.nn.linear import linear
from minift_kernels.nn.pooling import last_token
from minift_kernels.nn.weight import Params, dense

__all__ = ["BIAS", "SCORE", "TRUNK", "WEIGHT", "Config", "features", "head_module", "logits", "with_head", "with_score"]


def with_head(params: Params, config: Config, classes: int, rng: np.random.Generator) -> dict[str, Any]:
    """The parameters of a trunk with a fresh head, which learns. ValueError below one class."""
    if classes < 1:
        raise ValueError(f"classes is {classes}, needed at least 1")
    if isinstance(config, llama.Config):
        return with_score(params, classes, rng)
    weight = _fresh(0.02 * rng.standard_normal((classes, config.hidden_size)), dense(params[bert.WORDS]))
    bias = torch.zeros_like(weight[:, 0]).requires_grad_()
    return {f"{TRUNK}{name}": w for name, w in params.items()} | {WEIGHT: weight, BIAS: bias}


def with_score(params: Params, classes: int, rng: np.random.Generator) -> dict[str, Any]:
    """The parameters of a Llama model with a fresh head in place of the output matrix, drawn from N(0, 1/(d + 1))."""
    norm = dense(params["model.norm.weight"])
    head = _fresh(rng.standard_normal((classes, len(norm))) / math.sqrt(len(norm) + 1), norm)
    return {name: w for name, w in params.items() if name != llama.HEAD} | {SCORE: head}


def logits(
    params: Params,
    tokens: Integer[Tensor, "batch tokens"],
    lengths: Integer[Tensor, " batch"],
    config: Config,
    *,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch classes"]:
    """One row of logits a text. ValueError for a row without a token, except by BERT, which reads the first."""
    options: dict[str, Any] = {"dropout_key": dropout_key, "recompute": recompute, "dtype": dtype, "backend": backend}
    if isinstance(config, llama.Config):
        hidden = llama.backbone(params, tokens, config, lengths=lengths, **options)
        head = params[SCORE]
        return linear(_raised(last_token(hidden, lengths), head), head, backend=backend)
    trunk = {name.removeprefix(TRUNK): w for name, w in params.items() if name.startswith(TRUNK)}
    hidden = bert.backbone(trunk, tokens, config, lengths=lengths, **options)
    head = params[WEIGHT]
    return linear(_raised(bert.pool(trunk, hidden, backend=backend), head), head, params[BIAS], backend=backend)


@torch.no_grad()
def features(
    params: Params,
    tokens: Integer[Tensor, "batch tokens"],
    lengths: Integer[Tensor, " batch"],
    config: Config,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch d"]:
    """What a trunk without a head says about a text: Llama's last token, BERT's sentence embedding. No gradient is
    kept. ValueError for a row without a token."""
    if isinstance(config, llama.Config):
        hidden = llama.backbone(params, tokens, config, lengths=lengths, dtype=dtype, backend=backend)
        return last_token(hidden, lengths)
    return bert.embed(params, tokens, config, lengths, dtype=dtype, backend=backend)


def _fresh(head: np.ndarray, like: Tensor) -> Tensor:
    """A head that learns, of these numbers, on this tensor's device."""
    return torch.tensor(head, dtype=backends.widened(like[:0]).dtype, device=like.device).requires_grad_()


def _raised(x: Tensor, head: Any) -> Tensor:
    return x.to(torch.promote_types(x.dtype, dense(head).dtype))
