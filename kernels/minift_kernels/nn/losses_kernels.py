"""Softmax cross-entropy on a GPU: one pass over the vocabulary, and nothing of its size is kept.

    loss = log S − (x_label − m)        m = max_v x_v        S = Σ_v e^(x_v − m)                                (1)
    dx_v = dloss (p_v − [v = label])        p_v = e^(x_v − m) / S                                               (2)

**One pass.** The maximum and the sum are found together (Milakov & Gimelshein 2018, arXiv 1805.02867): when a larger
number comes, what was summed so far is scaled down. Each lane keeps an m and an S of its own, and the lanes are put
together once, at the end of the row:

    d = x − m        (m, S) ← (m, S + e^d) if d ≤ 0, else (x, S e^−d + 1)        both need e^−|d|, one exponential (3)

so no lane waits for another in the loop, and an element costs one exponential. Two a number would be as many as an H100
can do in the time in which it reads 16-bit logits; one leaves room.

**The entropy** of the same distribution is one more sum of the same pass, and a temperature τ one product:

    H = −Σ_v p_v log p_v = log S − W / S        W = Σ_v e^(x_v − m) (x_v − m)                                   (4)
    W ← W + e^d d if d ≤ 0, else (W − d S) e^−d                                                                 (5)
    dx_v = dloss (p_v − [v = label]) − dH p_v (log p_v + H)        log p_v = x_v − m − log S                     (6)

No term of W is positive, nor is −d S, so nothing cancels. With logits x and z = x / τ in place of x above, m is the
maximum of the logits and every distance is (x − m) / τ: a difference of neighbors is exact, a quotient is not. A token
that cannot be, whose logit is −∞, adds 0 to W, and not 0 · ∞: so distances are held in the range of finite numbers.
Cross-entropy asks for none of this, and is compiled without it.

**What is kept** is m and S, 8 bytes a row, 12 with H, and the logits themselves, for the backward pass to form p from
again. Not their one number m + log S: with logits near 1000 its rounding alone would move every p by 3 parts in 10⁵.
The forward pass reads each logit once; the backward pass reads it once and writes one number.

Rows whose label is `IGNORE_INDEX` are 0 in both passes, and their logits are not read. Any other label outside the
vocabulary makes its row NaN: to raise an error, the processor would have to wait for the GPU.

A row begins anywhere (`stride`), its elements are neighbors. Arithmetic is in float32; BLOCK logits at a time.
"""

import triton
import triton.language as tl

# Bytes of a logit: (BLOCK, num_warps). A lane has two words of 16 bytes at a time.
TILES = {2: (4096, 8), 4: (2048, 8), 8: (1024, 8)}
ROWS = 1024  # of logits at a time in `linear_cross_entropy`: for 128,256 tokens in 16 bits 263 MB

LOWEST = tl.constexpr(-3.0e38)  # finite, so that −∞ − LOWEST is −∞ and not NaN
HIGHEST = tl.constexpr(3.0e38)
IGNORE_INDEX = tl.constexpr(-100)


@triton.jit
def scaled(d, factor):
    """d · factor, as a finite number where d is one or infinite; NaN stays."""
    d = d * factor
    d = tl.where(d < LOWEST, LOWEST, d)
    return tl.where(d > HIGHEST, HIGHEST, d)


@triton.jit
def forward(
    losses, entropies, maxima, totals, logits, labels, stride, vocab, inverse_temperature,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equations (1) and (3) for one row. ENTROPY: (4) and (5) too, and the temperature; otherwise neither."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    end = tl.where(label == IGNORE_INDEX, 0, vocab)
    for first in range(0, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        d = x - m
        if ENTROPY:
            d = scaled(d, inverse_temperature)
        e = tl.exp(-tl.abs(d))
        if ENTROPY:
            weighted = tl.where(d > 0, e * (weighted - d * total), weighted + e * d)
        total = tl.where(d > 0, total * e + 1, total + e)
        m = tl.where(d > 0, x, m)
    top = tl.max(m, axis=0)
    below = m - top
    if ENTROPY:
        below = scaled(below, inverse_temperature)
    share = tl.exp(below)
    sum_ = tl.sum(total * share, axis=0)
    known = (label >= 0) & (label < vocab)
    x_label = tl.load(logits + row * stride + label, mask=known, other=float("nan")).to(tl.float32)
    d_label = x_label - top
    if ENTROPY:
        d_label *= inverse_temperature
        mean = tl.sum(share * (weighted + below * total), axis=0) / sum_
        tl.store(entropies + row, tl.where(known, tl.log(sum_) - mean, float("nan")))
    tl.store(losses + row, tl.where(label == IGNORE_INDEX, 0.0, tl.log(sum_) - d_label))
    tl.store(maxima + row, top)
    tl.store(totals + row, sum_)


@triton.jit
def backward(
    dlogits, dlosses, dentropies, logits, labels, maxima, totals, entropies, stride, vocab, inverse_temperature,
    TEMPERED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equation (2) for one tile of one row, or (6); dlogits is contiguous. It may be the logits' own memory.

    TEMPERED: there is a temperature. ENTROPY: there is a cotangent of the entropy as well."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    label = tl.load(labels + row).to(tl.int64)
    counts = label != IGNORE_INDEX
    x = tl.load(logits + row * stride + column, mask=inside & counts, other=0).to(tl.float32)
    dloss = tl.load(dlosses + row).to(tl.float32)
    dloss = tl.where((label >= 0) & (label < vocab), dloss, float("nan"))
    d = x - tl.load(maxima + row)
    if TEMPERED:
        d *= inverse_temperature
    total = tl.load(totals + row)
    p = tl.exp(d) / total
    result = dloss * (p - tl.where(column == label, 1.0, 0.0))
    if ENTROPY:
        log_p = scaled(d, 1.0) - tl.log(total)
        result -= tl.load(dentropies + row).to(tl.float32) * p * (log_p + tl.load(entropies + row))
    if TEMPERED:
        result *= inverse_temperature
    result = tl.where(counts, result, 0.0)
    tl.store(dlogits + row * vocab + column, result.to(dlogits.dtype.element_ty), mask=inside)
