"""Kernels of PPO's loss, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

MINIBATCH = (
    "minimum",  # the optimist's: of the losses the smaller one
    "clipped always",
    "slope of the clipped",  # the gradient does not stop at the clip
    "slope without ratio",  # −Â
    "stopped on both sides",  # no gradient wherever ρ is outside, also where it undoes a mistake
    "clip in logarithms",  # log ρ ± ε
    "values clipped the optimist's way",
    "value slope never stops",
    "values without their half",
    "clipped value by V",  # around V − R instead of V_old
    "coefficient forgotten in the slope",
    "entropy's sign",
    "padding counts",
    "masked by a product",
    "sum of all tiles in the first",  # each program stores its sum to the neighbor's place
    "ratio in float16",
)


@triton.jit
def minibatch(
    sums, dlogp, dvalues, logp, entropy, values, old_logp, old_values, advantages, returns, mask, n,
    cliprange, cliprange_value, vf_coef, entropy_coef,
    CLIP_VALUE: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    counts = tl.load(mask + i, mask=inside, other=0) != 0
    read = counts
    if WRONG == "padding counts":
        counts = inside
        read = inside
    if WRONG == "masked by a product":
        read = inside
    new = tl.load(logp + i, mask=read, other=0).to(tl.float32)
    rho = tl.exp(new - tl.load(old_logp + i, mask=read, other=0).to(tl.float32))
    if WRONG == "ratio in float16":
        rho = rho.to(tl.float16).to(tl.float32)
    a = tl.load(advantages + i, mask=read, other=0).to(tl.float32)
    free = -rho * a
    held = tl.minimum(tl.maximum(rho, 1 - cliprange), 1 + cliprange)
    if WRONG == "clip in logarithms":
        held = tl.minimum(tl.maximum(rho, tl.exp(-cliprange)), tl.exp(cliprange))
    clipped = -held * a
    total = tl.maximum(free, clipped)
    slope = tl.where(free >= clipped, free, 0.0)
    if WRONG == "minimum":
        total = tl.minimum(free, clipped)
        slope = tl.where(free <= clipped, free, 0.0)
    if WRONG == "clipped always":
        total = clipped
    if WRONG == "slope of the clipped":
        slope = total
    if WRONG == "slope without ratio":
        slope = tl.where(free >= clipped, -a, 0.0)
    if WRONG == "stopped on both sides":
        slope = tl.where(held == rho, free, 0.0)
    slope = free * counts.to(tl.float32) if WRONG == "masked by a product" else tl.where(counts, slope, 0.0)
    tl.store(dlogp + i, slope, mask=inside)
    v = tl.load(values + i, mask=counts, other=0).to(tl.float32)
    r = tl.load(returns + i, mask=counts, other=0).to(tl.float32)
    error = v - r
    worst = error
    if CLIP_VALUE:
        old = tl.load(old_values + i, mask=counts, other=0).to(tl.float32)
        if WRONG == "clipped value by V":
            near = tl.minimum(tl.maximum(v, r - cliprange_value), r + cliprange_value) - r
        else:
            near = tl.minimum(tl.maximum(v, old - cliprange_value), old + cliprange_value) - r
        if WRONG == "values clipped the optimist's way":
            worst = tl.where(tl.abs(near) < tl.abs(error), near, error)
        else:
            worst = tl.where(tl.abs(near) > tl.abs(error), near, error)
    half = 0.5
    if WRONG == "values without their half":
        half = 1.0
    total += vf_coef * (worst * worst * half)
    keeps = counts & (worst == error)
    if WRONG == "value slope never stops":
        keeps = counts
    factor = vf_coef
    if WRONG == "coefficient forgotten in the slope":
        factor = 1.0
    tl.store(dvalues + i, tl.where(keeps, factor * error, 0.0), mask=inside)
    bonus = entropy_coef * tl.load(entropy + i, mask=counts, other=0).to(tl.float32)
    if WRONG == "entropy's sign":
        bonus = -bonus
    total -= bonus
    place = program
    if WRONG == "sum of all tiles in the first":
        place = tl.maximum(program - 1, 0)
    tl.store(sums + place, tl.sum(tl.where(counts, total, 0.0), axis=0))
