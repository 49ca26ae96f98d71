"""Kernels of SwiGLU and GELU, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs.
"""

import triton
import triton.language as tl

SWIGLU = (
    "up forgotten",
    "gate and up exchanged",
    "sigmoid of up",
    "half the slope",  # σ(g/2)
    "naive sigmoid",  # e^g / (1 + e^g), which is NaN for a large gate
    "rounded early",  # silu rounded to float16 before the product
    "last one forgotten",
    "tiles overlap",
)
SWIGLU_BACKWARD = (
    "no slope of the sigmoid",  # dg = dy u σ
    "slope twice",
    "dup of sigmoid",  # g forgotten
    "dgate and dup exchanged",
    "up forgotten",
    "naive sigmoid",
    "cotangent forgotten",
    "NaN cleared",
)
GELU = (
    "not divided by root two",
    "logistic",  # x σ(1.702 x)
    "the other form",
    "half of it",  # ½ x erf instead of ½ x (1 + erf)
    "no cubic term",
    "beyond the end",
)
GELU_BACKWARD = (
    "no density",
    "density without its norm",
    "slope of the other form",
    "share forgotten",
    "cubic once",  # 1 + 0.044715 x² instead of three times
    "cotangent forgotten",
    "NaN cleared",
)

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)
ROOT = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x, WRONG: tl.constexpr):
    if WRONG == "naive sigmoid":
        s = tl.exp(x) / (1 + tl.exp(x))
    elif WRONG == "half the slope":
        s = tl.sigmoid(0.5 * x)
    else:
        s = tl.sigmoid(x)
    return s


@triton.jit
def swiglu(y, gate, up, n, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    if WRONG == "last one forgotten":
        inside = i < n - 1
    if WRONG == "tiles overlap":
        i = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK)
        inside = i < n
    g = tl.load(gate + i, mask=inside).to(tl.float32)
    u = tl.load(up + i, mask=inside).to(tl.float32)
    if WRONG == "gate and up exchanged":
        result = u * tl.sigmoid(u) * g
    elif WRONG == "sigmoid of up":
        result = g * tl.sigmoid(u) * u
    elif WRONG == "up forgotten":
        result = g * tl.sigmoid(g)
    elif WRONG == "rounded early":
        result = (g * tl.sigmoid(g)).to(tl.float16).to(tl.float32) * u
    else:
        result = g * _sigmoid(g, WRONG) * u
    tl.store(y + i, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(dgate, dup, dy, gate, up, n, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    cotangent = tl.load(dy + i, mask=inside).to(tl.float32)
    if WRONG == "cotangent forgotten":
        cotangent = tl.full((BLOCK,), 1.0, tl.float32)
    g = tl.load(gate + i, mask=inside).to(tl.float32)
    u = tl.load(up + i, mask=inside).to(tl.float32)
    s = _sigmoid(g, WRONG)
    silu = g * s
    slope = s + silu * (1 - s)
    if WRONG == "no slope of the sigmoid":
        slope = s
    if WRONG == "slope twice":
        slope = s + 2 * silu * (1 - s)
    dg = cotangent * u * slope
    if WRONG == "up forgotten":
        dg = cotangent * slope
    du = cotangent * silu
    if WRONG == "NaN cleared":
        du = tl.where(g == g, du, 0.0)
    if WRONG == "dup of sigmoid":
        du = cotangent * s
    if WRONG == "dgate and dup exchanged":
        tl.store(dgate + i, du.to(dgate.dtype.element_ty), mask=inside)
        tl.store(dup + i, dg.to(dup.dtype.element_ty), mask=inside)
    else:
        tl.store(dgate + i, dg.to(dgate.dtype.element_ty), mask=inside)
        tl.store(dup + i, du.to(dup.dtype.element_ty), mask=inside)


@triton.jit
def gelu(y, x, n, TANH: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    if WRONG == "beyond the end":
        inside = i < n + 1
    value = tl.load(x + i, mask=inside).to(tl.float32)
    inner = value * SQRT_HALF
    if WRONG == "not divided by root two":
        inner = value
    if WRONG == "no cubic term":
        share = tl.sigmoid(value * (2 * ROOT))
    elif WRONG == "logistic":
        share = tl.sigmoid(1.702 * value)
    elif (WRONG == "the other form") != TANH:
        share = tl.sigmoid((value + value * value * value * CUBIC) * (2 * ROOT))
        if WRONG == "not divided by root two":
            share = tl.sigmoid((value + value * value * value * CUBIC) * 2)
    else:
        share = 0.5 * (1 + tl.math.erf(inner))
    if WRONG == "half of it":
        share = share - 0.5
    tl.store(y + i, (value * share).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(dx, dy, x, n, TANH: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    cotangent = tl.load(dy + i, mask=inside).to(tl.float32)
    if WRONG == "cotangent forgotten":
        cotangent = tl.full((BLOCK,), 1.0, tl.float32)
    value = tl.load(x + i, mask=inside).to(tl.float32)
    if (WRONG == "slope of the other form") != TANH:
        share = tl.sigmoid((value + value * value * value * CUBIC) * (2 * ROOT))
        bend = 2 * value * share * (1 - share) * ROOT
        three = 3
        if WRONG == "cubic once":
            three = 1
        if WRONG == "density without its norm":
            bend = bend / ROOT
        term = bend * (1 + value * value * (three * CUBIC))
    else:
        share = 0.5 * (1 + tl.math.erf(value * SQRT_HALF))
        term = value * tl.exp(-0.5 * value * value)
        if WRONG != "density without its norm":
            term = term * DENSITY
    if WRONG == "no density":
        term = term * 0
    if WRONG == "share forgotten":
        share = share * 0
    if WRONG == "NaN cleared":
        term = tl.where(value == value, term, 0.0)
        share = tl.where(value == value, share, 0.0)
    tl.store(dx + i, (cotangent * (share + term)).to(dx.dtype.element_ty), mask=inside)
