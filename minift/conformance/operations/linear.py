"""The linear map: every bit in whole numbers, within γ of the length of its sums otherwise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.ball import Ball
from minift.conformance.operation import Operation, storage
from minift.nn import linear


class Product(NamedTuple):
    rows: tuple[int, ...]
    d_in: int
    d_out: int
    bias: bool = True
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Product, whole: bool = False) -> tuple[list[np.ndarray], np.ndarray]:
    """x, weight and perhaps bias; dy. Whole numbers up to 4: sums of dozens of their products are exact in 16 bits."""
    rng = np.random.default_rng(case.seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.integers(-4, 5, shape).astype(float) if whole else rng.standard_normal(shape)

    args = [draw(*case.rows, case.d_in), draw(case.d_out, case.d_in)] + [draw(case.d_out)] * case.bias
    return args, draw(*case.rows, case.d_out)


def oracle(number, dy, x, W, b=None):
    x, W, dy = map(number, (x, W, dy))
    y = x @ W.T if b is None else x @ W.T + number(b)
    flat_dy, flat_x = (a.reshape(-1, a.value.shape[-1]) for a in (dy, x))
    dx, dW, db = dy @ W, flat_dy.T @ flat_x, flat_dy.sum(0).reshape(-1)
    return (y, dx, dW) if b is None else (y, dx, dW, db)


def without_none(f):
    """Two arguments, two cotangents: the third is None, or is left out."""

    def called(*args):
        y, vjp = f(*args)

        def checked(dy):
            cotangents = vjp(dy)
            if len(args) == 2 and len(cotangents) == 3:
                assert cotangents[2] is None, "there is no bias to have a cotangent"
            return cotangents[: len(args)]

        return y, checked

    return called


def is_exact_on_whole_numbers(f, case):
    args, dy = arrays(case, whole=True)
    args, dy = [a.astype(storage(case.dtype)) for a in args], dy.astype(storage(case.dtype))
    y, vjp = without_none(f)(*args)
    balls = oracle(lambda a: Ball(a, np.float64), dy.astype(float), *(a.astype(float) for a in args))
    for what, found, ball in zip(("y", "dx", "dweight", "dbias"), (y, *vjp(dy)), balls, strict=False):
        common.same_bits(found + 0, ball.value.astype(found.dtype) + 0, what)  # + 0: no −0


def is_within_its_bound(f, case):
    common.within(without_none(f), oracle, *arrays(case), case.dtype)


def any_layout(f, case):
    common.any_layout(without_none(f), oracle, *arrays(case), case.dtype)


def changes_nothing(f, case):
    common.changes_nothing(f, *arrays(case), case.dtype)


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64":
        common.is_differentiated(without_none(f), arrays(case)[0], np.random.default_rng(case.seed))


def cases(dtypes):
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    dtype = st.sampled_from(sorted(dtypes))
    return st.builds(Product, shapes, st.integers(1, 70), st.integers(1, 9), st.booleans(), dtype, st.integers(0, 99))


FIXED = (
    Product((2, 3), 5, 7),
    Product((4,), 3, 3),
    Product((), 6, 2, bias=False),
    Product((3, 1, 2), 1, 1),
    Product((0, 3), 2, 4),
    Product((2, 2), 4, 4, False, "float64", 1),
    Product((5,), 33, 6, True, "float64", 2),
    Product((5,), 33, 6, True, "float16", 2),
    Product((5,), 33, 6, True, "bfloat16", 2),
)

OPERATIONS = (
    Operation(
        "linear.linear",
        linear.linear,
        "f(x (..., d_in), weight (d_out, d_in), bias (d_out,)) -> y (..., d_out), vjp; vjp(dy) -> dx, dweight, dbias",
        cases,
        FIXED,
        (
            is_exact_on_whole_numbers,
            is_within_its_bound,
            any_layout,
            changes_nothing,
            pullback_is_the_transpose_of_the_derivative,
        ),
    ),
)
