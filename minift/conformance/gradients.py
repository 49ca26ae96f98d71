"""One checker for every pullback: is `vjp` the transpose of the derivative of `op`?

Two tests, both in float64, both with random directions (never ones: softmax would give an exact zero for them):

    central differences     ⟨dy, (op(x + h v) − op(x − h v)) / 2h⟩  =  ⟨vjp(dy), v⟩ + O(h²)             (1)
    dot-product identity    ⟨dy, J v⟩ = ⟨Jᵀ dy, v⟩  with J v by Richardson extrapolation of (1)         (2)

Both sides of (1) are inner products of the same random dy, v, so one number compares the whole Jacobian. The
truncation error of (1) falls as h², that of the extrapolation as h⁴; the checker demands both rates' accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minift.nn.weight import Params, replace, trainable

STEP = 1e-3  # h: truncation h⁴ = 1e-12 and rounding u/h = 1e-13, both far below TOLERANCE
TOLERANCE = 1e-8


def check_vjp(
    op: Callable,
    *args: np.ndarray,
    rng: np.random.Generator,
    frozen: Sequence[int] = (),
    directions: int = 3,
) -> None:
    """Fail with AssertionError unless `op(*args) -> y, vjp` has a right pullback, argument by argument.

    `args` are float64 arrays; `frozen` are the positions whose cotangent must be None (they do not learn). The pullback
    is called several times, so one that uses up its closure fails, and the arguments' bytes must not change.
    """
    before = [a.copy() for a in args]
    y, vjp = op(*args)
    for _ in range(directions):
        dy = rng.standard_normal(y.shape)
        cotangents = vjp(dy)
        cotangents = cotangents if isinstance(cotangents, tuple) else (cotangents,)
        assert len(cotangents) == len(args), f"vjp gave {len(cotangents)} cotangents for {len(args)} arguments"
        for position, (argument, cotangent) in enumerate(zip(args, cotangents, strict=True)):
            if position in frozen:
                assert cotangent is None, f"argument {position} is frozen, its cotangent must be None"
                continue
            assert cotangent.shape == argument.shape, f"{position}: {cotangent.shape} for {argument.shape}"
            assert cotangent.dtype == argument.dtype, f"{position}: {cotangent.dtype} for {argument.dtype}"
            v = rng.standard_normal(argument.shape)

            def along(h, position=position, v=v, dy=dy):
                moved = [a + h * v if i == position else a for i, a in enumerate(args)]
                return float(np.vdot(dy, op(*moved)[0]))

            assert_derivative(along, float(np.vdot(cotangent, v)), f"argument {position}")
    for position, (argument, copy) in enumerate(zip(args, before, strict=True)):
        assert np.array_equal(argument, copy, equal_nan=True), f"argument {position} was changed in place"


def check_gradients(
    function: Callable, params: Params, *, rng: np.random.Generator, expected: set[str] | None = None
) -> None:
    """The same for whole models: `function(params) -> y, vjp` with `vjp(dy) -> {name: gradient}` for what learns.

    Every array is moved on its own, so a gradient under the wrong name fails. `expected` are the names that must have
    a gradient, by default all of `trainable(params)`."""
    arrays = trainable(params)
    before = {name: array.copy() for name, array in arrays.items()}
    y, vjp = function(params)
    dy = rng.standard_normal(np.shape(y))
    gradients = vjp(dy)
    assert set(gradients) == (set(arrays) if expected is None else expected), set(gradients) ^ set(arrays)
    for name, gradient in gradients.items():
        assert gradient.shape == arrays[name].shape, f"{name}: {gradient.shape} for {arrays[name].shape}"
        v = rng.standard_normal(gradient.shape)

        def along(h, name=name, v=v):
            moved = replace(params, {name: arrays[name] + h * v})
            return float(np.vdot(dy, function(moved)[0]))

        assert_derivative(along, float(np.vdot(gradient, v)), name)
    for name, copy in before.items():
        assert np.array_equal(trainable(params)[name], copy), f"{name} was changed in place"


def assert_derivative(along: Callable[[float], float], claimed: float, what: str) -> None:
    """Is `claimed` the derivative at 0 of the scalar function `along`?  The one comparison behind every check."""
    wide = (along(STEP) - along(-STEP)) / (2 * STEP)
    narrow = (along(STEP / 2) - along(-STEP / 2)) / STEP
    found = (4 * narrow - wide) / 3  # Richardson: the h² terms cancel
    # the roundoff of a difference quotient is that of the function's own value, divided by h
    scale = max(abs(found), abs(claimed), abs(along(0.0)) * 1e-4, 1e-3)
    assert abs(found - claimed) <= TOLERANCE * scale, (
        f"{what}: the pullback says {claimed:.12g}, central differences say {found:.12g} "
        f"(relative difference {abs(found - claimed) / scale:.2e}, allowed {TOLERANCE:.0e})"
    )
