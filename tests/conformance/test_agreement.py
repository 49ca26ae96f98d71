"""Two functions that should agree: what differs is found, made small, and written as it would be on paper."""

import numpy as np
import pytest
from hypothesis import strategies as st

from minift.conformance import Counterexample, check, matrices
from minift.peft import lora

SIZES = {"d_out": st.integers(1, 4096), "d_in": st.integers(1, 4096), "r": st.integers(1, 64)}
MATRICES = {"B": matrices(2, 1), "A": matrices(1, 3)}


def product(B, A):
    return B @ A


def quotient(x):
    return x / 3


@pytest.mark.parametrize(
    ("mine", "shown"),
    [
        (lambda d_out, d_in, r: d_out * r, "d_out = 1, d_in = 1, r = 1: 1, needed 2"),
        (lambda d_out, d_in, r: r * (d_out + d_in) + (d_in > 9), "d_out = 1, d_in = 10, r = 1: 12, needed 11"),
        (lambda d_out, d_in, r: None, "None, needed 2"),
        (lambda d_out, d_in: 0, "positional arguments"),
    ],
)
def test_the_smallest_difference_is_shown(mine, shown):
    with pytest.raises(Counterexample) as found:
        check(lora.trainable_parameters, mine, inputs=SIZES)
    assert shown in str(found.value)


@pytest.mark.parametrize(
    ("mine", "shown"),
    [
        (lambda B, A: A.T @ B.T, "A = [[0., 0., 0.]]: shape (3, 2), needed (2, 3)"),
        (lambda B, A: np.abs(B) @ A, "needed [["),
    ],
)
def test_arrays_are_compared_by_shape_and_value(mine, shown):
    with pytest.raises(Counterexample) as found:
        check(product, mine, inputs=MATRICES)
    assert shown in str(found.value)


def test_what_agrees_passes():
    def mine(B, A):
        result = np.einsum("or,ri->oi", B.astype(np.float64), A)
        B[:] = 0  # a copy of its own: this spoils nothing
        return result

    assert check(product, mine, inputs=MATRICES, examples=40).cases == 40


@pytest.mark.parametrize(("error", "passes"), [(5e-7, True), (2e-6, False)])
def test_a_millionth_is_rounding(error, passes):
    def mine(x):
        return x / 3 * (1 + error)

    inputs = {"x": st.floats(1, 2)}
    if passes:
        check(quotient, mine, inputs=inputs)
    else:
        with pytest.raises(Counterexample):
            check(quotient, mine, inputs=inputs)


def test_results_are_counted():
    def both(x):
        return x, 2 * x

    with pytest.raises(Counterexample, match="needed 2 results"):
        check(both, lambda x: x, inputs={"x": st.integers(0, 9)})
    with pytest.raises(Counterexample, match="needed 0"):
        check(both, lambda x: (x, x + 1), inputs={"x": st.integers(0, 9)})


def test_inputs_belong_to_functions():
    with pytest.raises(ValueError, match="draws its own"):
        check("nf4.quantize", product, inputs=MATRICES)
    with pytest.raises(ValueError, match="needed a hypothesis strategy"):
        check(product, product)
