"""AdamW in 8 bits: one number at a time, the zeros, rounding, 32 bits beside it, bitsandbytes, and wrong versions."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import wrong_adamw8bit
from hypothesis import given
from hypothesis import strategies as st
from test_adamw import oracle

from minift.conformance import bounds
from minift.data.batches import pad
from minift.io import load_model
from minift.nn.weight import dense
from minift.optim import adamw8bit
from minift.optim.adamw import AdamW, adamw_1
from minift.optim.adamw8bit import (
    LARGEST_GRADIENT,
    AdamW8bit,
    adamw8bit_1,
    adamw8bit_2,
    largest_step,
    quantize_second,
    zero_moments,
)
from minift.quant import blockwise
from minift.quant.blockwise import BlockwiseTensor
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED
from minift.train import sft
from nn import checks

# never a neutral setting: β₁ ≠ β₂, ε that can be seen, decay ≠ 0
SETTINGS = {"learning_rate": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.3}
# seed, shape, block size, step; sizes around whole blocks, and some of one block
CASES = [(1, (5, 7), 8, 1), (2, (32,), 16, 2), (3, (2, 3, 11), 16, 3), (4, (3, 31), 256, 1000), (5, (0, 4), 8, 2)]
CASES += [(6, (9, 9), 1, 4), (7, (40, 20), 64, 5)]


def in_place(theta, gradient, m, v, *rest, **settings):
    """`adamw8bit_2` in the form of `adamw8bit_1`."""
    theta, m, v = np.array(theta), copied(m), copied(v)
    assert adamw8bit_2(theta, gradient, m, v, *rest, **settings) is None
    return theta, m, v


def copied(q):
    return BlockwiseTensor(q.codes.copy(), q.absmax.copy(), q.code, q.shape, q.block_size)


def make(case, dtype=np.float64):
    """Gradients over seven decades in a block, so that v has numbers far below its smallest code. Every fifth parameter
    has had no gradient so far, and has none now; others have none now. From step 2 on, of a run under way. One block is
    all zeros."""
    seed, shape, block_size, step = case
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal(shape) + 0.5
    g = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 1, shape)
    m, v = rng.standard_normal(shape) * np.abs(g), rng.uniform(0.1, 1, shape) * g * g
    asleep = (np.arange(g.size) % 5 == 3) | (np.arange(g.size) // block_size == 1)
    for a in (g, m, v):
        a.reshape(-1)[asleep] = 0
    g.reshape(-1)[::7] = 0
    if step == 1:
        m, v = 0 * m, 0 * v
    q = blockwise.quantize(m, DYNAMIC, block_size), quantize_second(v, block_size)
    return theta.astype(dtype), g.astype(dtype), *q, step


def opened(q):
    """c · a, one number at a time, in Python."""
    values = [float(np.float32(q.code[c]) * q.absmax[i // q.block_size]) for i, c in enumerate(q.codes)]
    return np.array(values).reshape(q.shape)


def exact(theta, g, m, v, step, dtype=np.float64):
    """Balls of θ′, m′ and v′ before rounding to 8 bits."""
    arrays = (a.astype(np.float64) for a in (theta, g))
    return oracle(dtype, *arrays, opened(m), opened(v), step, **SETTINGS)


# --- properties of one step -------------------------------------------------------------------------------------------


def theta_is_adamw_on_what_the_codes_stand_for(op, case):
    for dtype in checks.DTYPES:
        given = make(case, dtype)
        found, _, _ = op(*given, **SETTINGS)
        assert found.dtype == dtype
        exact(*given, dtype)[0].check(found, "θ")


def moments_are_rounded_to_the_nearest_code(op, case):
    """absmax is the block's largest, and no other code is nearer, but for the floor under v: then the error is at most
    half the gap around the number, times absmax; below the first entry of v's map, one gap."""
    given = make(case, np.float32)
    _, *states = op(*given, **SETTINGS)
    u = bounds.gamma(4, np.float32)
    for what, q, ball, code in zip(
        "mv", states, exact(*given, np.float32)[1:], (DYNAMIC, DYNAMIC_UNSIGNED), strict=True
    ):
        assert q.code.tobytes() == code.tobytes(), f"{what} has another codebook"
        assert q.block_size == case[2]
        assert q.shape == case[1]
        value, radius = ball.value.reshape(-1), np.asarray(ball.radius).reshape(-1)
        for b, a in enumerate(q.absmax):
            block = slice(b * q.block_size, (b + 1) * q.block_size)
            largest, slack = np.abs(value[block]).max(), radius[block].max()
            assert abs(a - largest) <= slack + u * largest, f"{what}: absmax of block {b} is {a}, needed {largest}"
            for x, r, c in zip(value[block], radius[block], q.codes[block], strict=True):
                error = abs(float(code[c]) * a - x)
                nearest = np.abs(code.astype(float) * a - x).min()
                allowed = nearest + 2 * r + 2 * u * a
                if what == "v" and 0 < x < code[1] * a / 2:
                    assert c == 1, f"v: {x} became code {c} where absmax is {a}"
                else:
                    assert error <= allowed, (
                        f"{what}: {x} became {float(code[c]) * a}, {nearest / error:.3f} of it would do"
                    )


def nothing_but_zero_becomes_zero(op, case):
    """A moment that was and stays zero is zero exactly, wherever it is; a positive v never is."""
    given = make(case, np.float32)
    _, *states = op(*given, **SETTINGS)
    asleep = (given[1] == 0) & (opened(given[3]) == 0)
    for what, q in zip("mv", states, strict=True):
        assert not opened(q)[asleep].any(), f"{what} of a parameter without gradients is not zero"
    assert (opened(states[1])[~asleep] > 0).all(), "a positive v became zero"


def without_gradients_there_is_only_decay(op, case):
    """(1 − ηλ)ᵗ, bit for bit, for parameters whose gradient is always zero, beside others in the same block."""
    for dtype in checks.DTYPES:
        theta, g, m, v, _ = make((*case[:3], 1), dtype)
        asleep = g == 0
        expected, rng = theta.copy(), np.random.default_rng(case[0])
        for step in range(1, 6):
            theta, m, v = op(theta, g, m, v, step, **SETTINGS)
            expected = expected * (1 - 0.03 * 0.3)
            g = np.where(asleep, 0, g * rng.uniform(-2, 2, g.shape)).astype(dtype)
        checks.same_bits(theta[asleep], expected[asleep], f"θ of {dtype.__name__}")


def the_first_step_is_minus_lr_times_the_sign(op, case):
    """θ₁ = (1 − ηλ) θ₀ − η g / (|g| + ε), as in 32 bits: nothing has been rounded yet."""
    theta, g, m, v, _ = make((*case[:3], 1))
    lr, _, _, eps, wd = SETTINGS.values()
    found, _, _ = op(theta, g, m, v, 1, **SETTINGS)
    wanted = (1 - lr * wd) * theta - lr * g / (np.abs(g) + eps)
    assert (np.abs(found - wanted) <= bounds.gamma(16, np.float64) * (np.abs(theta) + lr)).all()


def no_step_is_longer_than_k(op, case):
    """Large gradients once, then hardly any: m is there and v, in a block with larger ones, is rounded away."""
    theta, g, m, v, _ = make((*case[:3], 1))
    options = SETTINGS | {"eps": 1e-8, "weight_decay": 0.0}
    for step in range(1, 9):
        before = theta
        theta, m, v = op(theta, g if step == 1 else g * 1e-9, m, v, step, **options)
        limit = 0.03 * largest_step(step, 0.8, 0.95) * (1 + 1e-5)
        longest = np.abs(theta - before).max(initial=0)
        assert longest <= limit, f"step {step} moved by {longest / 0.03:.3g} η, at most {limit / 0.03:.3g}"


def decay_is_apart_from_the_gradient(op, case):
    given = make(case)
    with_decay, without = (op(*given, **SETTINGS | {"weight_decay": wd}) for wd in (0.3, 0.0))
    radius = exact(*given)[0].radius
    assert (np.abs(with_decay[0] - without[0] + 0.03 * 0.3 * given[0]) <= 4 * radius).all()
    for a, b in zip(with_decay[1:], without[1:], strict=True):
        checks.same_bits(a.codes, b.codes, "codes")
        checks.same_bits(a.absmax, b.absmax, "absmax")


def blocks_do_not_see_each_other(op, case):
    """Another gradient in the last block, and nothing before it changes."""
    theta, g, m, v, step = make(case, np.float32)
    last = max(0, g.size - 1) // case[2] * case[2]
    other = g.copy()
    other.reshape(-1)[last:] = 17
    for what, a, b in zip(
        ("θ", "m", "v"), op(theta, g, m, v, step, **SETTINGS), op(theta, other, m, v, step, **SETTINGS), strict=True
    ):
        a, b = (x.reshape(-1) if what == "θ" else opened(x).reshape(-1) for x in (a, b))
        checks.same_bits(a[:last], b[:last], what)
        assert not g.size or a.tobytes() != b.tobytes(), f"{what}: the gradient of the last block has no effect"


def scales_fall_out(op, case):
    """With ε = 0 and gradients 64 times as large, θ moves by the same bits, and codes are the same."""
    theta, g, m, v, step = make(case, np.float32)
    g = np.where(g == 0, np.float32(1), g)
    larger = [
        BlockwiseTensor(q.codes, q.absmax * np.float32(s), q.code, q.shape, q.block_size)
        for q, s in ((m, 64), (v, 4096))
    ]
    free = SETTINGS | {"eps": 0.0}
    for a, b in zip(op(theta, g, m, v, step, **free), op(theta, 64 * g, *larger, step, **free), strict=True):
        a, b = (x.codes if isinstance(x, BlockwiseTensor) else x for x in (a, b))
        checks.same_bits(a, b, "64 g")


def any_layout_and_nothing_given_changes(op, case):
    theta, g, m, v, step = make(case, np.float32)
    expected = op(theta, g, m, v, step, **SETTINGS)
    before = [a.tobytes() for a in (theta, g, m.codes, m.absmax, v.codes, v.absmax)]
    for layout in checks.LAYOUTS:
        found = op(theta, layout(g), m, v, step, **SETTINGS)
        checks.same_bits(found[0], expected[0], f"θ, {layout.__name__}")
        for a, b in zip(found[1:], expected[1:], strict=True):
            checks.same_bits(a.codes, b.codes, layout.__name__)
    op(theta, g, m, v, step, **SETTINGS)
    assert [a.tobytes() for a in (theta, g, m.codes, m.absmax, v.codes, v.absmax)] == before


def what_has_no_finite_square_is_refused(op, case):
    for value in (np.nan, np.inf, -np.inf, 2e19, -2e19):
        given = list(make(case, np.float32))
        if not given[1].size:
            continue
        given[1].reshape(-1)[-1] = value
        before = given[0].tobytes()
        try:
            op(*given, **SETTINGS)
        except ValueError as error:
            assert f"is {np.float32(value)} at index" in str(error), str(error)
            assert given[0].tobytes() == before
        else:
            raise AssertionError(f"{value} was accepted")


PROPERTIES = (
    theta_is_adamw_on_what_the_codes_stand_for,
    moments_are_rounded_to_the_nearest_code,
    nothing_but_zero_becomes_zero,
    without_gradients_there_is_only_decay,
    the_first_step_is_minus_lr_times_the_sign,
    no_step_is_longer_than_k,
    decay_is_apart_from_the_gradient,
    blocks_do_not_see_each_other,
    scales_fall_out,
    any_layout_and_nothing_given_changes,
    what_has_no_finite_square_is_refused,
)


@pytest.mark.parametrize("op", [adamw8bit_1, in_place])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_adamw8bit(op, holds, case):
    holds(op, case)


def test_adamw8bit_kill_matrix():
    killed = checks.kill_matrix(PROPERTIES, wrong_adamw8bit.ADAMW8BIT, CASES)
    assert ("no_step_is_longer_than_k", "floor=nothing") in killed
    assert ("without_gradients_there_is_only_decay", "zero=table of 65,536") in killed


@pytest.mark.parametrize("dtype", checks.DTYPES)
@given(
    seed=st.integers(0, 9999),
    n=st.integers(0, 300),
    block_size=st.sampled_from([1, 7, 64, 256]),
    step=st.integers(1, 100_000),
    lr=st.floats(0, 0.1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-10, 1e-3),
    decay=st.floats(0, 0.5),
)
def test_both_forms_have_the_same_bits(dtype, seed, n, block_size, step, lr, beta1, beta2, eps, decay):
    given = make((seed, (n,), block_size, step), dtype)
    settings = (lr, beta1, beta2, eps, decay)
    assert_same(adamw8bit_1(*given, *settings), in_place(*given, *settings))


def assert_same(one, other):
    checks.same_bits(one[0], other[0], "θ")
    for what, a, b in zip("mv", one[1:], other[1:], strict=True):
        checks.same_bits(a.codes, b.codes, f"codes of {what}")
        checks.same_bits(a.absmax, b.absmax, f"absmax of {what}")


@pytest.mark.parametrize("beside", [-1, 0, 1, 300])
def test_pieces_meet_without_a_seam(beside):
    given = make((1, (blockwise.CHUNK + beside,), 256, 3), np.float32)
    assert_same(adamw8bit_1(*given, **SETTINGS), in_place(*given, **SETTINGS))


def test_what_cannot_be_written_in_place_is_refused():
    theta, *rest = make(CASES[0])
    with pytest.raises(ValueError, match=r"needed a contiguous array, see np\.ascontiguousarray$"):
        adamw8bit_2(np.asfortranarray(theta), *rest, **SETTINGS)


# --- against 32 bits --------------------------------------------------------------------------------------------------


def update_errors(step_of, moments, spread, n=1 << 14, steps=100):
    """Mean relative error of the update of the last step, and the longest step, beside AdamW in 32 bits on the same
    normal gradients, whose scales are spread over so many decades."""
    rng = np.random.default_rng(0)
    scale = 0.01 * 10 ** rng.uniform(-spread, 0, n).astype(np.float32)
    theta = m = v = np.zeros(n, np.float32)
    state, longest = moments(theta), 0.0
    for step in range(1, steps + 1):
        g = scale * rng.standard_normal(n, np.float32)
        exactly, m, v = adamw_1(theta, g, m, v, step, 1.0)
        found, *state = step_of(theta, g, *state, step, 1.0)
        longest = max(longest, float(np.abs(found).max()))
    return float(np.mean(np.abs(found - exactly) / np.abs(exactly))), longest


def wrong(name):
    return next(w for w in wrong_adamw8bit.ADAMW8BIT if w.__name__ == name)


def test_a_second_moment_that_is_rounded_up_keeps_the_update_finite():
    """The figures of the module's docstring: with gradients over four decades, rounding v up to the smallest code, to
    the nearest (0 among them), and evenly spaced codes. With two decades it is
    needed still."""
    ours = update_errors(adamw8bit_1, zero_moments, 4)
    nearest = update_errors(wrong("floor=nothing"), zero_moments, 4)
    evenly = update_errors(partial(wrong("floor=nothing"), maps="linear"), zero_moments, 4)
    for name, found in (("ours", ours), ("nearest", nearest), ("evenly spaced", evenly)):
        print(f"{name:15s} mean relative error {found[0]:9.3g}   longest step {found[1]:9.3g} η")
    assert ours[0] < 0.8 and ours[1] < 3
    assert nearest[0] > 5 and nearest[1] > 100
    assert evenly[0] > 20 and evenly[1] > 1e4
    assert update_errors(adamw8bit_1, zero_moments, 2)[1] < 2
    assert update_errors(wrong("floor=nothing"), zero_moments, 2)[1] > 20


def test_largest_step():
    """Equation (3), written out for the first steps, and its limit with the usual settings."""
    newest = 0.1 / math.sqrt(0.001)
    assert math.isclose(largest_step(1), math.sqrt(0.001) / 0.1 * newest) and math.isclose(largest_step(1), 1)
    second = 0.9 / math.sqrt(0.999) * newest / math.sqrt(3.25e-7) + newest
    assert math.isclose(largest_step(2), math.sqrt(1 - 0.999**2) / (1 - 0.81) * second, rel_tol=1e-6)
    assert 4.9e4 < largest_step(20_000) < 5.1e4


def test_a_small_problem_is_solved_as_well_as_in_32_bits(rng):
    """Logistic regression with features of very different scales."""
    x = rng.standard_normal((256, 4096)).astype(np.float32) * 10 ** rng.uniform(-2, 0, 4096).astype(np.float32)
    y = np.sign(x @ rng.standard_normal(4096).astype(np.float32))

    def train(optimizer):
        arrays, losses = {"w": np.zeros((1, 4096), np.float32)}, []
        for _ in range(60):
            margin = y * (x @ arrays["w"][0])
            losses.append(float(np.mean(np.logaddexp(0, -margin))))
            slope = -y / (1 + np.exp(margin)) / len(y)
            optimizer.update(arrays, {"w": (slope @ x)[None].astype(np.float32)}, 1e-3)
        return arrays["w"], losses

    (wide, exactly), (narrow, found) = train(AdamW(weight_decay=0.01)), train(AdamW8bit(weight_decay=0.01))
    assert exactly[-1] < 0.2 * exactly[0]
    assert np.abs(np.array(found) - exactly).max() < 0.02 * exactly[0]
    assert np.linalg.norm(narrow - wide) < 0.2 * np.linalg.norm(wide)  # many parameters, few examples: many solutions


def test_the_built_in_model_learns_as_in_32_bits():
    """Thirty steps of all its parameters on one batch: the loss of every step within a hundredth."""
    config, params = load_model("tiny")
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, config.vocab_size, 16).astype(np.int32) for _ in range(2)]
    batch = pad([(row, row) for row in rows])

    def train(optimizer):
        arrays = {name: np.array(dense(weight), np.float32) for name, weight in params.items()}
        losses = []
        for _ in range(30):
            value, vjp = sft.loss(arrays, batch, config)
            losses.append(float(value))
            optimizer.update(arrays, vjp(1.0), 1e-3)
        return losses

    exactly, found = np.array(train(AdamW())), np.array(train(AdamW8bit()))
    assert exactly[-1] < 0.5 * exactly[0]
    assert (np.abs(found - exactly) < 0.01 * exactly[0]).all(), np.abs(found - exactly).max()


# --- the optimizer's state --------------------------------------------------------------------------------------------


def parameters(rng):
    shapes = {"w": (70, 65), "norm": (5000,), "small": (63, 65), "t": (2, 2, 2)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def gradients_of(arrays, step):
    rng = np.random.default_rng(step)
    return {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in arrays.items()}


def test_update_is_the_function_for_every_array(rng):
    """In place; matrices decay and one-dimensional arrays do not; below 4,096 numbers it is AdamW in 32 bits."""
    arrays = parameters(rng)
    expected = {n: (a.copy(), *zero_moments(a)) for n, a in arrays.items()}
    same, optimizer = dict(arrays), AdamW8bit(0.8, 0.95, 1e-3, 0.3)
    for step, lr in enumerate((0.05, 0.01, 0.2), 1):
        gradients = gradients_of(arrays, step)
        optimizer.update(arrays, gradients, lr)
        assert optimizer.step == step
        for n, state in expected.items():
            decay = 0.0 if n == "norm" else 0.3
            op = adamw8bit_1 if n in ("w", "norm") else adamw_1
            expected[n] = op(state[0], gradients[n], *state[1:], step, lr, 0.8, 0.95, 1e-3, decay)
            found = arrays[n], optimizer.m[n], optimizer.v[n]
            if op is adamw_1:
                for a, b in zip(found, expected[n], strict=True):
                    checks.same_bits(a, b, n)
            else:
                assert_same(found, expected[n])
            assert arrays[n] is same[n]


@pytest.mark.parametrize(("n", "eight"), [(4095, False), (4096, True)])
def test_which_parameters_stay_in_32_bits(n, eight):
    """The limit, and the type of the state, are bitsandbytes'."""
    arrays = {"w": np.ones((1, n), np.float32)}
    optimizer = AdamW8bit()
    optimizer.update(arrays, {"w": np.ones((1, n), np.float32)}, 0.1)
    assert isinstance(optimizer.m["w"], BlockwiseTensor) == eight
    bnb = pytest.importorskip("bitsandbytes", reason="the oracle of this limit")
    state = states_of(bnb, n)
    assert (state["state1"].dtype == torch.uint8) == eight


@pytest.mark.parametrize("block_size", [64, 256, 2048])
def test_bytes_are_two_and_eight_a_block(block_size):
    """2 + 8 / block_size a parameter, 2.03 by default, and 8 where a parameter is small."""
    n = 1 << 15
    arrays = {"w": np.ones((n // 64, 64), np.float32), "norm": np.ones(100, np.float32)}
    optimizer = AdamW8bit(block_size=block_size)
    optimizer.update(arrays, {n: a.copy() for n, a in arrays.items()}, 0.1)
    assert optimizer.nbytes == n * (2 + 8 / block_size) + 8 * 100


@pytest.mark.parametrize("which", [0, 1])
def test_fresh_moments_are_zeros_quantized(which):
    """The code that stands for zero, not only a scale of zero."""
    q, code = zero_moments(np.ones((70, 65), np.float32))[which], (DYNAMIC, DYNAMIC_UNSIGNED)[which]
    assert not code[q.codes].any() and not q.absmax.any()
    checks.same_bits(q.codes, blockwise.quantize(np.zeros(70 * 65), code, 256).codes, "codes")


def test_resuming_at_any_step_is_as_if_nothing_had_happened(rng):
    start = parameters(rng)

    def run(optimizer, arrays, steps):
        for _ in range(steps):
            optimizer.update(arrays, gradients_of(arrays, optimizer.step), 0.05)

    whole, whole_optimizer = copy.deepcopy(start), AdamW8bit(weight_decay=0.1)
    run(whole_optimizer, whole, 4)
    for stop in range(5):
        arrays, optimizer = copy.deepcopy(start), AdamW8bit(weight_decay=0.1)
        run(optimizer, arrays, stop)
        resumed = AdamW8bit(weight_decay=0.1, step=stop, m=copy.deepcopy(optimizer.m), v=copy.deepcopy(optimizer.v))
        run(resumed, arrays, 4 - stop)
        for n in start:
            checks.same_bits(arrays[n], whole[n], f"{n}, stopped at {stop}")


def test_defaults():
    optimizer = AdamW8bit()
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    assert (optimizer.block_size, optimizer.min_8bit_size) == (256, 4096)
    assert (optimizer.step, optimizer.m, optimizer.v, optimizer.nbytes) == (0, {}, {}, 0)
    assert repr(optimizer) == (  # without the moments
        "AdamW8bit(beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.0, step=0, block_size=256, min_8bit_size=4096)"
    )
    given = make(CASES[1])
    for op in (adamw8bit_1, in_place):
        assert_same(op(*given, 0.1), op(*given, 0.1, 0.9, 0.999, 1e-8, 0.0))


def test_what_does_not_fit_is_refused_before_anything_moves(rng):
    arrays, optimizer = parameters(rng), AdamW8bit()
    before = {n: a.tobytes() for n, a in arrays.items()}
    gradients = gradients_of(arrays, 0)
    with pytest.raises(KeyError, match="arrays and gradients differ in"):
        optimizer.update(arrays, gradients | {"more": np.ones(2)}, 0.1)
    for value in (np.nan, 1.5e19):
        gradients["t"][1, 0, 1] = value
        with pytest.raises(ValueError, match=r"the gradient of t is .* at index \(1, 0, 1\), needed at most 1e\+19"):
            optimizer.update(arrays, gradients, 0.1)
    assert {n: a.tobytes() for n, a in arrays.items()} == before
    assert (optimizer.step, optimizer.m) == (0, {})
    with pytest.raises(ValueError, match=r"^the gradient of the parameter is nan at index \(1,\), "):
        adamw8bit.check_gradient(np.array([LARGEST_GRADIENT, np.nan, np.inf]))
    adamw8bit.check_gradient(np.array([LARGEST_GRADIENT, -LARGEST_GRADIENT]))
    gradients["t"][1, 0, 1] = LARGEST_GRADIENT
    optimizer.update(arrays, gradients, 0.1)


# --- beside bitsandbytes ----------------------------------------------------------------------------------------------


def states_of(bnb, n, gradients=None, theta=None, lr=1e-3):
    """bitsandbytes' AdamW8bit, run on the CPU: its state and the parameter afterwards."""
    leaf = torch.nn.Parameter(torch.ones(n) if theta is None else torch.tensor(theta))
    theirs = bnb.optim.AdamW8bit([leaf], lr=lr, weight_decay=0.0)
    for g in [np.ones(n, np.float32)] if gradients is None else gradients:
        leaf.grad = torch.tensor(g)
        theirs.step()
    return theirs.state[leaf] | {"theta": leaf.detach().numpy()}


def test_the_first_step_and_the_layout_are_those_of_bitsandbytes(rng):
    bnb = pytest.importorskip("bitsandbytes", reason="the oracle of the layout")
    theta, g = (rng.standard_normal(5000).astype(np.float32) for _ in range(2))
    theirs = states_of(bnb, 5000, [g], theta)
    m, v = zero_moments(theta)
    adamw8bit_2(ours := theta.copy(), g, m, v, 1, 1e-3)
    assert np.abs(theirs["theta"] - ours).max() <= bounds.gamma(8, np.float32) * (np.abs(theta).max() + 1e-3)
    for q, number in ((m, 1), (v, 2)):
        np.testing.assert_array_equal(theirs[f"qmap{number}"].numpy(), q.code)
        np.testing.assert_allclose(theirs[f"absmax{number}"].numpy(), q.absmax, rtol=bounds.gamma(3, np.float32))
        assert theirs[f"state{number}"].numpy().dtype == q.codes.dtype
        assert np.mean(theirs[f"state{number}"].numpy() != q.codes) < 0.05  # its table has 65,536 entries


def test_what_bitsandbytes_on_a_cpu_does_not_keep():
    """The two zero properties, which ours has above: 0 is encoded as 0, and what has no gradients is left alone. A
    table of 65,536 entries, none of them at zero, stands for the nearest code there (0.50)."""
    bnb = pytest.importorskip("bitsandbytes", reason="what fails here is bitsandbytes")
    x = torch.zeros(256)
    x[0] = 1
    codes, state = bnb.functional.quantize_blockwise(x, blocksize=256)
    theirs = bnb.functional.dequantize_blockwise(codes, state).numpy()
    ours = blockwise.dequantize(blockwise.quantize(x.numpy(), DYNAMIC, 256))
    assert theirs[1:].all() and not ours[1:].any()

    asleep = np.arange(4096) % 2 == 1
    rng = np.random.default_rng(0)
    gradients = [np.where(asleep, 0, rng.standard_normal(4096)).astype(np.float32) for _ in range(20)]
    arrays, optimizer = {"w": np.ones(4096, np.float32)}, AdamW8bit()
    for g in gradients:
        optimizer.update(arrays, {"w": g}, 1e-3)
    moved = states_of(bnb, 4096, gradients)["theta"][asleep] != 1
    assert moved.all() and (arrays["w"][asleep] == 1).all()


def test_pieces_are_views():
    _, _, m, _, _ = make((7, (40, 20), 64, 5))
    part = adamw8bit.piece(m, slice(64, 192), slice(1, 3))
    part.codes[:], part.absmax[:] = 3, 7
    assert (m.codes[64:192] == 3).all() and (m.absmax[1:3] == 7).all()
    assert (m.absmax[[0, 3]] != 7).all()


def test_a_step_in_place_refuses_moments_that_it_would_close_as_others():
    theta, gradient = np.ones(300, np.float32), np.full(300, 0.5, np.float32)
    m, v = adamw8bit.zero_moments(theta, 64, 0)
    wide = adamw8bit.zero_moments(theta, 256, 0)[1]
    for first, second, message in (
        (v, v, "another map than `zero_moments` has"),
        (m, m, "another map than `zero_moments` has"),
        (m, wide, "blocks of 64 and 256, needed one size"),
    ):
        with pytest.raises(ValueError, match=f"the moments of the parameter: {message}"):
            adamw8bit.adamw8bit_2(theta, gradient, first, second, 1, 0.1)
    assert (theta == 1).all() and not m.absmax.any()
