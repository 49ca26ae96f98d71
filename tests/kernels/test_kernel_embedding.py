"""The embedding table in torch and Triton: properties, guards, wrong versions, compilation."""

import functools

import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations import embedding as known
from minift.conformance.operations.embedding import FIXED, OPERATIONS, Lookup
from minift_kernels import aot, backend
from minift_kernels.nn import embedding
from minift_kernels.nn.weight import Frozen
from nn.checks import kill_matrix
from wrong_kernels import wrong_embedding

BACKENDS = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [Lookup((2, 4), 4, 3, seed=1), Lookup((3,), 3, 1030)]


def implementation(how, dtype=None):
    return torch_functions.differentiable(functools.partial(embedding.embedding, backend=how), dtype=dtype)


@pytest.mark.parametrize("how", BACKENDS)
def test_properties(how):
    with guarded():
        for case in FIXED:
            if case.dtype in BACKENDS[how]:
                for prop in OPERATIONS[0].properties:
                    prop(implementation(how, case.dtype), case)


def test_kill_matrix():
    kernel = backend.load("wrong_kernels.wrong_embedding", "interpreter").scatter_add
    make = functools.partial(version, implementation("interpreter"), "scatter_add", kernel)
    properties = (known.rows_and_sums_by_a_loop, known.is_within_its_bound_in_any_layout, known.changes_nothing)
    for prop in properties:
        for case in QUICK:
            prop(make("nothing"), case)
    kill_matrix(properties, [make(what) for what in wrong_embedding.SCATTER_ADD], QUICK)


@pytest.mark.parametrize("how", BACKENDS)
def test_a_frozen_table(how):
    tokens, table = torch.tensor([[1, 0, 1]]), torch.randn(3, 4)
    y = embedding.embedding(tokens, Frozen(table), backend=how)
    assert torch.equal(y, table[tokens]) and not y.requires_grad


def test_a_token_that_fills_a_batch_is_summed_in_float32():
    """In float16 a sum of ones would stop at 2,048."""
    table, tokens = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True), torch.ones(4000, dtype=torch.int32)
    for how in BACKENDS:
        (found,) = torch.autograd.grad(embedding.embedding(tokens, table, backend=how).sum(), table)
        assert found.flatten().tolist() == [0, 4000]


def test_offsets_have_64_bits():
    """The last row of 2³¹ + 192 numbers of the table, and of dy."""
    n, d = (1 << 31) // 64 + 3, 64
    dweight, dy = (sparse((n, d), torch.float32) for _ in range(2))
    order, starts = sparse((n,), torch.int64), sparse((n + 1,), torch.int64)
    dy[-1], order[-1], starts[-1], starts[-2], dweight[0] = torch.randn(d), n - 1, n, n - 1, 7
    with last_program():
        embedding.backward_launch(dweight, dy, order, starts, "interpreter").run(CPU)
    assert torch.equal(dweight[-1], dy[-1]) and (dweight[0] == 7).all()


@pytest.mark.parametrize("how", BACKENDS)
def test_opcheck(how):
    tokens, table = torch.tensor([2, 0, 2, 1]), torch.randn(5, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.minift.embedding.default, (tokens, table, how))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiles(target, dtype):
    """For Llama 3's table, in words of 16 bytes and with nothing spilled."""
    empty = functools.partial(torch.empty, device="meta")
    dweight, dy = empty(128256, 4096, dtype=dtype), empty(8192, 4096, dtype=dtype)
    order, starts = empty(8192, dtype=torch.int64), empty(128257, dtype=torch.int64)
    found = aot.compile_launch(embedding.backward_launch(dweight, dy, order, starts, "triton"), target)
    print(f"scatter_add {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
    assert found.spilled == 0 and max(found.widths("load")) == 128 and set(found.widths("store")) == {128}
