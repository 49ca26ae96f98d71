"""8-bit products with outlier columns apart: exact integers, the error bound, bitsandbytes, the pullback."""

import inspect
from typing import NamedTuple

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minift.conformance.ball import Ball
from minift.conformance.bounds import int8_product
from minift.nn.linear import linear
from minift.peft import lora
from minift.quant import int8_vectorwise
from minift.quant.int8_vectorwise import (
    Int8Tensor,
    forward,
    integer_product_1,
    integer_product_2,
    quantize,
    quantize_rows,
)
from nn.checks import kill_matrix, same_bits
from quant.quant_checks import refused
from quant.wrong_integers import PRODUCTS, Product

f32 = np.float32


class Case(NamedTuple):
    rows: tuple[int, ...]
    d_in: int
    d_out: int
    columns: tuple[int, ...] = ()  # where outliers are planted, of both signs
    threshold: float = 6.0
    dtype: type = np.float32
    size: float = 20.0

    def draw(self):
        rng = np.random.default_rng(self.d_in)
        x, w, dy = (
            rng.standard_normal(s) for s in ((*self.rows, self.d_in), (self.d_out, self.d_in), (*self.rows, self.d_out))
        )
        x = np.clip(x, -5, 5)
        for j in self.columns:
            x[..., j] *= self.size / 2
            x.reshape(-1, self.d_in)[j % len(x.reshape(-1, self.d_in)), j] = -self.size if j % 2 else self.size
        return x.astype(self.dtype), quantize(w.astype(f32) * 0.1), w * 0.1, dy.astype(self.dtype)


CASES = [
    Case((5,), 12, 4),
    Case((5,), 12, 4, (3,)),
    Case((2, 3), 40, 7, (0, 5, 39)),
    Case((4,), 40, 7, (1, 2), threshold=0.0),
    Case((6,), 30, 5, (4, 7), dtype=np.float64),
    Case((3,), 2200, 3, (9,)),
    Case((4,), 16, 4, (3,), size=6.0),
    Case((1,), 9, 2, (0, 8)),
]


def product_of_what_is_kept(product, case):
    """y = x̃ Ŵᵀ with x̃ = q a / 127 beside the outlier columns, and x in them; within the rounding of the arithmetic."""
    x, w, _, _ = case.draw()
    flat = x.reshape(-1, case.d_in)
    q, a, outliers = quantize_rows(flat, case.threshold)
    assert a.max() < (case.threshold or np.inf)
    total = integer_product_1(q, w.codes)
    scaled = Ball(total, x.dtype, np.abs(total) * 2.0**-24) * Ball(a[:, None], x.dtype) * Ball(w.absmax, x.dtype)
    w_hat = Ball(w.codes, f32) * (Ball(w.absmax[:, None], f32) / 127.0)
    w_hat = Ball(w_hat.value, x.dtype, w_hat.radius)[:, outliers]
    exact = scaled / Ball(127**2, x.dtype) + Ball(flat[:, outliers], x.dtype) @ w_hat.T
    exact.reshape(*case.rows, case.d_out).check(product(x, w, case.threshold)[0], "y")


def within_the_bound(product, case):
    """Against the exact x Wᵀ: equation (5), whatever scales and outliers an implementation has chosen."""
    x, w, dense, _ = case.draw()
    y = product(x, w, case.threshold)[0]
    bound = int8_product(x, dense, case.threshold)
    assert (np.abs(y - x.astype(np.float64) @ dense.T) <= bound).all()


def pullback_is_of_the_decoded_weight(product, case):
    x, w, _, dy = case.draw()
    w_hat = Ball(w.codes, f32) * (Ball(w.absmax[:, None], f32) / 127.0)
    dx = product(x, w, case.threshold)[1](dy)
    (Ball(dy, x.dtype) @ Ball(w_hat.value, x.dtype, w_hat.radius)).check(dx, "dx")


PROPERTIES = (product_of_what_is_kept, within_the_bound, pullback_is_of_the_decoded_weight)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prop", PROPERTIES)
def test_properties(prop, case):
    prop(forward, case)
    prop(Product(), case)


def test_wrong_versions_are_rejected():
    def of_classes(prop):
        def holds(wrong, case):
            prop(wrong(), case)

        holds.__name__ = prop.__name__
        return holds

    kill_matrix([of_classes(p) for p in PROPERTIES], PRODUCTS, CASES)


# --- against bitsandbytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 3.0, 6.0])
@pytest.mark.parametrize("n", [1, 50])
def test_codes_and_scales_are_those_of_bitsandbytes(dtype, threshold, n, rng):
    """Bit for bit, and the outlier columns too (without a threshold they have none). The last row is small beside its
    outlier."""
    x = rng.standard_normal((n, 96)).astype(dtype)
    x[:, [5, 60]] *= dtype(8)
    x[-1] *= dtype(0.1)
    x[-1, 5] = 9
    codes, absmax, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(torch.from_numpy(x.copy()), threshold)
    q, a, outliers = quantize_rows(x, threshold)
    same_bits(q, codes.numpy(), "codes")
    same_bits(a, absmax.numpy(), "absmax")
    assert outliers.tolist() == ([] if columns is None else columns.tolist())
    assert len(outliers) >= (2 if threshold and n > 1 else 0)


def test_a_product_of_bitsandbytes(rng):
    """Their 1/127² is 6.200124e-05, which lacks a digit (6.2000124e-05): 1.8e-5 too much; nothing else differs."""
    x, w = rng.standard_normal((50, 96)).astype(f32), rng.standard_normal((8, 96)).astype(f32)
    x[:, [5, 60]] *= 8
    kept = quantize(w)
    codes, absmax, columns = bnb.int8_vectorwise_quant(torch.from_numpy(x.copy()), 6.0)
    weight = torch.from_numpy(kept.codes), torch.from_numpy(kept.absmax)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        torch.from_numpy(x), codes, weight[0], absmax, weight[1], columns, None
    )
    y = forward(x, kept)[0]
    apart = x[:, columns.numpy()].astype(np.float64) @ kept.dense(np.float64)[:, columns.numpy()].T
    theirs, factor = theirs.numpy().astype(np.float64), 6.200124e-05 * 127**2
    assert 1.7e-5 < factor - 1 < 1.9e-5
    size = np.abs(x) @ np.abs(kept.dense()).T
    assert (np.abs((theirs - apart) / factor + apart - y) <= 2.0**-24 * 40 * size).all()
    assert np.abs(theirs - y).max() > 2.0**-24 * 40 * size.max()


# --- pieces -----------------------------------------------------------------------------------------------------------


@given(
    arrays(np.int8, (3, 2100), elements=st.integers(-127, 127)),
    arrays(np.int8, (2, 2100), elements=st.integers(-127, 127)),
)
def test_both_products_of_integers_agree(q, p):
    same_bits(integer_product_2(q, p), integer_product_1(q, p), "sum")


def test_the_largest_sum_of_a_strip_is_exact():
    full = np.full((1, int8_vectorwise.EXACT), 127, np.int8)
    assert 127**2 * int8_vectorwise.EXACT < 2**24 <= 127**2 * (int8_vectorwise.EXACT + 1)
    assert integer_product_2(full, full)[0, 0] == 127**2 * int8_vectorwise.EXACT
    wide = np.full((1, 100_000), -127, np.int8)
    assert integer_product_2(wide, -wide)[0, 0] == -(127**2) * 100_000


def test_zeros_tiny_and_huge_numbers(rng):
    w = quantize(rng.standard_normal((3, 8)).astype(f32))
    for scale in (0, 1e-44, 1e-30, 1e30):
        x = (rng.standard_normal((2, 8)) * scale).astype(f32)
        y, _ = forward(x, w, 0.0)
        assert np.isfinite(y).all() and (np.abs(y) <= 8 * 4 * 3.5 * scale).all()
    x[0, 3] = np.inf
    refused(lambda: forward(x, w), "cannot quantize inf at index (0, 3)")
    y, vjp = forward(np.zeros((0, 8), f32), w)
    assert y.shape == (0, 3) and vjp(y).shape == (0, 8)


def test_a_row_below_1e_36_is_coded_as_if_that_were_its_scale():
    """Its own 127 / a would soon be infinite. The scale that is stored is its own: what comes back is smaller."""
    q, a, _ = quantize_rows(f32([[0.9, 0.5001, 0.4999]]) * f32(1e-36))
    assert a[0] == f32(0.9) * f32(1e-36)
    assert q.tolist() == [[round(127 * 0.9), 64, 63]]


def test_scales_without_columns_are_zero():
    assert quantize(np.zeros((3, 0), f32)).absmax.tolist() == [0, 0, 0]


def test_float16_is_raised_and_rounded_once(rng):
    x, w = rng.standard_normal((6, 20)).astype(np.float16), quantize(rng.standard_normal((3, 20)).astype(f32))
    x[:, 2] *= np.float16(9)
    y, _ = forward(x, w)
    assert y.dtype == np.float16
    same_bits(y, forward(x.astype(f32), w)[0].astype(np.float16), "y")


def test_as_a_weight(rng):
    w, x = rng.standard_normal((6, 9)).astype(f32), rng.standard_normal((2, 3, 9)).astype(f32)
    kept = quantize(w, threshold=1.5)
    y, vjp = linear(x, kept)
    same_bits(y, forward(x, kept, 1.5)[0], "y")
    dx, dweight, _ = vjp(y)
    same_bits(dx, y @ kept.dense(), "dx")
    assert dweight is None and kept.nbytes == 54 + 24 and kept.arrays() == {} and kept.with_arrays({}) is kept
    A, B = rng.standard_normal((2, 9)).astype(f32), rng.standard_normal((6, 2)).astype(f32)
    over, _ = lora.LoRA(kept, A, B, 4).linear(x)
    np.testing.assert_allclose(over, y + 2 * (x @ A.T) @ B.T, atol=1e-4)
    assert repr(kept) == "Int8Tensor((6, 9), 78 bytes)"
    refused(lambda: Int8Tensor(kept.codes.ravel(), kept.absmax), "codes: int8 (54,), needed int8 (out, in)\n")
    needed = "needed float32 (6,), one for each row of the codes\n"
    refused(lambda: Int8Tensor(kept.codes, kept.absmax[1:]), f"absmax: float32 (5,), {needed}")


def test_frozen_and_compared_by_identity():
    w, same = (quantize(np.ones((3, 4), f32)) for _ in range(2))
    assert w == w and w != same and len({w, same}) == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        w.threshold = 3.0


@pytest.mark.parametrize("function", [Int8Tensor, quantize, forward])
def test_the_threshold_is_the_papers(function):
    assert inspect.signature(function).parameters["threshold"].default == 6
