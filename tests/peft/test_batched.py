"""Several adapters in one batch: both forms, a single adapter beside them, and what every implementation satisfies."""

import numpy as np
import pytest

from minift.conformance.operations import batched as operation
from minift.nn.weight import Frozen
from minift.peft import batched, lora
from minift.quant import nf4
from nn.checks import kill_matrix

SHAPES = [((6,), (6,)), ((2, 3), (2,)), ((2, 3), (2, 3)), ((2, 3), ())]


@pytest.fixture
def adapters(rng):
    """Of different rank and scaling."""
    return [(rng.standard_normal((r, 7)), rng.standard_normal((5, r)), s) for r, s in ((3, 1.75), (1, 0.5), (4, -2.0))]


@pytest.mark.parametrize("prop", operation.PROPERTIES, ids=lambda p: p.__name__)
def test_properties(prop):
    for case in operation.FIXED:
        if case.dtype in ("float32", "float64"):
            prop(operation.reference, case)


def spoiled(what):
    """The reference with one mistake."""

    def wrong(x, W, A, B, s, index):
        if what == "scales exchanged":
            s = s[::-1]
        if what == "adds up all":  # the detours of all adapters, zero for those that are not meant
            y, vjp = operation.reference(x, W, A, B, s, index)
            return y + 0 * sum(x @ A_a.T @ B_a.T for A_a, B_a in zip(A, B, strict=True)), vjp
        if what == "rows in memory":
            x = np.ascontiguousarray(
                np.lib.stride_tricks.as_strided(x, x.shape, (x.shape[-1] * x.itemsize, x.itemsize))
            )
        y, vjp = operation.reference(x, W, A, B, s, index)

        def wrong_vjp(dy):
            dx, dW, dA, dB = vjp(dy)
            if what == "uses up dy":
                dy *= 2
            return (dx, dy.T @ x, dA, dB) if what == "base learns" else (dx, dW, dA + (what == "dA moved"), dB)

        return y, wrong_vjp

    wrong.__name__ = what
    return wrong


def test_every_property_rejects_something():
    wrong = ["scales exchanged", "adds up all", "rows in memory", "uses up dy", "base learns", "dA moved"]
    kill_matrix(operation.PROPERTIES, [spoiled(what) for what in wrong], operation.FIXED[:1] + operation.FIXED[5:6])


@pytest.mark.parametrize(("rows", "of"), SHAPES)
def test_both_forms_and_one_adapter_by_itself(rows, of, adapters, rng):
    x, W, index = rng.standard_normal((*rows, 7)), rng.standard_normal((5, 7)), rng.integers(-1, 3, of)
    stack = batched.stack(adapters)
    y, vjp = batched.forward(x, W, stack, index)
    np.testing.assert_allclose(y, batched.forward_1(x, W, stack, index), rtol=1e-13, atol=1e-13)
    dy = rng.standard_normal(y.shape)
    dx = vjp(dy)[0]
    for row, a in enumerate(batched.of_rows(index, x.shape, 3)):
        x_row, dy_row = (part.reshape(-1, part.shape[-1])[row] for part in (x, dy))
        alone, alone_vjp = lora.forward(x_row[None], W, *adapters[a]) if a >= 0 else Frozen(W).linear(x_row[None])
        np.testing.assert_allclose(y.reshape(-1, 5)[row], alone[0], rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(dx.reshape(-1, 7)[row], alone_vjp(dy_row[None])[0][0], rtol=1e-13, atol=1e-13)


def test_the_gradient_of_an_adapter_is_that_of_its_rows_alone(adapters, rng):
    """And zero where the stack was filled up, and for whoever was not used."""
    x, W, index = rng.standard_normal((6, 7)), rng.standard_normal((5, 7)), np.array([2, 0, -1, 0, 2, 0])
    dy = rng.standard_normal((6, 5))
    _, dW, dA, dB = batched.forward(x, W, batched.stack(adapters), index)[1](dy)
    assert dW is None and not dA[1].any() and not dB[1].any()
    _, alone_vjp = lora.forward(x[index == 0], W, *adapters[0])
    _, _, dA_alone, dB_alone = alone_vjp(dy[index == 0])
    np.testing.assert_allclose(dA[0, :3], dA_alone, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(dB[0, :, :3], dB_alone, rtol=1e-13, atol=1e-13)
    assert not dA[0, 3:].any() and not dB[0, :, 3:].any()


def test_over_nf4(adapters, rng):
    q = nf4.quantize(rng.standard_normal((5, 7)))
    x, index = rng.standard_normal((6, 7)), np.array([2, 0, -1, 0, 2, 1])
    y, _ = batched.forward(x, q, batched.stack(adapters), index)
    np.testing.assert_array_equal(y, batched.forward(x, q.dense(np.float64), batched.stack(adapters), index)[0])


def test_what_does_not_fit_is_refused(adapters):
    stack, x, W = batched.stack(adapters), np.ones((3, 4, 7)), np.ones((5, 7))
    for index, message in (
        (np.zeros(4, int), r"index: shape \(4,\), needed the first axes of x's rows, \(3, 4\)"),
        (np.zeros((3, 4, 7), int), r"index: shape \(3, 4, 7\), needed"),
        (np.array([0, 3, 0]), r"index: from 0 to 3, needed -1 \(none\) to 2"),
        (np.array([0, -2, 0]), r"index: from -2 to 0, needed"),
    ):
        with pytest.raises(ValueError, match=message):
            batched.forward(x, W, stack, index)
    with pytest.raises(ValueError, match=r"adapters: for layers of shapes \(in, out\) \[\(6, 5\), \(7, 5\)\]"):
        batched.stack([adapters[0], (np.ones((2, 6)), np.ones((5, 2)), 1.0)])
    with pytest.raises(ValueError, match=r"A \(3, 4, 7\), B \(3, 5, 4\), scaling \(2,\): needed"):
        batched.Stack(stack.A, stack.B, stack.scaling[:2])
    assert repr(stack) == "Stack(3 adapters, r <= 4, 1,152 bytes)"
