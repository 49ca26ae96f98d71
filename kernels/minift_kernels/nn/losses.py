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
    losses, *_ = _cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), None, how)
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
        total, *_ = _linear_cross_entropy(x, matrix, labels, *keeps, how)
    else:
        total = _adapted(x, weight, labels, how)
    return total / _count(labels, normalizer)


def _count(labels: Tensor, normalizer: float | None) -> Tensor | float:
    return (labels.to(torch.int64) != IGNORE_INDEX).sum().clamp(min=1) if normalizer is None else normalizer


def _adapted(x: Tensor, weight: Weight, labels: Tensor, backend: str) -> Tensor:
    """The sum of the losses; each chunk's logits are computed again for the gradient of all that learns in `weight`."""

    def total(x, labels):
        return _cross_entropy(linear(x, weight, backend=backend), labels, None, backend)[0].sum()

    parts = row_parts(x, backend)
    totals = [checkpoint(total, x[part], labels[part], use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(totals).sum()


def row_parts(x: Tensor, backend: str) -> list[slice]:
    """The rows of x, as many at a time as have logits at the same time; one part, if there are no rows."""
    size = backends.load(KERNELS, backend).ROWS if x.device.type == "cuda" else ROWS
    return [slice(first, first + size) for first in range(0, max(len(x), 1), size)]


# A row's loss, and its gradient. With a temperature there is its distribution's entropy too (rlhf.logprobs).


def losses_and_entropies(logits: Tensor, labels: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor]:
    """−log p[label] and H of each row of softmax(logits / temperature); both have a gradient."""
    losses, entropies, *_ = _cross_entropy(logits, labels, temperature, backend)
    return losses, entropies


def _forward(
    logits: Tensor, labels: Tensor, temperature: float | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `minift::cross_entropy`: of every row the loss, the entropy if there is a temperature, the maximum m
    and the sum S."""
    labels = _checked(labels, logits.shape[-1])
    if backend == "torch":
        return _forward_torch(logits, labels, temperature)
    statistics = _like_forward(logits, labels, temperature, backend)
    forward_launch(statistics, backends.rows(logits), labels, temperature, backend).run(logits.device)
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


def _forward_torch(logits: Tensor, labels: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = backends.widened(logits)
    maxima = wide.amax(dim=-1)
    shifted = _shifted(wide, maxima, temperature)
    counts = labels != IGNORE_INDEX
    at_label = shifted.gather(-1, torch.where(counts, labels, 0)[:, None])[:, 0]
    e = shifted.exp()
    totals = e.sum(dim=-1)
    entropies = maxima.new_empty(0)
    if temperature is not None:
        entropies = totals.log() - (e * _finite(shifted)).sum(dim=-1) / totals
    return torch.where(counts, totals.log() - at_label, 0), entropies, maxima, totals


def _backward_torch(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    maxima: Tensor,
    totals: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None = None,
    temperature: float | None = None,
) -> Tensor:
    counts = labels != IGNORE_INDEX
    shifted = _shifted(backends.widened(logits), maxima, temperature)
    p = shifted.exp() / totals[:, None]
    from_entropy: Tensor | float = 0.0
    if of_entropy is not None:
        dentropies, entropies = of_entropy
        log_p = _finite(shifted) - totals.log()[:, None]
        from_entropy = dentropies[:, None] * p * (log_p + entropies[:, None])
    p.scatter_add_(-1, torch.where(counts, labels, 0)[:, None], -torch.ones_like(maxima)[:, None])
    dlogits = p * dlosses[:, None] - from_entropy
    if temperature is not None:
        dlogits *= 1 / temperature
    return torch.where(counts[:, None], dlogits, 0).to(logits.dtype)


def _shifted(wide: Tensor, maxima: Tensor, temperature: float | None) -> Tensor:
    shifted = wide - maxima[:, None]
    return shifted if temperature is None else shifted * (1 / temperature)


def _finite(shifted: Tensor) -> Tensor:
    """The distance of a token that cannot be is −∞, and 0 · ∞ would be NaN."""
    return shifted.clamp(min=torch.finfo(shifted.dtype).min)


def _like_forward(
    logits: Tensor, labels: Tensor, temperature: float | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = len(logits)
    losses, entropies, maxima, totals = (
        logits.new_empty(size, dtype=_wide(logits)) for size in (n, 0 if temperature is None else n, n, n)
    )
    return losses, entropies, maxima, totals


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward_launch(
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
    logits: Tensor,
    labels: Tensor,
    temperature: float | None,
    backend: str,
) -> Launch:
    """Equation (1) of `losses_kernels`, and (4); `logits` is a matrix of rows whose elements are neighbors."""
    kernels = backends.load(KERNELS, backend)
    n_rows, vocab = logits.shape
    block, warps = kernels.TILES[logits.element_size()]
    arguments = (*statistics, logits, labels, logits.stride(0), vocab, 1.0 if temperature is None else 1 / temperature)
    options = {"ENTROPY": temperature is not None, "BLOCK": block, "num_warps": warps}
    return Launch(kernels.forward, (n_rows,), arguments, options, outputs=4)


def _backward(
    dlosses: Tensor,
    dentropies: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    entropies: Tensor,
    maxima: Tensor,
    totals: Tensor,
    temperature: float | None,
    backend: str,
) -> Tensor:
    """The operator `minift::cross_entropy_backward`: dlogits, from a cotangent for every row's loss (and entropy)."""
    labels = labels.to(torch.int64).contiguous()
    of_entropy = None if dentropies is None else (dentropies.contiguous(), entropies)
    if backend == "torch":
        return _backward_torch(dlosses, logits, labels, maxima, totals, of_entropy, temperature)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    statistics = dlosses.contiguous(), labels, maxima, totals
    backward_launch(dlogits, backends.rows(logits), statistics, of_entropy, temperature, backend).run(logits.device)
    return dlogits


def backward_launch(
    dlogits: Tensor,
    logits: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
    of_entropy: tuple[Tensor, Tensor] | None,
    temperature: float | None,
    backend: str,
) -> Launch:
    """Equation (2), from dlosses, labels, maxima and totals, or (6), also from dentropies and entropies; `dlogits` is
    contiguous."""
    kernels = backends.load(KERNELS, backend)
    n_rows, vocab = logits.shape
    block, warps = kernels.TILES[logits.element_size()]
    dlosses, *rest = statistics
    dentropies, entropies = of_entropy or (dlosses, dlosses)  # not touched
    factor = 1.0 if temperature is None else 1 / temperature
    arguments = (dlogits, dlosses, dentropies, logits, *rest, entropies, logits.stride(0), vocab, factor)
    options = {"TEMPERED": factor != 1, "ENTROPY": of_entropy is not None, "BLOCK": block, "num_warps": warps}
    return Launch(kernels.backward, (n_rows, -(-vocab // block)), arguments, options)


def _save(ctx, inputs, output):
    logits, labels, ctx.temperature, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # where nothing depends on the entropy there is no work for it
    ctx.save_for_backward(logits, labels, *output[1:])
    ctx.mark_non_differentiable(*output[2 if ctx.temperature is not None else 1 :])


def _differentiate(ctx, dlosses, dentropies, *_):
    logits, labels, entropies, maxima, totals = ctx.saved_tensors
    if dlosses is None:
        dlosses = torch.zeros_like(maxima)
    found = _cross_entropy_backward(
        dlosses, dentropies, logits, labels, entropies, maxima, totals, ctx.temperature, ctx.backend
    )
    return found, None, None, None


_cross_entropy = backends.operator(
    "cross_entropy(Tensor logits, Tensor labels, float? temperature, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _like_forward,
    _differentiate,
    _save,
)
_cross_entropy_backward = backends.operator(
    "cross_entropy_backward(Tensor dlosses, Tensor? dentropies, Tensor logits, Tensor labels, Tensor entropies, "
    "Tensor maxima, Tensor totals, float? temperature, str backend) -> Tensor",
    _backward,
    lambda dlosses, dentropies, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
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
    for part in row_parts(x, backend):
        logits = x[part].to(matrix.dtype) @ matrix.T  # (rows, vocab)
        losses[part], _, maxima, totals = _cross_entropy(logits, labels[part], None, backend)
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
    backward_launch(logits, logits, (dlosses, labels, maxima, totals), None, None, backend).run(logits.device)
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
