"""SwiGLU and both GELUs: within the bound of float32 arithmetic, quiet at the extremes, and NaN stays where it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.ball import ELEMENTARY, Ball
from minift.conformance.bounds import unit_roundoff
from minift.conformance.operation import Operation, rounded, storage
from minift.nn import mlp

KINDS = ("normal", "large", "tiny", "extreme")
EXTREME = np.array([0, -0.0, 1e-30, -1e-30, 30, -30, 88.7, -88.7, 89, -89, 200, -200, 1e4, -1e4, 1e18, -1e18])
C = math.sqrt(2 / math.pi)


class Numbers(NamedTuple):
    shape: tuple[int, ...]
    kind: str = "normal"
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (or gate), up, dy. In float16 nothing beyond ±1e4, whose products it can hold."""
    rng = np.random.default_rng(case.seed)
    x, up, dy = rng.standard_normal((3, *case.shape))
    if case.kind == "large":
        x = x * 8
    elif case.kind == "tiny":
        x = x * 1e-6
    elif case.kind == "extreme":
        x = np.resize(rng.permutation(EXTREME), case.shape)
    return np.clip(x, -1e4, 1e4) if case.dtype == "float16" else x, up, dy


def swiglu_oracle(number, dy, gate, up):
    dy, g, u = map(number, (dy, gate, up))
    s = 0.5 * (0.5 * g).tanh() + 0.5
    silu = g * s
    return silu * u, dy * u * (s + silu * (1 - s)), dy * silu


def phi(x: Ball) -> Ball:
    """Φ(x), from `math.erfc`, and what rounds: x/√2 and √2 (half of erf'(z) z, three times), half of what erf may be
    off, two exact products, one sum, one rounding."""
    exact = np.asarray(np.frompyfunc(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)), 1, 1)(x.value)).astype(float)
    u = unit_roundoff(x.dtype.type)
    z = np.minimum(np.abs(x.value) / math.sqrt(2), 30)
    moved = z * np.exp(-z * z) / math.sqrt(math.pi) * 3 * u
    return Ball(exact, x.dtype, u * exact + 2 * moved + ELEMENTARY / 2 * u + 2 * u)


def gelu_oracle(number, dy, x):
    dy_, x_ = number(dy), number(x)
    cdf = phi(x_)
    capped = number(np.clip(x, -60, 60))  # beyond, the density is 0, and x times it too
    pdf = (capped * capped * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
    return x_ * cdf, dy_ * (cdf + capped * pdf)


def gelu_tanh_oracle(number, dy, x):
    dy_, x_ = number(dy), number(x)
    capped = number(np.clip(x, -60, 60))  # beyond, tanh is ±1 and 1 − t² is 0
    t = ((capped + 0.044715 * capped * capped * capped) * C).tanh()
    dz = C * (1 + 3 * 0.044715 * capped * capped)
    return 0.5 * x_ * (1 + t), dy_ * (0.5 * (1 + t) + 0.5 * capped * (1 - t * t) * dz)


def cases(dtypes):
    shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple) | st.tuples(st.integers(1, 130))
    return st.builds(Numbers, shapes, st.sampled_from(KINDS), st.sampled_from(sorted(dtypes)), st.integers(0, 99))


FIXED = (
    *(Numbers((4, 8), kind, dtype) for kind in KINDS for dtype in ("float32", "float16")),
    *(Numbers((2, 3, 7), kind, dtype, 1) for kind in ("normal", "large") for dtype in ("float64", "bfloat16")),
    Numbers((1025,), "large", seed=2),
    Numbers((2049,), "normal", "float16", 3),
    Numbers((1,), "extreme"),
    Numbers((0, 3)),
)


def _properties(oracle: Callable, n_arguments: int) -> tuple:
    def given(case: Numbers) -> tuple[list[np.ndarray], np.ndarray]:
        *args, dy = arrays(case)
        return args[:n_arguments], dy

    def is_within_its_bound(f, case):
        common.within(f, oracle, *given(case), case.dtype)

    def changes_nothing(f, case):
        common.changes_nothing(f, *given(case), case.dtype)

    def any_layout(f, case):
        common.any_layout(f, oracle, *given(case), case.dtype)

    def pullback_is_the_transpose_of_the_derivative(f, case):
        if case.dtype == "float64" and case.kind != "extreme":
            common.is_differentiated(f, given(case)[0], np.random.default_rng(case.seed))

    def is_quiet_at_the_extremes(f, case):
        """No overflow on either side: 0 below and the identity above, in both passes."""
        type_ = storage(case.dtype)
        top = 1e4 if case.dtype == "float16" else 1e18
        x = rounded(np.array([-top, -2e3, -1e3, 1e3, 2e3, top]), case.dtype)
        dy: np.ndarray = np.array([-0.5, 2, -2, 0.25, -4, 0.5], type_)  # powers of two: products are exact
        y, vjp = f(*[x, np.ones_like(x)][:n_arguments])
        wanted = [np.maximum(x, 0), dy * (x > 0), dy * np.maximum(x, 0)]
        for what, found, exact in zip(("y", "dx", "dup"), (y, *common.as_tuple(vjp(dy))), wanted, strict=False):
            assert np.array_equal(found, exact.astype(type_)), f"{what} of {x}: {found}, needed {exact}"

    def nan_stays_where_it_is(f, case):
        """One broken activation breaks one result, and the others are as without it."""
        x: np.ndarray = np.array([1.0, np.nan, -2.0], storage(case.dtype))
        dy: np.ndarray = np.array([2, 3, 4], storage(case.dtype))
        results = []
        for value in (x, x[[0, 0, 2]]):
            y, vjp = f(*[value, np.ones_like(x)][:n_arguments])
            results.append((y, *common.as_tuple(vjp(dy))))
        for found, clean in zip(*results, strict=True):
            assert np.isnan(found).tolist() == [False, True, False], f"{found}, of {x}"
            assert np.array_equal(found[[0, 2]], clean[[0, 2]]), f"{found} beside NaN, {clean} without it"

    return (
        is_within_its_bound,
        changes_nothing,
        any_layout,
        pullback_is_the_transpose_of_the_derivative,
        is_quiet_at_the_extremes,
        nan_stays_where_it_is,
    )


GELU_TAKES = "f(x (...)) -> y (...), vjp; vjp(dy) -> dx"

OPERATIONS = (
    Operation(
        "mlp.swiglu",
        mlp.swiglu,
        "f(gate (..., d), up (..., d)) -> y (..., d), vjp; vjp(dy) -> dgate, dup",
        cases,
        FIXED,
        _properties(swiglu_oracle, 2),
    ),
    Operation("mlp.gelu", mlp.gelu, GELU_TAKES, cases, FIXED, _properties(gelu_oracle, 1)),
    Operation("mlp.gelu_tanh", mlp.gelu_tanh, GELU_TAKES, cases, FIXED, _properties(gelu_tanh_oracle, 1)),
)
