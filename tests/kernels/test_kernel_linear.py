"""The linear map in torch: the properties, and what reaches a weight that is not a tensor."""

import pytest
import torch

from minift.conformance import torch_functions
from minift.conformance.operations.linear import FIXED, OPERATIONS
from minift_kernels.nn import linear
from minift_kernels.nn.weight import Frozen


@pytest.mark.parametrize("case", FIXED)
def test_properties(case):
    for prop in OPERATIONS[0].properties:
        prop(torch_functions.differentiable(linear.linear, dtype=case.dtype), case)


class Doubling(Frozen):
    """Multiplies by its key, and remembers the backend."""

    heard = None

    def linear(self, x, dropout_key=None, *, backend=None):
        Doubling.heard = backend
        return dropout_key * x


def test_a_weight_hears_the_dropout_key_and_the_backend():
    x, b = torch.randn(2, 4, 3), torch.randn(3)
    y = linear.linear(x, Doubling(torch.eye(3)), b, dropout_key=5, backend="interpreter")
    assert torch.equal(y, 5 * x + b) and Doubling.heard == "interpreter"
    with pytest.raises(TypeError):  # no key: nobody made one up
        linear.linear(x, Doubling(torch.eye(3)))


def test_a_frozen_weight_has_no_gradient_and_the_same_bits():
    x, W, b = torch.randn(2, 3, 5, requires_grad=True), torch.randn(7, 5), torch.randn(7, requires_grad=True)
    y, y_frozen = linear.linear(x, W), linear.linear(x, Frozen(W))
    assert torch.equal(y, y_frozen)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(f, x, dy)[0] for f in (y, y_frozen)))
    assert torch.equal(torch.autograd.grad(linear.linear(x, Frozen(W), b), b, dy)[0], dy.sum((0, 1)))


def test_a_backend_that_is_unknown_or_cannot():
    x, W = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match="needed one of"):
        linear.linear(x, W, backend="numpy")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        linear.linear(x, W, backend="triton")
