"""Softmax cross-entropy on torch tensors: the twin of `minift.nn.losses`, where the derivation is.

Losses are float32 (float64 for float64 logits) whatever the type of the logits. Both forms, plain PyTorch and Triton,
are operators with a gradient of their own, which keep two numbers a row instead of a softmax.

**Labels outside the vocabulary.** On the CPU they are refused, as by the reference. On a GPU nobody waits to look: the
kernel makes the loss NaN, and the row's gradient; plain PyTorch on CUDA stops with the assertion of its own gather.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minift.nn.losses import IGNORE_INDEX, ROWS
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.nn.linear import linear
from minift_kernels.nn.weight import Weight

KERNELS = "minift_kernels.nn.losses_kernels"


def log_softmax(x: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """log softmax(x) = x − max − log Σ exp(x − max). PyTorch's own, in float32 where x has 16 bits."""
    return torch.log_softmax(backends.widened(x), dim=-1).to(x.dtype)


def cross_entropy(
    logits: Float[Tensor, "*rows vocab"],
    labels: Integer[Tensor, "*rows"],
    normalizer: float | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """Mean negative log-probability of the labels, in nats: loss = −(1/N) Σ_{n counts} log p_n[label_n].

    Rows whose label is `IGNORE_INDEX` do not count. N is the number of rows that do, or `normalizer`: to accumulate
    micro-batches into the gradient of one large batch, pass the number in the *whole* batch to each."""
    how = backends.choose(backend, logits.device, logits.dtype)
    losses, _, _ = _cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), how)
    return losses.sum() / _count(labels, normalizer)


def linear_cross_entropy(
    x: Float[Tensor, "rows d"],
    weight: Float[Tensor, "vocab d"] | Weight,
    labels: Integer[Tensor, " rows"],
    normalizer: float | None = None,
    *,
    recompute: bool = False,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """The output matrix and the loss behind it, a few rows at a time: loss = cross_entropy(x Wᵀ, labels).

    The gradient is formed along with the value, for what requires one: of the *sum* over rows, in whose range 16 bits
    lose nothing, and the pullback multiplies it by dloss / N. dW is summed in float32. With `recompute` only x and W
    are kept, and the pullback forms the gradient; so it is for a weight that carries an adapter. A quantized W is
    decoded once, to the type of x."""
    how = backends.choose(backend, x.device, x.dtype)
    if isinstance(weight, Tensor) or not weight.arrays().keys() - {"weight"}:
        matrix = weight.to(x.dtype) if isinstance(weight, Tensor) else weight.dense(x.dtype)
        keep = torch.is_grad_enabled() and not recompute
        keeps = keep and x.requires_grad, keep and matrix.requires_grad
        total, _, _ = _linear_cross_entropy(x, matrix, labels, *keeps, how)
    else:
        total = _adapted(x, weight, labels, how)
    return total / _count(labels, normalizer)


def _count(labels: Tensor, normalizer: float | None) -> Tensor | float:
    return (labels.to(torch.int64) != IGNORE_INDEX).sum().clamp(min=1) if normalizer is None else normalizer


def _adapted(x: Tensor, weight: Weight, labels: Tensor, backend: str) -> Tensor:
    """The sum of the losses; each chunk's logits are computed again for the gradient of all that learns in `weight`."""

    def total(x, labels):
        return _cross_entropy(linear(x, weight, backend=backend), labels, backend)[0].sum()

    size = _rows_at_once(x, backend)
    parts = [slice(first, first + size) for first in range(0, max(len(x), 1), size)]  # one, if there are no rows
    totals = [checkpoint(total, x[part], labels[part], use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(totals).sum()


def _rows_at_once(x: Tensor, backend: str) -> int:
    return backends.load(KERNELS, backend).ROWS if x.device.type == "cuda" else ROWS


# A row's loss, and its gradient.


def _forward(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `minift::cross_entropy`: of every row the loss, the maximum m and the sum S."""
    labels = _checked(labels, logits.shape[-1])
    if backend == "torch":
        return _forward_torch(logits, labels)
    statistics = _like_forward(logits, labels, backend)
    forward_launch(statistics, backends.rows(logits), labels, backend).run(logits.device)
    return statistics


def _checked(labels: Tensor, vocab: int) -> Tensor:
    """Labels in 64 bits, and on the CPU all of them in the vocabulary or `IGNORE_INDEX`."""
    labels = labels.to(torch.int64).contiguous()
    if labels.device.type == "cpu":
        counting = labels[labels != IGNORE_INDEX]
        if counting.numel() and not (counting.min() >= 0 and counting.max() < vocab):
            found = f"{counting.min()}..{counting.max()}"
            raise ValueError(f"labels span {found}, needed 0..{vocab - 1} or {IGNORE_INDEX}")
    return labels


def _forward_torch(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = backends.widened(logits)
    maxima = wide.amax(dim=-1)
    shifted = wide - maxima[:, None]
    counts = labels != IGNORE_INDEX
    at_label = shifted.gather(-1, torch.where(counts, labels, 0)[:, None])[:, 0]
    totals = shifted.exp().sum(dim=-1)
    return torch.where(counts, totals.log() - at_label, 0), maxima, totals


def _backward_torch(dlosses: Tensor, logits: Tensor, labels: Tensor, maxima: Tensor, totals: Tensor) -> Tensor:
    counts = labels != IGNORE_INDEX
    p = (backends.widened(logits) - maxima[:, None]).exp() / totals[:, None]
    p.scatter_add_(-1, torch.where(counts, labels, 0)[:, None], -torch.ones_like(maxima)[:, None])
    return torch.where(counts[:, None], p * dlosses[:, None], 0).to(logits.dtype)


def _like_forward(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    losses, maxima, totals = (logits.new_empty(len(logits), dtype=_wide(logits)) for _ in range(3))
    return losses, maxima, totals


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward_launch(statistics: tuple[Tensor, Tensor, Tensor], logits: Tensor, labels: Tensor, backend: str) -> Launch:
    """Equation (1) of `losses_kernels`; `logits` is a matrix of rows whose elements are neighbors."""
    kernels = backends.load(KERNELS, backend)
    n_rows, vocab = logits.shape
    block, warps = kernels.TILES[logits.element_size()]
    arguments = (*statistics, logits, labels, logits.stride(0), vocab)
    return Launch(kernels.forward, (n_rows,), arguments, {"BLOCK": block, "num_warps": warps}, outputs=3)


def _backward(dlosses: Tensor, logits: Tensor, labels: Tensor, maxima: Tensor, totals: Tensor, backend: str) -> Tensor:
    """The operator `minift::cross_entropy_backward`: dlogits, from a cotangent for every row's loss."""
    labels = labels.to(torch.int64).contiguous()
    if backend == "torch":
        return _backward_torch(dlosses, logits, labels, maxima, totals)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    statistics = dlosses.contiguous(), labels, maxima, totals
    backward_launch(dlogits, backends.rows(logits), statistics, backend).run(logits.device)
    return dlogits


def backward_launch(
    dlogits: Tensor, logits: Tensor, statistics: tuple[Tensor, Tensor, Tensor, Tensor], backend: str
) -> Launch:
    """Equation (2), from dlosses, labels, maxima and totals; `dlogits` is contiguous."""
    kernels = backends.load(KERNELS, backend)
    n_rows, vocab = logits.shape
    block, warps = kernels.TILES[logits.element_size()]
    dlosses, *rest = statistics
    arguments = (dlogits, dlosses, logits, *rest, logits.stride(0), vocab)
    return Launch(kernels.backward, (n_rows, -(-vocab // block)), arguments, {"BLOCK": block, "num_warps": warps})


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dlosses, *_):
    return _cross_entropy_backward(dlosses, *ctx.saved_tensors, ctx.backend), None, None


_cross_entropy = backends.operator(
    "cross_entropy(Tensor logits, Tensor labels, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _like_forward,
    _differentiate,
    _save,
)
_cross_entropy_backward = backends.operator(
    "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, Tensor maxima, Tensor totals, str backend)"
    " -> Tensor",
    _backward,
    lambda dlosses, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


# With the output matrix, a chunk of rows at a time.


def _linear_forward(
    x: Tensor, weight: Tensor, labels: Tensor, keep_dx: bool, keep_dweight: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `minift::linear_cross_entropy`: the sum of the losses, and its gradients, empty if not asked for."""
    _, dx, dweight = _like_linear(x, weight, labels, keep_dx, keep_dweight, backend)
    dweight.zero_()
    labels = _checked(labels, len(weight))
    losses = x.new_empty(len(x), dtype=_wide(x))
    matrix = backends.widened(weight) if backend == "torch" else weight.to(x.dtype)
    ones = torch.ones_like(losses)
    size = _rows_at_once(x, backend)
    for first in range(0, len(x), size):
        part = slice(first, first + size)
        logits = x[part].to(matrix.dtype) @ matrix.T  # (rows, vocab)
        losses[part], maxima, totals = _cross_entropy(logits, labels[part], backend)
        if keep_dx or keep_dweight:
            dlogits = _in_place(ones[part], logits, labels[part], maxima, totals, backend)
            if keep_dx:
                dx[part] = dlogits @ matrix
            if keep_dweight:
                dweight += _wide_product(dlogits.T, x[part])
    return losses.sum(), dx, dweight


def _in_place(dlosses: Tensor, logits: Tensor, labels: Tensor, maxima: Tensor, totals: Tensor, backend: str) -> Tensor:
    """dlogits, by a kernel in the memory of the logits: each program reads its tile before it writes it."""
    if backend == "torch":
        return _backward_torch(dlosses, logits, labels, maxima, totals)
    backward_launch(logits, logits, (dlosses, labels, maxima, totals), backend).run(logits.device)
    return logits


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 at least: 16-bit numbers whose products are summed over rows, where float16 could overflow."""
    if a.device.type == "cuda" and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return backends.widened(a) @ backends.widened(b)


def _like_linear(x, weight, labels, keep_dx, keep_dweight, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if keep_dx else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if keep_dweight else 0, dtype=_wide(x))
    return x.new_empty((), dtype=_wide(x)), dx, dweight


def _save_linear(ctx, inputs, output):
    x, weight, labels, *keeps, ctx.backend = inputs
    ctx.dtypes, ctx.kept = (x.dtype, weight.dtype), any(keeps)
    ctx.save_for_backward(*(output[1:] if ctx.kept else (x, weight, labels)))
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_linear(ctx, dtotal, *_):
    needed = ctx.needs_input_grad[:2]
    if ctx.kept:
        gradients = ctx.saved_tensors
    else:
        _, *gradients = _linear_cross_entropy(*ctx.saved_tensors, *needed, ctx.backend)
    scaled = (
        (backends.widened(gradient) * dtotal).to(dtype) if need else None
        for gradient, dtype, need in zip(gradients, ctx.dtypes, needed, strict=True)
    )
    return *scaled, None, None, None, None


_linear_cross_entropy = backends.operator(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, bool keep_dx, bool keep_dweight, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _linear_forward,
    _like_linear,
    _differentiate_linear,
    _save_linear,
)
