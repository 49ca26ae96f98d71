"""The LSTM in torch: the properties, and wrong versions of both directions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.conformance import torch_functions
from minift.conformance.operations.lstm import FIXED, OPERATIONS, Layer
from minift_kernels.nn import lstm
from nn.checks import kill_matrix

DTYPES = ("float32", "float64", "float16", "bfloat16")
LAYER, BOTH = OPERATIONS


def both(x, *eight):
    return lstm.bidirectional_lstm(x, eight[:4], eight[4:])


def implementation(operation, dtype, f=None):
    f = f or (lstm.lstm if operation is LAYER else both)
    return torch_functions.differentiable(f, dtype="bfloat16" if dtype == "bfloat16" else None)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_properties(operation):
    for case in FIXED:
        for prop in operation.properties:
            prop(implementation(operation, case.dtype), case)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_drawn(operation, data):
    case = data.draw(operation.cases(DTYPES))
    for prop in operation.properties:
        prop(implementation(operation, case.dtype), case)


def test_cell():
    """A layer is its cell, step by step; in float64 by central differences."""
    generator = torch.Generator().manual_seed(0)
    x, h, c, *weights = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3), (2, 4), (2, 4), (16, 3), (16, 4), (16,), (16,))
    )
    assert torch.autograd.gradcheck(lstm.lstm_cell, (x, h, c, *weights), fast_mode=True)
    text = torch.stack([x, 2 * x, -x], dim=1)
    h = c = torch.zeros(2, 4, dtype=torch.float64)
    for t in range(3):
        h, c = lstm.lstm_cell(text[:, t], h, c, *weights)
        assert (lstm.lstm(text, *weights)[:, t] - h).abs().max() < 1e-14
    assert lstm.lstm_cell(*(a.half() for a in (x, h, c, *weights)))[1].dtype == torch.float16


def variant(order="ifgo", forget=True, shown=torch.tanh, backwards=False, keeps=True, mixed=False, memory=True):
    """`lstm` with switches: with none of them turned it is right."""

    def f(x, W_ih, W_hh, b_ih, b_hh):
        if mixed:
            x = x + x.roll(-1, 1) * 1e-3
        h = c = x.new_zeros(len(x), W_hh.shape[1])
        y = [x.new_zeros(len(x), 0, W_hh.shape[1])]
        steps = range(x.shape[1])
        for t in reversed(steps) if backwards else steps:
            a = x[:, t] @ W_ih.T + b_ih + b_hh + h @ W_hh.T * memory
            gates = dict(zip(order, a.chunk(4, dim=-1), strict=True))
            i, f, o = (torch.sigmoid(gates[name]) for name in "ifo")
            c = (f * c if forget else c) + i * torch.tanh(gates["g"])
            h = o * shown(c)
            y.append(h[:, None])
            h = h if keeps else h.detach()
        return torch.cat(y, dim=1)

    return f


WRONG = {
    "Keras's and PyTorch's order mixed up": {"order": "iofg"},
    "cell before output": {"order": "ifog"},
    "nothing is forgotten": {"forget": False},
    "memory is shown as it is": {"shown": lambda c: c},
    "backwards": {"backwards": True},
    "gradients stop at each step": {"keeps": False},
    "looks ahead": {"mixed": True},
    "no recurrence": {"memory": False},
}
CASES = [Layer(2, 3, 3, 4, seed=1), Layer(1, 3, 2, 3, 0.5, "float64", 7)]


def test_kill_matrix_of_the_layer():
    properties = [p for p in LAYER.properties if p.__name__ != "changes_nothing"]
    for prop in properties:
        prop(implementation(LAYER, "float32", variant()), CASES[0])
    versions = []
    for name, switches in WRONG.items():
        versions.append(implementation(LAYER, "float32", variant(**switches)))
        versions[-1].__name__ = name

    def doubles_its_input(x, *weights):
        x.data.mul_(1.5)
        return lstm.lstm(x, *weights)

    def hooked(x, *weights):
        """A gradient that is not the derivative."""
        y = lstm.lstm(x, *weights)
        y.register_hook(lambda dy: 1.01 * dy)
        return y

    for f in (doubles_its_input, hooked):
        versions.append(implementation(LAYER, "float32", f))
        versions[-1].__name__ = f.__name__
    kill_matrix(LAYER.properties, versions, CASES)


def test_kill_matrix_of_both_directions():
    def both_ahead(x, *eight):
        return torch.cat([lstm.lstm(x, *eight[:4]), lstm.lstm(x, *eight[4:])], dim=2)

    def not_turned_back(x, *eight):
        return torch.cat([lstm.lstm(x, *eight[:4]), lstm.lstm(x.flip(1), *eight[4:])], dim=2)

    def one_set_of_weights(x, *eight):
        return lstm.bidirectional_lstm(
            x, eight[:4], tuple(a + 0 * b for a, b in zip(eight[:4], eight[4:], strict=True))
        )

    def sides_swapped(x, *eight):
        return lstm.bidirectional_lstm(x, eight[4:], eight[:4])

    def batch_reversed(x, *eight):
        return torch.cat([lstm.lstm(x, *eight[:4]), lstm.lstm(x.flip(0), *eight[4:]).flip(0)], dim=2)

    def changes_its_input(x, *eight):
        x.data.add_(1)
        return both(x, *eight)

    wrong = [both_ahead, not_turned_back, one_set_of_weights, sides_swapped, batch_reversed, changes_its_input]
    versions = []
    for f in wrong:
        versions.append(implementation(BOTH, "float32", f))
        versions[-1].__name__ = f.__name__
    kill_matrix(BOTH.properties, versions, CASES)
