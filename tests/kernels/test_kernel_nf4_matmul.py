"""Products with an NF4 matrix: the properties, guards around every launch, wrong versions, what the compiler makes."""

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from interpreter_memory import Watched, watch
from launches import guarded, last_program, sparse, version
from nf4_properties import twin

from minift.conformance import torch_functions
from minift.conformance.ball import Ball
from minift.conformance.operations import nf4_linear
from minift.conformance.operations.nf4_linear import FIXED, PROPERTIES, Product
from minift_kernels import aot, backend
from minift_kernels.quant import nf4, nf4_matmul
from nn.checks import kill_matrix, rejected
from wrong_kernels import wrong_nf4_matmul

BACKENDS = {"torch": ("float32", "float64", "float16"), "interpreter": ("float32", "float64", "float16")}
CPU = torch.device("cpu")


def implementation(how, multiply=None):
    """`f(q, x) -> y, vjp` with `vjp(dy) -> dx, None`."""

    def f(q, x):
        linear = multiply or (lambda q, x: q.linear(x, backend=how))
        y, vjp = torch_functions.differentiable(functools.partial(linear, twin(q)))(x)
        return y, lambda dy: (vjp(dy), None)

    return f


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("how", BACKENDS)
def test_properties(how, prop):
    with guarded() if prop is nf4_linear.is_within_its_bound else contextlib.nullcontext():
        for case in FIXED:
            if case.dtype in BACKENDS[how]:
                prop(implementation(how), case)


# The ladder, and every tile.

WHOLE = (Product((19,), (21, 128), 32, 3, "float16", "wide"), Product((3,), (40, 192), 64, 0, "float32", "wide"))
OTHERS = (Product((3,), (9, 33), 32, 0, "float32", "wide"), Product((18,), (7, 50), 64, 2, "float16", "wide"))


def launched(make, case, parts=1, **settings):
    """y, or with `gradient_launch` dx, from one launch; and what it should be."""
    x, dy = nf4_linear.arrays(case)
    gradient = make is nf4_matmul.gradient_launch
    q, given = twin(nf4_linear.tensor(case)), torch.tensor(dy if gradient else x).to(getattr(torch, case.dtype))
    y = given.new_empty((parts, len(given), case.shape[1 if gradient else 0]), dtype=torch.float32)
    codes, *scales, shape, block_size, nested = nf4._parts(q)
    make(y, given, (codes, *scales), shape, block_size, nested, "interpreter", **settings).run(CPU)
    w = Ball(nf4_linear.weights(case).astype(float), np.float32)
    exact = Ball(given.double().numpy(), np.float32) @ (w if gradient else w.T)
    exact.check(y.sum(0).numpy(), f"{case} {settings}")


@pytest.mark.parametrize("step", range(1, 8))
def test_matmul_ladder(step):
    with guarded():
        for case in WHOLE if step in (3, 4) else (*WHOLE, *OTHERS):
            if step == 1:  # a row a program
                launched(nf4_matmul.matmul_launch, case._replace(rows=(2,)), 2, step=step, tile=(1, 16, 64, 4, 1))
            else:
                launched(nf4_matmul.matmul_launch, case, 2, step=step, tile=(16, 16, 32, 4, 1))
                launched(nf4_matmul.matmul_launch, case, 1, step=step, tile=(16, 16, 128, 4, 1))


@pytest.mark.parametrize(("tile", "parts"), [((16, 16, 32, 4, 1), 2), ((16, 128, 16, 4, 1), 1)])
def test_gradient(tile, parts):
    with guarded():
        for case in (*WHOLE, *OTHERS):
            launched(nf4_matmul.gradient_launch, case, parts, tile=tile)


@pytest.mark.parametrize("step", range(1, 5))
def test_matvec_ladder(step):
    """Turns of half a block, and of two blocks; steps before the last have a row a program."""
    with guarded():
        for rows, dtype in ((1, "float16"), (2, "float32"), (3, "float32"), (4, "float16"))[: 4 if step == 4 else 2]:
            block, tile = (64, (4, 32, 4, 1)) if rows % 2 else (32, (8, 64, 4, 2))
            case = Product((rows,), (9, 128), block, 3, dtype, "wide")
            launched(nf4_matmul.matvec_launch, case, rows % 2 + 1, step=step, tile=tile)


def test_every_tile():
    kernels = backend.load(nf4_matmul.MATMUL_KERNELS, "interpreter")
    for size, dtype in ((2, "float16"), (4, "float32")):
        for _, tile in kernels.TILES[size]:
            case = Product((tile[0] + 1,), (tile[1] // 2 + 3, 192), 64, 5, dtype, "wide")
            launched(nf4_matmul.matmul_launch, case, tile=tile)
            launched(nf4_matmul.gradient_launch, case, tile=tile)
    matvec = backend.load(nf4_matmul.MATVEC_KERNELS, "interpreter")
    for rows, tile in matvec.TILES.items():
        launched(nf4_matmul.matvec_launch, Product((rows,), (tile[0] + 3, 320), 64, 5, "float16", "wide"), tile=tile)


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_are_added_up(rows):
    """A long row is shared among parts: as many as the public function takes, more than one."""
    case = Product((rows,), (3, 2048), 128, 2, "float16", "wide")
    names = nf4_matmul.MATVEC_KERNELS if rows == 1 else nf4_matmul.MATMUL_KERNELS
    kernels = backend.load(names, "interpreter")
    assert kernels.parts(rows, 3, 2048, *([] if rows == 1 else [2])) > 1
    nf4_linear.is_within_its_bound(implementation("interpreter"), case)


def test_many_rows_are_decoded_first(monkeypatch):
    """The third way, where the plan takes it: the same properties."""
    monkeypatch.setattr(nf4_matmul, "MATMUL_ROWS", 4)
    assert [nf4_matmul.plan(rows, True) for rows in (1, 3, 5)] == ["matvec", "matmul", "decode"]
    assert nf4_matmul.plan(1, False) == "matmul"
    for case in (Product((5,), (9, 33), 32, 0, "float16", "wide"), Product((9,), (5, 64), 32, 3)):
        for prop in PROPERTIES[:4]:
            prop(implementation("interpreter"), case)


# Wrong versions.

QUICK = {
    "matmul": [Product((3,), (9, 33), 32, 0, "float16", "wide"), Product((3,), (9, 64), 32, 3, "float32", "wide")],
    "matvec": [Product((2,), (9, 96), 32, 0, "float16", "wide"), Product((2,), (33, 96), 32, 3, "float32", "wide")],
    "gradient": [Product((3,), (33, 9), 32, 0, "float16", "wide"), Product((3,), (64, 4), 32, 3, "float32", "wide")],
}
KERNEL = {"matmul": "matmul_7", "matvec": "matvec_4", "gradient": "gradient"}
NESTED = ("fused", "offset forgotten")  # mistakes in double-quantized scales
REJECTS = {  # what each property is there for; is_within_its_bound has all the others
    nf4_linear.multiplies_with_the_decoded_weights: NESTED,
    nf4_linear.a_row_alone_is_the_row_in_a_batch: ("rows touch",),
    nf4_linear.any_layout: ("stride by width",),
    nf4_linear.integers_are_exact: ("nibbles swapped",),
    nf4_linear.changes_nothing: ("beyond the outputs",),
}


@pytest.fixture
def versions(monkeypatch):
    """`versions(name) -> make`, `make(what)` with that wrong version. Two parts, and a turn for each in QUICK."""
    matmul, matvec = (backend.load(f, "interpreter") for f in (nf4_matmul.MATMUL_KERNELS, nf4_matmul.MATVEC_KERNELS))
    monkeypatch.setattr(matmul, "default_tile", lambda *_: (16, 64, 32, 4, 1))
    monkeypatch.setattr(matvec, "default_tile", lambda *_: (16, 64, 4, 1))
    for kernels in (matmul, matvec):
        monkeypatch.setattr(kernels, "parts", lambda *_: 2)
    wrong = backend.load("wrong_kernels.wrong_nf4_matmul", "interpreter")
    return lambda name: functools.partial(version_of, KERNEL[name], getattr(wrong, name))


@pytest.mark.parametrize("name", QUICK)
def test_every_wrong_version_is_rejected(name, versions):
    """By the property that is meant for it, which takes the right version."""
    make, (plain, nested) = versions(name), QUICK[name]
    others = set(getattr(wrong_nf4_matmul, name.upper())) - {what for found in REJECTS.values() for what in found}
    for prop, wrong in {nf4_linear.is_within_its_bound: sorted(others), **REJECTS}.items():
        case = nested if wrong is NESTED else plain
        if prop is nf4_linear.integers_are_exact:
            case = case._replace(kind="exact")
        prop(make("nothing"), case)
        for what in wrong:
            assert rejected(prop, make(what), [case]), f"{prop.__name__} accepts {what!r}"


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_kill_matrix(name, versions):
    make, properties = versions(name), [*REJECTS, nf4_linear.is_within_its_bound]
    cases = [*QUICK[name], QUICK[name][0]._replace(kind="exact")]
    for prop in properties:
        for case in cases:
            prop(make("nothing"), case)
    kill_matrix(properties, [make(what) for what in getattr(wrong_nf4_matmul, name.upper())], cases)


def version_of(kernel, wrong, what):
    """As `launches.version`, for a function whose first argument is a tensor of the reference."""

    def f(q, x):
        return version(lambda x: implementation("interpreter")(q, x), kernel, wrong, what)(x)

    f.__name__ = what
    return f


# 64 bits.


def few(n, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)


@pytest.mark.parametrize("rows", [1, 3])
def test_offsets_in_the_matrix_have_64_bits(rows):
    """The last outputs of a matrix with 2³² + 192 weights, and their share of the gradient."""
    d_out, d_in = (1 << 26) + 3, 64
    codes, absmax = sparse((d_out * d_in // 2,), torch.uint8), sparse((d_out,), torch.float32)
    codes[-96:] = torch.randint(256, (96,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    absmax[-3:] = torch.rand(3) + 1
    near = nf4.NF4Tensor(codes[-96:].clone(), absmax[-3:].clone(), (3, d_in))
    q = (codes, absmax, None, None, None), (d_out, d_in), 64, 0, "interpreter"
    x, y = few(rows * d_in, torch.float16).view(rows, d_in), sparse((1, rows, d_out), torch.float16)
    make = nf4_matmul.matvec_launch if rows == 1 else nf4_matmul.matmul_launch
    with last_program():
        make(y, x, *q).run(CPU)
    assert torch.equal(y[0, :, -3:], near.linear(x, backend="interpreter")) and y[0, :, -3:].abs().max() > 0
    dy = sparse((rows, d_out), torch.float16)
    dy[:, -3:] = few(3 * rows, torch.float16).view(rows, 3)
    dx = sparse((1 << 20 | 1, rows, d_in), torch.float32)  # a part for every 64 outputs
    with last_program():
        nf4_matmul.gradient_launch(dx, dy, *q, tile=(16, 64, 64, 4, 1)).run(CPU)
    wanted = dy[:, -3:].float() @ nf4.dequantize(near, torch.float16).float()
    torch.testing.assert_close(dx[-1], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("what", ["nothing", "32 bits"])
def test_32_bits_are_too_few(what):
    """The same for a wrong version, which must be seen to load from elsewhere."""
    d_out, d_in = (1 << 25) + 3, 64  # 2³¹ + 192 weights, a number that wraps around to a negative one
    codes, absmax = sparse((d_out * d_in // 2,), torch.uint8), sparse((d_out,), torch.float32)
    x, y = few(3 * d_in, torch.float16).view(3, d_in), sparse((1, 3, d_out), torch.float16)
    q = (codes, absmax, None, None, None), (d_out, d_in), 64, 0, "interpreter"
    launch = nf4_matmul.matmul_launch(y, x, *q)
    kernels = backend.load("wrong_kernels.wrong_nf4_matmul", "interpreter")
    launch = dataclasses.replace(launch, kernel=kernels.matmul, options={**launch.options, "WRONG": what})
    _, *inputs = (a for a in launch.arguments if isinstance(a, torch.Tensor))

    def run():
        with last_program(), watch([*map(Watched, inputs), Anywhere(y)]):
            launch.run(CPU)

    if what == "nothing":
        run()
    else:
        with pytest.raises(AssertionError, match="loads outside"):
            run()


class Anywhere(Watched):
    """May be stored to, and keeps no count of it."""

    def __init__(self, tensor):
        super().__init__(tensor)
        self.write, self.read = True, False

    def store(self, addresses):
        return False


def test_offsets_of_rows_have_64_bits():
    """The last rows of an x with 2³¹ + 192 numbers, forward and backward."""
    n, d = (1 << 31) // 64 + 3, 64
    q = nf4.quantize(few(d * d).view(d, d), 32)
    parts = (q.codes, q.absmax, None, None, None), (d, d), 32, 0, "interpreter"
    x, y = (sparse((n, d), torch.float16) for _ in range(2))
    x[-3:] = few(3 * d, torch.float16).view(3, d)
    for make in (nf4_matmul.matmul_launch, nf4_matmul.gradient_launch):
        near = torch.empty(1, 3, d, dtype=torch.float16)
        make(near, x[-3:], *parts).run(CPU)
        with last_program():
            make(y[None], x, *parts).run(CPU)
        torch.testing.assert_close(y[-3:], near[0], rtol=2e-3, atol=1e-6)
        assert near.abs().max() > 0


# What is public.


def test_the_last_nibble_of_an_odd_number_of_weights_does_not_matter():
    q = nf4.quantize(few(5 * 7).view(5, 7), 32)
    other = q.codes.clone()
    other[-1] = other[-1] & 0xF0 | 0x0A
    x = few(3 * 7).view(3, 7)
    for how in BACKENDS:
        assert torch.equal(dataclasses.replace(q, codes=other).linear(x, backend=how), q.linear(x, backend=how))


def test_what_does_not_fit_is_refused():
    q = nf4.quantize(few(15).view(3, 5))
    with pytest.raises(ValueError, match=r"linear: x \(2, 4\) and a weight \(3, 5\)"):
        q.linear(torch.ones(2, 4))
    with pytest.raises(ValueError, match="backend: 'cuda', needed one of"):
        q.linear(torch.ones(2, 5), backend="cuda")


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_sizes_of_zero(how, shape):
    q = nf4.quantize(torch.empty(shape))
    x = torch.ones(2, shape[1], requires_grad=True)
    y = q.linear(x, backend=how)
    assert y.shape == (2, shape[0]) and not y.any()
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_neither_pass_has_the_matrix(monkeypatch):
    """Nothing of its size is made, and nothing but codes and scales is kept."""
    sizes = []
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: sizes.append(a) or empty(t, *a, **k))
    q = nf4.quantize(few(64 * 64).view(64, 64))
    for rows in (1, 3):
        x = few(rows * 64).view(rows, 64).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = q.linear(x, backend="interpreter")
        y.square().sum().backward()
        assert not kept
    assert sizes and all(np.prod(size[0]) <= 3 * 64 for size in sizes)


@pytest.mark.parametrize("how", BACKENDS)
def test_gradcheck(how):
    q = nf4.quantize(few(7 * 10).view(7, 10), 32)
    x = few(30).view(3, 10).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: q.linear(x, backend=how), x, fast_mode=True)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("nested", [0, 4])
def test_opcheck(gradient, nested):
    q = twin(nf4_linear.tensor(Product((2,), (6, 64), 32, nested)))
    x = few(2 * (6 if gradient else 64)).view(2, -1).requires_grad_()
    torch.library.opcheck(torch.ops.minift.nf4_matmul.default, (x, *nf4._parts(q), gradient, "interpreter"))


def test_compiles_to_one_graph():
    """In a process of its own: here the compiler is off. Both passes, one row and several, the same bits."""
    program = """
        import torch
        from minift_kernels.quant import double_quant, nf4

        generator = torch.Generator().manual_seed(0)
        q = double_quant.compress(nf4.quantize(torch.randn(10, 64, generator=generator), 32), 4)
        s = q.absmax
        for rows in (1, 5):
            def model(x, codes, scale_codes, absmax, offset, code):
                scales = double_quant.DoubleQuantizedScales(scale_codes, absmax, offset, 4, code)
                return nf4.NF4Tensor(codes, scales, (10, 64), 32).linear(x, backend="interpreter").tanh()

            x = torch.randn(rows, 64, generator=generator, requires_grad=True)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            results = [f(x, q.codes, s.codes, s.absmax, s.offset, s.code) for f in (model, compiled)]
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
            assert torch.equal(*results) and torch.equal(*grads)
        print("same bits")
    """
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "same bits\n", done.stderr[-2000:]


# What the compiler makes.

SHAPE = (4096, 14336)
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes that a program may have
TENSOR_CORES = {"sm_80": r"mma\.sync", "sm_90": r"(wgmma\.mma_async|mma\.sync)", "gfx942": r"v_mfma"}
FUSED = r"\bFFMA|\bv_(pk_)?(fma|fmac|mac|mad)_f"


def compiled(make, rows, target, dtype=torch.bfloat16, **settings):
    return aot.compile_launch(nf4_matmul.meta_launch(make, rows, SHAPE, dtype, **settings), target)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("make", [nf4_matmul.matmul_launch, nf4_matmul.gradient_launch], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("target", "dtype", "rows"),
    [
        *(("sm_90", torch.bfloat16, rows) for rows in (16, 2048)),
        *((target, torch.float16, 2048) for target in ("sm_80", "gfx942")),
        slow("sm_90", torch.bfloat16, 64),
        *(slow(target, torch.bfloat16, rows) for target in ("sm_80", "gfx942") for rows in (16, 64, 2048)),
        *(slow("sm_90", torch.float16, rows) for rows in (16, 64, 2048)),
        *(slow(target, torch.float16, rows) for target in ("sm_80", "gfx942") for rows in (16, 64)),
    ],
    ids=str,
)
def test_what_is_launched_for_many_rows(make, target, dtype, rows):
    """On tensor cores, nothing spilled, within every machine's shared memory, 16 bytes at a time; scales not fused."""
    found = compiled(make, rows, target, dtype, nested_block_size=256)
    print(f"{make.__name__} {rows} rows {target} {dtype}: {found.registers} registers, {found.shared} bytes")
    assert found.spilled == 0 and found.shared <= SHARED[target]
    assert found.count(TENSOR_CORES[target]) > 0
    assert not re.search(FUSED, found.machine) and not found.count(r"fma\.rn")
    assert sixteen_bytes(found)


def sixteen_bytes(found):
    """Is there a copy of 16 bytes, asynchronous or not?"""
    asynchronous = re.search(r"cp\.async\.c[ag]\.shared\.global .*, (0x)?(10|16)\b", found.assembly)
    return bool(asynchronous) or 128 in found.widths("load")


@pytest.mark.parametrize(
    ("target", "dtype", "rows"),
    [
        *(("sm_90", torch.bfloat16, rows) for rows in (1, 2)),
        *(("sm_80", torch.float16, 2), ("gfx942", torch.float16, 1)),
        *(slow("sm_80", torch.float16, 1), slow("gfx942", torch.float16, 2)),
        *(slow("sm_90", torch.float16, rows) for rows in (1, 2)),
        *(slow(target, torch.bfloat16, rows) for target in ("sm_80", "gfx942") for rows in (1, 2)),
    ],
    ids=str,
)
def test_what_is_launched_for_a_few_rows(target, dtype, rows):
    """The sums are fused on purpose, the scales are not: as many fused operations with nested scales as without."""
    found, plain = (compiled(nf4_matmul.matvec_launch, rows, target, dtype, nested_block_size=n) for n in (256, 0))
    print(f"matvec {rows} rows {target} {dtype}: {found.registers} registers, {found.shared} bytes")
    assert rows <= nf4_matmul.MATVEC_ROWS
    assert found.spilled == 0 and found.shared <= SHARED[target] and sixteen_bytes(found)
    fused = [len(re.findall(FUSED, c.machine)) for c in (found, plain)]
    assert fused[0] == fused[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [nf4_matmul.matmul_launch, nf4_matmul.matvec_launch], ids=lambda f: f.__name__)
def test_the_two_roundings_depend_on_the_option(make):
    launch = nf4_matmul.meta_launch(make, 2, SHAPE, torch.bfloat16, nested_block_size=256)
    assert launch.options["enable_fp_fusion"] is False
    fused = dataclasses.replace(launch, options=launch.options | {"enable_fp_fusion": True})
    counts = [len(re.findall(FUSED, aot.compile_launch(one, "sm_90").machine)) for one in (launch, fused)]
    assert counts[1] > counts[0]


def instructions_a_weight(make, rows, step, **settings):
    """Of the loop, in the machine code: of the longest piece that ends with a jump back to where it began."""
    launch = nf4_matmul.meta_launch(make, rows, SHAPE, torch.bfloat16, step=step, **settings)
    machine = aot.compile_launch(launch, "sm_90").machine
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", machine)]
    jumps = [(at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in code]
    longest = max((at - int(to[1], 16)) // 16 + 1 for at, to in jumps if to and int(to[1], 16) < at)
    options = launch.options
    return longest * 32 * options["num_warps"] / (options["OUTS"] * options["INS"])


def test_the_last_steps_cost_what_their_comments_say():
    double = instructions_a_weight(nf4_matmul.matmul_launch, 2048, 7, nested_block_size=256)
    assert double == pytest.approx(10.4, abs=0.06)
    assert instructions_a_weight(nf4_matmul.matmul_launch, 16, 7) == pytest.approx(6.9, abs=0.06)
    assert instructions_a_weight(nf4_matmul.matvec_launch, 2, 4) == pytest.approx(9.05, abs=0.06)


@pytest.mark.slow
def test_the_ladder_costs_what_its_comments_say():
    matmul = [instructions_a_weight(nf4_matmul.matmul_launch, 2048, step) for step in range(2, 8)]
    assert matmul == pytest.approx([17.4, 9.4, 10.2, 10.5, 10.0, 8.1], abs=0.06)
    matvec = [instructions_a_weight(nf4_matmul.matvec_launch, 1, step) for step in range(1, 5)]
    assert matvec == pytest.approx([19.0, 10.5, 10.2, 7.8], abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_every_step_compiles(target):
    for step in range(1, 7):
        assert compiled(nf4_matmul.matmul_launch, 2048, target, torch.float16, step=step).widths("store")
    for step in range(1, 4):
        assert compiled(nf4_matmul.matvec_launch, 1, target, torch.float16, step=step).widths("store")


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (nf4_matmul.matmul_launch, (1000, 333)),
        (nf4_matmul.gradient_launch, ((1 << 20) + 5, 4096)),
        slow(nf4_matmul.gradient_launch, (1000, 333)),
        slow(nf4_matmul.matmul_launch, ((1 << 20) + 5, 4096)),
        *(slow(nf4_matmul.matmul_launch, shape) for shape in ((4096, 4100), (5, 1))),
        *(slow(nf4_matmul.gradient_launch, shape) for shape in ((4096, 4100), (5, 1))),
    ],
)
def test_other_sizes_are_other_kernels(make, shape):
    """An odd number of features, more than 2³¹ weights, blocks that span rows, and one feature."""
    found = aot.compile_launch(nf4_matmul.meta_launch(make, 33, shape, torch.float16, parts=2), "sm_90")
    assert found.count(TENSOR_CORES["sm_90"]) > 0
