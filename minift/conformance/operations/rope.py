"""Rotary positions: within the bound, at large positions too, and the laws of a rotation.

`rope.rope` is given angles; `rope.rotations` makes them, which is where the published bugs were.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import bounds, common
from minift.conformance.ball import ELEMENTARY, Ball
from minift.conformance.operation import Operation, arithmetic
from minift.nn import rope

FAR = 131_071


class Turned(NamedTuple):
    batch: int
    heads: int
    tokens: int
    d: int
    theta: float = 10000.0
    highest: int = 9  # position, one of those that occur
    dtype: str = "float32"
    seed: int = 0


def positions_of(case: Turned) -> np.ndarray:
    """(batch, tokens), others in each row; the highest is the last, and 0 the first."""
    positions = np.random.default_rng(case.seed).integers(0, case.highest + 1, (case.batch, case.tokens))
    positions[:1, :1] = 0
    positions[-1:, -1:] = case.highest
    return positions


def arrays(case: Turned) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """dy and x, rounded to the case's dtype; cos and sin in the type of the arithmetic."""
    rng = np.random.default_rng(case.seed)
    numbers = rng.standard_normal((2, case.batch, case.heads, case.tokens, case.d))
    dy, x = common.prepared(list(numbers), case.dtype)
    return dy, x, *angles(case, positions_of(case))


def angles(case: Turned, positions) -> tuple[np.ndarray, np.ndarray]:
    return rope.rotations(positions, rope.frequencies(case.d, case.theta), arithmetic(case.dtype))


def oracle_for(cos: np.ndarray, sin: np.ndarray):
    def oracle(number, dy, x):
        c, s = (number(a.astype(np.float64)[:, None]) for a in (cos, sin))
        first, second = np.s_[..., : x.shape[-1] // 2], np.s_[..., x.shape[-1] // 2 :]

        def turned(x, s):
            x1, x2 = number(x[first]), number(x[second])
            halves = x1 * c - x2 * s, x2 * c + x1 * s
            value, radius = (np.concatenate([getattr(h, a) for h in halves], -1) for a in ("value", "radius"))
            return Ball(value, halves[0].dtype, radius)

        return turned(x, s), turned(dy, -s)

    return oracle


def is_within_its_bound(f, case):
    dy, x, cos, sin = arrays(case)
    common.within(lambda x: f(x, cos, sin), oracle_for(cos, sin), [x], dy, case.dtype)


def changes_nothing(f, case):
    dy, x, cos, sin = arrays(case)
    before = cos.tobytes(), sin.tobytes()
    common.changes_nothing(lambda x: f(x, cos, sin), [x], dy, case.dtype)
    assert (cos.tobytes(), sin.tobytes()) == before, "an angle was changed"


def any_layout(f, case):
    """Of x and its cotangent; and of the angles."""
    dy, x, cos, sin = arrays(case)
    common.any_layout(lambda x: f(x, cos, sin), oracle_for(cos, sin), [x], dy, case.dtype)
    placed = common.strided(cos), common.transposed(sin)
    common.within(lambda x: f(x, *placed), oracle_for(cos, sin), [x], dy, case.dtype)


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64" and case.tokens:
        _, x, cos, sin = arrays(case)
        common.is_differentiated(lambda x: f(x, cos, sin), [x], np.random.default_rng(case.seed))


def the_first_position_is_the_identity(f, case):
    dy, x, cos, sin = arrays(case)
    y, vjp = f(x, np.ones_like(cos), np.zeros_like(sin))
    assert np.array_equal(y, x), "R₀ x is not x"
    assert np.array_equal(vjp(dy), dy), "the pullback of R₀ is not the identity"


def transpose_is_inverse(f, case):
    """A rotation keeps lengths, and its pullback undoes it: up to the rounding of cos and sin, of two products and a
    sum, and of what is stored, for each of the two."""
    _, x, cos, sin = arrays(case)
    y, vjp = f(x, cos, sin)
    back = vjp(y)
    u, stored = bounds.unit_roundoff(arithmetic(case.dtype)), float(np.finfo(x.dtype).eps) / 2
    pairs = (*x.shape[:-1], 2, case.d // 2)
    before, after = (np.linalg.norm(a.astype(np.float64).reshape(pairs), axis=-2, keepdims=True) for a in (x, y))
    allowed = 2 * before * (8 * u + 2 * stored) + 2.0**-22 * (case.dtype == "float16")
    error = np.abs(back.astype(np.float64) - x).reshape(pairs)
    assert (error <= allowed).all(), f"the pullback does not undo the rotation: off by {error.max():.2g}"
    assert (np.abs(after - before) <= allowed).all(), "a pair's length is not kept"


def scores_depend_on_the_distance(f, case):
    """⟨R_m q, R_n k⟩ = ⟨R_{m+s} q, R_{n+s} k⟩, also for large shifts s."""
    if case.dtype == "float16":
        return
    rng, type_ = np.random.default_rng(case.seed), arithmetic(case.dtype)
    q, k = rng.standard_normal((2, 1, 1, 1, case.d)).astype(type_)

    def score(m, n):
        turned = (f(x, *angles(case, np.array([[p]])))[0].astype(np.float64) for x, p in ((q, m), (k, n)))
        return np.vdot(*turned)

    size = np.linalg.norm(q) * np.linalg.norm(k)
    # each of four vectors is off by at most (4u + angle) in norm, each product of two by both of theirs
    allowed = 4 * size * (4 * bounds.unit_roundoff(type_) + 4 * bounds.rope_angle(case.highest + 8, type_))
    error = abs(score(3, 8) - score(3 + case.highest, 8 + case.highest))
    assert error <= allowed, f"a score changes by {error:.2g} when both positions move by {case.highest}"


def one_row_of_angles_serves_every_sequence(f, case):
    dy, x, cos, sin = arrays(case)
    (y, vjp), (shared, shared_vjp) = (f(x, *(a[np.zeros(n, int)] for a in (cos, sin))) for n in (case.batch, 1))
    common.same_bits(shared, y, "y with one row of angles")
    common.same_bits(shared_vjp(dy), vjp(dy), "dx with one row of angles")


# f(positions, omega) -> cos, sin in float32


def angles_are_exact_to_float32(f, case):
    """cos φ and sin φ one number at a time, up to the largest positions; ω is a power in float64, as is the angle."""
    positions, omega = positions_of(case), rope.frequencies(case.d, case.theta)
    cos, sin = f(positions, omega)
    shape = (*positions.shape, case.d // 2)
    assert cos.shape == sin.shape == shape and cos.dtype == sin.dtype == np.float32
    for *at, i in np.ndindex(*shape):
        m = int(positions[tuple(at)])
        phi = m * case.theta ** (-2 * i / case.d)
        radius = bounds.rope_angle(m, np.float32) + ELEMENTARY * 2.0**-53 * (phi + 1)
        for name, found, exact in (("cos", cos, math.cos(phi)), ("sin", sin, math.sin(phi))):
            error = abs(float(found[(*at, i)]) - exact)
            assert error <= radius, f"{name} of position {m}, frequency {i}: off by {error:.2g}"


def angles_leave_positions_as_they_are(f, case):
    positions, omega = positions_of(case), rope.frequencies(case.d, case.theta)
    before = positions.tobytes(), omega.tobytes()
    f(positions, omega)
    assert (positions.tobytes(), omega.tobytes()) == before, "positions or frequencies were changed"


def cases(dtypes):
    def build(batch, heads, tokens, half, *rest):
        return Turned(batch, heads, tokens, 2 * half, *rest)

    shape = st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(1, 9)
    theta, highest = st.sampled_from((1e4, 5e5, 1e6)), st.integers(0, FAR)
    return st.builds(build, *shape, theta, highest, st.sampled_from(sorted(dtypes)), st.integers(0, 99))


FIXED = (
    Turned(2, 3, 5, 8),
    Turned(1, 2, 4, 6, 500000.0, FAR),
    Turned(3, 1, 1, 2, 100.0, 3000),
    Turned(2, 9, 10, 20, 1e6, FAR),  # more heads and tokens than a program has
    Turned(2, 2, 3, 4, 1e4, 0),
    Turned(2, 1, 0, 4),
    Turned(2, 3, 5, 8, 1e4, FAR, "float16"),
    Turned(1, 9, 9, 6, 1e4, 99, "float16"),
    Turned(2, 3, 5, 8, 1e4, 99, "bfloat16"),
    Turned(2, 2, 3, 10, 5e5, FAR, "float64"),
    Turned(1, 1, 4, 64, 1e4, 12, "float64"),
)

OPERATIONS = (
    Operation(
        "rope.rope",
        rope.rope,
        "f(x (batch, heads, tokens, d), cos, sin (#batch, tokens, d/2)) -> y like x, vjp; vjp(dy) -> dx",
        cases,
        FIXED,
        (
            is_within_its_bound,
            changes_nothing,
            any_layout,
            pullback_is_the_transpose_of_the_derivative,
            the_first_position_is_the_identity,
            transpose_is_inverse,
            scores_depend_on_the_distance,
            one_row_of_angles_serves_every_sequence,
        ),
    ),
    Operation(
        "rope.rotations",
        rope.rotations,
        "f(positions (batch, tokens) int, omega (half,) float64) -> cos, sin (batch, tokens, half) float32",
        cases,
        FIXED,
        (angles_are_exact_to_float32, angles_leave_positions_as_they_are),
    ),
)
