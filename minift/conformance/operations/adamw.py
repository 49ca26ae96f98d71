"""AdamW and clipping: one step within its bound, and the laws of decoupled decay, of many parameters and of resuming.

A step has two forms, `adamw_1`, which returns θ′, m′, v′, and `adamw_2`, which overwrites its arguments; the properties
are the same. Parameters and gradients have the case's type, moments that of the arithmetic. No setting is neutral:
decay is never 0, ε can be seen, and moments are those of a run under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.ball import Ball
from minift.conformance.bounds import unit_roundoff
from minift.conformance.operation import Operation, arithmetic, rounded
from minift.optim import adamw

RATE, BETA1, BETA2, EPS, DECAY = 0.03, 0.8, 0.95, 1e-3, 0.3
STATE = (BETA1, BETA2, EPS, DECAY)
RAGGED = ((3, 4), (5,), (0, 2), (), (31,), (1025,), (1024,), (33, 31), (1,), (2, 2, 2))

# --- one step ---------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    shape: tuple[int, ...]
    step: int = 3
    dtype: str = "float32"
    seed: int = 0


def given(case: Step) -> list[np.ndarray]:
    """θ, g, m, v. Gradients from 1e-6 to 10, so that ε matters for some; every fourth is 0."""
    rng = np.random.default_rng(case.seed)
    theta = rng.standard_normal(case.shape) + 0.5
    g = np.asarray(rng.standard_normal(case.shape) * 10.0 ** rng.uniform(-6, 1, case.shape))
    g.reshape(-1)[3::4] = 0
    m, v = rng.standard_normal(case.shape), rng.random(case.shape) * 0.1
    type_ = arithmetic(case.dtype)
    return [rounded(theta, case.dtype), rounded(g, case.dtype), *(np.asarray(a, type_) for a in (m, v))]


def settings(case: Step, decay: float = DECAY) -> tuple:
    return case.step, RATE, BETA1, BETA2, EPS, decay


def oracle(number, theta, g, m, v, step, rate, beta1, beta2, eps, decay):
    """Equations (1) to (3), as Balls."""
    theta, g, m, v = map(number, (theta, g, m, v))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return (1 - rate * decay) * theta - rate * m_hat / (v_hat.sqrt() + eps), m, v


def balls_of(arrays, dtype: str, *rest) -> list[Ball]:
    """θ′ as it is stored, m′ and v′."""
    theta, m, v = oracle(partial(Ball, dtype=arithmetic(dtype)), *arrays, *rest)
    return [theta.stored(dtype), m, v]


def check_step(found, arrays, dtype: str, *rest) -> None:
    for name, array, ball in zip("θmv", found, balls_of(arrays, dtype, *rest), strict=True):
        ball.check(array, name)


def shrunk(theta: np.ndarray, dtype: str, times: int = 1) -> np.ndarray:
    """θ · fl(1 − ηλ), so many times, each rounded to the type that θ is kept in."""
    for _ in range(times):
        theta = rounded(theta.astype(arithmetic(dtype)) * arithmetic(dtype)(1 - RATE * DECAY), dtype)
    return theta


def returned(f: Callable, *args) -> tuple:
    return f(*args)


def overwritten(f: Callable, theta, g, m, v, *rest) -> tuple:
    """An in-place step in the form of the other."""
    theta, m, v = np.array(theta), np.array(m), np.array(v)
    assert f(theta, g, m, v, *rest) is None, "an in-place step returns nothing"
    return theta, m, v


def _properties_of_a_step(run: Callable) -> tuple:
    def is_within_its_bound(f, case):
        arrays = given(case)
        check_step(run(f, *arrays, *settings(case)), arrays, case.dtype, *settings(case))

    def the_first_step_has_no_scale(f, case):
        """From m = v = 0 at step 1: θ′ = (1 − ηλ) θ − η g / (|g| + ε), whatever the betas."""
        theta, g, m, v = given(case)
        arrays, first = (theta, g, 0 * m, 0 * v), settings(case._replace(step=1))
        found, _, _ = run(f, *arrays, *first)
        theta, g = (np.asarray(a, np.float64) for a in (theta, g))
        exact = (1 - RATE * DECAY) * theta - RATE * g / (np.abs(g) + EPS)
        radius = balls_of(arrays, case.dtype, *first)[0].radius + 1e-14 * (1 + np.abs(theta))  # + float64's own
        worse = ~(np.abs(np.asarray(found, np.float64) - exact) <= radius)
        assert not worse.any(), f"θ is {np.asarray(found)[worse][0]!r} after the first step, needed {exact[worse][0]!r}"

    def nothing_but_decay_without_a_gradient(f, case):
        """g = m = v = 0: three steps are θ · fl(1 − ηλ), three times, to the bit; without decay no bit moves."""
        theta, g, m, v = given(case)
        now = theta, 0 * m, 0 * v
        for step in (1, 2, 3):
            now = run(f, now[0], 0 * g, *now[1:], *settings(case._replace(step=step)))
        common.same_bits(now[0], shrunk(theta, case.dtype, 3), "θ")
        assert not np.any(now[1]) and not np.any(now[2]), "moments out of nothing"
        still = run(f, theta, 0 * g, 0 * m, 0 * v, *settings(case, decay=0.0))
        common.same_bits(still[0], theta, "θ without decay")

    def decay_is_apart_from_the_gradient(f, case):
        """The moments do not know of the decay."""
        arrays = given(case)
        one, other = (run(f, *arrays, *settings(case, decay)) for decay in (DECAY, 0.9))
        for name, a, b in zip("mv", one[1:], other[1:], strict=True):
            common.same_bits(a, b, f"{name} with another decay")

    def mirrored(f, case):
        """−θ, −g, −m: the mirror image, bit for bit."""
        theta, g, m, v = given(case)
        found, mirror = (run(f, s * theta, s * g, s * m, v, *settings(case)) for s in (1, -1))
        for name, a, b, sign in zip("θmv", found, mirror, (-1, -1, 1), strict=True):
            same_numbers(sign * b, a, f"{name} of the mirror image")

    def any_layout_of_the_gradient(f, case):
        theta, g, m, v = given(case)
        expected = run(f, theta, g, m, v, *settings(case))
        for layout in (common.strided, common.transposed, common.misaligned, common.apart) if g.ndim else ():
            found = run(f, theta, layout(g), m, v, *settings(case))
            for name, a, b in zip("θmv", found, expected, strict=True):
                common.same_bits(a, b, f"{name}, the gradient {layout.__name__}")

    def numbers_do_not_mix(f, case):
        """A NaN among the gradients spoils one parameter, and no other."""
        theta, g, m, v = given(case)
        expected = run(f, theta, g, m, v, *settings(case))
        for at in {0, g.size // 2, g.size - 1} if g.size else ():
            broken = g.copy()
            broken.reshape(-1)[at] = np.nan
            beside = np.arange(g.size) != at
            for name, a, b in zip("θmv", run(f, theta, broken, m, v, *settings(case)), expected, strict=True):
                a, b = np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)
                assert np.isnan(a[at]), f"{name}: {a[at]} from a gradient that is NaN"
                common.same_bits(a[beside], b[beside], f"{name} beside a NaN")

    def changes_only_what_it_should(f, case):
        """The gradient keeps its bytes (the others too, where they are returned); a second call gives the same bits."""
        arrays = given(case)
        before = [a.tobytes() for a in arrays]
        first = run(f, *arrays, *settings(case))
        assert [a.tobytes() for a in arrays] == before, "the gradient, or an argument that is returned, was changed"
        for name, a, b in zip("θmv", run(f, *arrays, *settings(case)), first, strict=True):
            common.same_bits(a, b, f"{name} of a second call")

    return (
        is_within_its_bound,
        the_first_step_has_no_scale,
        nothing_but_decay_without_a_gradient,
        decay_is_apart_from_the_gradient,
        mirrored,
        any_layout_of_the_gradient,
        numbers_do_not_mix,
        changes_only_what_it_should,
    )


def same_numbers(found, expected, what: str) -> None:
    """Equal, but zeros may differ in sign: x − x is +0, and so is its mirror image."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, needed {expected.dtype}"
    common.same_bits(found + 0.0 * (found == 0), expected + 0.0 * (expected == 0), what)


# --- the optimizer: f(beta1, beta2, eps, weight_decay, step, m, v) -> an AdamW on dictionaries of arrays --------------


class Run(NamedTuple):
    shapes: tuple[tuple[int, ...], ...] = RAGGED
    dtype: str = "float32"
    seed: int = 0


def start(case: Run) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(case.seed)
    return {f"p{i}": np.array(rounded(rng.standard_normal(s), case.dtype)) for i, s in enumerate(case.shapes)}


def gradients_of(case: Run, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([case.seed, step])
    return {f"p{i}": np.array(rounded(rng.standard_normal(s), case.dtype)) for i, s in enumerate(case.shapes)}


def copies(arrays: dict) -> dict:
    return {name: np.array(a) for name, a in arrays.items()}


def _same(found: dict, expected: dict, what: str) -> None:
    assert list(found) == list(expected), f"{what}: {list(found)}, needed {list(expected)}"
    for name in expected:
        common.same_bits(found[name], expected[name], f"{what} {name}")


def many_are_one_by_one(f, case):
    """Two steps of all arrays together: the bits that each has by itself. None sees another."""
    together, optimizer = start(case), f(*STATE, 0, {}, {})
    alone = {name: ({name: a}, f(*STATE, 0, {}, {})) for name, a in start(case).items()}
    for step in (1, 2):
        gradients = gradients_of(case, step)
        optimizer.update(together, copies(gradients), RATE)
        for name, (array, own) in alone.items():
            own.update(array, {name: gradients[name].copy()}, RATE)
    _same(together, {name: array[name] for name, (array, _) in alone.items()}, "θ")
    for what in "mv":
        _same(getattr(optimizer, what), {n: getattr(own, what)[n] for n, (_, own) in alone.items()}, what)


def each_is_a_step(f, case):
    """θ, m and v of every array within the bound of a step; matrices decay, and what has one axis or none does not."""
    arrays, optimizer = start(case), f(*STATE, 0, {}, {})
    optimizer.update(arrays, gradients_of(case, 1), RATE)
    state = [copies(d) for d in (arrays, optimizer.m, optimizer.v)]
    gradients = gradients_of(case, 2)
    optimizer.update(arrays, copies(gradients), RATE)
    for name, theta in arrays.items():
        before, m, v = (d[name] for d in state)
        decay = DECAY if theta.ndim >= 2 else 0.0
        found = theta, optimizer.m[name], optimizer.v[name]
        check_step(found, (before, gradients[name], m, v), case.dtype, 2, RATE, BETA1, BETA2, EPS, decay)
    assert optimizer.step == 2, f"step is {optimizer.step} after two"


def only_matrices_decay(f, case):
    """Without gradients: matrices are multiplied by fl(1 − ηλ) each step, to the bit, and nothing else moves a bit."""
    arrays, optimizer = start(case), f(*STATE, 0, {}, {})
    for _ in range(2):
        optimizer.update(arrays, {name: np.zeros_like(a) for name, a in arrays.items()}, RATE)
    expected = {name: shrunk(a, case.dtype, 2) if a.ndim >= 2 else a for name, a in start(case).items()}
    _same(arrays, expected, "θ")


def resumes_as_if_nothing_had_happened(f, case):
    """Three steps; and the same from copies of the arrays and the state after the first, and after the second."""
    whole, optimizer = start(case), f(*STATE, 0, {}, {})
    stopped = []
    for step in (1, 2, 3):
        optimizer.update(whole, gradients_of(case, step), RATE)
        stopped.append((copies(whole), (optimizer.step, copies(optimizer.m), copies(optimizer.v))))
    for after, (arrays, state) in enumerate(stopped[:2], 1):
        resumed = f(*STATE, *state)
        for step in range(after + 1, 4):
            resumed.update(arrays, gradients_of(case, step), RATE)
        _same(arrays, whole, f"stopped after step {after}, θ")
        for what in "mv":
            _same(getattr(resumed, what), getattr(optimizer, what), f"stopped after step {after}, {what}")


def writes_into_the_arrays_it_is_given(f, case):
    """The arrays are the same objects, changed; the gradients keep their bytes; moments have the arrays' names."""
    arrays, gradients = start(case), gradients_of(case, 1)
    same, before = dict(arrays), {name: g.tobytes() for name, g in gradients.items()}
    optimizer = f(*STATE, 0, {}, {})
    optimizer.update(arrays, gradients, RATE)
    for name, a in arrays.items():
        assert a is same[name], f"{name} is another array now"
        assert a.size == 0 or (a != start(case)[name]).any(), f"{name} did not move"
    assert {name: g.tobytes() for name, g in gradients.items()} == before, "a gradient was changed"
    assert list(optimizer.m) == list(optimizer.v) == list(arrays), "moments have other names than the arrays"


def refuses_before_anything_moves(f, case):
    arrays, optimizer = start(case), f(*STATE, 0, {}, {})
    gradients = gradients_of(case, 1)
    first = next(iter(gradients))
    for wrong in (gradients | {"more": np.ones(2, np.float32)}, {n: g for n, g in gradients.items() if n != first}):
        try:
            optimizer.update(arrays, wrong, RATE)
        except KeyError:
            pass
        else:
            raise AssertionError("arrays and gradients have other names, and nothing was raised")
    _same(arrays, start(case), "after a refusal, θ")
    assert optimizer.step == 0, "a refused step was counted"


# --- clipping: f(gradients, max_norm) -> gradients, norm --------------------------------------------------------------


class Clip(NamedTuple):
    max_norm: float
    scale: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    shapes: tuple[tuple[int, ...], ...] = ((3, 4), (7,), (2, 1, 3), (0, 2), (1025,))


def to_clip(case: Clip) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(case.seed)
    numbers = (case.scale * (i + 1) * rng.standard_normal(s) for i, s in enumerate(case.shapes))
    return {f"g{i}": np.array(rounded(x, case.dtype)) for i, x in enumerate(numbers)}


def length(gradients: dict, dtype: str) -> Ball:
    flat = np.concatenate([np.asarray(g, np.float64).reshape(-1) for g in gradients.values()])
    number = Ball(flat, arithmetic(dtype))
    return (number * number).sum().sqrt()


def has_the_common_length(f, case):
    """The length before; after it at most max_norm, in the same direction; below max_norm nothing changes."""
    gradients = to_clip(case)
    clipped, norm = f(gradients, case.max_norm)
    ball = length(gradients, case.dtype)
    assert type(norm) is float, f"the norm is a {type(norm).__name__}, needed a float"
    assert abs(norm - ball.value[0]) <= ball.radius[0], f"norm {norm}, exactly {ball.value[0]}"
    if ball.value[0] <= case.max_norm * (1 - 1e-3):
        return _same(clipped, gradients, "a gradient that is short enough,")
    assert list(clipped) == list(gradients)
    type_ = arithmetic(case.dtype)
    factor = case.max_norm / ball
    factor = Ball(factor.value, type_, factor.radius + unit_roundoff(type_) * factor.value)  # rounded once more
    for name, g in gradients.items():
        exact = Ball(np.asarray(g, np.float64), type_)
        (exact * factor.reshape(*(1,) * g.ndim)).stored(case.dtype).check(clipped[name], name)


def leaves_the_given_gradients(f, case):
    gradients = to_clip(case)
    before = {name: g.tobytes() for name, g in gradients.items()}
    first, second = f(gradients, case.max_norm), f(gradients, case.max_norm)
    assert {name: g.tobytes() for name, g in gradients.items()} == before, "a gradient was changed"
    assert first[1] == second[1], f"norm {first[1]}, and {second[1]} the second time"
    _same(second[0], first[0], "clipped a second time,")


def refuses_what_is_not_finite_by_name(f, case):
    """NaN and infinities, by the name of the first that holds one; and a sum of squares beyond the largest number."""
    for value in (np.nan, np.inf, -np.inf):
        gradients = to_clip(case)
        for name, at in (("g1", 3), ("g4", -1)):
            gradients[name].reshape(-1)[at] = value
        _refused(f, gradients, case.max_norm, "first in g1: lower the learning rate")
    if case.dtype == "float32":
        _refused(f, {"large": np.full(4, 1e30, np.float32)}, case.max_norm, "first in the sum of squares")


def _refused(f, gradients, max_norm, message):
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            found = f"the norm {f(gradients, max_norm)[1]}"
    except ValueError as error:
        found = str(error)
    assert message in found, f"expected a ValueError with {message!r}: {found}"


# --- the operations ---------------------------------------------------------------------------------------------------

_shapes = st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple)


def steps(dtypes):
    return st.builds(Step, _shapes, st.integers(1, 10_000), st.sampled_from(sorted(dtypes)), st.integers(0, 99))


def runs(dtypes):
    shapes = st.lists(_shapes | st.just(()), min_size=1, max_size=6).map(tuple)
    return st.builds(Run, shapes, st.sampled_from(sorted(dtypes)), st.integers(0, 99))


def clips(dtypes):
    limits = st.floats(1e-3, 1e3)
    return st.builds(Clip, limits, st.floats(1e-3, 1e2), st.sampled_from(sorted(dtypes)), st.integers(0, 99))


DTYPES = ("float32", "float64", "float16", "bfloat16")
STEPS = (
    *(Step((n,), seed=n) for n in (0, 1, 31, 1023, 1024, 1025)),
    *(Step((5, 7), step, seed=step) for step in (1, 2, 1000, math.floor(1e6))),
    *(Step((3, 2, 9), 4, dtype) for dtype in DTYPES[1:]),
)
RUNS = (Run(), *(Run(((3, 4), (5,), (), (40, 30)), dtype, 1) for dtype in DTYPES))
CLIPS = (
    *(Clip(*limit) for limit in ((0.5, 1.0), (1e6, 1.0), (2.0, 1e-3), (0.25, 1e3))),
    *(Clip(1.5, 1.0, dtype, 1) for dtype in DTYPES[1:]),
    Clip(1.0, 0.0),
)

TAKES = "f(theta, gradient, m, v, step, learning_rate, beta1, beta2, eps, weight_decay)"

OPERATIONS = (
    Operation(
        "adamw.adamw_1",
        adamw.adamw_1,
        f"{TAKES} -> theta, m, v, new arrays",
        steps,
        STEPS,
        _properties_of_a_step(returned),
    ),
    Operation(
        "adamw.adamw_2",
        adamw.adamw_2,
        f"{TAKES} -> None; theta, m and v are overwritten",
        steps,
        STEPS,
        _properties_of_a_step(overwritten),
    ),
    Operation(
        "adamw.AdamW",
        adamw.AdamW,
        "f(beta1, beta2, eps, weight_decay, step, m, v) -> an object with these, and update(arrays, gradients, "
        "learning_rate), which overwrites the arrays; dictionaries of arrays under the same names",
        runs,
        RUNS,
        (
            many_are_one_by_one,
            each_is_a_step,
            only_matrices_decay,
            resumes_as_if_nothing_had_happened,
            writes_into_the_arrays_it_is_given,
            refuses_before_anything_moves,
        ),
    ),
    Operation(
        "adamw.clip_by_global_norm",
        adamw.clip_by_global_norm,
        "f(gradients, max_norm) -> gradients, norm; dictionaries of arrays",
        clips,
        CLIPS,
        (has_the_common_length, leaves_the_given_gradients, refuses_what_is_not_finite_by_name),
    ),
)
