"""A linear head over classes on a trunk that read a text: Llama's last token, or BERT's first.

    Llama    logits = hidden[last token] W_sᵀ                    W_s: score.weight                      (1)
    BERT     logits = pooled W_cᵀ + b_c                          W_c, b_c: classifier.weight, .bias     (2)

They are transformers' LlamaForSequenceClassification and BertForSequenceClassification, with their names, so that what
learns here is loaded there: BERT's trunk is called `bert.…`. One class is a score: the reward model of RLHF is (1).

    features(text)     what a frozen model already says about a text, for a classifier that is trained apart  (3)

Those of Llama are the vectors in (1), those of BERT are not the ones in (2) but its sentence embeddings: [CLS] means
little until it is trained for something.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from minift.models import bert, llama
from minift.nn.linear import linear
from minift.nn.pooling import last_token
from minift.nn.weight import Params, dense, gradients

Config = llama.Config | bert.Config

SCORE = "score.weight"  # (classes, d)
TRUNK = "bert."
WEIGHT, BIAS = "classifier.weight", "classifier.bias"  # (classes, d), (classes,)


def with_head(params: Params, config: Config, classes: int, rng: np.random.Generator) -> dict[str, Any]:
    """The parameters of a trunk with a fresh head, which learns; beside an adapter, attach that afterwards with
    modules_to_save=[`head_module(config)`], which keeps it learning. ValueError below one class."""
    if classes < 1:
        raise ValueError(f"classes is {classes}, needed at least 1")
    if isinstance(config, llama.Config):
        return with_score(params, classes, rng)
    weight = (0.02 * rng.standard_normal((classes, config.hidden_size))).astype(dense(params[bert.WORDS]).dtype)
    return {f"{TRUNK}{name}": w for name, w in params.items()} | {WEIGHT: weight, BIAS: np.zeros(classes, weight.dtype)}


def with_score(params: Params, classes: int, rng: np.random.Generator) -> dict[str, Any]:
    """The parameters of a Llama model with a fresh head in place of the output matrix.

    Drawn from N(0, 1/(d + 1)), so that scores begin with the size of one hidden number  (Ziegler et al. 2019, §2.1)."""
    norm = dense(params["model.norm.weight"])
    head = rng.standard_normal((classes, len(norm))) / math.sqrt(len(norm) + 1)
    return {name: w for name, w in params.items() if name != llama.HEAD} | {SCORE: head.astype(norm.dtype)}


def head_module(config: Config) -> str:
    """The path of the head, for `modules_to_save`."""
    return "score" if isinstance(config, llama.Config) else "classifier"


def logits(
    params: Params,
    tokens: Integer[np.ndarray, "batch tokens"],
    lengths: Integer[np.ndarray, " batch"],
    config: Config,
    *,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[Float[np.ndarray, "batch classes"], Callable]:
    """Equation (1) or (2): one row of logits a text;  `vjp(dlogits) -> {name: gradient}`.

    Which token is the last, `lengths` says, not a look for padding: an end-of-text token that also pads is real once.
    ValueError for a row without a token."""
    options: dict[str, Any] = {"lengths": lengths, "dropout_key": dropout_key, "recompute": recompute}
    if isinstance(config, llama.Config):
        hidden, backbone_vjp = llama.backbone(params, tokens, config, **options)
        last, last_vjp = last_token(hidden, lengths)
        y, head_vjp = linear(last, params[SCORE])

        def llama_vjp(dlogits):
            dlast, dhead, _ = head_vjp(dlogits)
            _, _, below = backbone_vjp(last_vjp(dlast))
            return gradients([*below.items(), (SCORE, dhead)])

        return y, llama_vjp

    trunk = {name.removeprefix(TRUNK): w for name, w in params.items() if name.startswith(TRUNK)}
    hidden, encoder_vjp = bert.backbone(trunk, tokens, config, **options)
    pooled, pool_vjp = bert.pool(trunk, hidden)
    y, head_vjp = linear(pooled, params[WEIGHT], params[BIAS])

    def bert_vjp(dlogits):
        dpooled, dweight, dbias = head_vjp(dlogits)
        dhidden, above = pool_vjp(dpooled)
        below = [(f"{TRUNK}{name}", gradient) for name, gradient in (encoder_vjp(dhidden) | above).items()]
        return gradients([*below, (WEIGHT, dweight), (BIAS, dbias)])

    return y, bert_vjp


def features(
    params: Params,
    tokens: Integer[np.ndarray, "batch tokens"],
    lengths: Integer[np.ndarray, " batch"],
    config: Config,
) -> Float[np.ndarray, "batch d"]:
    """Equation (3), of a trunk without a head. Nothing is kept for a pullback. ValueError as `logits`."""
    if isinstance(config, llama.Config):
        hidden, _ = llama.backbone(params, tokens, config, lengths=lengths, recompute=True)
        return last_token(hidden, lengths)[0]
    return bert.embed(params, tokens, config, lengths, recompute=True)[0]
