"""What the tests of operations share: layouts that aim at trouble, purity, and the kill matrix.

A property is a function `(implementation, case) -> None` that fails with a readable counterexample; a case is a
hashable description (a shape, a seed) from which the property makes its inputs. The same properties run on ours, over
a fixed battery and over cases that hypothesis draws, and on the wrong versions.
"""

import warnings

import numpy as np

from minift.conformance.ball import Ball

DTYPES = (np.float32, np.float64)


def contiguous(x):
    return np.ascontiguousarray(x)


def strided(x):
    """Every second element of a larger array, NaN (or an index far outside) in the gaps."""
    gap = np.nan if np.issubdtype(x.dtype, np.floating) else 1 << 20
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 1), gap, x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def transposed(x):
    return np.asfortranarray(x)


def backwards(x):
    """Negative strides."""
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


def misaligned(x):
    """A view that begins one element into its buffer, read-only neighbors NaN."""
    gap = np.nan if np.issubdtype(x.dtype, np.floating) else 1 << 20
    buffer = np.full(x.size + 2, gap, x.dtype)
    buffer[1:-1] = x.reshape(-1)
    return buffer[1:-1].reshape(x.shape)


LAYOUTS = (strided, transposed, backwards, misaligned)


def read_only(x):
    view = x.view()
    view.flags.writeable = False
    return view


def tuple_of(cotangents):
    return cotangents if isinstance(cotangents, tuple) else (cotangents,)


def same_bits(found, expected, what):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, needed {expected.dtype}"
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, needed {expected.shape}"
    if found.tobytes() != expected.tobytes():
        differ = np.argwhere((found != expected) & ~((found != found) & (expected != expected)))
        i = tuple(int(j) for j in differ[0]) if len(differ) else "(sign of zero)"
        raise AssertionError(f"{what}: element {i} differs ({len(differ)} of {found.size})")


def in_dtype(oracle):
    """An oracle of the suite, `oracle(number, dy, *args)`, as `inside` calls one: with the dtype first."""
    return lambda dtype, *args: oracle(lambda a: Ball(a, dtype), *args)


def inside(op, oracle, args, dy, dtype, layout=contiguous):
    """Run `op` on the arguments in this dtype and layout: value and cotangents lie in the oracle's balls.

    `oracle(dy, *args) -> (y, *cotangents)` gets the rounded numbers in float64."""
    args = [a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a for a in args]
    dy = np.asarray(dy).astype(dtype)
    balls = oracle(dtype, *(a.astype(np.float64) if a.dtype == dtype else a for a in (dy, *args)))
    y, vjp = op(*(layout(a) if a.ndim else a for a in args))
    balls[0].check(y, "y")
    dy = layout(dy) if dy.ndim else dtype(dy)
    cotangents = tuple_of(vjp(dy))
    assert len(cotangents) == len(balls) - 1, f"{len(cotangents)} cotangents, needed {len(balls) - 1}"
    for position, (found, ball) in enumerate(zip(cotangents, balls[1:], strict=True)):
        ball.check(found, f"cotangent {position}")


def pure(op, args, dy):
    """No argument, cotangent or result changes, in either pass; the pullback may be called again."""
    for dtype in DTYPES:
        given = [a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a.copy() for a in args]
        dy_ = np.asarray(dy).astype(dtype)
        before = [a.tobytes() for a in (*given, dy_)]
        y, vjp = op(*given)
        kept = np.array(y)
        first = [None if c is None else c.copy() for c in tuple_of(vjp(dy_[()]))]
        second = tuple_of(vjp(dy_[()]))
        assert [a.tobytes() for a in (*given, dy_)] == before, "an argument or the cotangent was changed"
        same_bits(y, kept, "y after the pullback")
        same_bits(op(*given)[0], kept, "y of a second call")
        for position, (a, b) in enumerate(zip(first, second, strict=True)):
            assert a is b is None or a.tobytes() == b.tobytes(), f"cotangent {position} of a second call"


def rejected(holds, implementation, cases):
    """Does the property refuse the implementation on any of the cases?"""
    for case in cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a wrong version may overflow: what counts is what it returns
                holds(implementation, case)
        except (AssertionError, ValueError, TypeError, LookupError, ArithmeticError):
            return True
    return False


def kill_matrix(properties, wrong, cases):
    """Every wrong version is rejected, and every property rejects one; returns {(property, wrong)} and prints it."""
    killed = {(p.__name__, w.__name__) for p in properties for w in wrong if rejected(p, w, cases)}
    for w in wrong:
        by = [p.__name__ for p in properties if (p.__name__, w.__name__) in killed]
        print(f"{w.__name__:32s} {len(by)}: {', '.join(by)}")
    survivors = [w.__name__ for w in wrong if not any((p.__name__, w.__name__) in killed for p in properties)]
    idle = [p.__name__ for p in properties if not any((p.__name__, w.__name__) in killed for w in wrong)]
    assert not survivors, f"no property rejects {survivors}"
    assert not idle, f"these properties reject nothing: {idle}"
    return killed
