"""Advantages on a GPU: a recursion along time, a row of tokens a program.

    Â_t = δ_t + a_t Â_{t+1}        a_t = γλ where t counts, else 0                                          (1)
    δ_t = r_t + γ V_{t+1} − V_t    where t counts, else 0        V_{t+1}: 0 where t + 1 does not count,
                                                                          `bootstrap` behind the row's last token (2)

**A recursion is a scan.** Each step is a map y ↦ b + a y with a pair (a, b), and maps one behind the other are a map:

    (a, b) after (a′, b′):   y ↦ b + a (b′ + a′ y)   is   (a a′, b + a b′)                                  (3)

That is associative, so BLOCK steps take log₂ BLOCK rounds in registers instead of BLOCK steps that wait for each other.
It costs twice the products, and the powers (γλ)^k are formed as products of products, each rounded: together no more
roundings than the recursion has, which the property's bound counts. Where t does not count, (0, 0) forgets what came
behind it; so episodes of one row do not mix, and nothing needs to know where they begin.

A row is walked from its end, BLOCK tokens at a time, and what is carried over is Â of the first token so far. The last
token that counts is met in the first tile that has one.

Rewards, values and mask are read once (a value's neighbor comes from the cache), and one number is written: 13 bytes a
token in float32. A batch has only some hundred rows, fewer programs than a GPU could hold, and a few megabytes: what
this saves is not bytes but launches, one in place of four for each column. (A prediction; it was not timed.)

What does not count is never multiplied: it is loaded as 0, whatever stands there. Arithmetic is in float32.
"""

import triton
import triton.language as tl

TILE = (1024, 4)  # BLOCK, num_warps: eight tokens a lane


@triton.jit
def after(a_behind, b_behind, a, b):
    """Equation (3); in a scan from the end the map that was met first is the inner one."""
    return a * a_behind, b + a * b_behind


@triton.jit
def gae(
    advantages, rewards, values, mask, bootstrap, width, gamma, decay,
    BOOTSTRAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equations (1) and (2) for one row; all are contiguous, `mask` is bytes. `decay` is γλ."""
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    end = tl.full((), 0.0, tl.float32)
    if BOOTSTRAP:
        end = tl.load(bootstrap + row).to(tl.float32)
    carried = tl.full((), 0.0, tl.float32)
    met = tl.full((), 0, tl.int32)  # whether a token that counts stands behind this tile
    tiles = tl.cdiv(width, BLOCK)
    for i in range(0, tiles):
        column = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        counts = tl.load(mask + start + column, mask=inside, other=0) != 0
        next_counts = tl.load(mask + start + column + 1, mask=column + 1 < width, other=0) != 0
        r = tl.load(rewards + start + column, mask=counts, other=0).to(tl.float32)
        v = tl.load(values + start + column, mask=counts, other=0).to(tl.float32)
        following = tl.load(values + start + column + 1, mask=next_counts, other=0).to(tl.float32)
        last = tl.max(tl.where(counts, column, -1), axis=0)
        if BOOTSTRAP:
            following = tl.where((column == last) & (met == 0), end, following)
        met = tl.where(last >= 0, 1, met)
        delta = tl.where(counts, r + gamma * following - v, 0.0)
        a = tl.where(counts, decay, 0.0)
        a, b = tl.associative_scan((a, delta), 0, after, reverse=True)
        result = b + a * carried
        carried = tl.sum(tl.where(column == (tiles - 1 - i) * BLOCK, result, 0.0), axis=0)
        tl.store(advantages + start + column, result.to(advantages.dtype.element_ty), mask=inside)
