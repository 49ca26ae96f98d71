"""8-bit products in torch: the reference's codes and sums bit for bit, outlier columns apart, the gradient."""

import numpy as np
import pytest
import torch

from minift.conformance.bounds import gamma
from minift.peft import lora as reference_lora
from minift.quant import int8_vectorwise as reference
from minift_kernels.nn.linear import linear
from minift_kernels.params import from_numpy, to_numpy
from minift_kernels.quant import int8_vectorwise as int8
from nn.checks import kill_matrix, same_bits
from quant.wrong_integers import PRODUCTS, Product

f32 = np.float32
# rows of x, (out, in) of W, columns where outliers are planted, threshold, type
CASES = [
    ((5,), (4, 12), (), 6.0, f32),
    ((5,), (4, 12), (3,), 6.0, f32),
    ((2, 3), (7, 40), (0, 5, 39), 6.0, f32),
    ((4,), (7, 40), (1, 2), 0.0, f32),
    ((6,), (5, 30), (4, 7), 6.0, np.float64),
    ((3,), (3, 2200), (9,), 6.0, f32),
    ((1,), (2, 9), (0, 8), 6.0, f32),
    ((0,), (2, 9), (), 6.0, f32),
    ((3,), (2, 1), (), 6.0, f32),
]


def draw(case):
    rows, shape, columns, threshold, dtype = case
    rng = np.random.default_rng(shape)
    x = np.clip(rng.standard_normal((*rows, shape[1])), -5, 5)
    for j in columns:  # of both signs; in one row beyond the threshold, in others perhaps
        x[..., j] *= 3
        x.reshape(-1, shape[1])[j % len(x.reshape(-1, shape[1])), j] = -20 if j % 2 else 20
    w = reference.quantize((0.1 * rng.standard_normal(shape)).astype(f32))
    return x.astype(dtype), w, threshold, rng.standard_normal((*rows, shape[0])).astype(dtype)


def in_torch(x, w, threshold):
    """`y, vjp` on arrays, with the reference's weight."""
    given = torch.tensor(x, requires_grad=True)
    y = int8.forward(given, int8.Int8Tensor(torch.tensor(w.codes), torch.tensor(w.absmax)), threshold)
    return y.detach().numpy(), lambda dy: torch.autograd.grad(y, given, torch.from_numpy(dy))[0].numpy()


def as_the_reference(product, case):
    """Without outliers y is the same to the bit; with them, and in dx, sums of k terms have another order."""
    x, w, threshold, dy = draw(case)
    y, vjp = reference.forward(x, w, threshold)
    found, found_vjp = product(x, w, threshold)
    outliers = reference.quantize_rows(x.reshape(-1, x.shape[-1]), threshold)[2]
    w_hat = np.abs(w.dense(np.float64))
    u = 2 * gamma(len(outliers) + 1, x.dtype) if len(outliers) else 0
    within = np.abs(x[..., outliers]) @ w_hat[:, outliers].T + np.abs(y)
    assert found.dtype == y.dtype and (np.abs(found - y) <= u * within).all()
    dx = found_vjp(dy)
    assert dx.dtype == x.dtype and (np.abs(dx - vjp(dy)) <= 2 * gamma(len(w_hat), x.dtype) * (np.abs(dy) @ w_hat)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_and_gradients_are_the_references(case):
    as_the_reference(in_torch, case)


def test_wrong_versions_are_rejected():
    def holds(wrong, case):
        as_the_reference(wrong(), case)

    cases = [case for case in CASES if case[0] != (0,)]
    for right in (Product, lambda: in_torch):
        holds(right, cases[1])
    kill_matrix([holds], PRODUCTS, cases)


@pytest.mark.parametrize("dtype", [np.float16, f32, np.float64])
@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
def test_codes_scales_and_outliers_bit_for_bit(dtype, threshold, rng):
    x = rng.standard_normal((50, 96)) * 10.0 ** rng.integers(-3, 1, (50, 1))
    x[:, [5, 60]] *= 30
    x[3], x[4] = 0, 1e-6
    x[5, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]  # ties
    x = x.astype(dtype)
    for found, expected in zip(
        int8.quantize_rows(torch.tensor(x), threshold), reference.quantize_rows(x, threshold), strict=True
    ):
        same_bits(found.numpy(), expected, "codes, scales, outliers")
    kept, expected = int8.quantize(torch.tensor(x), 2.5), reference.quantize(x, 2.5)
    same_bits(kept.codes.numpy(), expected.codes, "codes")
    same_bits(kept.dense().numpy(), expected.dense(), "decoded")
    assert kept.threshold == 2.5


def test_bfloat16_is_raised_and_rounded_once(rng):
    x, w = (
        torch.tensor(rng.standard_normal((6, 20))).bfloat16(),
        int8.quantize(torch.tensor(rng.standard_normal((3, 20)))),
    )
    x[:, 2] *= 9
    x.requires_grad_()
    y = int8.forward(x, w)
    assert y.dtype == torch.bfloat16 and torch.equal(y, int8.forward(x.float(), w).bfloat16())
    y.float().square().sum().backward()
    assert torch.equal(x.grad, ((2 * y.float()).bfloat16().float() @ w.dense()).bfloat16())


# --- the sum of integers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,d,out", [(1, 1, 1), (17, 8, 8), (16, 1041, 3), (40, 2100, 9), (0, 5, 2), (3, 0, 2)])
def test_sums_are_exact_however_they_are_made(n, d, out, rng, monkeypatch):
    """The library's product as a GPU allows it (its rules are checked here), and in strips."""

    def library(a, b):
        (rows, inner), columns = a.shape, b.shape[1]
        assert rows > 16 and inner % 8 == columns % 8 == 0 and inner and columns
        return (a.to(torch.int32) @ b.to(torch.int32)).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", library)
    q, p = (rng.integers(-127, 128, (rows, d)).astype(np.int8) for rows in (n, out))
    expected = reference.integer_product_1(q, p)
    for product in (int8.integer_product_2, int8._padded_product):
        same_bits(product(torch.tensor(q), torch.tensor(p)).numpy(), expected, product.__name__)


def test_the_largest_sums(rng):
    wide = torch.full((1, 133_144), -127, dtype=torch.int8)
    assert int8.integer_product_2(wide, -wide).item() == -(127**2) * 133_144 > -(2**31)


# --- a weight among others --------------------------------------------------------------------------------------------


def test_as_a_weight_and_under_a_lora(rng):
    w, x = rng.standard_normal((6, 9)).astype(f32), rng.standard_normal((2, 3, 9)).astype(f32)
    kept, A, B = (
        reference.quantize(w, 1.5),
        rng.standard_normal((2, 9)).astype(f32),
        rng.standard_normal((6, 2)).astype(f32),
    )
    carried = reference_lora.LoRA(kept, A, B, 4)
    there = from_numpy({"dense": kept, "adapted": carried})
    expected, vjp = carried.linear(x)
    given = torch.tensor(x, requires_grad=True)
    y = linear(given, there["adapted"])
    dy = rng.standard_normal(y.shape).astype(f32)
    dx, learned = vjp(dy)
    found = torch.autograd.grad(y, [given, there["adapted"].A, there["adapted"].B], torch.tensor(dy))
    X, W, A_, B_, DY = (np.abs(a).reshape(-1, a.shape[-1]) for a in (x, kept.dense(), A, B, dy))
    sizes = [X @ W.T + 2 * X @ A_.T @ B_.T, DY @ W + 2 * DY @ B_ @ A_, 2 * (DY @ B_).T @ X, 2 * DY.T @ (X @ A_.T)]
    expected = [expected, dx, learned["lora_A.weight"], learned["lora_B.weight"]]
    for a, b, size in zip([y.detach(), *found], expected, sizes, strict=True):  # the longest chain of sums: 6 + 2 + 9
        assert (np.abs(a.numpy() - b).reshape(size.shape) <= 2 * gamma(6 + 2 + 9 + 3, f32) * size).all()
    back = to_numpy(there)["dense"]
    assert back.codes.tobytes() == kept.codes.tobytes() and back.threshold == 1.5
    assert repr(there["dense"]) == "Int8Tensor((6, 9), 78 bytes)" and there["dense"].arrays() == {}


def test_what_is_refused(rng):
    w = int8.quantize(torch.tensor(rng.standard_normal((3, 8))))
    x = torch.zeros(2, 8)
    x[0, 3] = torch.inf
    with pytest.raises(ValueError, match=r"cannot quantize inf at index \(0, 3\)"):
        int8.forward(x, w)
    with pytest.raises(ValueError, match=r"x \(2, 7\) and a weight \(3, 8\), needed \(…, in\), \(out, in\)"):
        int8.forward(torch.zeros(2, 7), w)
    with pytest.raises(ValueError, match=r"codes: torch.int8 \(24,\), needed int8 \(out, in\)"):
        int8.Int8Tensor(w.codes.view(-1), w.absmax)
    with pytest.raises(ValueError, match=r"absmax: torch.float32 \(2,\), needed torch.float32 \(3,\)"):
        int8.Int8Tensor(w.codes, w.absmax[1:])
