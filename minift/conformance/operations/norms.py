"""RMSNorm and LayerNorm: within the bound of float32 arithmetic, on rows that show each term of the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.operation import Operation
from minift.nn import norms

EPS = 3e-5  # not the default
KINDS = ("normal", "tiny", "shifted", "far", "outlier", "wide")


class Rows(NamedTuple):
    shape: tuple[int, ...]
    kind: str = "normal"
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, weight, bias and dy. |x| as small as √ε, a mean far from 0, an outlier; gains are not one."""
    rng = np.random.default_rng(case.seed)
    x = rng.standard_normal(case.shape)
    if case.kind == "tiny":
        x *= 3e-3
    elif case.kind == "shifted":
        x += 5
    elif case.kind == "far":
        x += 1000
    elif case.kind == "outlier":
        x[..., :1] = 100
    elif case.kind == "wide":
        x *= 2.0 ** rng.integers(-6, 6, case.shape)
    gain, shift = rng.standard_normal((2, case.shape[-1]))
    return x, gain, shift, rng.standard_normal(case.shape)


def rms_oracle(number, dy, x, gain):
    dy, x, gain = map(number, (dy, x, gain))
    inv_rms = 1 / ((x * x).mean() + EPS).sqrt()
    x_hat, dx_hat = x * inv_rms, dy * gain
    dx = inv_rms * (dx_hat - x_hat * (dx_hat * x_hat).mean())
    return x_hat * gain, dx, over_rows(dy * x_hat)


def layer_oracle(number, dy, x, gain, shift):
    dy, x, gain, shift = map(number, (dy, x, gain, shift))
    centered = x - x.mean()
    inv_std = 1 / ((centered * centered).mean() + EPS).sqrt()
    x_hat, dx_hat = centered * inv_std, dy * gain
    dx = inv_std * (dx_hat - dx_hat.mean() - x_hat * (dx_hat * x_hat).mean())
    return x_hat * gain + shift, dx, over_rows(dy * x_hat), over_rows(dy)


def over_rows(x):
    return x.reshape(-1, x.value.shape[-1]).sum(0).reshape(-1)


def cases(dtypes):
    shapes = st.tuples(st.integers(0, 3), st.integers(1, 130)) | st.tuples(st.integers(1, 5))
    return st.builds(Rows, shapes, st.sampled_from(KINDS), st.sampled_from(sorted(dtypes)), st.integers(0, 99))


FIXED = (
    *(Rows((3, d), kind, seed=d) for d, kind in ((1, "normal"), (7, "tiny"), (33, "outlier"), (64, "shifted"))),
    Rows((2, 3, 65), "wide"),
    Rows((9,), "far"),
    Rows((0, 5)),
    *(Rows((9, 8), kind, dtype) for kind in ("normal", "tiny") for dtype in ("float32", "float16")),
    *(Rows((2, 3, 17), kind, dtype) for kind in ("tiny", "shifted") for dtype in ("float64", "float16", "bfloat16")),
    Rows((3, 6), "normal", "float64"),
)


def _properties(oracle: Callable, n_parameters: int) -> tuple:
    """For a norm with this many parameters beside x."""

    def given(case: Rows) -> tuple[list[np.ndarray], np.ndarray]:
        *args, dy = arrays(case)
        return args[: 1 + n_parameters], dy

    def with_eps(f):
        return lambda *args: f(*args, EPS)

    def is_within_its_bound(f, case):
        """y and every cotangent are as near to the exact ones as float32 arithmetic promises, then rounded once."""
        common.within(with_eps(f), oracle, *given(case), case.dtype)

    def changes_nothing(f, case):
        """Arguments and cotangents keep their bytes in both passes, and a second call gives the same bits."""
        common.changes_nothing(with_eps(f), *given(case), case.dtype)

    def any_layout(f, case):
        """Strided, transposed and misaligned arguments, with NaN in the gaps, give the same."""
        common.any_layout(with_eps(f), oracle, *given(case), case.dtype)

    def pullback_is_the_transpose_of_the_derivative(f, case):
        """Central differences along random directions, in float64."""
        if case.dtype == "float64" and case.kind in ("normal", "shifted"):  # the others are too curved for differences
            common.is_differentiated(with_eps(f), given(case)[0], np.random.default_rng(case.seed))

    def rows_do_not_mix(f, case):
        """The first row's result and cotangent are the same bits if the other rows are NaN."""
        (x, *rest), dy = given(case)
        x, *rest, dy = common.prepared([x, *rest, dy], case.dtype)
        if x.ndim > 1 and len(x) > 1:
            y, vjp = with_eps(f)(x, *rest)
            poisoned, dpoisoned = x.copy(), dy.copy()
            poisoned[1:] = dpoisoned[1:] = np.nan
            y_beside_nan, vjp_beside_nan = with_eps(f)(poisoned, *rest)
            common.same_bits(y_beside_nan[:1], y[:1], "y of the first row, beside rows of NaN")
            dx, dx_beside_nan = vjp(dy)[0], vjp_beside_nan(dpoisoned)[0]
            common.same_bits(dx_beside_nan[:1], dx[:1], "dx of the first row, beside rows of NaN")

    return (
        is_within_its_bound,
        changes_nothing,
        any_layout,
        rows_do_not_mix,
        pullback_is_the_transpose_of_the_derivative,
    )


TAKES = "f(x (..., d), weight (d,){}, eps) -> y (..., d), vjp; vjp(dy) -> dx, dweight{}"

OPERATIONS = (
    Operation("norms.rms_norm", norms.rms_norm, TAKES.format("", ""), cases, FIXED, _properties(rms_oracle, 1)),
    Operation(
        "norms.layer_norm",
        norms.layer_norm,
        TAKES.format(", bias (d,)", ", dbias"),
        cases,
        FIXED,
        _properties(layer_oracle, 2),
    ),
)
