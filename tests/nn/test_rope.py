"""Rotary positions: complex numbers as the oracle, the relative law at large positions, and wrong versions.

The implementation under test is the whole path, `op(x, positions, theta) -> y, vjp`: positions are where the published
bugs were."""

import cmath
import math

import numpy as np
import pytest
import torch
import wrong_nn
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minift.conformance import bounds
from minift.conformance.ball import ELEMENTARY, Ball
from minift.conformance.gradients import check_vjp
from minift.nn.rope import RopeScaling, frequencies, rope, rotations
from nn import checks

FAR = 131_071
CASES = [(1, (2, 3, 5, 8), 10000.0, 9), (2, (1, 2, 4, 6), 500000.0, FAR), (3, (3, 1, 1, 2), 100.0, 3000)]
CASES += [(4, (2, 2, 3, 4), 10000.0, 0), (5, (1, 1, 6, 64), 1e6, FAR), (6, (2, 1, 0, 4), 1e4, 5)]


def ours(x, positions, theta):
    return rope(x, *rotations(positions, frequencies(x.shape[-1], theta), x.dtype))


def make(case):
    """Positions up to `highest`, the highest among them, others in each row; a row of one position 0 begins."""
    seed, shape, theta, highest = case
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, highest + 1, (shape[0], shape[2]))
    if positions.size:
        positions[-1, -1], positions[0, 0] = highest, 0 if positions.size > 1 else highest
    return rng.standard_normal(shape), positions, theta, rng.standard_normal(shape), rng


def angles(positions, d, theta):
    """φ one number at a time."""
    return np.array(
        [[[m * theta ** (-2 * i / d) for i in range(d // 2)] for m in row] for row in positions.tolist()]
    ).reshape(*positions.shape, d // 2)


def oracle_for(positions, theta):
    def oracle(dtype, dy, x):
        d = x.shape[-1]
        phi = angles(positions, d, theta)[:, None]
        radius = np.frompyfunc(lambda m: bounds.rope_angle(m, dtype), 1, 1)(positions).astype(float)[:, None, :, None]
        # the frequency itself is a power in float64, within a few units of its last place: so is the angle
        radius = radius + ELEMENTARY * 2.0**-53 * phi
        shape = phi.shape
        cos, sin = (Ball(f(phi), dtype, np.broadcast_to(radius, shape)) for f in (np.cos, np.sin))
        halves = [Ball(a[..., h], dtype) for a in (x, dy) for h in (slice(0, d // 2), slice(d // 2, d))]
        x1, x2, d1, d2 = halves

        def side_by_side(a, b):
            return Ball(*(np.concatenate([getattr(a, n), getattr(b, n)], -1) for n in ("value",)), dtype,
                        np.concatenate([a.radius, b.radius], -1))  # fmt: skip

        y = side_by_side(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        dx = side_by_side(d1 * cos + d2 * sin, d2 * cos - d1 * sin)
        return y, dx

    return oracle


def one_complex_number_at_a_time(op, case):
    """(x₁ + i x₂) e^{iφ}, in float64."""
    x, positions, theta, _, _ = make(case)
    y, _ = op(x, positions, theta)
    half = x.shape[-1] // 2
    for b, h, t in np.ndindex(x.shape[:3]):
        for i in range(half):
            phi = int(positions[b, t]) * theta ** (-i / half)
            z = complex(x[b, h, t, i], x[b, h, t, half + i])
            exact = z * cmath.exp(1j * phi)
            error = abs(complex(y[b, h, t, i], y[b, h, t, half + i]) - exact)
            assert error <= abs(z) * 2.0**-53 * (8 + 8 * phi), f"{b, h, t, i}: off by {error:.2g}"


def within_the_bound(op, case):
    x, positions, theta, dy, _ = make(case)
    for dtype in checks.DTYPES:
        checks.inside(lambda x: op(x, positions, theta), oracle_for(positions, theta), [x], dy, dtype)


def in_any_layout(op, case):
    x, positions, theta, dy, _ = make(case)
    for layout in checks.LAYOUTS:
        placed = layout(positions)
        checks.inside(lambda x, p=placed: op(x, p, theta), oracle_for(positions, theta), [x], dy, np.float32, layout)


def gradient(op, case):
    x, positions, theta, _, rng = make(case)
    if x.size:
        check_vjp(lambda x: op(x, positions, theta), x, rng=rng)


def scores_depend_on_the_distance(op, case):
    """⟨R_m q, R_n k⟩ = ⟨R_{m+s} q, R_{n+s} k⟩, also in float32 and for large shifts s."""
    _, _, theta, highest = case
    d, rng = case[1][-1], np.random.default_rng(case[0])
    q, k = rng.standard_normal((2, 1, 1, 1, d)).astype(np.float32)
    m, n = 3, 8
    near = [op(x, np.array([[p]]), theta)[0].astype(float) for x, p in ((q, m), (k, n))]
    far = [op(x, np.array([[p + highest]]), theta)[0].astype(float) for x, p in ((q, m), (k, n))]
    size = np.linalg.norm(q) * np.linalg.norm(k)
    # each of four rotated vectors is off by at most (4u + angle) in norm, each product of two by both of theirs
    allowed = 4 * size * (4 * 2.0**-24 + 4 * bounds.rope_angle(n + highest, np.float32))
    assert abs(np.vdot(*near) - np.vdot(*far)) <= allowed
    exact = np.vdot(q.astype(float), ours(k.astype(float), np.array([[n - m]]), theta)[0])
    assert abs(np.vdot(*near) - exact) <= allowed


def the_first_position_is_the_identity(op, case):
    x, positions, theta, dy, _ = make(case)
    y, vjp = op(x, 0 * positions, theta)
    assert np.array_equal(y, x)
    assert np.array_equal(vjp(dy), dy)


def transpose_is_inverse(op, case):
    """A rotation keeps lengths, and its pullback undoes it."""
    x, positions, theta, _, _ = make(case)
    y, vjp = op(x, positions, theta)
    assert (np.abs(vjp(y) - x).max(initial=0)) <= 2 * bounds.gamma(8, np.float64) * np.abs(x).max(initial=0)
    norms = np.linalg.norm(y, axis=-1) / np.linalg.norm(x, axis=-1)
    assert (np.abs(norms - 1) <= bounds.gamma(x.shape[-1] + 8, np.float64)).all()


def changes_nothing(op, case):
    x, positions, theta, dy, _ = make(case)
    checks.pure(lambda x: op(x, positions, theta), (x,), dy)


PROPERTIES = (
    one_complex_number_at_a_time,
    within_the_bound,
    in_any_layout,
    gradient,
    scores_depend_on_the_distance,
    the_first_position_is_the_identity,
    transpose_is_inverse,
    changes_nothing,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_rope(holds, case):
    holds(ours, case)


def test_rope_kill_matrix():
    checks.kill_matrix(PROPERTIES, wrong_nn.ROPE, CASES)


@given(
    st.tuples(
        st.integers(0, 9999),
        st.tuples(*[st.integers(1, 3)] * 2, st.integers(0, 4), st.integers(1, 9).map(lambda n: 2 * n)),
        st.sampled_from((1e4, 5e5, 1e6)),
        st.integers(0, FAR),
    ),
    st.sampled_from((checks.contiguous, *checks.LAYOUTS)),
    st.sampled_from(checks.DTYPES),
)
def test_any_shape_position_and_layout(case, layout, dtype):
    x, positions, theta, dy, _ = make(case)
    checks.inside(lambda x: ours(x, positions, theta), oracle_for(positions, theta), [x], dy, dtype, layout)


def test_interleaved_pairs_are_a_permutation_of_ours(rng):
    """GGUF's order: feature 2i with 2i + 1."""
    x, positions = rng.standard_normal((2, 3, 5, 8)), rng.integers(0, 99, (2, 5))
    order = np.arange(8).reshape(2, 4).T.reshape(-1)  # 0 4 1 5 2 6 3 7
    interleaved = wrong_nn._rope(x[..., order], positions, 1e4, interleaved=True)[0]
    checks.same_bits(interleaved, ours(x, positions, 1e4)[0][..., order], "y")


def test_transformers_turns_the_same_way(rng):
    x, positions = rng.standard_normal((2, 3, 5, 8)), rng.integers(0, 99, (2, 5))
    cos, sin = rotations(positions, frequencies(8), np.float64)
    both = [torch.tensor(np.concatenate([a, a], -1)) for a in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), *both)
    y, _ = ours(x, positions, 10000.0)
    assert (np.abs(y - expected.numpy()) <= bounds.gamma(6, np.float64) * 2 * np.abs(x).max()).all()


def test_one_row_of_angles_serves_every_sequence(rng):
    x = rng.standard_normal((3, 2, 4, 6))
    cos, sin = rotations(np.arange(4)[None], frequencies(6), np.float64)
    checks.same_bits(rope(x, cos, sin)[0], ours(x, np.tile(np.arange(4), (3, 1)), 1e4)[0], "y")


# --- frequencies ------------------------------------------------------------------------------------------------------

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize("head_dim", [2, 16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), LLAMA3, RopeScaling("llama3", 32, 1.5, 6, 8192)])
def test_frequencies_are_transformers(head_dim, theta, scaling):
    """Theirs are float32: a power, a product or two, a quotient, and the blend, whose two terms do not cancel."""
    parameters = {"rope_theta": theta, "rope_type": "default"}
    if scaling is not None:
        parameters |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        parameters |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=parameters)
    if scaling is None:
        expected = 1 / (theta ** (torch.arange(0, head_dim, 2).double() / head_dim))
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](config, "cpu")
        assert factor == 1
    found, u = frequencies(head_dim, theta, scaling), 2.0**-24
    relative = np.abs(found / expected.double().numpy() - 1)
    turns = 1.0 if scaling is None or scaling.rope_type == "linear" else scaling.high_freq_factor
    # the exponent i/d, rounded by u, moves the power by log θ; the blend (1 − s)/f + s has slope ≤ f in s ≤ turns
    slope = 1 if scaling is None else max(scaling.factor, 1) * (1 + turns)
    assert (relative <= u * (ELEMENTARY + 2 * math.log(theta) + 4) * slope).all()
    assert len(found) == head_dim // 2
    assert found.dtype == np.float64


def test_frequencies_by_hand():
    """d = 4, base 16: ω = 1, 16^(−1/2). With a context of 64: ω = 1 turns 10.2 times, and is kept."""
    assert frequencies(4, 16.0).tolist() == [1, 0.25]
    assert frequencies(4, 16.0, RopeScaling("linear", 4.0)).tolist() == [0.25, 0.0625]
    turns = 64 * 0.25 / (2 * math.pi)  # 2.546, between 1 and 4: blended
    blend = (turns - 1) / 3
    found = frequencies(4, 16.0, LLAMA3)
    assert found[0] == 1
    assert math.isclose(found[1], 0.25 * (blend + (1 - blend) / 8), rel_tol=1e-15)
    slow = frequencies(64, 1e4, LLAMA3)
    plain = frequencies(64, 1e4)
    assert np.array_equal(slow[plain * 64 < 2 * math.pi] * 8, plain[plain * 64 < 2 * math.pi])
    assert np.array_equal(slow[plain * 64 > 8 * math.pi], plain[plain * 64 > 8 * math.pi])
    assert (np.diff(slow) < 0).all()
    assert RopeScaling("llama3", 8.0) == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_frequencies_refuse():
    with pytest.raises(ValueError, match="head_dim is 5, needed an even number"):
        frequencies(5)
    with pytest.raises(ValueError, match=r"rope_type 'yarn' is not known; known are 'linear' and 'llama3'"):
        frequencies(4, 1e4, RopeScaling("yarn", 2.0))
