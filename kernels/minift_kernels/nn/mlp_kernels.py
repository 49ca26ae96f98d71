"""SwiGLU and both GELUs on a GPU: each number is read once and written once.

    y = g σ(g) u        dg = dy u (σ + g σ (1 − σ))        du = dy g σ        σ = 1 / (1 + e^−g)                  (1)
    y = x Φ(x)        dx = dy (Φ + x φ)        Φ = ½ (1 + erf(x / √2))        φ = e^(−x²/2) / √(2π)               (2)
    y = x s        dx = dy (s + 2 x s (1 − s) z′)        s = σ(2z)        z = √(2/π) (x + 0.044715 x³)            (3)

(3) is the GELU with a tanh: ½ (1 + tanh z) = σ(2z), one exponential and nothing beyond `tl.exp`.

Some twenty instructions a number: the time is that of the bytes. In plain PyTorch `silu(g) * u` writes g σ(g) to memory
and reads it again, and keeps it for the backward pass. Here the forward pass moves three numbers for each result, the
fewest possible, and nothing is kept but g and u. The backward pass forms σ again: an exponential takes less time than
reading σ would. It moves five numbers for two results.

BLOCK numbers a program, so that each lane moves words of 16 bytes and has two of them under way. Arithmetic is in
float32, whatever the type of the numbers; results are rounded once.
"""

import triton
import triton.language as tl

TILES = {2: (2048, 4), 4: (1024, 4), 8: (1024, 4)}  # bytes of a number: (BLOCK, num_warps)

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / √(2π)
ROOT = tl.constexpr(0.7978845608028654)  # √(2/π)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def swiglu(y, gate, up, n, BLOCK: tl.constexpr):
    """Equation (1) for a tile of n numbers; all are contiguous."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(gate + i, mask=inside).to(tl.float32)
    u = tl.load(up + i, mask=inside).to(tl.float32)
    tl.store(y + i, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(dgate, dup, dy, gate, up, n, BLOCK: tl.constexpr):
    """The pullback of equation (1), in the same tiles."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    cotangent = tl.load(dy + i, mask=inside).to(tl.float32)
    g = tl.load(gate + i, mask=inside).to(tl.float32)
    u = tl.load(up + i, mask=inside).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    tl.store(dgate + i, (cotangent * u * (s + silu * (1 - s))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + i, (cotangent * silu).to(dup.dtype.element_ty), mask=inside)


@triton.jit
def gelu(y, x, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """Equation (2), or with TANH equation (3); far out, 2z overflows to ±∞, and s is still 0 or 1."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + i, mask=inside).to(tl.float32)
    if TANH:
        share = tl.sigmoid((value + value * value * value * CUBIC) * (2 * ROOT))
    else:
        share = 0.5 * (1 + tl.math.erf(value * SQRT_HALF))
    tl.store(y + i, (value * share).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(dx, dy, x, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """The pullback of either."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    cotangent = tl.load(dy + i, mask=inside).to(tl.float32)
    value = tl.load(x + i, mask=inside).to(tl.float32)
    if TANH:
        s = tl.sigmoid((value + value * value * value * CUBIC) * (2 * ROOT))
        bend = value * s * (1 - s)
        slope = s + bend * (1 + value * value * (3 * CUBIC)) * (2 * ROOT)
    else:
        slope = 0.5 * (1 + tl.math.erf(value * SQRT_HALF)) + value * tl.exp(value * value * -0.5) * DENSITY
    tl.store(dx + i, (cotangent * slope).to(dx.dtype.element_ty), mask=inside)
