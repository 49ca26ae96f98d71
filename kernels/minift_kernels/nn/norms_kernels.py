"""RMSNorm and LayerNorm on a GPU: a row a program while it fits into registers, which every model's rows do.

    y = x̂ γ (+ β)        x̂ = (x − μ) ρ        ρ = (mean((x − μ)²) + ε)^(−1/2)        RMSNorm: μ = 0            (1)
    dx = ρ (dx̂ − [mean(dx̂)] − x̂ mean(dx̂ x̂))        dx̂ = dy γ        dγ = Σ_rows dy x̂        [dβ = Σ_rows dy]     (2)

There are about ten operations for each number that is read, so the time is that of the bytes: x and y, each once. The
forward pass keeps ρ (and μ), 4 bytes a row, instead of x̂; the backward pass forms x̂ again from x.

**dγ without atomics.** Every row adds to all of dγ. Programs that added to one place in memory would do so in another
order each time, and the last bits would change from run to run. So a program takes a share of the rows, keeps the sum
of its share in registers, and writes it to a row of its own; the few rows are added up afterwards, in order.

Arithmetic is in float32, whatever the type of x; results are rounded once. BLOCK is the row's length rounded up to a
power of two; places beyond the row are zeros, which no sum notices (and LayerNorm's centered row is masked again).
"""

import triton
import triton.language as tl

PARTS = 256  # shares of the rows in the backward pass: about two a multiprocessor


def warps(BLOCK):
    """Enough that a lane holds 16 numbers of a row, which spills nothing; few enough that a sum over warps is cheap."""
    return min(max(BLOCK // 512, 1), 16)


@triton.jit
def forward(
    y, inv_std, mean, x, weight, bias, x_stride, n_features, eps,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equation (1) for one row; y is contiguous. CENTERED: LayerNorm, otherwise `mean` and `bias` are not touched."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < n_features
    values = tl.load(x + row * x_stride + feature, mask=inside, other=0).to(tl.float32)
    if CENTERED:
        center = tl.sum(values, axis=0) / n_features
        tl.store(mean + row, center)
        values = tl.where(inside, values - center, 0.0)
    rho = 1 / tl.sqrt(tl.sum(values * values, axis=0) / n_features + eps)
    tl.store(inv_std + row, rho)
    result = values * rho * tl.load(weight + feature, mask=inside, other=0).to(tl.float32)
    if CENTERED:
        result += tl.load(bias + feature, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * n_features + feature, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    dx, dweight, dbias, dy, x, weight, inv_std, mean, dy_stride, x_stride, n_rows, n_features, rows_a_part,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equation (2) for one share of the rows; dx is contiguous, dweight and dbias have a row a share."""
    part = tl.program_id(0).to(tl.int64)
    first = part * rows_a_part
    feature = tl.arange(0, BLOCK)
    inside = feature < n_features
    gain = tl.load(weight + feature, mask=inside, other=0).to(tl.float32)
    dgain = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, tl.minimum(rows_a_part, n_rows - first)):
        row = first + i  # 64 bits, also in the interpreter, where a loop counts in Python's numbers
        x_hat = tl.load(x + row * x_stride + feature, mask=inside, other=0).to(tl.float32)
        cotangent = tl.load(dy + row * dy_stride + feature, mask=inside, other=0).to(tl.float32)
        rho = tl.load(inv_std + row)
        if CENTERED:
            x_hat = tl.where(inside, x_hat - tl.load(mean + row), 0.0)
        x_hat *= rho
        dx_hat = cotangent * gain
        result = dx_hat - x_hat * (tl.sum(dx_hat * x_hat, axis=0) / n_features)
        if CENTERED:
            result -= tl.sum(dx_hat, axis=0) / n_features
            dshift += cotangent
        dgain += cotangent * x_hat
        tl.store(dx + row * n_features + feature, (result * rho).to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + part * n_features + feature, dgain, mask=inside)
    if CENTERED:
        tl.store(dbias + part * n_features + feature, dshift, mask=inside)
