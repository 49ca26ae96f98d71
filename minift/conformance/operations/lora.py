"""LoRA: within the bound of its arithmetic, with the very mask of `nn.dropout`, and with the laws of B A.

In 16 bits four intermediate results may be kept in 16 bits, as every library does: the base's product in either pass,
h, and the cotangent of h. The oracle rounds them (`kept`) and so allows for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.ball import Ball
from minift.conformance.gradients import check_vjp
from minift.conformance.operation import Operation
from minift.nn.dropout import dropout, uniform
from minift.peft import lora

SCALING = 1.75  # neither 1 nor its own square
KEY = (1 << 63) + 12345
KINDS = ("normal", "wide", "signs")


class Layer(NamedTuple):
    rows: tuple[int, ...]
    d_in: int
    d_out: int
    r: int
    p: float = 0.0
    kind: str = "normal"
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Layer) -> tuple[list[np.ndarray], np.ndarray]:
    """x, W, A, B and dy. "signs": W of −1, 0 and 1, which NF4 holds exactly."""
    rng = np.random.default_rng(case.seed)
    shapes = (*case.rows, case.d_in), (case.d_out, case.d_in), (case.r, case.d_in), (case.d_out, case.r)
    args = [rng.standard_normal(shape) for shape in shapes]
    if case.kind == "wide":
        args[0] *= 2.0 ** rng.integers(-5, 5, args[0].shape)
    elif case.kind == "signs":
        args[1] = rng.integers(-1, 2, args[1].shape).astype(np.float64)
    return args, rng.standard_normal((*case.rows, case.d_out))


def mask(case: Layer) -> np.ndarray:
    shape = *case.rows, case.d_in
    return (uniform(KEY, np.arange(np.prod(shape, dtype=int), dtype=np.uint64)) > np.float32(case.p)).reshape(shape)


def kept(ball: Ball, dtype: str) -> Ball:
    """Kept in memory in this type, and computed with again."""
    return Ball(ball.value, ball.dtype, ball.stored(dtype).radius)


def over_rows(x: Ball) -> Ball:
    return x.reshape(-1, x.value.shape[-1])


def oracle(case: Layer):
    m, factor = (mask(case), 1 / (1 - case.p)) if case.p else (np.array(True), 1.0)

    def balls(number, dy, x, W, A, B):
        dy, x, W, A, B = map(number, (dy, x, W, A, B))
        x_tilde = x.where(m) * factor
        h = kept((x_tilde @ A.T) * SCALING, case.dtype)
        y = kept(x @ W.T, case.dtype) + h @ B.T
        dh = kept(dy @ B, case.dtype) * SCALING
        dx = kept(dy @ W, case.dtype) + ((dh @ A) * factor).where(m)
        return y, dx, None, over_rows(dh).T @ over_rows(x_tilde), over_rows(dy).T @ over_rows(h)

    return balls


def given(case: Layer):
    args, dy = arrays(case)
    return args, dy, case.dtype


def settings(f, case: Layer):
    return lambda x, W, A, B: f(x, W, A, B, SCALING, case.p, KEY)


def is_within_its_bound(f, case):
    args, dy, dtype = given(case)
    common.within(settings(f, case), oracle(case), args, dy, dtype)


def changes_nothing(f, case):
    common.changes_nothing(settings(f, case), *given(case))


def any_layout(f, case):
    args, dy, dtype = given(case)
    common.any_layout(settings(f, case), oracle(case), args, dy, dtype)


def the_base_has_no_gradient(f, case):
    """Nothing is formed for W, and a fresh adapter (B = 0) shows the base: no bit of A is seen, and only B learns."""
    args, dy, dtype = given(case)
    dy, x, W, A, B = common.prepared([dy, *args], dtype)
    y, vjp = settings(f, case)(x, W, A, 0 * B)
    other, _ = settings(f, case)(x, W, 2 * A, 0 * B)
    common.same_bits(other + 0, y + 0, "y of a fresh adapter with another A")
    _, dW, dA, dB = vjp(dy)
    assert dW is None, "W is frozen, and got a gradient"
    assert not dA.any(), "B is zero, and A has a gradient that is not"
    assert dB.any() or not (x.size and B.size), "B has no gradient, so nothing would ever be learned"


def drops_what_dropout_drops(f, case):
    """With A = B = 1 and p = 1/2 the detour is dropout itself, to the bit, in both passes; the base drops nothing."""
    args, _, dtype = given(case)
    x, rng = args[0], np.random.default_rng(case.seed)
    dy = rng.standard_normal(x.shape)
    unit = np.eye(case.d_in)
    x, dy, unit = common.prepared([x, dy, unit], dtype)
    dropped, dropout_vjp = dropout(x, 0.5, KEY)
    y, vjp = f(x, 0 * unit, unit, unit, 1.0, 0.5, KEY)
    common.same_bits(y + 0, dropped + 0, "y of the detour alone")
    common.same_bits(vjp(dy)[0] + 0, dropout_vjp(dy) + 0, "dx of the detour alone")
    y, vjp = f(x, unit, unit, 0 * unit, 1.0, 0.5, KEY)
    common.same_bits(y + 0, x + 0, "y of the base alone")
    common.same_bits(vjp(dy)[0] + 0, dy + 0, "dx of the base alone")
    y, _ = f(x, 0 * unit, unit, unit, 1.0, 0.5, None)
    common.same_bits(y + 0, x + 0, "y without a key")


def scales_exactly(f, case):
    """Doubling is exact, so twice the scaling is twice the detour and its gradients, to the bit; and so is half of A
    beside twice of B the same layer (one of the changes of basis, B G and G⁻¹ A, that leave B A what it is)."""
    if case.dtype in ("float16", "bfloat16"):
        return  # halves of small numbers are not exact
    args, dy, dtype = given(case)
    dy, x, W, A, B = common.prepared([dy, *args], dtype)
    zero = 0 * W
    (y, vjp), (twice, twice_vjp) = (f(x, zero, A, B, s * SCALING, case.p, KEY) for s in (1, 2))
    common.same_bits(twice, 2 * y, "y with twice the scaling")
    for name, found, once in zip(("dx", "dW", "dA", "dB"), twice_vjp(dy), vjp(dy), strict=True):
        if once is not None:
            common.same_bits(found, 2 * once, f"{name} with twice the scaling")
    (y, vjp), (gauged, gauged_vjp) = (settings(f, case)(x, W, g * A, B / g) for g in (1, 0.5))
    common.same_bits(gauged, y, "y with half of A and twice B")
    (dx, _, dA, dB), (dx_gauged, _, dA_gauged, dB_gauged) = vjp(dy), gauged_vjp(dy)
    common.same_bits(dx_gauged, dx, "dx with half of A and twice B")
    common.same_bits(dA_gauged, 2 * dA, "dA with half of A and twice B")
    common.same_bits(dB_gauged, dB / 2, "dB with half of A and twice B")


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64" and case.kind == "normal":
        rng = np.random.default_rng(case.seed)
        check_vjp(settings(f, case), *given(case)[0], rng=rng, frozen=[1])


def cases(dtypes):
    rows = st.tuples(st.integers(0, 40)) | st.tuples(st.integers(1, 4), st.integers(1, 9)) | st.just(())
    wide, r, p = st.integers(1, 140), st.integers(1, 40), st.sampled_from((0.0, 0.25, 0.5))
    kinds, dtype = st.sampled_from(KINDS), st.sampled_from(sorted(dtypes))
    return st.builds(Layer, rows, wide, wide, r, p, kinds, dtype, st.integers(0, 99))


FIXED = (
    Layer((5,), 7, 6, 3, 0.25),
    Layer((), 9, 5, 1),
    Layer((2, 17), 70, 40, 17, 0.3, "wide"),
    Layer((0,), 5, 4, 2, 0.3),
    Layer((3,), 8, 66, 4, 0.0, "signs"),
    *(Layer((35,), 12, 10, 3, p, kind, dtype) for dtype in ("float16", "bfloat16") for p, kind in ((0.4, "normal"),)),
    Layer((2, 3), 70, 9, 5, 0.0, "wide", "float16"),
    Layer((2, 3), 6, 5, 3, 0.4, "normal", "float64"),
    Layer((4,), 5, 7, 1, 0.0, "normal", "float64"),
)

PROPERTIES = (
    is_within_its_bound,
    changes_nothing,
    any_layout,
    the_base_has_no_gradient,
    drops_what_dropout_drops,
    scales_exactly,
    pullback_is_the_transpose_of_the_derivative,
)

OPERATIONS = (
    Operation(
        "lora.forward",
        lora.forward,
        "f(x (..., in), W (out, in), A (r, in), B (out, r), scaling, p, dropout_key) -> y (..., out), vjp; "
        "vjp(dy) -> dx, None, dA, dB",
        cases,
        FIXED,
        PROPERTIES,
    ),
)
