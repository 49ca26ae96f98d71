"""SwiGLU and GELU in torch and Triton: the properties, guards around every launch, wrong versions, compilation."""

import functools

import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations.mlp import FIXED, OPERATIONS, Numbers
from minift_kernels import aot, backend
from minift_kernels.nn import mlp
from nn.checks import kill_matrix
from wrong_kernels import wrong_mlp

BACKENDS = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [Numbers((2, 9), "normal"), Numbers((1030,), "extreme", seed=1), Numbers((6,), "large", "float16")]


def implementation(operation, how, dtype=None):
    function = getattr(mlp, operation.name.split(".")[1])
    return torch_functions.differentiable(functools.partial(function, backend=how), dtype=dtype)


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_properties(operation, how):
    with guarded():
        for case in FIXED:
            if case.dtype in BACKENDS[how]:
                for prop in operation.properties:
                    prop(implementation(operation, how, case.dtype), case)


def test_tiles_are_all_run():
    """The fixed cases have a short tile behind a whole one for each size of number that the interpreter can hold."""
    tiles = backend.load(mlp.KERNELS, "interpreter").TILES
    for size, dtype in ((2, "float16"), (4, "float32")):
        assert any(case.dtype == dtype and case.shape == (tiles[size][0] + 1,) for case in FIXED)


@pytest.mark.parametrize(
    ("operation", "name", "wrong"),
    [
        (OPERATIONS[0], "swiglu", wrong_mlp.SWIGLU),
        (OPERATIONS[0], "swiglu_backward", wrong_mlp.SWIGLU_BACKWARD),
        (OPERATIONS[1], "gelu", set(wrong_mlp.GELU) - {"no cubic term"}),
        (OPERATIONS[2], "gelu", wrong_mlp.GELU),
        (OPERATIONS[1], "gelu_backward", set(wrong_mlp.GELU_BACKWARD) - {"cubic once"}),
        (OPERATIONS[2], "gelu_backward", wrong_mlp.GELU_BACKWARD),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "name", ""),
)
def test_kill_matrix(operation, name, wrong):
    kernel = getattr(backend.load("wrong_kernels.wrong_mlp", "interpreter"), name)
    make = functools.partial(version, implementation(operation, "interpreter"), name, kernel)
    within, nothing, _, _, extremes, nan = operation.properties
    for prop in (within, nothing, extremes, nan):
        for case in QUICK:
            prop(make("nothing"), case)
    kill_matrix((within, extremes, nan), [make(what) for what in sorted(wrong)], QUICK)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_offsets_have_64_bits(name):
    """The last tile of 2³¹ + 1,030 numbers, forward and backward."""
    n = (1 << 31) + 1030
    y, x, up, dy, dx, dup = (sparse((n,), torch.float16) for _ in range(6))
    near = slice(n - n % 2048, n)
    x[near], up[near], dy[near] = torch.randn(3, n % 2048).half()
    y[0] = dx[0] = 7
    with last_program():
        if name == "swiglu":
            mlp.swiglu_launch(y, x, up, "interpreter").run(CPU)
            mlp.swiglu_backward_launch((dx, dup), dy, x, up, "interpreter").run(CPU)
        else:
            mlp.gelu_launch(y, x, True, "interpreter").run(CPU)
            mlp.gelu_backward_launch(dx, dy, x, True, "interpreter").run(CPU)
    if name == "swiglu":
        assert torch.equal(y[near], mlp._swiglu(x[near], up[near], "interpreter"))
        wanted = mlp._swiglu_backward(dy[near], x[near], up[near], "interpreter")
        assert torch.equal(dx[near], wanted[0]) and torch.equal(dup[near], wanted[1])
    else:
        assert torch.equal(y[near], mlp._gelu(x[near], True, "interpreter"))
        assert torch.equal(dx[near], mlp._gelu_backward(dy[near], x[near], True, "interpreter"))
    assert y[0] == 7 == dx[0]


def test_opcheck():
    gate, up = (torch.randn(3, 2, 7, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.minift.swiglu.default, (gate, up, "interpreter"))
    torch.library.opcheck(torch.ops.minift.gelu.default, (gate, True, "interpreter"))


@pytest.mark.parametrize("how", ["torch", "interpreter"])
def test_a_half_of_a_wider_matrix(how):
    """gate and up as the two halves of one product: rows with a gap, whose gradient is the whole product's."""
    both = torch.randn(3, 10, requires_grad=True)
    y = mlp.swiglu(*both.chunk(2, dim=-1), backend=how)
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, both, dy)
    gate, up = (part.detach().clone().requires_grad_() for part in both.chunk(2, dim=-1))
    wanted = torch.autograd.grad(mlp.swiglu(gate, up, backend=how), (gate, up), dy)
    assert torch.equal(found, torch.cat(wanted, dim=-1))


def test_sigmoid_and_erf_are_the_references():
    x = torch.linspace(-7, 7, 1001, dtype=torch.float64)
    from minift.nn import mlp as reference

    assert abs(mlp.sigmoid(x).numpy() - reference.sigmoid(x.numpy())).max() <= 2.0**-51
    assert abs(mlp.erf(x).numpy() - reference.erf(x.numpy())).max() <= 2.0**-50


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiles(target, dtype):
    """In words of 16 bytes and with nothing spilled."""
    x = torch.empty(4096, 14336, dtype=dtype, device="meta")
    for launch in (
        mlp.swiglu_launch(x, x, x, "triton"),
        mlp.swiglu_backward_launch((x, x), x, x, x, "triton"),
        *(mlp.gelu_launch(x, x, tanh, "triton") for tanh in (False, True)),
        *(mlp.gelu_backward_launch(x, x, x, tanh, "triton") for tanh in (False, True)),
    ):
        found = aot.compile_launch(launch, target)
        print(f"{launch.kernel.fn.__name__} {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
        assert found.spilled == 0 and set(found.widths("load")) == {128} == set(found.widths("store"))
