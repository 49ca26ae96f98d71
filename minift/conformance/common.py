"""Properties that every differentiable operation has, whatever it computes.

Each operation makes its inputs from a case, and hands them to these: results inside the oracle's balls, nothing changed
that was given, the same for every layout in memory, and a pullback that is the transpose of the derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minift.conformance.ball import Ball
from minift.conformance.gradients import check_vjp
from minift.conformance.operation import arithmetic, rounded

Arrays = Sequence[np.ndarray]


def as_tuple(cotangents) -> tuple:
    return cotangents if isinstance(cotangents, tuple) else (cotangents,)


def prepared(arrays: Arrays, dtype: str) -> list[np.ndarray]:
    """Floating arrays rounded to the dtype; indices as they are."""
    return [rounded(a, dtype) if np.issubdtype(a.dtype, np.floating) else a for a in arrays]


def within(
    f: Callable, oracle: Callable, args: Arrays, dy: np.ndarray, dtype: str, layout: Callable | None = None
) -> None:
    """y and every cotangent lie in the oracle's balls: `oracle(number, dy, *args) -> (y, *cotangents)`, where
    `number(array)` makes a Ball of the exact number in the type of the arithmetic. None is no cotangent."""
    dy, *args = prepared([dy, *args], dtype)
    type_ = arithmetic(dtype)
    exact = [a.astype(np.float64) if np.issubdtype(a.dtype, np.floating) else a for a in (dy, *args)]
    balls = oracle(lambda a: Ball(a, type_), *exact)
    if layout is not None:
        dy, *args = (layout(a) if a.ndim else a for a in (dy, *args))
    y, vjp = f(*args)
    balls[0].stored(dtype).check(y, "y")
    cotangents = as_tuple(vjp(dy))
    assert len(cotangents) == len(balls) - 1, f"{len(cotangents)} cotangents, needed {len(balls) - 1}"
    for position, (found, ball) in enumerate(zip(cotangents, balls[1:], strict=True)):
        if ball is not None:
            ball.stored(dtype).check(found, f"the cotangent of argument {position}")


def any_layout(f: Callable, oracle: Callable, args: Arrays, dy: np.ndarray, dtype: str) -> None:
    """The same for every second element of something with NaN in the gaps, a transposed array, and one that starts in
    the middle. Not to the bit: what lies otherwise may be summed in another order."""
    for layout in (strided, transposed, misaligned, apart):
        try:
            within(f, oracle, args, dy, dtype, layout)
        except AssertionError as error:
            raise AssertionError(f"{layout.__name__} arguments: {error}") from error


def changes_nothing(f: Callable, args: Arrays, dy: np.ndarray, dtype: str) -> None:
    """Arguments and cotangents keep their bytes in both passes, and a second call of either gives the same bits."""
    dy, *args = prepared([dy, *args], dtype)
    before = [a.tobytes() for a in (*args, dy)]
    y, vjp = f(*args)
    kept, first = np.array(y), [None if c is None else np.array(c) for c in as_tuple(vjp(dy))]
    assert [a.tobytes() for a in (*args, dy)] == before, "an argument or the cotangent was changed"
    same_bits(y, kept, "y after the pullback")
    again, _ = f(*args)
    same_bits(again, kept, "y of a second call")
    for position, (a, b) in enumerate(zip(first, as_tuple(vjp(dy)), strict=True)):
        if a is not None:
            same_bits(b, a, f"cotangent {position} of a second call of the pullback")


def is_differentiated(f: Callable, args: Arrays, rng: np.random.Generator) -> None:
    """The pullback is the transpose of the derivative: central differences along random directions, in float64."""
    check_vjp(f, *(a.astype(np.float64) for a in args), rng=rng)


def strided(x: np.ndarray) -> np.ndarray:
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 1), _gap(x), x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def transposed(x: np.ndarray) -> np.ndarray:
    return np.asfortranarray(x)


def misaligned(x: np.ndarray) -> np.ndarray:
    buffer = np.full(x.size + 2, _gap(x), x.dtype)
    buffer[1:-1] = x.reshape(-1)
    return buffer[1:-1].reshape(x.shape)


def apart(x: np.ndarray) -> np.ndarray:
    """Rows whose elements are neighbors, with a gap behind each row."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 3), _gap(x), x.dtype)
    wide[..., :-3] = x
    return wide[..., :-3]


def _gap(x: np.ndarray) -> float:
    return np.nan if np.issubdtype(x.dtype, np.floating) else 0


def same_bits(found, expected, what: str) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, needed {expected.dtype}"
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, needed {expected.shape}"
    if found.tobytes() != expected.tobytes():
        differ = np.argwhere((found != expected) & ~((found != found) & (expected != expected)))
        i = tuple(int(j) for j in differ[0]) if len(differ) else None
        where = f"element {i} is {found[i]!r}, expected {expected[i]!r}" if i is not None else "the sign of a zero"
        raise AssertionError(f"{what}: {where} ({len(differ)} of {found.size} differ)")
