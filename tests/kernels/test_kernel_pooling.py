"""Pooling in torch: the reference's values and gradients, padding of NaN, 16 bits, wrong versions, what is refused."""

import functools

import numpy as np
import pytest
import torch

from minift.conformance.bounds import gamma
from minift.nn import pooling as reference
from minift_kernels.nn import pooling
from wrong_kernels import wrong_models

SHAPES = [(3, 5, 4), (2, 1, 6), (4, 7, 1), (1, 3, 33)]
POOLS = ["mean_pool", "last_token"]


def texts(shape):
    """Hidden states, lengths that differ, padding of NaN, a cotangent."""
    rng = np.random.default_rng(shape)
    lengths = rng.integers(1, shape[1], shape[0], endpoint=True)
    x = rng.standard_normal(shape)
    x[np.arange(shape[1]) >= lengths[:, None]] = np.nan
    return x, lengths, rng.standard_normal((shape[0], shape[2]))


def rows(shape):
    """Rows of very different lengths, one of zeros; the two terms of dx may cancel, so bounds are of their sizes."""
    rng = np.random.default_rng(shape)
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
    x[0, 0] = 0
    return x, rng.standard_normal(shape)


def in_torch(op, dy, x, *args):
    given = torch.tensor(x, requires_grad=True)
    y = op(given, *args)
    return y.detach().numpy(), torch.autograd.grad(y, given, torch.tensor(dy))[0].numpy()


def pools_as_the_reference(name, op=None):
    """The last token to the bit; of means, sums of T numbers in another order, and padding has no cotangent."""
    op = op or getattr(pooling, name)
    for shape in SHAPES:
        x, lengths, dy = texts(shape)
        y, vjp = getattr(reference, name)(x, lengths)
        found, dx = in_torch(op, dy, x, torch.tensor(lengths))
        size = np.where(np.isnan(x), 0, np.abs(x)).sum(axis=1) / lengths[:, None]
        assert (np.abs(found - y) <= (2 * gamma(shape[1] + 1, np.float64) if name == "mean_pool" else 0) * size).all()
        assert np.array_equal(dx, vjp(dy))


def unit_length_as_the_reference(op=pooling.unit_length):
    for shape in SHAPES:
        x, dy = rows(shape)
        for eps in (1e-12, 0.5):  # rows above and below
            y, vjp = reference.unit_length(x, eps)
            found, dx = in_torch(op, dy, x, eps)
            length = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), eps)
            size = np.linalg.norm(dy, axis=-1, keepdims=True) / length
            u = 4 * gamma(shape[-1] + 4, np.float64)
            assert (np.abs(found - y) <= u * np.abs(y)).all() and (np.abs(dx - vjp(dy)) <= u * size).all()


PROPERTIES = {name: functools.partial(pools_as_the_reference, name) for name in POOLS}
PROPERTIES["unit_length"] = unit_length_as_the_reference


@pytest.mark.parametrize("name", PROPERTIES)
def test_values_and_gradients_are_the_references(name):
    PROPERTIES[name]()


@pytest.mark.parametrize("name", PROPERTIES)
def test_wrong_versions_are_rejected(name):
    for wrong in wrong_models.POOLING[name].values():
        with pytest.raises(AssertionError):
            PROPERTIES[name](op=wrong)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_summed_in_float32_and_rounded_once(name, dtype):
    x, lengths = (torch.tensor(a) for a in texts((3, 300, 4))[:2])
    op, x = getattr(pooling, name), x.to(dtype)
    found = op(x, lengths)
    assert found.dtype == dtype and torch.equal(found, op(x.float(), lengths).to(dtype))
    y = pooling.unit_length(found)
    assert y.dtype == dtype and torch.equal(y, pooling.unit_length(found.float()).to(dtype))


@pytest.mark.parametrize("op", [pooling.mean_pool, pooling.last_token])
@pytest.mark.parametrize("lengths", [[2, 0], [2, 4]])
def test_a_row_needs_as_many_tokens_as_it_says(op, lengths):
    with pytest.raises(ValueError, match=rf"row 1 has {lengths[1]} tokens, needed 1 to 3"):
        op(torch.zeros(2, 3, 4), torch.tensor(lengths))
