"""Fine-tuning for classification, in four ways that differ in what learns.

features   a frozen model turns every text into a vector, once; a linear classifier learns on the vectors
head       the layers above the trunk: the classifier, and under it BERT's pooler
lora       adapters on every linear layer of the trunk, and the classifier in full
full       everything

    loss = −(1/N) Σ_n log softmax(logits_n)[label_n]                                                    (1)

The first two never move the trunk. `features` computes it once a text, `head` once a text and step; so the first takes
many more steps in less time, but only the last three are one model that other libraries load as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Integer

from minift.data.labeled import Labeled, pad_labeled
from minift.models import bert, classifier
from minift.models.classifier import TRUNK, Config
from minift.nn.linear import linear
from minift.nn.losses import cross_entropy
from minift.nn.weight import Params, freeze
from minift.peft import lora

Method = Literal["features", "head", "lora", "full"]


def prepare(
    method: Method,
    params: Params,
    config: Config,
    classes: int,
    *,
    rng: np.random.Generator,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
) -> dict[str, Any]:
    """The trunk with a fresh head, of which the method's part learns. ValueError for an unknown method, and for
    `features`, which need no head: fit a `FeatureSet` instead."""
    headed = classifier.with_head(params, config, classes, rng)
    head = classifier.head_module(config)
    if method == "full":
        return headed
    if method == "head":
        above = (f"{head}.", f"{TRUNK}{bert.POOLER}.")
        return freeze(headed) | {name: w for name, w in headed.items() if name.startswith(above)}
    if method == "lora":
        return lora.attach(
            headed, "all-linear", r, lora_alpha, lora_dropout=lora_dropout, rng=rng, modules_to_save=[head]
        )
    raise ValueError(f"method is {method!r}, needed one of {get_args(Method)[1:]}")


def loss(
    params: Params,
    texts: Labeled,
    config: Config,
    normalizer: float | None = None,
    dropout_key: int | None = None,
    recompute: bool = False,
) -> tuple[np.floating, Callable]:
    """Equation (1), or the sum divided by `normalizer`;  `vjp(dloss) -> {name: gradient}`."""
    logits, logits_vjp = classifier.logits(
        params, texts.batch.tokens, texts.lengths, config, dropout_key=dropout_key, recompute=recompute
    )
    value, loss_vjp = cross_entropy(logits, texts.labels, normalizer)
    return value, lambda dloss: logits_vjp(loss_vjp(dloss))


def over_texts(
    function: Callable[[Labeled], np.ndarray], texts: Sequence[np.ndarray], batch_size: int = 32
) -> Float[np.ndarray, "texts n"]:
    """`function` of every text, a row each in the order given. Neighbors in length share a batch, so that little is
    padding. ValueError for no texts."""
    if not texts:
        raise ValueError("no texts: needed at least one")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[Any] = [None] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = function(pad_labeled([texts[i] for i in chosen], np.zeros(len(chosen), np.int64)))
        for i, row in zip(chosen, found, strict=True):
            rows[i] = row
    return np.stack(rows)


# --- frozen features --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureSet:
    """Vectors of texts, each with the number of its label; a batch of them is a FeatureSet again."""

    vectors: Float[np.ndarray, "n d"]
    labels: Integer[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def lengths(self) -> np.ndarray:
        """A vector takes the place of a text: it counts as one token."""
        return np.ones(len(self), np.int64)

    @property
    def count(self) -> int:
        return len(self)

    def take(self, rows: Integer[np.ndarray, " b"]) -> FeatureSet:
        """These vectors, in this order."""
        return FeatureSet(self.vectors[rows], self.labels[rows])


def on_features(d: int, classes: int) -> dict[str, np.ndarray]:
    """A linear classifier that knows nothing yet: every class is as likely as every other."""
    return {classifier.WEIGHT: np.zeros((classes, d), np.float32), classifier.BIAS: np.zeros(classes, np.float32)}


def feature_logits(
    params: Params, vectors: Float[np.ndarray, "n d"]
) -> tuple[Float[np.ndarray, "n classes"], Callable]:
    """x Wᵀ + b;  `vjp(dlogits) -> {name: gradient}`."""
    logits, linear_vjp = linear(vectors, params[classifier.WEIGHT], params[classifier.BIAS])

    def vjp(dlogits):
        _, dweight, dbias = linear_vjp(dlogits)
        return {classifier.WEIGHT: dweight, classifier.BIAS: dbias}

    return logits, vjp


def feature_loss(params: Params, features: FeatureSet, normalizer: float | None = None) -> tuple[np.floating, Callable]:
    """Equation (1) of vectors."""
    logits, logits_vjp = feature_logits(params, features.vectors)
    value, loss_vjp = cross_entropy(logits, features.labels, normalizer)
    return value, lambda dloss: logits_vjp(loss_vjp(dloss))


def scale_of(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    """The root mean square of each feature, 1 where that is 0. Divided by it, features learn at one rate, however their
    sizes differ; W / scale is then the classifier of the features as they are."""
    rms = np.sqrt(np.mean(vectors * vectors, axis=0))
    return np.where(rms > 0, rms, 1).astype(vectors.dtype)


# --- what came of it --------------------------------------------------------------------------------------------------


def accuracy(logits: Float[np.ndarray, "n classes"], labels: Integer[np.ndarray, " n"]) -> float:
    """The share of texts whose label has the highest logit."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def confusion(
    predicted: Integer[np.ndarray, " n"], labels: Integer[np.ndarray, " n"], classes: int
) -> Integer[np.ndarray, "classes classes"]:
    """How many texts of each class (row) were taken for each class (column)."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
