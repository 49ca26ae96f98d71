"""AdamW and clipping: one number at a time, torch, bounds, the laws of decoupled decay, and wrong versions."""

import copy
import math

import numpy as np
import pytest
import torch
import wrong_optim
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance import bounds
from minift.conformance.ball import Ball
from minift.optim import adamw
from minift.optim.adamw import AdamW, adamw_1, adamw_2, clip_by_global_norm
from nn import checks

# never a neutral setting: β₁ ≠ β₂, ε that can be seen, decay ≠ 0
SETTINGS = {"learning_rate": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.3}
CASES = [(1, (5, 7), 1), (2, (11,), 2), (3, (2, 3, 4), 3), (4, (3, 3), 1000), (5, (), 7), (6, (0, 4), 2)]


def in_place(theta, gradient, m, v, *rest, **settings):
    """`adamw_2` in the form of `adamw_1`."""
    theta, m, v = np.array(theta), np.array(m), np.array(v)
    gradient = np.asarray(gradient)
    assert adamw_2(theta, gradient, m, v, *rest, **settings) is None
    return theta, m, v


def make(case):
    """Gradients from 1e-6 to 10, so that ε matters for some; one is zero. Moments of a run under way from step 2."""
    seed, shape, step = case
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal(shape) + 0.5
    g = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 1, shape))
    m, v = (
        (np.asarray(rng.standard_normal(shape)), np.asarray(rng.random(shape) * 0.1))
        if step > 1
        else 0 * np.stack([g, g])
    )
    return [np.asarray(a) for a in (theta, g, m, v)], step, rng


def oracle(dtype, theta, g, m, v, step, learning_rate, beta1, beta2, eps, weight_decay):
    theta, g, m, v = (Ball(a, dtype) for a in (theta, g, m, v))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return (1 - learning_rate * weight_decay) * theta - learning_rate * m_hat / (v_hat.sqrt() + eps), m, v


# --- properties of one step -------------------------------------------------------------------------------------------


def one_number_at_a_time(op, case):
    arrays, step, _ = make(case)
    found = op(*arrays, step, **SETTINGS)
    balls = oracle(np.float64, *arrays, step, **SETTINGS)
    lr, b1, b2, eps, wd = SETTINGS.values()
    for i in np.ndindex(arrays[0].shape):
        t, g, m, v = (float(a[i]) for a in arrays)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        t = t - lr * wd * t - lr * (m / (1 - b1**step)) / (math.sqrt(v / (1 - b2**step)) + eps)
        for what, array, exact, ball in zip(("θ", "m", "v"), found, (t, m, v), balls, strict=True):
            assert abs(array[i] - exact) <= 2 * ball.radius[i], f"{what} {i}: {array[i]}, needed {exact}"


def within_the_bound(op, case):
    arrays, step, _ = make(case)
    for dtype in checks.DTYPES:
        rounded = [a.astype(dtype) for a in arrays]
        balls = oracle(dtype, *(a.astype(float) for a in rounded), step, **SETTINGS)
        for what, found, ball in zip("θmv", op(*rounded, step, **SETTINGS), balls, strict=True):
            ball.check(found, what)


def strided_gradients(op, case):
    arrays, step, _ = make(case)
    arrays = [a.astype(np.float32) for a in arrays]
    expected = op(*arrays, step, **SETTINGS)
    for layout in checks.LAYOUTS if arrays[0].ndim else ():
        found = op(arrays[0], layout(arrays[1]), *arrays[2:], step, **SETTINGS)
        for a, b in zip(found, expected, strict=True):
            checks.same_bits(a, b, layout.__name__)


def torch_walks_the_same_way(op, case):
    """Five steps from the start, in float64."""
    (theta, g, _, _), _, rng = make(case)
    lr, b1, b2, eps, wd = SETTINGS.values()
    leaf = torch.tensor(theta, requires_grad=True)
    theirs = torch.optim.AdamW([leaf], lr, (b1, b2), eps, wd)
    m = v = np.zeros_like(theta)
    slack = np.zeros_like(theta)
    for step in range(1, 6):
        radius = oracle(np.float64, theta, g, m, v, step, **SETTINGS)[0].radius
        theta, m, v = op(theta, g, m, v, step, **SETTINGS)
        leaf.grad = torch.tensor(g)
        theirs.step()
        # a difference in m and v lives on and weighs at most 1 / (1 − β₁) = 5 times more than in the step it arose in
        slack = slack + 10 * radius
        assert (np.abs(theta - leaf.detach().numpy()) <= slack).all(), f"step {step}"
        g = np.asarray(rng.standard_normal(theta.shape) * 10.0 ** rng.uniform(-6, 1, theta.shape))


def the_first_step_is_minus_lr_times_the_sign(op, case):
    """θ₁ = (1 − ηλ) θ₀ − η g / (|g| + ε): bias correction takes β₁ and β₂ out."""
    (theta, g, m, v), _, _ = make(case)
    lr, _, _, eps, wd = SETTINGS.values()
    found, _, _ = op(theta, g, 0 * m, 0 * v, 1, **SETTINGS)
    exact = (1 - lr * wd) * theta - lr * g / (np.abs(g) + eps)
    assert (np.abs(found - exact) <= bounds.gamma(16, np.float64) * (np.abs(theta) + lr)).all()


def nothing_but_decay_without_a_gradient(op, case):
    """g = m = v = 0: θ shrinks by 1 − ηλ exactly, whatever the step; without decay no bit moves."""
    (theta, g, m, v), step, _ = make(case)
    found, m1, v1 = op(theta, 0 * g, 0 * m, 0 * v, step, **SETTINGS)
    checks.same_bits(found, np.asarray(theta * (1 - 0.03 * 0.3)), "θ")
    assert not m1.any()
    assert not v1.any()
    checks.same_bits(op(theta, 0 * g, 0 * m, 0 * v, step, **SETTINGS | {"weight_decay": 0.0})[0], theta, "θ, no decay")


def decay_is_apart_from_the_gradient(op, case):
    """The step with decay minus the step without is −ηλθ, whatever the gradient, and the moments are the same."""
    arrays, step, _ = make(case)
    with_decay, without = (op(*arrays, step, **SETTINGS | {"weight_decay": wd}) for wd in (0.3, 0.0))
    radius = oracle(np.float64, *arrays, step, **SETTINGS)[0].radius
    assert (np.abs(with_decay[0] - without[0] + 0.03 * 0.3 * arrays[0]) <= 4 * radius).all()
    for a, b in zip(with_decay[1:], without[1:], strict=True):
        checks.same_bits(a, b, "moments")


def signs_and_scales(op, case):
    """−g, −θ, −m: the mirror image, bit for bit. With ε = 0 the gradient's scale (a power of two) falls out."""
    (theta, g, m, v), step, _ = make(case)
    found, mirrored = op(theta, g, m, v, step, **SETTINGS), op(-theta, -g, -m, v, step, **SETTINGS)
    checks.same_bits(-mirrored[0], found[0], "θ")
    checks.same_bits(-mirrored[1], found[1], "m")
    checks.same_bits(mirrored[2], found[2], "v")
    free = SETTINGS | {"eps": 0.0}
    some = np.where(g == 0, 1.0, g)
    checks.same_bits(
        op(theta, 64 * some, 64 * m, 4096 * v, step, **free)[0], op(theta, some, m, v, step, **free)[0], "θ of 64 g"
    )


def the_given_is_unchanged(op, case):
    arrays, step, _ = make(case)
    before = [a.tobytes() for a in arrays]
    first = op(*arrays, step, **SETTINGS)
    assert [a.tobytes() for a in arrays] == before
    for a, b in zip(first, op(*arrays, step, **SETTINGS), strict=True):
        checks.same_bits(a, b, "a second call")


PROPERTIES = (
    one_number_at_a_time,
    within_the_bound,
    strided_gradients,
    torch_walks_the_same_way,
    the_first_step_is_minus_lr_times_the_sign,
    nothing_but_decay_without_a_gradient,
    decay_is_apart_from_the_gradient,
    signs_and_scales,
    the_given_is_unchanged,
)


WITH_AXES = [case for case in CASES if case[1]]  # without, adamw_1's arithmetic gives NumPy scalars, not arrays


@pytest.mark.parametrize(("op", "case"), [(adamw_1, c) for c in WITH_AXES] + [(in_place, c) for c in CASES])
@pytest.mark.parametrize("holds", PROPERTIES)
def test_adamw(op, holds, case):
    holds(op, case)


def test_adamw_kill_matrix():
    def flattens_in_memory_order(theta, gradient, *rest, **settings):
        return adamw_1(theta, np.ravel(gradient, order="K").reshape(theta.shape), *rest, **settings)

    killed = checks.kill_matrix(PROPERTIES, (*wrong_optim.ADAMW, flattens_in_memory_order), WITH_AXES)
    assert ("strided_gradients", "flattens_in_memory_order") in killed
    assert ("decay_is_apart_from_the_gradient", "decay=coupled") in killed
    assert ("nothing_but_decay_without_a_gradient", "decay=without lr") in killed


@pytest.mark.parametrize("dtype", checks.DTYPES)
@given(
    seed=st.integers(0, 9999),
    n=st.integers(0, 70),
    step=st.integers(1, 100_000),
    lr=st.floats(0, 0.1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-10, 1e-3),
    decay=st.floats(0, 0.5),
)
def test_both_forms_have_the_same_bits(dtype, seed, n, step, lr, beta1, beta2, eps, decay):
    arrays, _, _ = make((seed, (n,), step))
    arrays = [a.astype(dtype) for a in arrays]
    settings = (step, lr, beta1, beta2, eps, decay)
    for what, a, b in zip("θmv", adamw_1(*arrays, *settings), in_place(*arrays, *settings), strict=True):
        checks.same_bits(a, b, what)


@pytest.mark.parametrize("beside", [-1, 0, 1, adamw._CHUNK + 3])
def test_pieces_meet_without_a_seam(beside):
    arrays, _, _ = make((1, (adamw._CHUNK + beside,), 3))
    arrays = [a.astype(np.float32) for a in arrays]
    for what, a, b in zip("θmv", adamw_1(*arrays, 3, **SETTINGS), in_place(*arrays, 3, **SETTINGS), strict=True):
        checks.same_bits(a, b, what)


@pytest.mark.parametrize("which", [0, 2, 3])
def test_what_cannot_be_written_in_place_is_refused(which):
    """reshape(-1) would copy a transposed array, and the step would be lost without a word."""
    arrays, _, _ = make((1, (5, 7), 2))
    arrays[which] = np.asfortranarray(arrays[which])
    before = [a.tobytes() for a in arrays]
    with pytest.raises(ValueError, match=r"needed contiguous arrays, see np\.ascontiguousarray$"):
        adamw_2(*arrays, 2, **SETTINGS)
    assert [a.tobytes() for a in arrays] == before


# --- the optimizer's state --------------------------------------------------------------------------------------------


def parameters(rng, dtype=np.float32):
    return {n: rng.standard_normal(s).astype(dtype) for n, s in (("w", (3, 4)), ("norm", (5,)), ("t", (2, 2, 2)))}


def run(optimizer, arrays, steps, seed=0):
    for step in range(steps):
        rng = np.random.default_rng([seed, optimizer.step, step * 0])
        optimizer.update(arrays, {n: rng.standard_normal(a.shape).astype(a.dtype) for n, a in arrays.items()}, 0.05)


def test_update_is_the_function_for_every_array(rng):
    """In place, on the arrays themselves; matrices decay and one-dimensional arrays do not."""
    arrays = parameters(rng)
    expected = {n: (a.copy(), 0 * a, 0 * a) for n, a in arrays.items()}
    same = dict(arrays)
    optimizer = AdamW(0.8, 0.95, 1e-3, 0.3)
    for step, lr in enumerate((0.05, 0.01, 0.2), 1):
        gradients = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in arrays.items()}
        kept = {n: g.tobytes() for n, g in gradients.items()}
        optimizer.update(arrays, gradients, lr)
        assert optimizer.step == step
        for n, (theta, m, v) in expected.items():
            decay = 0.0 if n == "norm" else 0.3
            expected[n] = adamw_1(theta, gradients[n], m, v, step, lr, 0.8, 0.95, 1e-3, decay)
            for found, exact in zip((arrays[n], optimizer.m[n], optimizer.v[n]), expected[n], strict=True):
                checks.same_bits(found, exact, n)
            assert arrays[n] is same[n]
            assert gradients[n].tobytes() == kept[n]
    assert optimizer.nbytes == 2 * 4 * (12 + 5 + 8)


def test_resuming_at_any_step_is_as_if_nothing_had_happened(rng):
    start = parameters(rng)
    whole, whole_optimizer = copy.deepcopy(start), AdamW(weight_decay=0.1)
    run(whole_optimizer, whole, 6)
    for stop in range(7):
        arrays, optimizer = copy.deepcopy(start), AdamW(weight_decay=0.1)
        run(optimizer, arrays, stop)
        resumed = AdamW(
            optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay, optimizer.step,
            *({n: a.copy() for n, a in moments.items()} for moments in (optimizer.m, optimizer.v)),
        )  # fmt: skip
        run(resumed, arrays, 6 - stop)
        for n in start:
            checks.same_bits(arrays[n], whole[n], f"{n}, stopped at {stop}")


def test_the_length_of_a_step_is_bounded(rng):
    """|Δθ| ≤ η max(1, (1 − β₁) / √(1 − β₂)) + ηλ|θ|, with gradients of any size.     (Kingma & Ba 2015, §2.1)"""
    arrays, optimizer = {"w": rng.standard_normal((20, 20))}, AdamW(0.9, 0.999, 1e-8, 0.1)
    for _ in range(30):
        before = arrays["w"].copy()
        gradient = rng.standard_normal((20, 20)) * 10.0 ** rng.uniform(-8, 8, (20, 20))
        optimizer.update(arrays, {"w": gradient}, 0.01)
        largest = 0.01 * 0.1 / math.sqrt(0.001) + 0.01 * 0.1 * np.abs(before)
        assert (np.abs(arrays["w"] - before) <= largest * (1 + 1e-12)).all()


def test_defaults():
    optimizer = AdamW()
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    assert (optimizer.step, optimizer.m, optimizer.v, optimizer.nbytes) == (0, {}, {}, 0)
    assert repr(optimizer) == "AdamW(beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.0, step=0)"
    arrays, _, _ = make(CASES[1])
    for op in (adamw_1, in_place):
        for a, b in zip(op(*arrays, 3, 0.1), op(*arrays, 3, 0.1, 0.9, 0.999, 1e-8, 0.0), strict=True):
            checks.same_bits(a, b, "defaults")


def test_names_that_do_not_fit_are_refused_before_anything_moves(rng):
    arrays, optimizer = parameters(rng), AdamW()
    before = {n: a.tobytes() for n, a in arrays.items()}
    gradients = {n: np.ones_like(a) for n, a in arrays.items()}
    for wrong in (gradients | {"more": np.ones(2)}, {n: g for n, g in gradients.items() if n != "w"}):
        with pytest.raises(KeyError, match="arrays and gradients differ in"):
            optimizer.update(arrays, wrong, 0.1)
    assert {n: a.tobytes() for n, a in arrays.items()} == before
    assert optimizer.step == 0


# --- clipping: op(gradients, max_norm) -> clipped, norm ---------------------------------------------------------------

CLIP_CASES = [(1, 0.5, 1.0), (2, 100.0, 1.0), (3, 2.0, 1e-3), (4, 0.25, 1e3), (5, 1.0, 0.0)]


def some(case, dtype=np.float64):
    seed, max_norm, scale = case
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (7,), "c": (2, 1, 3), "empty": (0, 2)}
    return {
        n: (scale * (i + 1) * rng.standard_normal(s)).astype(dtype) for i, (n, s) in enumerate(shapes.items())
    }, max_norm


def the_common_length(op, case):
    """Against a sum over all numbers; the clipped ones have length min(‖g‖, max_norm), and the same direction."""
    for dtype in checks.DTYPES:
        gradients, max_norm = some(case, dtype)
        clipped, norm = op(gradients, max_norm)
        flat = [float(x) for g in gradients.values() for x in g.reshape(-1)]
        exact = math.sqrt(math.fsum(x * x for x in flat))
        ball = Ball(np.array([flat]), dtype)
        total = (ball * ball).sum().sqrt()
        assert abs(norm - exact) <= total.radius[0, 0]
        assert type(norm) is float
        assert list(clipped) == list(gradients)
        if exact <= max_norm * (1 - 1e-3):
            for n, g in gradients.items():
                checks.same_bits(clipped[n], g, n)
        else:
            factor = max_norm / total
            rounded = Ball(factor.value, dtype, factor.radius + bounds.unit_roundoff(dtype) * factor.value)
            for n, g in gradients.items():
                (Ball(g, dtype) * rounded.reshape(*(1,) * g.ndim)).check(clipped[n], n)


def the_given_gradients_are_unchanged(op, case):
    gradients, max_norm = some(case)
    before = {n: g.tobytes() for n, g in gradients.items()}
    first = op(gradients, max_norm)
    assert {n: g.tobytes() for n, g in gradients.items()} == before
    second = op(gradients, max_norm)
    assert first[1] == second[1]
    for n in gradients:
        checks.same_bits(first[0][n], second[0][n], n)


def what_is_not_finite_is_refused_by_name(op, case):
    for value in (np.nan, np.inf, -np.inf):
        gradients, max_norm = some(case)
        gradients["b"][3] = value
        try:
            op(gradients, max_norm)
        except ValueError as error:
            assert "not finite" in str(error)
        else:
            raise AssertionError(f"{value} was accepted")


CLIP_PROPERTIES = (the_common_length, the_given_gradients_are_unchanged, what_is_not_finite_is_refused_by_name)


@pytest.mark.parametrize("case", CLIP_CASES)
@pytest.mark.parametrize("holds", CLIP_PROPERTIES)
def test_clip(holds, case):
    holds(clip_by_global_norm, case)


def test_clip_kill_matrix():
    checks.kill_matrix(CLIP_PROPERTIES, wrong_optim.CLIP, CLIP_CASES)


def test_clip_agrees_with_torch():
    """Theirs adds 1e-6 to the norm: relatively 1e-6 / ‖g‖ smaller."""
    gradients, max_norm = some((1, 0.5, 1.0))
    leaves = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in gradients.values()]
    for leaf, g in zip(leaves, gradients.values(), strict=True):
        leaf.grad = torch.tensor(g)
    clipped, norm = clip_by_global_norm(gradients, max_norm)
    theirs = torch.nn.utils.clip_grad_norm_(leaves, max_norm).item()
    assert math.isclose(theirs, norm, rel_tol=bounds.gamma(40, np.float64))
    for leaf, g in zip(leaves, clipped.values(), strict=True):
        assert (np.abs(leaf.grad.numpy() * (1 + 1e-6 / norm) - g) <= bounds.gamma(80, np.float64) * np.abs(g)).all()


def test_at_exactly_the_limit_nothing_happens():
    gradients = {"a": np.array([3.0]), "b": np.array([4.0])}
    same, norm = clip_by_global_norm(gradients, 5.0)
    assert same is gradients
    assert norm == 5.0
    clipped, norm = clip_by_global_norm(gradients, 2.5)
    assert norm == 5.0
    assert (clipped["a"][0], clipped["b"][0]) == (1.5, 2.0)


def test_the_error_names_the_first_that_is_broken():
    gradients = {"fine": np.ones(2), "broken": np.array([1, np.nan]), "too": np.array([np.inf])}
    with pytest.raises(ValueError, match="the gradient is not finite, first in broken: lower the learning rate"):
        clip_by_global_norm(gradients, 1.0)
    huge = {"a": np.full(4, 1e30, np.float32)}
    with (
        np.errstate(over="ignore"),
        pytest.raises(ValueError, match=r"first in the sum of squares: lower the learning rate$"),
    ):
        clip_by_global_norm(huge, 1.0)
