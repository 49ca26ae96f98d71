"""Kernels that turn pairs of features, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" it is right. Only what is wrong differs.
"""

import triton
import triton.language as tl

TURN = (
    "interleaved",  # feature 2i turns with 2i + 1
    "other direction",
    "backward as forward",  # the sign is not looked at
    "no second product",  # y₂ = x₂ cos φ
    "plus",  # y₁ = x₁ cos φ + x₂ sin φ
    "in place",  # y₂ made from y₁ instead of x₁
    "next token's angle",
    "angle of the head",
    "angles of the first",  # of sequence 0 for all
    "angles without strides",  # those of sequence b, also where all share one row
    "rounded early",  # the products, to the type of y
    "cos in 16 bits",
    "frequency of the feature",  # the second half has frequencies of its own
)


@triton.jit
def turn(
    y, x, cos, sin, y_strides, x_strides, angle_strides, heads, tokens, head_tiles, token_tiles, sign,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
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
    if WRONG == "next token's angle":
        at = batch * angle_strides[0] + tl.minimum(token + 1, tokens - 1) * angle_strides[1] + feature
    if WRONG == "angle of the head":
        at = batch * angle_strides[0] + tl.minimum(head, tokens - 1) * angle_strides[1] + feature + 0 * token
        known = inside
    if WRONG == "angles of the first":
        at = token * angle_strides[1] + feature
    if WRONG == "angles without strides":
        at = batch * tokens * HALF + token * HALF + feature
    c = tl.load(cos + at, mask=known, other=0).to(tl.float32)
    s = tl.load(sin + at, mask=known, other=0).to(tl.float32)
    if WRONG == "cos in 16 bits":
        c = c.to(tl.float16).to(tl.float32)
    if WRONG == "other direction":
        s = -s
    if WRONG != "backward as forward":
        s = s * sign
    c2 = c
    s2 = s
    if WRONG == "frequency of the feature":
        other = batch * angle_strides[0] + token * angle_strides[1] + tl.minimum(feature + 1, HALF - 1)
        c2 = tl.load(cos + other, mask=known, other=0).to(tl.float32)
        s2 = tl.load(sin + other, mask=known, other=0).to(tl.float32) * sign
    step = 1
    distance = HALF
    if WRONG == "interleaved":
        step = 2
        distance = 1
    at = x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2] + feature * step
    x1 = tl.load(at, mask=inside, other=0).to(tl.float32)
    x2 = tl.load(at + distance, mask=inside, other=0).to(tl.float32)
    to = y + batch * y_strides[0] + head * y_strides[1] + token * y_strides[2] + feature * step
    one = x1 * c
    two = x2 * c2
    if WRONG == "rounded early":
        one = one.to(tl.float16).to(tl.float32)
        two = two.to(tl.float16).to(tl.float32)
    y1 = one - x2 * s
    if WRONG == "plus":
        y1 = one + x2 * s
    y2 = two + x1 * s2
    if WRONG == "in place":
        y2 = two + y1 * s2
    if WRONG == "no second product":
        y2 = two
    tl.store(to, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(to + distance, y2.to(y.dtype.element_ty), mask=inside)
