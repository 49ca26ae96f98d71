"""The pairwise loss on a GPU, and its gradients in the same pass; DPO's, which is the same loss of other differences.

    softplus(x) = log(1 + e^x) = max(x, 0) + log1p(e^−|x|)                                                  (1)
    σ(x) = 1 / (1 + e^−|x|) for x ≥ 0, else e^−|x| / (1 + e^−|x|)                                            (2)
    log1p(e) = 2 artanh(s) = 2 (s + s³/3 + s⁵/5 + …)        s = e / (2 + e) ≤ 1/3                            (3)

    reward      d = r_w − r_l − m     loss = softplus(−d) + c (r_w + r_l)²
                                      dr_w = −σ(−d) + 2c (r_w + r_l)     dr_l = σ(−d) + 2c (r_w + r_l)       (4)
    DPO         z = β h               loss = (1 − ε) softplus(−z) + ε softplus(z)
                                      dh = β (ε σ(z) − (1 − ε) σ(−z))                                        (5)
    IPO         e = h − 1 / 2β        loss = e²        dh = 2e                                               (6)

One exponential serves value and gradients. Neither form overflows, and both are right to the last digits where a pair
is decided: log(1 + e^−20) would be the logarithm of a number that has lost e^−20. Eight terms of the series (3) leave
out less than 3 parts in 10⁹; Triton itself has no log1p.

There are as many pairs as a batch has, hundreds: what a kernel saves here are launches, about ten of them. Slopes are
those of the sum, in float32; the backward pass multiplies them by dloss / P. No atomics: a program writes the sum of
its own pairs.
"""

import triton
import triton.language as tl

TILE = (256, 4)  # BLOCK, num_warps


@triton.jit
def softplus_of_minus(x):
    """log(1 + e^−x), equations (1) and (3); σ(x) and σ(−x), equation (2)."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    t = s * s
    series = 1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))))))
    value = tl.maximum(-x, 0.0) + 2 * s * series
    large = 1 / (1 + e)
    small = e * large
    return value, tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def pairwise(
    sums, dchosen, drejected, chosen, rejected, margin, n, center,
    MARGIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equation (4) for BLOCK pairs; everything is contiguous."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    better = tl.load(chosen + i, mask=inside, other=0).to(tl.float32)
    worse = tl.load(rejected + i, mask=inside, other=0).to(tl.float32)
    d = better - worse
    if MARGIN:
        d -= tl.load(margin + i, mask=inside, other=0).to(tl.float32)
    value, _, doubt = softplus_of_minus(d)
    both = better + worse
    pull = 2 * center * both
    tl.store(dchosen + i, pull - doubt, mask=inside)
    tl.store(drejected + i, pull + doubt, mask=inside)
    tl.store(sums + program, tl.sum(tl.where(inside, value + center * both * both, 0.0), axis=0))


@triton.jit
def preference(
    sums, slope, chosen, rejected, ref_chosen, ref_rejected, n, beta, half_over_beta, kept, smoothing,
    IPO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equation (5) or (6) for BLOCK pairs, with the slope by h; everything is contiguous."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    better = tl.load(chosen + i, mask=inside, other=0).to(tl.float32)
    better -= tl.load(ref_chosen + i, mask=inside, other=0).to(tl.float32)
    worse = tl.load(rejected + i, mask=inside, other=0).to(tl.float32)
    worse -= tl.load(ref_rejected + i, mask=inside, other=0).to(tl.float32)
    h = better - worse
    if IPO:
        error = h - half_over_beta
        value, dh = error * error, 2 * error
    else:
        z = beta * h
        value, sure, doubt = softplus_of_minus(z)
        value = kept * value + smoothing * (value + z)  # softplus(z) = softplus(−z) + z
        dh = beta * (smoothing * sure - kept * doubt)
    tl.store(slope + i, dh, mask=inside)
    tl.store(sums + program, tl.sum(tl.where(inside, value, 0.0), axis=0))
