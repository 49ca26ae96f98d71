"""Kernels of the pairwise and the preference loss, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

LOSS = (  # of both
    "infinite where hopeless",  # −log σ(x), as it is written
    "naive logarithm",  # log(1 + e^−|x|), which loses e^−|x|
    "naive sigmoid",  # e^x / (1 + e^x), ∞ / ∞ where a pair is decided
    "slope of the other side",  # σ(d) for σ(−d)
    "slope in float16",
    "last tile forgotten",
    "padding counts",  # places behind the last pair are ties, and cost ln 2
    "sum to the neighbor",
)
PAIRWISE = (
    *LOSS,
    "margin forgotten",
    "margin added",
    "margin on both sides",  # a slope that takes the margin off twice
    "difference the wrong way round",
)
PREFERENCE = (
    *LOSS,
    "reference forgotten",
    "reference of the other answer",
    "beta forgotten in the slope",
    "smoothing exchanged",  # ε for 1 − ε
    "smoothing forgotten in the slope",
    "smoothing to one half",  # (1 − ε/2), as with label smoothing over two classes
)


@triton.jit
def softplus_of_minus(x, WRONG: tl.constexpr):
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    t = s * s
    series = 1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))))))
    value = tl.maximum(-x, 0.0) + 2 * s * series
    large = 1 / (1 + e)
    small = e * large
    sure, doubt = tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)
    if WRONG == "infinite where hopeless":
        value = -tl.log(1 / (1 + tl.exp(-x)))
    if WRONG == "naive logarithm":
        value = tl.maximum(-x, 0.0) + tl.log(1 + e)
    if WRONG == "naive sigmoid":
        sure = tl.exp(x) / (1 + tl.exp(x))
        doubt = tl.exp(-x) / (1 + tl.exp(-x))
    if WRONG == "slope of the other side":
        sure, doubt = doubt, sure
    if WRONG == "slope in float16":
        doubt = doubt.to(tl.float16).to(tl.float32)
    return value, sure, doubt


@triton.jit
def pairwise(
    sums, dchosen, drejected, chosen, rejected, margin, n, center,
    MARGIN: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    better = tl.load(chosen + i, mask=inside, other=0).to(tl.float32)
    worse = tl.load(rejected + i, mask=inside, other=0).to(tl.float32)
    d = better - worse
    if WRONG == "difference the wrong way round":
        d = -d
    if MARGIN:
        m = tl.load(margin + i, mask=inside, other=0).to(tl.float32)
        if WRONG == "margin added":
            d += m
        elif WRONG != "margin forgotten":
            d -= m
    value, _, doubt = softplus_of_minus(d, WRONG)
    if MARGIN and WRONG == "margin on both sides":
        _, _, doubt = softplus_of_minus(d - tl.load(margin + i, mask=inside, other=0).to(tl.float32), WRONG)
    both = better + worse
    pull = 2 * center * both
    tl.store(dchosen + i, pull - doubt, mask=inside)
    tl.store(drejected + i, pull + doubt, mask=inside)
    counted = inside
    if WRONG == "padding counts":
        counted = i >= 0
    if WRONG == "last tile forgotten":
        counted = inside & (program * BLOCK + BLOCK <= n)
    place = program
    if WRONG == "sum to the neighbor":
        place = tl.maximum(program - 1, 0)
    tl.store(sums + place, tl.sum(tl.where(counted, value + center * both * both, 0.0), axis=0))


@triton.jit
def preference(
    sums, slope, chosen, rejected, ref_chosen, ref_rejected, n, beta, half_over_beta, kept, smoothing,
    IPO: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    better = tl.load(chosen + i, mask=inside, other=0).to(tl.float32)
    worse = tl.load(rejected + i, mask=inside, other=0).to(tl.float32)
    a = tl.load(ref_chosen + i, mask=inside, other=0).to(tl.float32)
    b = tl.load(ref_rejected + i, mask=inside, other=0).to(tl.float32)
    if WRONG == "reference of the other answer":
        better, worse = better - b, worse - a
    elif WRONG != "reference forgotten":
        better, worse = better - a, worse - b
    h = better - worse
    if WRONG == "smoothing exchanged":
        kept, smoothing = smoothing, kept
    if WRONG == "smoothing to one half":
        smoothing = smoothing / 2
        kept = 1 - smoothing
    if IPO:
        error = h - half_over_beta
        value, dh = error * error, 2 * error
    else:
        z = beta * h
        value, sure, doubt = softplus_of_minus(z, WRONG)
        value = kept * value + smoothing * (value + z)
        if WRONG == "smoothing forgotten in the slope":
            smoothing = 0.0
            kept = 1.0
        dh = smoothing * sure - kept * doubt
        if WRONG != "beta forgotten in the slope":
            dh = beta * dh
    tl.store(slope + i, dh, mask=inside)
    counted = inside
    if WRONG == "padding counts":
        counted = i >= 0
    if WRONG == "last tile forgotten":
        counted = inside & (program * BLOCK + BLOCK <= n)
    place = program
    if WRONG == "sum to the neighbor":
        place = tl.maximum(program - 1, 0)
    tl.store(sums + place, tl.sum(tl.where(counted, value, 0.0), axis=0))
