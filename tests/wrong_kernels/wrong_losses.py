"""Kernels of cross-entropy, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

FORWARD = (
    "no maximum",  # e^x, which overflows
    "sum not scaled",  # when a larger maximum comes
    "scaled the wrong way",
    "last tile forgotten",
    "padding counts",  # places beyond the vocabulary are zeros
    "lanes not put together",  # sums of lanes with other maxima are added as they are
    "in one number",  # m + log S, rounded at the size of the logits
    "ignored contributes",
    "label of the row before",
    "labels from one",
    "row by width",
    "base two",
    "wraps labels",
    "neighbor's statistics",
)
BACKWARD = (
    "no onehot",
    "cotangent forgotten",
    "onehot not scaled",
    "ignored has a gradient",
    "ignored times zero",  # NaN · 0
    "p not divided",
    "label in its tile",  # compared with the place in the tile instead of the vocabulary
    "last tile forgotten",
    "row by width",
    "dlogits accumulates",
    "exp of rounded",  # p rounded to float16 before the subtraction
)

ENTROPY_FORWARD = (  # of the same kernels, with an entropy and a temperature
    "temperature forgotten",
    "multiplied by the temperature",
    "label not divided",  # log p with the label's logit as it is
    "weights not moved",  # W scaled as S is, though every distance grew
    "weights not scaled",
    "lanes not moved",  # put together by the new maximum, with distances from the old one
    "infinite distance",  # 0 · ∞ beyond the end of the vocabulary
    "entropy not divided",  # log S − W
    "entropy of the best",  # −log p of the likeliest token
)
ENTROPY_BACKWARD = (
    "entropy forgotten",
    "without H",
    "log p without log S",
    "entropy's sign",
    "not divided by the temperature",
    "p at temperature 1",
)

LOWEST = tl.constexpr(-3.0e38)
HIGHEST = tl.constexpr(3.0e38)
IGNORE_INDEX = tl.constexpr(-100)


@triton.jit
def scaled(d, factor):
    d = d * factor
    d = tl.where(d < LOWEST, LOWEST, d)
    return tl.where(d > HIGHEST, HIGHEST, d)


@triton.jit
def forward(
    losses, entropies, maxima, totals, logits, labels, stride, vocab, inverse_temperature,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label_row = row
    if WRONG == "label of the row before":
        label_row = tl.maximum(row - 1, 0)
    label = tl.load(labels + label_row).to(tl.int64)
    if WRONG == "temperature forgotten":
        inverse_temperature = 1.0
    if WRONG == "multiplied by the temperature":
        inverse_temperature = 1 / inverse_temperature
    weighted = tl.zeros((BLOCK,), tl.float32)
    if WRONG == "row by width":
        stride = vocab
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    if WRONG == "no maximum":
        m = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    ignored = label == IGNORE_INDEX
    if WRONG == "ignored contributes":
        ignored = label == -101
        label = tl.where(label == IGNORE_INDEX, 0, label)
    if WRONG == "wraps labels":
        label = tl.where(ignored, label, (label % vocab + vocab) % vocab)
    if WRONG == "labels from one":
        label = tl.where(ignored, label, tl.maximum(label - 1, 0))
    end = tl.where(ignored, 0, vocab)
    if WRONG == "last tile forgotten":
        end = tl.where(end > BLOCK, (end - 1) // BLOCK * BLOCK, end)
    for first in range(0, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        if WRONG == "padding counts":
            x = tl.where(column < vocab, x, 0.0)
        d = x - m
        if ENTROPY:
            d = d * inverse_temperature if WRONG == "infinite distance" else scaled(d, inverse_temperature)
        e = tl.exp(-tl.abs(d))
        if ENTROPY:
            if WRONG == "weights not moved":
                weighted = tl.where(d > 0, e * weighted, weighted + e * d)
            elif WRONG == "weights not scaled":
                weighted = tl.where(d > 0, weighted - d * total, weighted + e * d)
            else:
                weighted = tl.where(d > 0, e * (weighted - d * total), weighted + e * d)
        if WRONG == "no maximum":
            total = total + tl.exp(x)
        else:
            if WRONG == "sum not scaled":
                total = tl.where(d > 0, total + 1, total + e)
            elif WRONG == "scaled the wrong way":
                total = tl.where(d > 0, total + e, total * e + 1)
            else:
                total = tl.where(d > 0, total * e + 1, total + e)
            m = tl.where(d > 0, x, m)
    top = tl.max(m, axis=0)
    below = m - top
    if ENTROPY:
        below = scaled(below, inverse_temperature)
    share = tl.exp(below)
    if WRONG == "lanes not put together":
        share = tl.where(total > 0, 1.0, 0.0)
    sum_ = tl.sum(total * share, axis=0)
    known = (label >= 0) & (label < vocab)
    x_label = tl.load(logits + row * stride + label, mask=known, other=float("nan")).to(tl.float32)
    d_label = x_label - top
    if ENTROPY:
        if WRONG != "label not divided":
            d_label *= inverse_temperature
        if WRONG == "lanes not moved":
            mean = tl.sum(share * weighted, axis=0) / sum_
        else:
            mean = tl.sum(share * (weighted + below * total), axis=0) / sum_
        if WRONG == "entropy not divided":
            mean *= sum_
        if WRONG == "entropy of the best":
            mean *= 0
        tl.store(entropies + row, tl.where(known, tl.log(sum_) - mean, float("nan")))
    loss = tl.log(sum_) - d_label
    if WRONG == "in one number":
        loss = (top + tl.log(sum_)) - x_label
    if WRONG == "base two":
        loss = tl.log2(sum_) - (x_label - top)
    tl.store(losses + row, tl.where(ignored, 0.0, loss))
    if WRONG == "neighbor's statistics":
        tl.store(maxima + tl.maximum(row - 1, 0), top)
    else:
        tl.store(maxima + row, top)
    tl.store(totals + row, sum_)


@triton.jit
def backward(
    dlogits, dlosses, dentropies, logits, labels, maxima, totals, entropies, stride, vocab, inverse_temperature,
    TEMPERED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    if WRONG == "last tile forgotten":
        inside = inside & ((tl.program_id(1) == 0) | (column < vocab // BLOCK * BLOCK))
    if WRONG == "row by width":
        stride = vocab
    label = tl.load(labels + row).to(tl.int64)
    counts = label != IGNORE_INDEX
    read = inside & counts
    if (WRONG == "ignored has a gradient") | (WRONG == "ignored times zero"):
        read = inside
    x = tl.load(logits + row * stride + column, mask=read, other=0).to(tl.float32)
    dloss = tl.load(dlosses + row).to(tl.float32)
    if WRONG == "cotangent forgotten":
        dloss = dloss * 0 + 1
    d = x - tl.load(maxima + row)
    if TEMPERED and WRONG != "p at temperature 1":
        d *= inverse_temperature
    p = tl.exp(d)
    total = tl.load(totals + row)
    if WRONG != "p not divided":
        p = p / total
    if WRONG == "exp of rounded":
        p = p.to(tl.float16).to(tl.float32)
    place = column
    if WRONG == "label in its tile":
        place = tl.arange(0, BLOCK)
    onehot = tl.where(place == label, 1.0, 0.0)
    if WRONG == "no onehot":
        result = dloss * p
    elif WRONG == "onehot not scaled":
        result = dloss * p - onehot
    else:
        result = dloss * (p - onehot)
    if ENTROPY:
        log_p = scaled(d, 1.0)
        if WRONG != "log p without log S":
            log_p -= tl.log(total)
        if WRONG != "without H":
            log_p += tl.load(entropies + row)
        of_entropy = tl.load(dentropies + row).to(tl.float32) * p * log_p
        if WRONG == "entropy's sign":
            of_entropy = -of_entropy
        if WRONG != "entropy forgotten":
            result -= of_entropy
    if TEMPERED and WRONG != "not divided by the temperature":
        result *= inverse_temperature
    if WRONG == "ignored times zero":
        result = tl.where(counts, result, x * 0.0)
    elif WRONG != "ignored has a gradient":
        result = tl.where(counts, result, 0.0)
    else:
        result = tl.where(counts, result, x)
    if WRONG == "dlogits accumulates":
        before = tl.load(dlogits + row * vocab + column, mask=inside, other=0).to(tl.float32)
        result = tl.where(before == before, before + result, result)
    tl.store(dlogits + row * vocab + column, result.to(dlogits.dtype.element_ty), mask=inside)
