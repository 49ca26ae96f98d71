"""Classifiers, wrong where theirs are: the token that is read, the bias, a pooler that is left out, gradients lost."""

import numpy as np

from minift.models import bert, classifier, llama
from minift.nn.linear import linear
from minift.nn.pooling import mean_pool
from minift.nn.weight import gradients
from nn.wrong_nn import variants


def _logits(
    params,
    tokens,
    lengths,
    config,
    *,
    reads="last",
    bias=True,
    pooler="tanh",
    below=True,
    head=True,
    prefix=True,
    lengths_seen=True,
    dropout_key=None,
    recompute=False,
):
    seen = lengths if lengths_seen else np.full_like(lengths, tokens.shape[1])
    if isinstance(config, llama.Config):
        hidden, trunk_vjp = llama.backbone(params, tokens, config, lengths=seen)
        if reads == "mean":
            vector, vector_vjp = mean_pool(hidden, seen)
        else:
            at = np.arange(len(hidden)), {"last": seen - 1, "width": 0 * seen - 1, "first": 0 * seen}[reads]
            vector = hidden[at]

            def vector_vjp(dy):
                dx = np.zeros_like(hidden)
                dx[at] = dy
                return dx

        y, head_vjp = linear(vector, params[classifier.SCORE])

        def vjp(dy):
            dvector, dhead, _ = head_vjp(dy)
            found = trunk_vjp(vector_vjp(dvector))[2] if below else {}
            return gradients([*found.items(), (classifier.SCORE, dhead if head else 0 * dhead)])

        return y, vjp

    trunk = {n.removeprefix("bert."): w for n, w in params.items() if n.startswith("bert.")}
    hidden, trunk_vjp = bert.backbone(trunk, tokens, config, lengths=seen)
    if pooler == "tanh":
        vector, pool_vjp = bert.pool(trunk, hidden if reads == "last" else hidden[:, 1:] + 0 * hidden[:, :1])
    else:
        vector, above = hidden[:, 0], {n: 0 * trunk[n] for n in ("pooler.dense.weight", "pooler.dense.bias")}

        def pool_vjp(dy):
            dx = np.zeros_like(hidden)
            dx[:, 0] = dy
            return dx, above

    y, head_vjp = linear(vector, params[classifier.WEIGHT], params[classifier.BIAS] if bias else None)

    def vjp(dy):
        dvector, dweight, dbias = head_vjp(dy)
        dhidden, above = pool_vjp(dvector)
        if reads != "last":
            dhidden = np.pad(dhidden, ((0, 0), (1, 0), (0, 0)))
        found = (trunk_vjp(dhidden) if below else {}) | above
        name = "bert." if prefix else ""
        return gradients(
            [*((name + n, g) for n, g in found.items()), (classifier.WEIGHT, dweight if head else 0 * dweight),
             (classifier.BIAS, dbias if bias else dy.sum(0))]
        )  # fmt: skip

    return y, vjp


LLAMA = variants(_logits, reads=("width", "first", "mean"), below=False, head=False)
BERT = variants(
    _logits, reads="first", bias=False, pooler="none", below=False, head=False, prefix=False, lengths_seen=False
)
