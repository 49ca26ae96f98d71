"""Many adapters in one batch, in torch and Triton: the properties, guards, wrong versions, offsets, compilation."""

import functools
import inspect

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import bounds, torch_functions
from minift.conformance.operations import batched as operation
from minift.conformance.operations.batched import FIXED, PROPERTIES, Batch
from minift_kernels import aot, backend
from minift_kernels.peft import batched, lora
from minift_kernels.quant import nf4
from nn.checks import kill_matrix
from wrong_kernels import wrong_batched

BACKENDS = {"torch": ("float32", "float64", "float16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
LAWS = (FIXED[0], FIXED[1], FIXED[6])  # of all, for the properties that run a kernel many times
QUICK = [
    Batch((2, -1, 0, 2, 0, 2), (3, 1, 5)),
    Batch((1, 0, 1), (2, 3), 70, 3),
    Batch((1, 0, 1), (33, 2), 150, 3, "float16"),
]


def implementation(how):
    def forward(x, W, A, B, scaling, index):
        return batched.forward(x, W, batched.Stack(A, B, scaling), index, backend=how)

    def without_scaling(x, W, A, B, scaling, index):
        y, vjp = torch_functions.differentiable(forward)(x, W, A, B, scaling, index)

        def vjp_without_scaling(dy):
            *cotangents, dscaling = vjp(dy)
            assert dscaling is None, "the scaling does not learn"
            return tuple(cotangents)

        return y, vjp_without_scaling

    return without_scaling


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.__name__)
def test_properties(prop, how):
    with guarded():
        for case in FIXED if prop is operation.is_within_its_bound or how == "torch" else LAWS:
            if case.dtype in BACKENDS[how]:
                prop(implementation(how), case)


@pytest.mark.parametrize("name", ["down", "up", "outer"])
def test_kill_matrix(name):
    kernel = getattr(backend.load("wrong_kernels.wrong_batched", "interpreter"), name)
    make = functools.partial(version, implementation("interpreter"), name, kernel)
    for case in QUICK:
        operation.is_within_its_bound(make("nothing"), case)
    properties = [operation.is_within_its_bound]
    kill_matrix(properties, [make(what) for what in getattr(wrong_batched, name.upper())], QUICK)


def near(found, wanted, allowed):
    """Each of the two is within `allowed` of the exact result."""
    difference = np.abs(found.detach().double().numpy() - wanted.detach().double().numpy())
    assert (difference <= 2 * allowed).all(), f"off by {difference.max():.3g}, allowed {2 * allowed.min():.3g} or more"


@pytest.mark.parametrize("how", BACKENDS)
def test_a_row_is_what_it_is_alone(how):
    """An adapter a sequence, over NF4, and each sequence beside `lora.forward` with its adapter by itself."""
    adapters = [(torch.randn(r, 40), torch.randn(9, r), s) for r, s in ((3, 1.75), (1, 0.5), (20, 2.0))]
    x, q, index = torch.randn(4, 5, 40), nf4.quantize(torch.randn(9, 40)), torch.tensor([1, 2, -1, 1])
    y = batched.forward(x, q, batched.stack(adapters), index, backend=how)
    for sequence, found, a in zip(x, y, index, strict=True):
        alone = lora.forward(sequence, q, *adapters[a], backend=how) if a >= 0 else q.linear(sequence, backend=how)
        A, B, scaling = adapters[a] if a >= 0 else (torch.zeros(1, 40), torch.zeros(9, 1), 0.0)
        # the tile of a batch is as wide as its largest rank: zeros, which add roundings of nothing
        matrices = (part.double().numpy() for part in (sequence, q.dense(), A, B))
        near(found, alone, bounds.lora(*matrices, scaling, np.float32))


@pytest.mark.parametrize("how", BACKENDS)
def test_gradients_reach_the_adapters_themselves(how):
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    wide = torch.randn(4, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    x, w, dy, index = torch.randn(7, 6), torch.randn(5, 6), torch.randn(7, 5), torch.tensor([0, 1, 0, -1, 1, 1, 0])
    y = batched.forward(x, w, batched.stack([(A, B, 1.75), (*wide, 0.5)]), index, backend=how)
    found = torch.autograd.grad(y, (A, B), dy)
    rows = index == 0
    alone = lora.forward(x[rows], w, A, B, 1.75, backend=how)
    # dA = s (dy B)ᵀ x and dB = s dyᵀ (x Aᵀ): sums of at most 7 products, of sums of 5 and of 6
    mine, of_x, a, b = (part.detach().double().abs().numpy() for part in (dy[rows], x[rows], A, B))
    sizes = 1.75 * (mine @ b).T @ of_x, 1.75 * mine.T @ (of_x @ a.T)
    for one, wanted, size in zip(found, torch.autograd.grad(alone, (A, B), dy[rows]), sizes, strict=True):
        near(one, wanted, bounds.gamma(7 + 6 + 2, np.float32) * size)


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 16), (17, 16, 1), (0, 33, 0), (5, 5, 5)])
def test_every_row_lies_in_one_tile(counts):
    """Tiles of one adapter, 16 rows at most, none forgotten; those that are too many are empty."""
    of_row = torch.cat([torch.full((count,), a - 1) for a, count in enumerate(counts)])
    of_row = of_row[torch.randperm(len(of_row))]
    order, starts, (adapters, first, last) = batched._segments(of_row, 2, 16)
    places = []
    for a, start, end in zip(adapters.tolist(), first.tolist(), last.tolist(), strict=True):
        assert 0 <= end - start <= 16 and (of_row[order[start:end]] == a).all()
        places += range(start, end)
    assert sorted(places) == list(range(len(of_row)))
    assert starts.tolist() == [counts[0], counts[0] + counts[1], len(of_row)]


@pytest.mark.parametrize("how", BACKENDS)
def test_what_does_not_fit_is_refused(how):
    adapters = batched.stack([(torch.randn(2, 6), torch.randn(5, 2), 1.0)])
    x, w = torch.randn(3, 4, 6), torch.randn(5, 6)
    for index, message in (
        (torch.zeros(4, dtype=torch.int64), r"index: shape \(4,\), needed the first axes of x's rows, \(3, 4\)"),
        (torch.zeros(3, 4, 6, dtype=torch.int64), r"index: shape \(3, 4, 6\), needed"),
        (torch.tensor([0, 1, 0]), r"index: from 0 to 1, needed -1 \(none\) to 0"),
        (torch.tensor([0, -2, 0]), r"index: from -2 to 0, needed"),
    ):
        with pytest.raises(ValueError, match=message):
            batched.forward(x, w, adapters, index, backend=how)
    with pytest.raises(ValueError, match=r"x \(3, 4, 6\), W \(4, 6\), A \(2, 6\), B \(5, 2\): needed"):
        inspect.unwrap(batched.forward)(x, w[:4], adapters, torch.tensor(0).expand(3), backend=how)
    with pytest.raises(ValueError, match=r"adapters: for layers of shapes \(in, out\) \[\(6, 5\), \(7, 5\)\]"):
        batched.stack([(torch.randn(2, 6), torch.randn(5, 2), 1.0), (torch.randn(2, 7), torch.randn(5, 2), 1.0)])


def test_offsets_have_64_bits():
    """The last rows of an x of 2³¹ numbers and more, and the last adapter of a stack of as many."""
    n, d, r = (1 << 31) // 64 + 3, 64, 2
    x, y = sparse((n, d), torch.float16), sparse((n, d), torch.float16)
    h, A = sparse((n, r), torch.float16), sparse((n // 2, r, d), torch.float16)
    scaling, order = sparse((n // 2,), torch.float32), torch.tensor([n - 2, n - 1])
    x[-2:], A[-1], scaling[-1] = torch.randn(2, d).half(), torch.randn(r, d).half(), 1.75
    tiles = torch.tensor([[n // 2 - 1], [0], [2]])
    with last_program():
        batched.down_launch(h[None], x, A, scaling, order, tiles, "interpreter").run(CPU)
        batched.up_launch(y, x, h, A.mT, order, tiles, "interpreter").run(CPU)
    near = torch.tensor([0, 1]), torch.tensor([[0], [0], [2]])
    wanted = batched._down(x[-2:], A[-1:], scaling[-1:], *near, "interpreter")
    assert torch.equal(h[-2:], wanted) and wanted.any()
    assert torch.equal(y[-2:], batched._up(x[-2:], wanted, A[-1:].mT, *near, "interpreter"))
    assert not h[:2].any() and not y[:2].any()


def test_opcheck():
    index = torch.tensor([1, -1, 0, 1, 1])
    order, starts, tiles = batched._segments(index, 2, 16)
    x, h, A, scaling = torch.randn(5, 7), torch.randn(5, 3), torch.randn(2, 3, 7), torch.randn(2)
    ops = torch.ops.minift
    torch.library.opcheck(ops.batched_down.default, (x, A, scaling, order, tiles, "interpreter"))
    torch.library.opcheck(ops.batched_up.default, (x, h, A.mT, order, tiles, "interpreter"))
    torch.library.opcheck(ops.batched_outer.default, (h, x, order, starts, torch.float32, "interpreter"))


PRODUCTS = {"sm_80": r"mma\.sync", "sm_90": r"(mma\.sync|wgmma)", "gfx942": r"v_mfma"}
COPIES = r"cp\.async\.cg\.shared\.global .*, 0x10"  # 16 bytes from global to shared memory, past the registers


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_compiles(target, dtype):
    """For rows of 4,096 and 64 adapters in float32: tensor cores, words of 16 bytes, nothing spilled, 64 KB shared."""
    empty = functools.partial(torch.empty, device="meta")
    x, h, integers = empty(256, 4096, dtype=dtype), empty(256, 32, dtype=dtype), torch.int64
    A, B, scaling = empty(64, 32, 4096), empty(64, 4096, 32), empty(64)
    order, tiles, starts = empty(256, dtype=integers), empty(3, 80, dtype=integers), empty(65, dtype=integers)
    for launch in (
        batched.down_launch(h[None], x, A, scaling, order, tiles, "triton"),
        batched.up_launch(x, x, h, B, order, tiles, "triton"),
        batched.outer_launch(A, h, x, order, starts, "triton"),
    ):
        found = aot.compile_launch(launch, target)
        name = launch.kernel.fn.__name__
        print(f"{name} {target} {dtype}: {found.registers} registers, {found.shared} bytes shared")
        assert found.spilled == 0 and found.shared <= 1 << 16 and found.count(PRODUCTS[target])
        assert 128 in found.widths("load") or found.count(COPIES)
