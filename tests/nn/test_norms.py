"""RMSNorm and LayerNorm: against torch, one number at a time, within bounds, laws, and wrong versions."""

import math

import numpy as np
import pytest
import torch
import wrong_nn
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance import bounds
from minift.conformance.ball import Ball
from minift.conformance.gradients import check_vjp
from minift.nn.norms import layer_norm, rms_norm
from minift.nn.weight import Frozen
from nn import checks

KINDS = ("normal", "tiny", "shifted", "far", "outlier", "wide")
CASES = [(1, (5, 8), "normal"), (2, (2, 3, 7), "tiny"), (3, (4, 4), "shifted"), (4, (3, 1), "normal")]
CASES += [
    (5, (2, 2, 33), "outlier"),
    (6, (9,), "wide"),
    (7, (3, 65), "shifted"),
    (8, (6, 6), "tiny"),
    (9, (0, 5), "tiny"),
]
CASES += [(10, (3, 8), "far")]
EPS = 3e-5  # not the default


def make(case):
    """Rows that show each term: |x| as small as √ε, a mean far from 0, an outlier; gains are not one."""
    seed, shape, kind = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "tiny":
        x *= 3e-3
    elif kind == "shifted":
        x += 5
    elif kind == "far":
        x += 1000
    elif kind == "outlier":
        x[..., 0] = 100
    elif kind == "wide":
        x *= 2.0 ** rng.integers(-12, 12, shape)
    gain, shift = rng.standard_normal((2, shape[-1]))
    return x, gain, shift, rng.standard_normal(shape), rng


def rms_oracle(dtype, dy, x, gain):
    dy, x, gain = (Ball(a, dtype) for a in (dy, x, gain))
    inv_rms = 1 / ((x * x).mean() + EPS).sqrt()
    x_hat, dx_hat = x * inv_rms, dy * gain
    dx = inv_rms * (dx_hat - x_hat * (dx_hat * x_hat).mean())
    return x_hat * gain, dx, (dy * x_hat).reshape(-1, len(gain.value)).sum(0).reshape(-1)


def layer_oracle(dtype, dy, x, gain, shift):
    dy, x, gain = (Ball(a, dtype) for a in (dy, x, gain))
    centered = x - x.mean()
    inv_std = 1 / ((centered * centered).mean() + EPS).sqrt()
    x_hat, dx_hat = centered * inv_std, dy * gain
    dx = inv_std * (dx_hat - dx_hat.mean() - x_hat * (dx_hat * x_hat).mean())
    d = len(gain.value)
    dgain, dshift = ((a.reshape(-1, d).sum(0).reshape(-1)) for a in (dy * x_hat, dy))
    return x_hat * gain + shift, dx, dgain, dshift


# --- properties of RMSNorm: op(x, weight, eps) ------------------------------------------------------------------------


def gradients(op, case):
    x, gain, _, _, rng = make(case)
    if x.size and case[2] == "normal":  # the others curve more than central differences can follow
        check_vjp(lambda x, gain: op(x, gain, EPS), x, gain, rng=rng)


def one_number_at_a_time(op, case):
    x, gain, _, _, _ = make(case)
    y, _ = op(x, gain, EPS)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index].tolist()
        rms = math.sqrt(math.fsum(t * t for t in row) / len(row) + EPS)
        exact = np.array([t / rms * g for t, g in zip(row, gain.tolist(), strict=True)])
        assert (np.abs(y[index] - exact) <= 2 * bounds.rms_norm(exact, np.float64)).all(), f"row {index}"


def torch_agrees(op, case):
    x, gain, _, dy, _ = make(case)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, gain)]
    y = torch.nn.functional.rms_norm(leaves[0], gain.shape, leaves[1], EPS)
    y.backward(torch.tensor(dy))
    found, vjp = op(x, gain, EPS)
    balls = rms_oracle(np.float64, dy, x, gain)  # both are inside, so they are within twice the radius
    for what, a, b, ball in zip(
        ("y", "dx", "dw"), (found, *vjp(dy)), (y.detach(), *(t.grad for t in leaves)), balls, strict=True
    ):
        assert (np.abs(a - b.numpy()) <= 2 * ball.radius).all(), what


def within_the_bound(op, case):
    x, gain, _, dy, _ = make(case)
    for dtype in checks.DTYPES:
        checks.inside(lambda x, gain: op(x, gain, EPS), rms_oracle, [x, gain], dy, dtype)


def relative_bound(op, case):
    """No absolute tolerance: a sum of squares does not cancel."""
    x, gain, _, _, _ = make(case)
    x, gain = x.astype(np.float32), gain.astype(np.float32)
    exact = rms_oracle(np.float64, x.astype(float), x.astype(float), gain.astype(float))[0].value
    found = op(x, gain, EPS)[0]
    assert (np.abs(found - exact) <= bounds.rms_norm(exact, np.float32) + 2.0**-149).all()


def in_any_layout(op, case):
    x, gain, _, dy, _ = make(case)
    for layout in checks.LAYOUTS:
        checks.inside(lambda x, gain: op(x, gain, EPS), rms_oracle, [x, gain], dy, np.float32, layout)


def changes_nothing(op, case):
    x, gain, _, dy, _ = make(case)
    checks.pure(lambda x, gain: op(x, gain, EPS), (x, gain), dy)


def scale_falls_out(op, case):
    """f(2^k x) = f(x) bit for bit where ε is 0; and a row of zeros stays zero where it is not."""
    x, gain, _, dy, _ = make(case)
    y, vjp = op(x, gain, 0.0)
    scaled, scaled_vjp = op(x * 1024, gain, 0.0)
    checks.same_bits(scaled, y, "y of a scaled row")
    checks.same_bits(scaled_vjp(dy)[0] * 1024, vjp(dy)[0], "dx of a scaled row")
    zero, zero_vjp = op(0 * x, gain, EPS)
    assert not zero.any()
    assert not zero_vjp(dy)[1].any()
    limit = dy * gain / math.sqrt(EPS)
    assert (np.abs(zero_vjp(dy)[0] - limit) <= 4 * 2.0**-53 * np.abs(limit)).all(), "dx at 0 is dy γ / √ε"


def rows_are_independent(op, case):
    x, gain, _, dy, _ = make(case)
    if x.ndim > 1 and len(x) > 1:
        y, vjp = op(x, gain, EPS)
        other_y, other_vjp = op(x[1:] if x.ndim == 2 else x[1:, :1], gain, EPS)
        part = dy[1:] if x.ndim == 2 else dy[1:, :1]
        checks.same_bits(other_y, y[1:] if x.ndim == 2 else y[1:, :1], "y")
        dx = vjp(dy)[0]
        checks.same_bits(other_vjp(np.ascontiguousarray(part))[0], dx[1:] if x.ndim == 2 else dx[1:, :1], "dx")


RMS_PROPERTIES = (
    gradients,
    one_number_at_a_time,
    torch_agrees,
    within_the_bound,
    relative_bound,
    in_any_layout,
    changes_nothing,
    scale_falls_out,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", (*RMS_PROPERTIES, rows_are_independent))
def test_rms_norm(holds, case):
    holds(rms_norm, case)


def test_rms_norm_kill_matrix():
    def over_the_batch(x, gain, eps=1e-6):
        """Statistics over everything: what a flattened reduction would do."""
        y, vjp = rms_norm(x.reshape(1, -1), np.broadcast_to(gain, x.shape).reshape(-1).copy(), eps)

        def wrong(dy):
            dx, dgain = vjp(dy.reshape(1, -1))
            return dx.reshape(x.shape), dgain.reshape(-1, len(gain)).sum(0)

        return y.reshape(x.shape), wrong

    properties = (*RMS_PROPERTIES, rows_are_independent)
    checks.kill_matrix(properties, (*wrong_nn.RMS_NORM, over_the_batch), CASES)


# --- properties of LayerNorm: op(x, weight, bias, eps) ----------------------------------------------------------------


def layer_gradients(op, case):
    x, gain, shift, _, rng = make(case)
    if x.size and case[2] == "normal":
        check_vjp(lambda *args: op(*args, EPS), x, gain, shift, rng=rng)


def layer_torch_agrees(op, case):
    x, gain, shift, dy, _ = make(case)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, gain, shift)]
    y = torch.nn.functional.layer_norm(leaves[0], gain.shape, leaves[1], leaves[2], EPS)
    y.backward(torch.tensor(dy))
    found, vjp = op(x, gain, shift, EPS)
    balls = layer_oracle(np.float64, dy, x, gain, shift)
    expected = (y.detach(), *(t.grad for t in leaves))
    for what, a, b, ball in zip(("y", "dx", "dw", "db"), (found, *vjp(dy)), expected, balls, strict=True):
        assert (np.abs(a - b.numpy()) <= 2 * ball.radius).all(), what


def layer_within_the_bound_in_any_layout(op, case):
    x, gain, shift, dy, _ = make(case)
    for layout in (checks.contiguous, *checks.LAYOUTS):
        for dtype in checks.DTYPES:
            checks.inside(lambda *args: op(*args, EPS), layer_oracle, [x, gain, shift], dy, dtype, layout)


def layer_shift_and_scale_fall_out(op, case):
    """x + c, for x and c on a grid, has the same centered row, and a constant row becomes the bias."""
    x, gain, shift, _, _ = make(case)
    d = x.shape[-1]
    if d & (d - 1) == 0:  # the mean of whole numbers is exact
        whole = np.rint(4 * x)
        checks.same_bits(op(whole + 8, gain, shift, EPS)[0], op(whole, gain, shift, EPS)[0], "y")
    constant = op(np.full_like(x, 0.25), gain, shift, EPS)[0]
    assert (np.abs(constant - shift) <= 1e-11 * np.abs(gain)).all(), "a constant row is only rounding noise / √ε"


def layer_changes_nothing(op, case):
    x, gain, shift, dy, _ = make(case)
    checks.pure(lambda *args: op(*args, EPS), (x, gain, shift), dy)


LAYER_PROPERTIES = (
    layer_gradients,
    layer_torch_agrees,
    layer_within_the_bound_in_any_layout,
    layer_shift_and_scale_fall_out,
    layer_changes_nothing,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", LAYER_PROPERTIES)
def test_layer_norm(holds, case):
    holds(layer_norm, case)


def test_layer_norm_kill_matrix():
    def scribbles(x, gain, shift, eps=1e-5):
        y, vjp = layer_norm(x, gain, shift, eps)

        def wrong(dy):
            found = vjp(dy)
            dy *= gain
            return found

        return y, wrong

    checks.kill_matrix(LAYER_PROPERTIES, (*wrong_nn.LAYER_NORM, scribbles), CASES)


# --- both -------------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 9999),
    rows=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    d=st.integers(1, 200),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from((checks.contiguous, *checks.LAYOUTS)),
    dtype=st.sampled_from(checks.DTYPES),
)
def test_any_shape_and_layout(seed, rows, d, kind, layout, dtype):
    x, gain, shift, dy, _ = make((seed, (*rows, d), kind))
    checks.inside(lambda x, gain: rms_norm(x, gain, EPS), rms_oracle, [x, gain], dy, dtype, layout)
    checks.inside(lambda *args: layer_norm(*args, EPS), layer_oracle, [x, gain, shift], dy, dtype, layout)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_defaults_are_the_fields(norm, rng):
    """ε = 1e-6 and 1e-5, seen on rows so small that ε is all there is."""
    x, ones = 1e-12 * rng.standard_normal((3, 8)), np.ones(8)
    eps = {rms_norm: 1e-6, layer_norm: 1e-5}[norm]
    arguments = (ones,) if norm is rms_norm else (ones, 0 * ones)
    centered = x if norm is rms_norm else x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(norm(x, *arguments)[0], centered / math.sqrt(eps), rtol=1e-11)


def test_frozen_gains_and_biases_have_no_cotangent(rng):
    x, dy = rng.standard_normal((2, 3, 8))
    gain, shift = rng.standard_normal((2, 8))
    for arguments, op in (((gain,), rms_norm), ((gain, shift), layer_norm)):
        y, vjp = op(x, *arguments)
        full = vjp(dy)
        for kept in range(len(arguments) + 1):
            some = [a if i == kept else Frozen(a) for i, a in enumerate(arguments)]
            y_frozen, vjp_frozen = op(x, *some)
            found = vjp_frozen(dy)
            checks.same_bits(y_frozen, y, "y")
            checks.same_bits(found[0], full[0], "dx")
            for i, cotangent in enumerate(found[1:]):
                if i == kept:
                    checks.same_bits(cotangent, full[1 + i], "what learns")
                else:
                    assert cotangent is None
