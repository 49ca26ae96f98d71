"""The log-probability of each given token, and its entropy, on torch tensors: the twin of `minift.rlhf.logprobs`.

    log p[token] = z[token] − log Σ_v exp z_v        H = − Σ_v p_v log p_v        z = logits / τ             (1)

Both come out of the kernel of cross-entropy (`nn.losses`), whose loss is −log p: one pass over the vocabulary, three
numbers a row kept, no softmax. They are float32 (float64 for float64 logits) whatever the type of the logits, for a
policy's ratio is a difference of two of them.

Texts are the reference's batches, in NumPy: which tokens count is known on the host, before anything is multiplied.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minift.data.batches import Batch
from minift.nn.losses import IGNORE_INDEX
from minift.rlhf.logprobs import answer_mask, answers, counts
from minift_kernels import backend as backends
from minift_kernels.models import llama
from minift_kernels.nn.linear import linear
from minift_kernels.nn.losses import losses_and_entropies, row_parts
from minift_kernels.nn.weight import Params, Weight, dense

__all__ = ["answer_mask", "answers", "at_answers", "counts", "linear_token_log_probs", "on_device"]
__all__ += ["sequence_log_probs", "token_log_probs"]


def token_log_probs(
    logits: Float[Tensor, "*rows vocab"],
    tokens: Integer[Tensor, "*rows"],
    temperature: float = 1.0,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Equation (1) from logits: (log-probabilities, entropies), in nats.

    ValueError for a temperature that is not positive, and on a CPU for a token outside the vocabulary; on a GPU, where
    nobody waits to look, its row is NaN."""
    how = backends.choose(backend, logits.device, logits.dtype)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, needed a positive number")
    vocab = logits.shape[-1]
    if tokens.device.type == "cpu" and tokens.numel() and not (tokens.min() >= 0 and tokens.max() < vocab):
        raise ValueError(f"tokens span {tokens.min()}..{tokens.max()}, needed 0..{vocab - 1}")
    tokens = torch.where(tokens == IGNORE_INDEX, -1, tokens)  # every row counts here
    nll, entropy = losses_and_entropies(logits.reshape(-1, vocab), tokens.reshape(-1), temperature, how)
    return -nll.view(tokens.shape), entropy.view(tokens.shape)


def linear_token_log_probs(
    x: Float[Tensor, "rows d"],
    weight: Float[Tensor, "vocab d"] | Weight,
    tokens: Integer[Tensor, " rows"],
    temperature: float = 1.0,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The same through the output matrix U, a few rows at a time: the logits never exist all at once.

    The cotangents come row by row and are not known in the forward pass, so the backward pass forms each few rows'
    logits again. The parts of dU are added up in the type of U: one that learns should be float32."""
    how = backends.choose(backend, x.device, x.dtype)

    def of_rows(x, tokens):
        return token_log_probs(linear(x, weight, backend=backend), tokens, temperature, backend=how)

    parts = row_parts(x, how)
    pairs = [checkpoint(of_rows, x[p], tokens[p], use_reentrant=False, preserve_rng_state=False) for p in parts]
    logp, entropy = (torch.cat(both) for both in zip(*pairs, strict=True))
    return logp, entropy


# --- text -------------------------------------------------------------------------------------------------------------


def on_device(array: np.ndarray, like: Tensor) -> Tensor:
    """A batch's integers or its mask where that tensor is."""
    return torch.from_numpy(np.array(array, bool if array.dtype == bool else np.int64)).to(like.device)


def at_answers(
    hidden: Float[Tensor, "batch width d"],
    weight: Float[Tensor, "vocab d"] | Weight,
    batch: Batch,
    temperature: float = 1.0,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width"]]:
    """Log-probabilities and entropies at the tokens that count, 0 at the others.

    Only the hidden states in front of a token that counts are multiplied by the output matrix."""
    rows, columns = np.nonzero(counts(batch))
    before = hidden[on_device(rows, hidden), on_device(columns - 1, hidden)]
    labels = on_device(batch.labels[rows, columns], hidden)
    logp, entropy = linear_token_log_probs(before, weight, labels, temperature, backend=backend)
    at = on_device(rows, hidden), on_device(columns, hidden)

    def spread(values):
        return values.new_zeros(hidden.shape[:2]).index_put(at, values)

    return spread(logp), spread(entropy)


def sequence_log_probs(
    params: Params,
    batch: Batch,
    config: llama.Config,
    *,
    temperature: float = 1.0,
    dropout_key: int | None = None,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width"]]:
    """`at_answers` of a whole model. The log-probability of an answer is the sum of its row.

    `recompute` and `dtype` are those of `llama.backbone`; where nothing is to be learned, call it under
    `torch.no_grad()`."""
    like = dense(params[llama.EMBEDDING])
    hidden = llama.backbone(
        params,
        on_device(batch.tokens, like),
        config,
        segments=None if batch.segments is None else on_device(batch.segments, like),
        dropout_key=dropout_key,
        recompute=recompute,
        dtype=dtype,
        backend=backend,
    )
    return at_answers(hidden, params[llama.head_name(config)], batch, temperature, backend=backend)
