"""LoRA in torch and Triton: the properties, also over NF4, guards, wrong versions, what is kept, compilation."""

import functools
import inspect

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations import lora as operation
from minift.conformance.operations.lora import FIXED, KEY, PROPERTIES, Layer
from minift.nn.dropout import uniform
from minift_kernels import aot, backend
from minift_kernels.peft import lora
from minift_kernels.quant import double_quant, nf4
from nn.checks import kill_matrix, rejected
from wrong_kernels import wrong_lora

BACKENDS = {"torch": ("float32", "float64", "float16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
LAWS = (FIXED[0], FIXED[1], FIXED[5])  # of all, for the properties that run a kernel many times
SMALL = Layer((5,), 9, 6, 3, 0.25)
QUICK = [
    SMALL,
    Layer((2, 35), 40, 3, 2, 0.4, "wide"),
    Layer((2,), 150, 8, 2, 0.0, "normal", "float16"),
    Layer((70,), 3, 5, 66, 0.3, "normal", "float16"),
]


@pytest.fixture
def few_programs(monkeypatch):
    """Two shares of the rows where there are rows for two."""
    monkeypatch.setattr(backend.load(lora.KERNELS, "interpreter"), "PROGRAMS", 2)


def implementation(how):
    return torch_functions.differentiable(functools.partial(lora.forward, backend=how))


def over_nf4(how, nested):
    """W is quantized on the way; for the matrices of "signs" that changes nothing."""

    def forward(x, W, *rest):
        q = nf4.quantize(W.detach(), 32)
        return lora.forward(x, double_quant.compress(q, 4) if nested else q, *rest, backend=how)

    return torch_functions.differentiable(forward)


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.__name__)
def test_properties(prop, how, few_programs):
    with guarded():
        for case in FIXED if prop is operation.is_within_its_bound or how == "torch" else LAWS:
            if case.dtype in BACKENDS[how]:
                prop(implementation(how), case)


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_over_nf4(how, dtype, few_programs):
    """QLoRA is the same function."""
    case = Layer((3, 7), 40, 9, 5, 0.25, "signs", dtype)
    for prop in PROPERTIES[:2]:
        prop(over_nf4(how, nested=False), case)


def wrong_version(name, what):
    kernel = getattr(backend.load("wrong_kernels.wrong_lora", "interpreter"), name)
    return version(implementation("interpreter"), name, kernel, what)


@pytest.mark.parametrize("name", ["down", "up", "outer"])
def test_kill_matrix(name, few_programs):
    for case in QUICK:
        operation.is_within_its_bound(wrong_version(name, "nothing"), case)
    wrong = [wrong_version(name, what) for what in getattr(wrong_lora, name.upper())]
    kill_matrix([operation.is_within_its_bound], [w for w in wrong if w.__name__ != "row by width"], QUICK)


@pytest.mark.parametrize(
    ("prop", "name", "what"),
    [
        (operation.any_layout, "down", "row by width"),
        (operation.drops_what_dropout_drops, "up", "counter from one"),
        (operation.scales_exactly, "down", "scale squared"),
    ],
)
def test_properties_reject(prop, name, what, few_programs):
    """What the bound does not see, or what the property was made for; tests/peft/test_lora.py has the others."""
    assert rejected(prop, wrong_version(name, what), [SMALL])


@pytest.mark.parametrize("how", BACKENDS)
def test_a_quantized_base_is_the_dequantized_one(how):
    """To the bit, and a fresh adapter is the base to the bit."""
    x, A, B, w = torch.randn(5, 40), torch.randn(3, 40), torch.randn(9, 3), torch.randn(9, 40)
    q = double_quant.compress(nf4.quantize(w, 32), 4)
    for p in (0.0, 0.25):
        y = lora.forward(x, q, A, B, 1.75, p, KEY, backend=how)
        over_base = lora.forward(torch.zeros_like(x), q, A, B, 1.75, p, KEY, backend=how)
        assert not over_base.any()
        detour = lora.forward(x, torch.zeros(9, 40), A, B, 1.75, p, KEY, backend=how)
        assert torch.equal(y, q.linear(x, backend=how) + detour)
    assert torch.equal(lora.forward(x, q, A, 0 * B, backend=how), q.linear(x, backend=how))


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_nothing_of_the_size_of_the_weight_is_kept(how, quantized):
    """For the backward pass: x itself, A, B and h, and a dense W itself. No gradient is formed for W."""
    w, x = torch.randn(96, 64), torch.randn(32, 64, requires_grad=True)
    A, B = torch.randn(3, 64, requires_grad=True), torch.randn(96, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora.forward(x, nf4.quantize(w) if quantized else w, A, B, 1.75, 0.25, KEY, backend=how)
        copies = [t.shape for t in kept if t.data_ptr() not in (w.data_ptr(), x.data_ptr())]
    assert max(shape.numel() for shape in copies) <= (x.numel() if how == "torch" else B.numel())
    y.backward(torch.randn(32, 96))
    assert w.grad is None and x.grad is not None and A.grad.any() and B.grad.any()


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize(("of_A", "of_B"), [((3, 6), (9, 3)), ((3, 7), (8, 3)), ((3, 7), (9, 2))])
def test_shapes_that_do_not_fit_are_refused(how, of_A, of_B):
    forward = inspect.unwrap(lora.forward)  # the tests check shapes, users do not
    with pytest.raises(ValueError, match=r"x \(5, 7\), W \(9, 7\), A .*: needed \(…, in\), \(out, in\), \(r, in\)"):
        forward(torch.ones(5, 7), torch.ones(9, 7), torch.ones(of_A), torch.ones(of_B), backend=how)


def test_gradients_have_the_type_of_what_learns():
    """Matrices in float32 beside activations in 16 bits: their gradients are summed in float32 and not rounded."""
    x = torch.randn(5, 64, dtype=torch.float16)
    w, A, B = torch.randn(96, 64).half(), torch.randn(3, 64, requires_grad=True), torch.zeros(96, 3, requires_grad=True)
    y = lora.forward(x, w, A, B, 1.75, backend="interpreter")
    y.backward(torch.randn(5, 96).half())
    assert y.dtype == torch.float16 and A.grad.dtype == B.grad.dtype == torch.float32
    assert not torch.equal(B.grad, B.grad.half().float())


def test_offsets_and_counters_have_64_bits():
    """The last three rows of an x of more than 2³² numbers."""
    n, d, r = (1 << 32) // 64 + 3, 64, 2
    x, base, y = (sparse((n, d), torch.float16) for _ in range(3))
    h = sparse((n, r), torch.float16)
    x[-3:], base[-3:] = torch.randn(2, 3, d).half()
    A = torch.randn(r, d)
    keep = torch.from_numpy(uniform(KEY, np.arange((n - 3) * d, n * d, dtype=np.uint64)) > np.float32(0.5)).view(3, d)
    key = lora._signed(KEY)
    with last_program():
        lora.down_launch(h[None], x, A, 1.75, 0.5, key, "interpreter").run(CPU)
    near = lora._down(x[-3:] * keep, A, 1.75, 0.0, 0, "interpreter")
    assert torch.equal(h[-3:], near) and near.any() and not h[:3].any()
    with last_program():
        lora.up_launch(y, base, h, A.T, 1.75, 0.5, key, "interpreter").run(CPU)
    wanted = lora._up(base[-3:], near, A.T, 1.75, 0.0, 0, "interpreter")
    assert torch.equal(y[-3:][keep], wanted[keep]) and torch.equal(y[-3:][~keep], base[-3:][~keep])
    assert not y[:3].any()
    parts = sparse((-(-n // 32), r, d), torch.float32)
    with last_program():
        lora.outer_launch(parts, h, x, 1.75, 0.5, key, "interpreter").run(CPU)
    assert torch.equal(parts[-1], lora._outer(near, x[-3:] * keep, 1.75, 0.0, 0, "interpreter")) and parts[-1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    x, h, A = torch.randn(2, 5, 7, dtype=dtype), torch.randn(2, 5, 3, dtype=dtype), torch.randn(3, 7)
    dropout = 1.75, 0.25, -KEY >> 1, "interpreter"
    torch.library.opcheck(torch.ops.minift.lora_down.default, (x, A, *dropout))
    torch.library.opcheck(torch.ops.minift.lora_up.default, (x, h, A.T, *dropout))
    torch.library.opcheck(torch.ops.minift.lora_outer.default, (h, x, *dropout))


PRODUCTS = {"sm_80": r"mma\.sync", "sm_90": r"(mma\.sync|wgmma)", "gfx942": r"v_mfma"}
COPIES = r"cp\.async\.cg\.shared\.global .*, 0x10"  # 16 bytes from global to shared memory, past the registers


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("dtype", "r", "p"), [(torch.float16, 64, 0.0), (torch.bfloat16, 16, 0.1)], ids=str)
def test_compiles(target, dtype, r, p):
    """For rows of 4,096 and A and B in float32: tensor cores, words of 16 bytes, nothing spilled, 64 KB shared."""
    empty = functools.partial(torch.empty, device="meta")
    x, h = empty(8192, 4096, dtype=dtype), empty(8192, r, dtype=dtype)
    A, B, dropout = empty(r, 4096), empty(4096, r), (1.75, p, 1 << 40, "triton")
    for launch in (
        lora.down_launch(h[None], x, A, *dropout),
        lora.up_launch(x, x, h, A.T, *dropout) if p else lora.up_launch(x, x, h, B, *dropout),
        lora.outer_launch(empty(8, r, 4096), h, x, *dropout),
    ):
        found = aot.compile_launch(launch, target)
        name = launch.kernel.fn.__name__
        print(f"{name} {target} {dtype} r {r} p {p}: {found.registers} registers, {found.shared} bytes shared")
        assert found.spilled == 0 and found.shared <= 1 << 16 and found.count(PRODUCTS[target])
        assert 128 in found.widths("load") or found.count(COPIES)
        assert max(found.widths("store")) >= (128 if name != "down" and target != "gfx942" else 64)
