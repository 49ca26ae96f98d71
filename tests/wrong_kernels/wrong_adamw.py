"""AdamW kernels, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs. `step_one` and `step_all` share the arithmetic, so
what is wrong with a formula is tried in the first, and what is wrong with the table of addresses in the second.
"""

import triton
import triton.language as tl

FORMULA = (
    "L2",  # the decay is a part of the gradient
    "decay without rate",  # 1 − λ instead of 1 − ηλ
    "decay afterwards",  # of θ after the step
    "eps inside",  # √(v̂ + ε)
    "t - 1",  # bias correction of the step before
    "m not corrected",
    "v not corrected",
    "no square",  # v of |g|
    "one-sided",  # v of gradients above 0
    "one v",  # the mean of a tile's squares
    "m sums up",  # β₁ m + g
    "betas swapped",
    "float16 moments",  # m rounded to 16 bits
    "rounded early",  # the update rounded to 16 bits before it is subtracted
    "fast quotient",  # a product with the reciprocal
    "last forgotten",  # the last element of a tensor
    "one too many",  # and a load and a store behind it
    "gradient cleared",  # written to, for the next step
    "32 bits",  # offsets wrap around
)
TABLE = (
    "vectors decay",
    "neighbor's decay",  # of the tensor before
    "nothing decays",
    "last forgotten",
    "boundary crossed",  # a whole tile is written, also at a tensor's end
    "first tile only",
    "tile by tensor",  # begins where the tensor's number says
    "neighbor's gradient",  # of the tensor before, as far as it goes
    "moments swapped",
    "32 bits",
)
SQUARES = (
    "last forgotten",
    "no mask",  # reads to the end of the block
    "one block",  # of a tile
    "float16 squares",
    "absolute",  # Σ |g|
    "32 bits",
)


@triton.jit
def step_at(
    theta, gradient, m, v, inside, shrink,
    learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2, WRONG: tl.constexpr,
):  # fmt: skip
    g = tl.load(gradient, mask=inside).to(tl.float32)
    wide = tl.load(theta, mask=inside).to(tl.float32)
    zero = tl.zeros_like(g)
    if WRONG == "L2":
        g += (1 - shrink) / learning_rate * wide
        shrink = 1.0
    if WRONG == "decay without rate":
        shrink = 1 - (1 - shrink) / learning_rate
    if WRONG == "betas swapped":
        beta1, beta2, rest1, rest2 = beta2, beta1, rest2, rest1
    if WRONG == "t - 1":  # 1 − βᵗ⁻¹ = 1 − (1 − (1 − βᵗ)) / β
        correction1 = 1 - (1 - correction1) / beta1
        correction2 = 1 - (1 - correction2) / beta2
    if WRONG == "m not corrected":
        correction1 = 1.0
    if WRONG == "v not corrected":
        correction2 = 1.0
    first = tl.load(m, mask=inside) * beta1 + g * (1.0 if WRONG == "m sums up" else rest1)
    second = tl.load(v, mask=inside) * beta2 + g * rest2 * (tl.where(g < 0, -1.0, 1.0) if WRONG == "no square" else g)
    if WRONG == "one-sided":
        second = tl.load(v, mask=inside) * beta2 + tl.where(g > 0, g * rest2 * g, 0.0)
    if WRONG == "one v":
        squares = tl.where(inside, g * g, 0.0)
        second = tl.load(v, mask=inside) * beta2 + rest2 * tl.sum(squares, axis=0) / tl.sum(inside.to(tl.int32), axis=0)
    if WRONG == "float16 moments":
        first = first.to(tl.float16).to(tl.float32)
    v_hat = tl.math.div_rn(second, zero + correction2)
    denominator = tl.math.sqrt_rn(v_hat + eps) if WRONG == "eps inside" else tl.math.sqrt_rn(v_hat) + eps
    a = tl.math.div_rn(first, zero + correction1) * learning_rate
    a = a * tl.math.div_rn(zero + 1, denominator) if WRONG == "fast quotient" else tl.math.div_rn(a, denominator)
    if WRONG == "rounded early":
        a = a.to(tl.float16).to(tl.float32)
    moved = (wide - a) * shrink if WRONG == "decay afterwards" else wide * shrink - a
    tl.store(theta, moved.to(theta.dtype.element_ty), mask=inside)
    tl.store(m, first, mask=inside)
    tl.store(v, second, mask=inside)
    if WRONG == "gradient cleared":
        tl.store(gradient, zero.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def step_one(
    theta, m, v, gradient, n, shrink,
    learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    TILE: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if WRONG != "32 bits":
        program = program.to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    end = n
    if WRONG == "last forgotten":
        end = n - 1
    if WRONG == "one too many":
        end = n + 1
    step_at(
        theta + at, gradient + at, m + at, v + at, at < end, shrink,
        learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2, WRONG,
    )  # fmt: skip


@triton.jit
def step_all(
    table, tiles, shrink, learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    THETA: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tiles + 2 * program).to(tl.int64)
    tile = tl.load(tiles + 2 * program + 1)
    if WRONG != "32 bits":
        tile = tile.to(tl.int64)
    if WRONG == "first tile only":
        tile = tile * 0
    if WRONG == "tile by tensor":
        tile = tensor
    row = table + tensor * COLUMNS
    before = table + tl.maximum(tensor - 1, 0) * COLUMNS
    start = (tile * TILE).to(tl.int64)
    left = tl.load(row + 4) - start
    decays = tl.load((before if WRONG == "neighbor's decay" else row) + 5) != 0
    if WRONG == "vectors decay":
        decays = decays | True
    if WRONG == "nothing decays":
        decays = decays & False
    factor = tl.where(decays, shrink, 1.0)
    at = tl.arange(0, TILE)
    inside = at < left
    if WRONG == "last forgotten":
        inside = at < left - 1
    if WRONG == "boundary crossed":
        inside = at < TILE
    theta = tl.load(row).to(tl.pointer_type(THETA)) + start + at
    gradient = tl.load(row + 1).to(tl.pointer_type(GRADIENT)) + start + at
    if WRONG == "neighbor's gradient":
        neighbor = tl.load(before + 1).to(tl.pointer_type(GRADIENT)) + start + at
        gradient = tl.where(start + at < tl.load(before + 4), neighbor, gradient)
    m = tl.load(row + (3 if WRONG == "moments swapped" else 2)).to(tl.pointer_type(tl.float32)) + start + at
    v = tl.load(row + (2 if WRONG == "moments swapped" else 3)).to(tl.pointer_type(tl.float32)) + start + at
    step_at(
        theta, gradient, m, v, inside, factor,
        learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2, "nothing",
    )  # fmt: skip


@triton.jit
def squares(
    partials, table, tiles,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + 2 * program).to(tl.int64) * COLUMNS
    tile = tl.load(tiles + 2 * program + 1)
    if WRONG != "32 bits":
        tile = tile.to(tl.int64)
    start = (tile * TILE).to(tl.int64)
    left = tl.minimum(tl.load(row + 4) - start, TILE).to(tl.int32)
    if WRONG == "last forgotten":
        left -= 1
    if WRONG == "one block":
        left = tl.minimum(left, BLOCK)
    at = tl.arange(0, BLOCK)
    gradient = tl.load(row + 1).to(tl.pointer_type(GRADIENT)) + start + at
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, left, BLOCK):
        g = tl.load(gradient + i, mask=at < (BLOCK if WRONG == "no mask" else left - i), other=0).to(tl.float32)
        square = tl.abs(g) if WRONG == "absolute" else g * g
        if WRONG == "float16 squares":
            square = square.to(tl.float16).to(tl.float32)
        total += square
    tl.store(partials + program, tl.sum(total.to(tl.float64), axis=0))
