"""Dropout in torch and Triton: equal to the reference bit for bit, guards, wrong versions, compilation."""

import functools
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations.dropout import COUNTERS, DROPPED, OPERATIONS, Dropped, refuses_probabilities_outside
from minift.nn import dropout as reference
from minift_kernels import aot, backend
from minift_kernels.nn import dropout
from nn.checks import kill_matrix
from wrong_kernels import wrong_dropout

BACKENDS = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [Dropped((2, 7), 0.4, 2**40 + 3, 2**33 + 1), Dropped((1026,), 0.3, 5, seed=1)]


def implementation(how, dtype=None):
    return torch_functions.differentiable(functools.partial(dropout.dropout, backend=how), dtype=dtype)


def on_counters(f):
    return lambda key, counter, *rest: f(key, torch.from_numpy(counter), *rest).numpy()


@pytest.mark.parametrize("operation", OPERATIONS[:2], ids=lambda o: o.name)
def test_random_numbers(operation):
    for case in COUNTERS:
        for prop in operation.properties:
            prop(on_counters(getattr(dropout, operation.name.split(".")[1])), case)


@pytest.mark.parametrize("how", BACKENDS)
def test_properties(how):
    with guarded():
        for case in DROPPED:
            if case.dtype in BACKENDS[how]:
                for prop in OPERATIONS[2].properties:
                    prop(implementation(how, case.dtype), case)


@pytest.mark.parametrize("how", BACKENDS)
def test_the_references_bits(how):
    x, dy = np.random.default_rng(0).standard_normal((2, 3, 700), np.float32)
    y, vjp = reference.dropout(x, 0.37, 2**64 - 3, 2**41)
    twin, twin_vjp = implementation(how)(x, 0.37, 2**64 - 3, 2**41)
    assert y.tobytes() == twin.tobytes() and vjp(dy).tobytes() == twin_vjp(dy).tobytes()


def test_kill_matrix():
    kernel = backend.load("wrong_kernels.wrong_dropout", "interpreter").dropout
    make = functools.partial(version, implementation("interpreter"), "dropout", kernel)
    properties = [p for p in OPERATIONS[2].properties if p is not refuses_probabilities_outside]  # not the kernel's
    for prop in properties:
        for case in QUICK:
            prop(make("nothing"), case)
    one, _, part, exactly_p, nan = properties
    wrong = [make(what) for what in wrong_dropout.DROPOUT]
    kill_matrix((one, part, exactly_p, nan), wrong, QUICK)


def test_offsets_have_64_bits():
    n = (1 << 31) + 1030
    x, y = (sparse((n,), torch.float16) for _ in range(2))
    near = slice(n - n % 2048, n)
    x[near], y[0] = torch.randn(n % 2048).half(), 7
    with last_program():
        dropout.dropout_launch(y, x, 0.3, 5, 11, "interpreter").run(CPU)
    assert torch.equal(y[near], dropout._dropout(x[near], 0.3, 5, 11 + near.start, "torch")) and y[0] == 7


@pytest.mark.parametrize("how", BACKENDS)
def test_opcheck(how):
    x = torch.randn(3, 2, 7).mT.requires_grad_()
    torch.library.opcheck(torch.ops.minift.dropout.default, (x, 0.3, -5, 1 << 40, how))


def test_gradcheck_and_a_second_derivative():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout.dropout(x, 0.4, 3, 9), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout.dropout(x, 0.4, 3, 9) ** 2, x)


def test_nothing_is_kept():
    """Between the passes the graph holds no tensor."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        dropout.dropout(torch.randn(5, requires_grad=True), 0.5, 3)
    assert not saved


def test_compiled():
    """One opaque operation without a break, the same bits, and no new graph for every key."""
    program = """
        import torch
        from minift_kernels.nn.dropout import dropout, fold_in

        for backend in ("torch", "interpreter"):
            def model(x, key):
                return 2 * dropout(x + 1, 0.4, key, 1 << 33, backend=backend)

            x = torch.randn(3, 70, requires_grad=True)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            for key in [5, 6, 7, *(fold_in(3, step) for step in range(12))]:
                results = [f(x, key) for f in (model, compiled)]
                grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
                assert torch.equal(*results) and torch.equal(*grads)
        print("same bits")
    """
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "same bits\n", done.stderr[-2000:]


def test_fold_in_is_the_references():
    assert dropout.fold_in is reference.fold_in


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", [5, -(1 << 62)])
def test_compiles(target, dtype, key):
    """In words of 16 bytes and with nothing spilled."""
    x = torch.empty(4096, 4096, dtype=dtype, device="meta")
    found = aot.compile_launch(dropout.dropout_launch(x, x, 0.1, key, 0, "triton"), target)
    print(f"dropout {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
    assert found.spilled == 0 and set(found.widths("load")) == {128} == set(found.widths("store"))
