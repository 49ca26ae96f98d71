"""The norms in torch and Triton: the properties, guards around every launch, wrong versions, compilation."""

import functools

import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations.norms import FIXED, OPERATIONS, Rows
from minift_kernels import aot, backend
from minift_kernels.nn import norms
from nn.checks import kill_matrix
from wrong_kernels import wrong_norms

BACKENDS = {"torch": ("float32", "float64", "float16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [Rows((9, 8), "tiny"), Rows((5, 17), "shifted"), Rows((2, 3, 17), "shifted", "float16")]


@pytest.fixture
def few_parts(monkeypatch):
    """Four shares of the rows in the backward pass: with so few, several rows in each."""
    monkeypatch.setattr(backend.load(norms.KERNELS, "interpreter"), "PARTS", 4)


def implementation(operation, how):
    function = getattr(norms, operation.name.split(".")[1])
    return torch_functions.differentiable(functools.partial(function, backend=how))


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_properties(operation, how, few_parts):
    with guarded():
        for case in FIXED:
            if case.dtype in BACKENDS[how]:
                for prop in operation.properties:
                    prop(implementation(operation, how), case)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_kill_matrix(name, few_parts):
    kernels = backend.load("wrong_kernels.wrong_norms", "interpreter")
    operation = OPERATIONS[1]
    make = functools.partial(version, implementation(operation, "interpreter"), name, getattr(kernels, name))
    properties = operation.properties[:4]
    for prop in properties:
        for case in QUICK:
            prop(make("nothing"), case)
    kill_matrix(properties, [make(what) for what in getattr(wrong_norms, name.upper())], QUICK)


@pytest.mark.parametrize("centered", [False, True])
def test_offsets_have_64_bits(centered):
    """The last row of 2³¹ + 192 numbers, forward and backward."""
    n, d = (1 << 31) // 64 + 3, 64
    x, y, dx = (sparse((n, d), torch.float32) for _ in range(3))
    gain, bias = torch.randn(2, d)
    inv_std, mean = sparse((n,), torch.float32), sparse((n if centered else 0,), torch.float32)
    x[-1], y[0] = torch.randn(d), 7
    shift = bias if centered else None
    with last_program():
        norms.forward_launch(y, inv_std, mean, x, gain, shift, 1e-5, "interpreter").run(CPU)
    near = norms._norm(x[-1:], gain, shift, 1e-5, "interpreter")
    assert torch.equal(y[-1:], near[0]) and inv_std[-1] == near[1] and (y[0] == 7).all()
    dy, dgain, dshift = (sparse((n, d), torch.float32) for _ in range(3))  # a share for every row
    gradients = dx, dgain, dshift if centered else dshift[:0]
    dy[-1] = torch.randn(d)
    with last_program():
        norms.backward_launch(gradients, dy, x, gain, inv_std, mean, centered, "interpreter").run(CPU)
    wanted = norms._norm_backward(dy[-1:], x[-1:], gain, inv_std[-1:], mean[-1:], centered, "interpreter")
    assert torch.equal(dx[-1:], wanted[0]) and torch.equal(gradients[1][-1], wanted[1])


@pytest.mark.parametrize("centered", [False, True])
def test_opcheck(centered):
    x, gain, bias = torch.randn(3, 2, 7, requires_grad=True), *torch.randn(2, 7)
    args = (x, gain.requires_grad_(), bias.requires_grad_() if centered else None, 1e-5, "interpreter")
    torch.library.opcheck(torch.ops.minift.norm.default, args)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centered", [False, True])
def test_compiles(target, dtype, centered):
    """For a row of 4,096, in words of 16 bytes and with nothing spilled."""
    empty = functools.partial(torch.empty, device="meta")
    x, gain, of_row = empty(2048, 4096, dtype=dtype), empty(4096, dtype=dtype), empty(2048)
    shift = gain if centered else None
    parts = empty(256, 4096)
    for launch in (
        norms.forward_launch(x, of_row, of_row, x, gain, shift, 1e-5, "triton"),
        norms.backward_launch((x, parts, parts), x, x, gain, of_row, of_row, centered, "triton"),
    ):
        found = aot.compile_launch(launch, target)
        print(f"{launch.kernel.fn.__name__} {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
        assert found.spilled == 0 and max(found.widths("load")) == 128 == max(found.widths("store"))
