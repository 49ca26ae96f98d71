"""PPO's loss on a GPU: three losses and their gradients in one pass over the tokens.

    ρ = e^(log π − log π_old)        policy   max(−ρ Â, −clip(ρ, 1 ± ε) Â)        slope   −ρ Â if that is the max   (1)
    e = V − R    e′ = clip(V, V_old ± ε_v) − R    value    ½ max(e², e′²)         slope   e if that is the max      (2)
    loss = Σ_t (policy + c_v value − c_H H)                                                                       (3)

Six numbers and a mask are read for a token, with the entropy seven, and the slopes by log π and by V are written: 37
bytes in float32. Written as operations on whole rectangles, the same is some twenty launches that read and write as
much each. (Counted, not timed.) The slopes are those of the *sum*: the backward pass multiplies them by dloss / N, and
N is not needed here, so nothing has to be counted first. They are float32 whatever the types of what was given, so a
gradient of 16 bits is rounded once.

A program writes the sum of its own tokens, and the few sums are added up in order: no atomics, the same bits each time.
What does not count is loaded as 0 and its ρ is 1: equal bits of log π and log π_old make ρ exactly 1 for the others.
"""

import triton
import triton.language as tl

TILE = (1024, 4)  # BLOCK, num_warps: eight tokens a lane


@triton.jit
def minibatch(
    sums, dlogp, dvalues, logp, entropy, values, old_logp, old_values, advantages, returns, mask, n,
    cliprange, cliprange_value, vf_coef, entropy_coef,
    CLIP_VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equations (1) to (3) for BLOCK tokens; everything is contiguous, `mask` is bytes."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    counts = tl.load(mask + i, mask=inside, other=0) != 0
    new = tl.load(logp + i, mask=counts, other=0).to(tl.float32)
    rho = tl.exp(new - tl.load(old_logp + i, mask=counts, other=0).to(tl.float32))
    a = tl.load(advantages + i, mask=counts, other=0).to(tl.float32)
    free = -rho * a
    clipped = -tl.minimum(tl.maximum(rho, 1 - cliprange), 1 + cliprange) * a
    total = tl.maximum(free, clipped)
    tl.store(dlogp + i, tl.where(counts & (free >= clipped), free, 0.0), mask=inside)
    v = tl.load(values + i, mask=counts, other=0).to(tl.float32)
    r = tl.load(returns + i, mask=counts, other=0).to(tl.float32)
    error = v - r
    worst = error
    if CLIP_VALUE:
        old = tl.load(old_values + i, mask=counts, other=0).to(tl.float32)
        near = tl.minimum(tl.maximum(v, old - cliprange_value), old + cliprange_value) - r
        worst = tl.where(tl.abs(near) > tl.abs(error), near, error)
    total += vf_coef * (worst * worst * 0.5)
    tl.store(dvalues + i, tl.where(counts & (worst == error), vf_coef * error, 0.0), mask=inside)
    total -= entropy_coef * tl.load(entropy + i, mask=counts, other=0).to(tl.float32)
    tl.store(sums + program, tl.sum(tl.where(counts, total, 0.0), axis=0))
