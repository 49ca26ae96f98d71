"""Several adapters in one batch: every row as if it were alone with its own adapter."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.gradients import check_vjp
from minift.conformance.operation import Operation
from minift.conformance.operations.lora import kept
from minift.peft import batched


class Batch(NamedTuple):
    users: tuple[int, ...]  # an adapter a row, −1 for none
    ranks: tuple[int, ...]  # of the adapters
    d_in: int = 7
    d_out: int = 5
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Batch) -> tuple[list[np.ndarray], np.ndarray]:
    """x, W, the stack's A and B, and dy."""
    rng = np.random.default_rng(case.seed)
    x, W = rng.standard_normal((len(case.users), case.d_in)), rng.standard_normal((case.d_out, case.d_in))
    adapters = [(rng.standard_normal((r, case.d_in)), rng.standard_normal((case.d_out, r)), 1.0) for r in case.ranks]
    stack = batched.stack(adapters)
    return [x, W, stack.A, stack.B], rng.standard_normal((len(case.users), case.d_out))


def scaling(case: Batch) -> np.ndarray:
    """Neither 1 nor alike."""
    return (1.75 - 0.5 * np.arange(len(case.ranks))).astype(np.float64 if case.dtype == "float64" else np.float32)


def settings(f, case: Batch):
    index = np.array(case.users, np.int64)
    return lambda x, W, A, B: f(x, W, A, B, scaling(case), index)


def oracle(case: Batch):
    """Each adapter over all rows, and then zeros where a row has another."""

    def balls(number, dy, x, W, A, B):
        mine = [np.array(case.users)[:, None] == a for a in range(len(A))]
        dy, x, W = map(number, (dy, x, W))
        y, dx, dAs, dBs = kept(x @ W.T, case.dtype), kept(dy @ W, case.dtype), [], []
        for A_a, B_a, s, of_a in zip(map(number, A), map(number, B), scaling(case), mine, strict=True):
            h = kept(((x @ A_a.T) * float(s)).where(of_a), case.dtype)
            dh = kept(((dy @ B_a) * float(s)).where(of_a), case.dtype)
            y, dx = y + h @ B_a.T, dx + dh @ A_a
            dAs.append(dh.T @ x)
            dBs.append(dy.T @ h)
        return y, dx, None, stacked(dAs), stacked(dBs)

    return balls


def stacked(balls):
    type_ = balls[0].dtype
    value, radius = (np.stack([getattr(b, part) for b in balls]) for part in ("value", "radius"))
    return type(balls[0])(value, type_, radius)


def given(case: Batch):
    args, dy = arrays(case)
    return args, dy, case.dtype


def is_within_its_bound(f, case):
    args, dy, dtype = given(case)
    common.within(settings(f, case), oracle(case), args, dy, dtype)


def changes_nothing(f, case):
    common.changes_nothing(settings(f, case), *given(case))


def any_layout(f, case):
    args, dy, dtype = given(case)
    common.any_layout(settings(f, case), oracle(case), args, dy, dtype)


def users_do_not_mix(f, case):
    """The first row has the same bits, in both passes, and its adapter the same gradient, if the others are NaN."""
    args, dy, dtype = given(case)
    dy, x, W, A, B = common.prepared([dy, *args], dtype)
    if not case.users:
        return
    first = case.users[0]
    others, not_mine = np.array(case.users) != first, np.arange(len(A)) != first
    y, vjp = settings(f, case)(x, W, A, B)
    x_nan, dy_nan, A_nan, B_nan = (part.copy() for part in (x, dy, A, B))
    x_nan[others] = dy_nan[others] = A_nan[not_mine] = B_nan[not_mine] = np.nan
    y_nan, vjp_nan = settings(f, case)(x_nan, W, A_nan, B_nan)
    common.same_bits(y_nan[:1], y[:1], "y of the first row, beside NaN")
    (dx, dW, dA, dB), (dx_nan, _, dA_nan, dB_nan) = vjp(dy), vjp_nan(dy_nan)
    common.same_bits(dx_nan[:1], dx[:1], "dx of the first row, beside NaN")
    assert dW is None, "W is frozen, and got a gradient"
    if first >= 0:
        common.same_bits(dA_nan[first], dA[first], "dA of the first row's adapter, beside NaN")
        common.same_bits(dB_nan[first], dB[first], "dB of the first row's adapter, beside NaN")
    for unused in set(range(len(A))) - set(case.users):
        assert not dA[unused].any() and not dB[unused].any(), f"adapter {unused} is not used, and has a gradient"


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64" and case.users:
        rng = np.random.default_rng(case.seed)
        check_vjp(settings(f, case), *given(case)[0], rng=rng, frozen=[1])


def _cases(dtypes):
    def of(ranks):
        index = st.lists(st.integers(-1, len(ranks) - 1), max_size=40).map(tuple)
        width, dtype = st.integers(1, 140), st.sampled_from(sorted(dtypes))
        return st.builds(Batch, index, st.just(ranks), width, width, dtype, st.integers(0, 99))

    return st.lists(st.integers(1, 40), min_size=1, max_size=5).map(tuple).flatmap(of)


FIXED = (
    Batch((2, -1, 0, 2, 0, 2), (3, 1, 5)),
    Batch((), (2, 1)),
    Batch((-1, -1), (2,)),
    Batch((0,) * 17 + (1,) * 16 + (-1,) * 3 + (0,) * 5, (2, 4), 70, 66),
    Batch((1, 0, 1), (33, 2), 9, 130, "float16"),
    *(Batch((3, 1, 3, -1, 0, 3), (2, 1, 4, 3), dtype=dtype) for dtype in ("float64", "float16", "bfloat16")),
)

PROPERTIES = (
    is_within_its_bound,
    changes_nothing,
    any_layout,
    users_do_not_mix,
    pullback_is_the_transpose_of_the_derivative,
)


def reference(x, W, A, B, s, index):
    return batched.forward(x, W, batched.Stack(A, B, s), index)


OPERATIONS = (
    Operation(
        "batched.forward",
        reference,
        "f(x (N, in), W (out, in), A (n, r, in), B (n, out, r), scaling (n,), index (N,)) -> y (N, out), vjp; "
        "vjp(dy) -> dx, None, dA, dB",
        _cases,
        FIXED,
        PROPERTIES,
    ),
)
