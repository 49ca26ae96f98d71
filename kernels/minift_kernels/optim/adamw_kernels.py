"""AdamW on a GPU: all parameters of a model in one launch, and bit for bit the reference's step.

    m′ = fl(fl(β₁ m) + fl((1 − β₁) g))        v′ = fl(fl(β₂ v) + fl(fl((1 − β₂) g) g))                          (1)
    a  = fl(fl(η fl(m′ / (1 − β₁ᵗ))) / fl(√fl(v′ / (1 − β₂ᵗ)) + ε))        θ′ = fl(fl((1 − ηλ) θ) − a)           (2)

Each fl is one rounding to float32, in the order of `minift.optim.adamw`. So quotients and roots are the correctly
rounded ones (`div_rn`, `sqrt_rn`), and no product is fused with a sum (OPTIONS). What stands between parentheses is
computed in float64 by the caller and rounded once, as NumPy does it. Parameters and gradients may have 16 bits: they
are widened, and θ′ is rounded once more. Moments have 32 always: 1 − β₂ = 0.001 is less than half a unit in the last
place of bfloat16, whose v would never move.

**What it costs.** A float32 parameter is 28 bytes: θ, m and v read and written, g read (16 bits: 22). An H100 at
3.35 TB/s moves 120 thousand million of them a second. Exact quotients and roots are not one instruction but ten or
more: in the machine code for sm_90, (1) and (2) are 97 an element, many of them for numbers that are too small or too
large and never reached. At 132 × 128 lanes and 1.7 GHz there is time for 240. Predicted: exactness is free.

**One launch.** A model has hundreds of tensors, many of them small (gains of norms, adapters of rank 8). A launch for
each would leave most of the GPU idle most of the time. So the kernel is given a table in memory instead of tensors:

    table (tensors, 6)     addresses of θ, g, m, v; number of elements; 1 if it decays
    tiles (programs, 2)    the tensor of this program, and which of the tensor's tiles is its own

A program reads its row of `tiles`, then that tensor's row of `table`: 56 bytes for the 22,000 or more of its tile. No
program searches, and none sees two tensors. `tiles` depends on the sizes only and is made once; `table` is sent every
step (48 bytes a tensor), since gradients lie elsewhere each time.

**Words of 16 bytes.** The compiler knows nothing about an address that it reads from memory. ALIGNED promises that all
of them are divisible by 16, which the caller has looked at. A whole tile takes a path without a mask, the last one of a
tensor a path with. And 4 numbers are neighbors for one lane, whatever their type (`max_contiguous`): 16 bytes of a
moment, 8 of a 16-bit parameter. With 8 there would be two stores for a moment's 8 numbers, and on sm_90 a detour
through shared memory before them.
"""

import triton
import triton.language as tl

TILE, WARPS = 1024, 4
SQUARES_TILE, SQUARES_BLOCK = 16384, 1024  # a lane adds up 16 squares for each of its 8 numbers
COLUMNS = 6  # of `table`
OPTIONS = {"enable_fp_fusion": False}
TYPES = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}


@triton.jit
def step_at(
    theta, gradient, m, v, inside, shrink,
    learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
):  # fmt: skip
    """Equations (1) and (2) at these addresses, where `inside` holds (None: everywhere). rest is 1 − β, correction
    1 − βᵗ, shrink 1 − ηλ."""
    g = tl.load(gradient, mask=inside).to(tl.float32)
    first = tl.load(m, mask=inside) * beta1 + g * rest1
    second = tl.load(v, mask=inside) * beta2 + g * rest2 * g
    zero = tl.zeros_like(first)
    denominator = tl.math.sqrt_rn(tl.math.div_rn(second, zero + correction2)) + eps
    a = tl.math.div_rn(tl.math.div_rn(first, zero + correction1) * learning_rate, denominator)
    moved = tl.load(theta, mask=inside).to(tl.float32) * shrink - a
    tl.store(theta, moved.to(theta.dtype.element_ty), mask=inside)
    tl.store(m, first, mask=inside)
    tl.store(v, second, mask=inside)


@triton.jit
def step_one(
    theta, m, v, gradient, n, shrink,
    learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2, TILE: tl.constexpr,
):  # fmt: skip
    """One tensor: `adamw_2`."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.max_contiguous(tl.arange(0, TILE), 4)
    step_at(
        theta + at, gradient + at, m + at, v + at, at < n, shrink,
        learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    )  # fmt: skip


@triton.jit
def address(row, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in this column of a row of `table`."""
    pointer = tl.load(row + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def step_all(
    table, tiles, shrink, learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    THETA: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of one of many tensors: `AdamW.update`. What does not decay has the factor 1, which changes no bit."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + 2 * program).to(tl.int64) * COLUMNS
    start = tl.load(tiles + 2 * program + 1).to(tl.int64) * TILE
    left = tl.load(row + 4) - start  # elements from here to the tensor's end
    factor = tl.where(tl.load(row + 5) != 0, shrink, 1.0)
    at = tl.max_contiguous(tl.arange(0, TILE), 4)
    theta = address(row, 0, THETA, ALIGNED) + start + at
    gradient = address(row, 1, GRADIENT, ALIGNED) + start + at
    m = address(row, 2, tl.float32, ALIGNED) + start + at
    v = address(row, 3, tl.float32, ALIGNED) + start + at
    if left >= TILE:
        step_at(
            theta, gradient, m, v, None, factor,
            learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
        )  # fmt: skip
    else:
        step_at(
            theta, gradient, m, v, at < left, factor,
            learning_rate, beta1, rest1, beta2, rest2, eps, correction1, correction2,
        )  # fmt: skip


# The length of all gradients together: Σ g², a partial sum for each tile, the partial sums added up afterwards.
#
# No atomics, so that the length, and with it every parameter, is the same bits in every run. Squares are float32 (those
# of 16-bit numbers exact) and overflow as the reference's do; a lane adds up 16 of them in float32, all that follows is
# in float64. So a sum of squares is within γ₁₇ of the exact one, relatively, however many parameters there are.


@triton.jit
def squares(
    partials, table, tiles,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + 2 * program).to(tl.int64) * COLUMNS
    start = tl.load(tiles + 2 * program + 1).to(tl.int64) * TILE
    left = tl.minimum(tl.load(row + 4) - start, TILE).to(tl.int32)
    at = tl.arange(0, BLOCK)
    gradient = address(row, 1, GRADIENT, ALIGNED) + start + at
    total = tl.zeros((BLOCK,), tl.float32)
    if left == TILE:
        for i in tl.static_range(TILE // BLOCK):
            g = tl.load(gradient + i * BLOCK).to(tl.float32)
            total += g * g
    else:
        for i in range(0, left, BLOCK):
            g = tl.load(gradient + i, mask=at < left - i, other=0).to(tl.float32)
            total += g * g
    tl.store(partials + program, tl.sum(total.to(tl.float64), axis=0))
