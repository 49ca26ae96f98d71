"""Kernels of the norms, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

FORWARD = (
    "eps forgotten",
    "eps outside",  # 1 / (rms + ε)
    "padding counts",  # the mean over BLOCK instead of the row's length
    "padding centered",  # the places behind the row are −mean, and their squares count
    "n - 1",  # the unbiased variance
    "weight of the row",  # γ_row instead of γ_feature
    "rounded early",  # x̂ rounded to the type of y before γ
    "neighbor's statistics",  # stored one row too early
    "row by width",  # n_features instead of the stride
)
BACKWARD = (
    "no projection",  # the term with x̂ mean(dx̂ x̂) left out
    "dy for dx_hat",  # γ forgotten in the projection
    "last row forgotten",
    "dweight of x",  # dy x instead of dy x̂
    "overlapping parts",  # a row belongs to two shares
    "dx accumulates",  # adds to what was there
)


@triton.jit
def forward(
    y, inv_std, mean, x, weight, bias, x_stride, n_features, eps,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < n_features
    if WRONG == "row by width":
        x_stride = n_features
    n = n_features
    if WRONG == "padding counts":
        n = BLOCK
    values = tl.load(x + row * x_stride + feature, mask=inside, other=0).to(tl.float32)
    if CENTERED:
        center = tl.sum(values, axis=0) / n
        tl.store(mean + row, center)
        values = tl.where(inside | (WRONG == "padding centered"), values - center, 0.0)
    if WRONG == "n - 1":
        n = tl.maximum(n - 1, 1)
    square = tl.sum(values * values, axis=0) / n
    rho = 1 / tl.sqrt(square + eps)
    if WRONG == "eps forgotten":
        rho = 1 / tl.sqrt(square)
    if WRONG == "eps outside":
        rho = 1 / (tl.sqrt(square) + eps)
    if WRONG == "neighbor's statistics":
        tl.store(inv_std + tl.maximum(row - 1, 0), rho)
    else:
        tl.store(inv_std + row, rho)
    x_hat = values * rho
    if WRONG == "rounded early":
        x_hat = x_hat.to(tl.float16).to(tl.float32)
    if WRONG == "weight of the row":
        gain = tl.load(weight + row % n_features).to(tl.float32)
    else:
        gain = tl.load(weight + feature, mask=inside, other=0).to(tl.float32)
    result = x_hat * gain
    if CENTERED:
        result += tl.load(bias + feature, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * n_features + feature, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    dx, dweight, dbias, dy, x, weight, inv_std, mean, dy_stride, x_stride, n_rows, n_features, rows_a_part,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < n_features
    gain = tl.load(weight + feature, mask=inside, other=0).to(tl.float32)
    dgain = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum((part + 1) * rows_a_part, n_rows)
    if WRONG == "last row forgotten":
        end = tl.minimum(end, n_rows - 1)
    if WRONG == "overlapping parts":
        end = tl.minimum(end + 1, n_rows)
    first = part * rows_a_part
    for i in range(0, end - first):
        row = first + i
        values = tl.load(x + row * x_stride + feature, mask=inside, other=0).to(tl.float32)
        cotangent = tl.load(dy + row * dy_stride + feature, mask=inside, other=0).to(tl.float32)
        rho = tl.load(inv_std + row)
        if CENTERED:
            values = tl.where(inside, values - tl.load(mean + row), 0.0)
        x_hat = values * rho
        dx_hat = cotangent * gain
        projected = dx_hat
        if WRONG == "dy for dx_hat":
            projected = cotangent
        result = dx_hat
        if WRONG != "no projection":
            result = dx_hat - x_hat * (tl.sum(projected * x_hat, axis=0) / n_features)
        if CENTERED:
            result -= tl.sum(dx_hat, axis=0) / n_features
            dshift += cotangent
        dgain += cotangent * (values if WRONG == "dweight of x" else x_hat)
        result = result * rho
        if WRONG == "dx accumulates":
            before = tl.load(dx + row * n_features + feature, mask=inside, other=0).to(tl.float32)
            result = tl.where(before == before, result + before, result)
        tl.store(dx + row * n_features + feature, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + part * n_features + feature, dgain, mask=inside)
    if CENTERED:
        tl.store(dbias + part * n_features + feature, dshift, mask=inside)
