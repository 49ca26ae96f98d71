"""What is said of NF4: sixteen levels, equally used, the best there are for normal weights.

A million numbers from N(0, 1), in blocks of 64, are quantized with the real quantizer. The best table of sixteen values
is found by Lloyd's iteration on the same numbers: each value becomes the mean of the numbers that are nearest to it
(the median, for absolute errors), until nothing moves. Each number weighs what its block's absmax makes of its error.
The table is free: NF4 must have 0 and ±1 among its values, this one need not.                    (Lloyd 1982; Max 1960)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Float32

from minift.claims.claim import APPROXIMATELY, FALSE, TRUE, Claim, depends, holds
from minift.quant import blockwise
from minift.quant.codebooks import FP4, INT4, read_only
from minift.quant.nf4 import CODE

PAPER = "QLoRA (Dettmers et al. 2023, arXiv 2305.14314)"
AF4 = "NF4 isn't information theoretically optimal (Yoshida 2023, arXiv 2306.06965)"
COUNT, BLOCK, ITERATIONS = 1 << 20, 64, 3000
E2M1 = read_only(np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6)


def sixteen_levels() -> Claim:
    """NF4 has 2⁴ = 16 levels, and zero is one of them: counted in the table that is derived in `quant/nf4.py`."""
    found = len(set(CODE.tolist()))
    how = f"from {CODE[0]:g} to {CODE[-1]:g}, {(CODE < 0).sum()} below zero and {(CODE > 0).sum()} above it"
    return Claim("NF4 has 16 levels and an exact zero", PAPER, 16, found, holds(found == 16 and 0 in CODE), how, "§3")


def equation_four() -> Claim:
    """The sixteen levels are q_i = ½ (Q(i/17) + Q((i+1)/17)), i = 0 … 15, with Q the quantiles of N(0, 1).

    Q(0) is −∞, so the first is no number. The authors' code computes something else (`quant/nf4.py`, (1) to (4))."""
    q = [_quantile(i / 17) / 2 + _quantile((i + 1) / 17) / 2 for i in range(16)]
    found = sum(map(math.isfinite, q))
    how = f"q_0 = {q[0]}, q_1 = {q[1]:.3f}, …, q_15 = {q[15]:.3f}"
    return Claim("equation 4 gives sixteen numbers", PAPER, 16, found, holds(found == 16), how, "§3, eq. 4")


def equal_use() -> Claim:
    """Every level gets an equal number of values.

    Quantiles of N(0, 1) would be used equally by N(0, 1). But what is quantized is x / max|x| of a block, which is
    another distribution, and one number of each block is ±1 by construction."""
    codes = blockwise.quantize(_normal(), CODE, BLOCK).codes
    share = np.bincount(codes, minlength=16) / codes.size
    entropy = float(-(share * np.log2(share)).sum())
    found = 100 * float(share.min())
    how = f"share of the rarest of 16 levels in %, the commonest has {share.max():.1%}; {entropy:.2f} bits, not 4"
    equal = bool(np.all(np.abs(share * 16 - 1) < 0.05))
    return Claim("each level is used by 1/16 of the weights", PAPER, 6.25, found, holds(equal), how, "§3")


def optimal_in_squares() -> Claim:
    """NF4 is information-theoretically optimal for normal weights, if the loss is the mean squared error.

    Decibels that NF4 loses against the best sixteen values for blocks of 64: 10 log₁₀ of the ratio of the errors."""
    best, ours = _decibels(_best_table(BLOCK, 2), BLOCK), _decibels(CODE, BLOCK)
    found = best - ours
    how = f"signal to noise: NF4 {ours:.2f} dB, the best table {best:.2f} dB"
    verdict = TRUE if found < 0.01 else FALSE
    return Claim("NF4 is optimal, in squared error (dB lost)", PAPER, 0.0, found, verdict, how, "§3")


def optimal_in_magnitude() -> Claim:
    """NF4 is information-theoretically optimal for normal weights, if the loss is the mean absolute error.

    Percent by which NF4's error exceeds that of the best sixteen values for blocks of 64."""
    best, ours = (blockwise.round_trip_error(_normal(), table, BLOCK) for table in (_best_table(BLOCK, 1), CODE))
    found = 100 * (ours / best - 1)
    how = f"mean absolute error: NF4 {ours:.5f}, the best table {best:.5f}"
    verdict = TRUE if found < 0.01 else APPROXIMATELY if found < 1 else FALSE
    return Claim("NF4 is optimal, in absolute error (% lost)", PAPER, 0.0, found, verdict, how, "§3")


def better_than_int4() -> Claim:
    """NF4 loses less than 4-bit integers on normal weights: ratio of the mean absolute errors, blocks of 64."""
    return _against("int4", INT4)


def better_than_fp4() -> Claim:
    """NF4 loses less than 4-bit floats on normal weights: ratio of the mean absolute errors, blocks of 64."""
    return _against("FP4 (E2M1)", E2M1)


def fp4_better_than_int4() -> Claim:
    """FP4 is better than int4 (table 2: perplexity 31.07 against 34.34).

    In decibels on normal weights, blocks of 64. There are several types of that name: the paper's E2M1, and what
    bitsandbytes calls FP4, which has a subnormal of 1/192 and a gap from there to 1/6."""
    int4, e2m1, theirs = (_decibels(table, BLOCK) for table in (INT4, E2M1, FP4))
    on = f"on which FP4: E2M1 is {e2m1 - int4:+.2f} dB, bitsandbytes' {theirs - int4:+.2f} dB"
    how = f"signal to noise: int4 {int4:.2f}, E2M1 {e2m1:.2f}, bitsandbytes' FP4 {theirs:.2f} dB"
    return Claim("FP4 is better than int4", PAPER, "> 0 dB", e2m1 - int4, depends(on), how, "table 2")


def one_table_for_all_blocks() -> Claim:
    """No table is best for every block size, because the distribution of x / max|x| depends on it.

    Decibels that the best table for blocks of 64 loses on blocks of 4,096 against the best table for those."""
    theirs, ours = _decibels(_best_table(4096, 2), 4096), _decibels(_best_table(BLOCK, 2), 4096)
    found = theirs - ours
    how = f"in blocks of 4,096: {ours:.2f} dB with the best table for blocks of 64, {theirs:.2f} dB with their own"
    return Claim("no table is best for every block size", AF4, "> 0 dB", found, holds(found > 0.01), how)


CLAIMS: dict[str, Callable[[], Claim]] = {
    "sixteen-levels": sixteen_levels,
    "equation-four": equation_four,
    "equal-use": equal_use,
    "optimal-in-squares": optimal_in_squares,
    "optimal-in-magnitude": optimal_in_magnitude,
    "better-than-int4": better_than_int4,
    "better-than-fp4": better_than_fp4,
    "fp4-better-than-int4": fp4_better_than_int4,
    "one-table-for-all-blocks": one_table_for_all_blocks,
}


def _against(name: str, table: Float32[np.ndarray, " entries"]) -> Claim:
    ours, theirs = (blockwise.round_trip_error(_normal(), t, BLOCK) for t in (CODE, table))
    how = f"mean absolute error: NF4 {ours:.4f}, {name} {theirs:.4f}"
    claim = f"NF4 loses less than {name} (ratio)"
    return Claim(claim, PAPER, "< 1", ours / theirs, holds(ours < theirs), how, "§3, table 2")


@lru_cache(maxsize=1)
def _normal() -> Float32[np.ndarray, " n"]:
    return np.random.default_rng(0).standard_normal(COUNT, np.float32)


def _decibels(table: Float32[np.ndarray, " entries"], block_size: int) -> float:
    """10 log₁₀ (mean x² / mean (x̂ − x)²)."""
    x = _normal()
    error = blockwise.dequantize(blockwise.quantize(x, table, block_size), np.float64) - x
    return 10 * math.log10(float(np.mean(np.square(x, dtype=np.float64)) / np.mean(error * error)))


@lru_cache(maxsize=4)
def _best_table(block_size: int, power: int) -> Float32[np.ndarray, " 16"]:
    """The sixteen values of least mean |x̂ − x|^power for blocks of this size, by Lloyd's iteration from NF4's."""
    rows = _normal().reshape(-1, block_size).astype(np.float64)
    absmax = np.abs(rows).max(axis=1, keepdims=True)
    scaled, weight = (rows / absmax).ravel(), np.broadcast_to(absmax**power, rows.shape).ravel()
    order = np.argsort(scaled)
    scaled, weight = scaled[order], weight[order]
    mass = np.concatenate([[0.0], np.cumsum(weight)])  # of the numbers up to each
    moment = np.concatenate([[0.0], np.cumsum(weight * scaled)])
    table: Float[np.ndarray, " 16"] = CODE.astype(np.float64)
    for _ in range(ITERATIONS):
        edges = np.concatenate([[0], np.searchsorted(scaled, (table[:-1] + table[1:]) / 2), [scaled.size]])
        if power == 2:
            moved = np.diff(moment[edges]) / np.diff(mass[edges])
        else:
            moved = scaled[np.searchsorted(mass, (mass[edges[:-1]] + mass[edges[1:]]) / 2) - 1]
        if np.array_equal(moved, table):
            break
        table = moved
    return read_only(table)


def _quantile(p: float) -> float:
    """Φ⁻¹(p), with its limits."""
    return -math.inf if p <= 0 else math.inf if p >= 1 else NormalDist().inv_cdf(p)
