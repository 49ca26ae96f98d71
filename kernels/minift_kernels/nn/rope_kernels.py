"""Rotary positions on a GPU: every number read once and written once, both halves of a head in one program.

    y₁ = x₁ cos φ − x₂ sin φ        y₂ = x₂ cos φ + x₁ sin φ        x₁, x₂ the first and second half of a head      (1)

Written with PyTorch's operations, (1) makes a negated and swapped copy of x, two products and a sum: five times the
bytes that must move. Here a lane has both numbers of a pair and makes both results; float16 moves 4 bytes a number.

cos φ and sin φ are the same for all heads of a token. A program takes HEADS heads of TOKENS tokens: it loads the angles
of its tokens once, for all of its heads, so that they add (8 / HEADS) bytes a pair to the 8 of float16 x and y.
Predicted: the time of a copy, and a tenth more.

`sign` is 1 forward and −1 backward: a rotation's transpose is the rotation by −φ, so the gradient is this kernel too.
Arithmetic is in float32, whatever the type of x, and rounded once.
"""

import triton
import triton.language as tl

HEADS, TOKENS = 8, 8  # of a program
LANES = 128  # with 128 features, 2 × 32 numbers each


@triton.jit
def turn(
    y, x, cos, sin, y_strides, x_strides, angle_strides, heads, tokens, head_tiles, token_tiles, sign,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Equation (1), with `sign` before the angle. Strides are of batch, head and token; of the angles, of batch and
    token. BLOCK is HALF rounded up to a power of two."""
    program = tl.program_id(0)
    first_head = (program % head_tiles).to(tl.int64) * HEADS
    first_token = (program // head_tiles % token_tiles).to(tl.int64) * TOKENS
    batch = (program // head_tiles // token_tiles).to(tl.int64)
    head = first_head + tl.arange(0, HEADS)[:, None, None]
    token = first_token + tl.arange(0, TOKENS)[None, :, None]
    feature = tl.arange(0, BLOCK)[None, None, :]
    known = (token < tokens) & (feature < HALF)
    inside = (head < heads) & known
    at = batch * angle_strides[0] + token * angle_strides[1] + feature
    c = tl.load(cos + at, mask=known, other=0).to(tl.float32)  # (1, TOKENS, BLOCK)
    s = tl.load(sin + at, mask=known, other=0).to(tl.float32) * sign
    at = x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2] + feature
    x1 = tl.load(at, mask=inside, other=0).to(tl.float32)  # (HEADS, TOKENS, BLOCK)
    x2 = tl.load(at + HALF, mask=inside, other=0).to(tl.float32)
    to = y + batch * y_strides[0] + head * y_strides[1] + token * y_strides[2] + feature
    tl.store(to, (x1 * c - x2 * s).to(y.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (x2 * c + x1 * s).to(y.dtype.element_ty), mask=inside)
