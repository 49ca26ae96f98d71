"""Cross-entropy in torch and Triton: properties, guards, wrong versions, chunks, compilation."""

import contextlib
import functools
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import common, torch_functions
from minift.conformance.operations import losses as known
from minift.conformance.operations.losses import FIXED, HEADS, OPERATIONS, Head, Labeled
from minift.nn import losses as reference
from minift_kernels import aot, backend
from minift_kernels.nn import losses
from minift_kernels.nn.weight import Frozen
from nn.checks import kill_matrix
from wrong_kernels import wrong_losses

BACKENDS = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
TILES = backend.load(losses.KERNELS, "interpreter").TILES.copy()
QUICK = [Labeled((3,), 19, "rising", 0.4, 7.0, seed=1), Labeled((2,), 17, "shifted", 0.0), Labeled((2,), 5)]
GUARDED = (known.is_within_its_bound, known.what_does_not_count_is_not_seen, known.the_head_is_within_its_bound)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 logits: a few dozen tokens are several, the last one short."""
    monkeypatch.setattr(backend.load(losses.KERNELS, "interpreter"), "TILES", dict.fromkeys((2, 4, 8), (16, 1)))


@pytest.fixture
def two_rows(monkeypatch):
    """Two rows of logits at a time, so that a handful of rows has several chunks, the last one short."""
    monkeypatch.setattr(losses, "ROWS", 2)


def implementation(operation, how, dtype=None):
    function = getattr(losses, operation.name.split(".")[1])
    return torch_functions.differentiable(functools.partial(function, backend=how), dtype=dtype)


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_properties(operation, how, small_tiles, two_rows):
    for case in operation.fixed:
        if case.dtype in BACKENDS[how]:
            for prop in operation.properties:
                with guarded() if prop in GUARDED else contextlib.nullcontext():  # watched accesses take their time
                    prop(implementation(operation, how, case.dtype), case)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_tiles_that_ship(dtype, more):
    """One less than a tile, a tile, one more, with labels at its edge; and a prime behind two tiles."""
    block, _ = TILES[np.dtype(dtype).itemsize]
    vocab = block + more if more < 1 else {2048: 4099, 4096: 4099}[block]
    with guarded():
        for kind in ("rising", "huge"):
            known.is_within_its_bound(
                implementation(OPERATIONS[0], "interpreter"), Labeled((4,), vocab, kind, 0.2, 3.0, dtype)
            )
    if more == 1:
        case = Labeled((4,), block + 1, "normal", 0.0, 3.0, dtype)
        known.is_within_its_bound(implementation(OPERATIONS[0], "interpreter"), case)


def rows_apart(f, case):
    known.is_within_its_bound(f, case, common.apart)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_kill_matrix(name, small_tiles):
    kernel = getattr(backend.load("wrong_kernels.wrong_losses", "interpreter"), name)
    make = functools.partial(version, implementation(OPERATIONS[0], "interpreter"), name, kernel)
    properties = (known.is_within_its_bound, rows_apart, known.what_does_not_count_is_not_seen)
    for prop in (*properties, known.changes_nothing, known.micro_batches_add_up):
        for case in QUICK[:2]:
            prop(make("nothing"), case)
    wrong = [make(what) for what in getattr(wrong_losses, name.upper()) if what != "wraps labels"]
    kill_matrix(properties, wrong, QUICK)


def on_a_gpu(labels, vocab):
    """What a GPU does with labels: nobody looks at them."""
    return labels.to(torch.int64).contiguous()


def test_a_label_outside_makes_a_loss_that_is_nan(monkeypatch, small_tiles):
    """And a gradient: the row's, and no other. The property rejects a kernel that wraps labels around."""
    monkeypatch.setattr(losses, "_checked", on_a_gpu)
    f = implementation(OPERATIONS[0], "interpreter")
    with guarded():
        for case in QUICK:
            known.refuses_labels_outside(f, case)
    kernel = backend.load("wrong_kernels.wrong_losses", "interpreter").forward
    with pytest.raises(AssertionError, match="was accepted"):
        known.refuses_labels_outside(version(f, "forward", kernel, "wraps labels"), QUICK[1])
    logits = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    for label in (-1, 5):
        loss, vjp = f(logits, np.array([1, label, -100]), 3.0)
        found = vjp(np.float32(2))
        assert np.isnan(loss) and np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("how", BACKENDS)
def test_narrow_labels(how):
    """int8 labels reach the ignored one; uint8 ones cannot, and are not taken for it."""
    logits = torch.randn(4, 200)
    labels = torch.tensor([0, -100, 4, 2])
    wanted = losses.cross_entropy(logits, labels, backend=how)
    assert torch.equal(losses.cross_entropy(logits, labels.to(torch.int8), backend=how), wanted)
    labels = torch.tensor([0, 156, 4, 2])  # 156 is −100 in 8 bits
    wanted = losses.cross_entropy(logits, labels, backend=how)
    assert torch.equal(losses.cross_entropy(logits, labels.to(torch.uint8), backend=how), wanted)


# --- linear_cross_entropy ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Adapted(Frozen):
    """y = x (W + B A)ᵀ, in which A and B learn: as much of a LoRA as `linear` asks for."""

    A: torch.Tensor
    B: torch.Tensor

    def arrays(self):
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def linear(self, x, dropout_key=None, *, backend=None):
        return x @ self.array.T + x @ self.A.T @ self.B.T


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_any_weight(how, recompute, two_rows, small_tiles):
    """An adapter's arrays, or nothing for what is frozen: the gradient of all logits at once, within its bound."""
    rng = np.random.default_rng(0)
    x, W, A, B = (rng.standard_normal(s, np.float32) for s in ((5, 4), (7, 4), (2, 4), (7, 2)))
    labels, dloss = np.array([3, -100, 0, 6, 2]), np.float32(-1.7)
    number = lambda a: known.Ball(a, np.float32)  # noqa: E731
    balls = known.linear_oracle(labels, 2.5, scaling=1.0)(number, dloss, *(a.astype(float) for a in (x, W, A, B)))

    def frozen(x):
        weight = Frozen(torch.from_numpy(W))
        return losses.linear_cross_entropy(x, weight, torch.from_numpy(labels), 2.5, recompute=recompute, backend=how)

    def adapted(x, A, B):
        weight = Adapted(torch.from_numpy(W), A, B)
        return losses.linear_cross_entropy(x, weight, torch.from_numpy(labels), 2.5, recompute=recompute, backend=how)

    with guarded():
        loss, vjp = torch_functions.differentiable(adapted)(x, A, B)
        cotangents = vjp(dloss)
    for what, found, ball in zip(
        ("loss", "dx", "dA", "dB"), (loss, *cotangents), (*balls[:2], *balls[3:]), strict=True
    ):
        ball.check(found, what)
    balls = known.linear_oracle(labels, 2.5)(number, dloss, x.astype(float), W.astype(float))
    loss, vjp = torch_functions.differentiable(frozen)(x)
    balls[0].check(loss, "loss")
    balls[1].check(vjp(dloss), "dx")


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_when_the_gradient_is_formed_changes_no_bit(how, dtype, two_rows, small_tiles):
    """Along with the value, or in the pullback; for both, for one alone, or for none: the same numbers."""
    x, W = torch.randn(5, 4, dtype=dtype), torch.randn(7, 4, dtype=dtype)
    labels = torch.tensor([3, -100, 0, 6, 2])
    with torch.no_grad():
        value = losses.linear_cross_entropy(x, W, labels, backend=how)
    found = {}
    for recompute in (False, True):
        for learning in ("x", "W", "xW"):
            leaves = {"x": x.clone(), "W": W.clone()}
            for name in learning:
                leaves[name].requires_grad_()
            loss = losses.linear_cross_entropy(leaves["x"], leaves["W"], labels, recompute=recompute, backend=how)
            assert torch.equal(loss, value) and loss.dtype == torch.float32
            (loss * -0.37).backward()
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in learning)
                if name in learning:
                    assert leaf.grad.dtype == dtype and torch.equal(leaf.grad, found.setdefault(name, leaf.grad))


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept(recompute):
    """Between the passes: dx and dW, or nothing but the arguments; no array as long as the logits."""
    x, W = torch.randn(300, 4, requires_grad=True), torch.randn(700, 4, requires_grad=True)
    labels, saved = torch.randint(0, 700, (300,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        losses.linear_cross_entropy(x, W, labels, recompute=recompute)
    assert sorted(t.numel() for t in saved if t.numel() > 1) == sorted([1200, 2800] + [300] * recompute)
    own = {t.data_ptr() for t in (x, W, labels)}
    assert not recompute or all(t.data_ptr() in own for t in saved if t.numel() > 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_logits_never_exist_all_at_once(recompute, monkeypatch):
    """Of all that is made, nothing is larger than a chunk's logits, and there are as many chunks as there should be."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.found = max(self.found, out.numel())
            return out

    monkeypatch.setattr(losses, "ROWS", 10)
    x, W = torch.randn(60, 3), torch.randn(500, 3)
    total = losses._linear_forward
    with Largest() as mode:
        total(x, W, torch.randint(0, 500, (60,)), not recompute, not recompute, "torch")
    assert mode.found == 10 * 500


def test_no_rows(two_rows):
    """The loss is 0, and what learns gets zeros."""
    x, W = torch.zeros(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    for how in BACKENDS:
        for recompute in (False, True):
            loss = losses.linear_cross_entropy(x, W, torch.zeros(0, dtype=int), recompute=recompute, backend=how)
            dx, dW = torch.autograd.grad(loss, (x, W))
            assert loss == 0 and dx.shape == (0, 4) and dW.shape == (7, 4) and not dW.any()


def test_a_label_outside_in_the_last_chunk(two_rows):
    x, W, labels = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 1, 2, 3, 7])
    for how in BACKENDS:
        with pytest.raises(ValueError, match=r"labels span 0\.\.7, needed 0\.\.6 or -100"):
            losses.linear_cross_entropy(x, W, labels, backend=how)


# --- both -------------------------------------------------------------------------------------------------------------


def test_log_softmax():
    for dtype in (torch.float64, torch.float32):
        x = 30 * torch.randn(3, 50, dtype=dtype)
        found, wanted = losses.log_softmax(x).numpy(), reference.log_softmax(x.numpy())
        assert abs(found - wanted).max() <= 8 * np.finfo(found.dtype).eps * abs(wanted).max()
    assert torch.equal(losses.log_softmax(x.half()), torch.log_softmax(x.half().float(), -1).half())


def test_gradcheck():
    x, W = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    labels = torch.tensor([3, -100, 0, 6, 2])
    assert torch.autograd.gradcheck(lambda x: losses.cross_entropy(x @ W.detach().T, labels, 2.5), x)
    for recompute in (False, True):
        f = functools.partial(losses.linear_cross_entropy, labels=labels, normalizer=2.5, recompute=recompute)
        assert torch.autograd.gradcheck(f, (x, W))


@pytest.mark.parametrize("how", BACKENDS)
def test_opcheck(how):
    labels = torch.tensor([3, -100, 0])
    for temperature in (None, 0.7):
        counting = labels if temperature is None else labels.clamp(min=0)
        args = (torch.randn(3, 9)[:, 1:8].requires_grad_(), counting, temperature, how)
        torch.library.opcheck(torch.ops.minift.cross_entropy.default, args)
    x, W = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    for keeps in ((True, True), (False, False)):
        args = (x, W, labels, *keeps, how)
        torch.library.opcheck(torch.ops.minift.linear_cross_entropy.default, args)


def test_compiled():
    """Opaque operations without a break, and the same bits; also where an adapter's logits are computed again."""
    program = """
        import torch
        from minift_kernels.nn import losses

        class Adapted:
            def __init__(self, W, A):
                self.W, self.A = W, A

            def arrays(self):
                return {"lora_A.weight": self.A}

            def linear(self, x, dropout_key=None, *, backend=None):
                return x @ (self.W + self.A).T

        losses.ROWS = 2
        labels = torch.tensor([3, -100, 0, 6, 2])
        x, W, A = (torch.randn(n, 4, requires_grad=True) for n in (5, 7, 7))
        for backend in ("torch", "interpreter"):
            def whole(x, W, A):
                return losses.cross_entropy(x @ W.T + A.sum(), labels, backend=backend)

            def head(x, W, A):
                return losses.linear_cross_entropy(2 * x, W, labels, 2.5, backend=backend) + A.sum()

            def recomputed(x, W, A):
                return losses.linear_cross_entropy(2 * x, W, labels, recompute=True, backend=backend) + A.sum()

            def adapted(x, W, A):
                return losses.linear_cross_entropy(2 * x, Adapted(W, A), labels, backend=backend)

            for model in (whole, head, recomputed, adapted):
                compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
                results = [f(x, W, A) for f in (model, compiled)]
                grads = [torch.autograd.grad(1.5 * loss, (x, W, A)) for loss in results]
                assert torch.equal(*results), model.__name__
                assert all(map(torch.equal, *grads)), model.__name__
        print("same bits")
    """
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "same bits\n", done.stderr[-2000:]


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_offsets_have_64_bits(temperature):
    """The last row of 2³¹ + 192 logits, forward and backward."""
    n, vocab = (1 << 31) // 64 + 3, 64
    logits, dlogits = (sparse((n, vocab), torch.float32) for _ in range(2))
    of_row = functools.partial(sparse, dtype=torch.float32)
    entropies, dentropies = of_row((0 if temperature is None else n,)), of_row((n,))
    statistics = of_row((n,)), entropies, of_row((n,)), of_row((n,))
    labels, dlosses = sparse((n,), torch.int64), of_row((n,))
    logits[-1], labels[-1], dlosses[-1], dentropies[-1], dlogits[0] = torch.randn(vocab), 63, -1.5, 0.4, 7
    with last_program():
        losses.forward_launch(statistics, logits, labels, temperature, "interpreter").run(CPU)
        rest = (dlosses, labels, *statistics[2:])
        of_entropy = None if temperature is None else (dentropies, entropies)
        losses.backward_launch(dlogits, logits, rest, of_entropy, temperature, "interpreter").run(CPU)
    near = losses._cross_entropy(logits[-1:], labels[-1:], temperature, "interpreter")
    assert all(torch.equal(found[-1:], wanted) for found, wanted in zip(statistics, near, strict=True))
    cotangents = dlosses[-1:], None if temperature is None else dentropies[-1:]
    wanted = losses._cross_entropy_backward(
        *cotangents, logits[-1:], labels[-1:], *near[1:], temperature, "interpreter"
    )
    assert torch.equal(dlogits[-1:], wanted) and wanted.any() and (dlogits[0] == 7).all()


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [None, 0.7], ids=["cross-entropy", "with its entropy"])
def test_compiles(target, dtype, temperature):
    """For the vocabulary of Llama 3, in words of 16 bytes and with nothing spilled."""
    empty = functools.partial(torch.empty, device="meta")
    logits, of_row, labels = empty(1024, 128256, dtype=dtype), empty(1024), empty(1024, dtype=torch.int64)
    statistics = of_row, of_row if temperature else of_row[:0], of_row, of_row
    of_entropy = (of_row, of_row) if temperature else None
    rest = of_row, labels, of_row, of_row
    for launch in (
        losses.forward_launch(statistics, logits, labels, temperature, "triton"),
        losses.backward_launch(logits, logits, rest, of_entropy, temperature, "triton"),
    ):
        found = aot.compile_launch(launch, target)
        print(f"{launch.kernel.fn.__name__} {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
        assert found.spilled == 0 and max(found.widths("load")) == 128
    assert set(found.widths("store")) == {128}


def test_fixed_cases_meet_every_edge():
    assert {case.kind for case in FIXED} == set(known.KINDS) and {1, 2} < {case.vocab for case in FIXED}
    assert any(isinstance(case, Head) and case.rows == 0 for case in HEADS)
