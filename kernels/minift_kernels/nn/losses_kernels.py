"""Softmax cross-entropy on a GPU: one pass over the vocabulary, and nothing of its size is kept.

    loss = log S − (x_label − m)        m = max_v x_v        S = Σ_v e^(x_v − m)                                (1)
    dx_v = dloss (e^(x_v − m) / S − [v = label])                                                                (2)

**One pass.** The maximum and the sum are found together (Milakov & Gimelshein 2018, arXiv 1805.02867): when a larger
number comes, what was summed so far is scaled down. Each lane keeps an m and an S of its own, and the lanes are put
together once, at the end of the row:

    d = x − m        (m, S) ← (m, S + e^d) if d ≤ 0, else (x, S e^−d + 1)        both need e^−|d|, one exponential (3)

so no lane waits for another in the loop, and an element costs one exponential. Two a number would be as many as an H100
can do in the time in which it reads 16-bit logits; one leaves room.

**What is kept** is m and S, 8 bytes a row, and the logits themselves, for the backward pass to form p from again. Not
their one number m + log S: with logits near 1000 its rounding alone would move every p by 3 parts in 10⁵.
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
IGNORE_INDEX = tl.constexpr(-100)


@triton.jit
def forward(losses, maxima, totals, logits, labels, stride, vocab, BLOCK: tl.constexpr):
    """Equations (1) and (3) for one row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    end = tl.where(label == IGNORE_INDEX, 0, vocab)
    for first in range(0, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        d = x - m
        e = tl.exp(-tl.abs(d))
        total = tl.where(d > 0, total * e + 1, total + e)
        m = tl.where(d > 0, x, m)
    top = tl.max(m, axis=0)
    sum_ = tl.sum(total * tl.exp(m - top), axis=0)
    known = (label >= 0) & (label < vocab)
    x_label = tl.load(logits + row * stride + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(label == IGNORE_INDEX, 0.0, tl.log(sum_) - (x_label - top)))
    tl.store(maxima + row, top)
    tl.store(totals + row, sum_)


@triton.jit
def backward(dlogits, dlosses, logits, labels, maxima, totals, stride, vocab, BLOCK: tl.constexpr):
    """Equation (2) for one tile of one row; dlogits is contiguous. It may be the logits' own memory."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    label = tl.load(labels + row).to(tl.int64)
    counts = label != IGNORE_INDEX
    x = tl.load(logits + row * stride + column, mask=inside & counts, other=0).to(tl.float32)
    dloss = tl.load(dlosses + row).to(tl.float32)
    dloss = tl.where((label >= 0) & (label < vocab), dloss, float("nan"))
    p = tl.exp(x - tl.load(maxima + row)) / tl.load(totals + row)
    result = tl.where(counts, dloss * (p - tl.where(column == label, 1.0, 0.0)), 0.0)
    tl.store(dlogits + row * vocab + column, result.to(dlogits.dtype.element_ty), mask=inside)
