"""AdamW with 8-bit moments in torch and Triton: the properties, the reference's bits, wrong versions, compilation."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter_memory import Watched, watch
from launches import every_launch, guarded, replaced

from minift.conformance import torch_functions
from minift.conformance.common import same_bits
from minift.conformance.implementations.twins import moments_8bit
from minift.conformance.operations import adamw8bit as operations
from minift.conformance.operations.adamw8bit import FIXED, OPERATIONS, REST, Step
from minift.optim import adamw8bit as reference
from minift.quant import blockwise as reference_blockwise
from minift_kernels import aot, backend
from minift_kernels.optim import adamw, adamw8bit
from minift_kernels.quant.blockwise import BlockwiseTensor, midpoints
from minift_kernels.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, on_device
from nn.checks import kill_matrix
from wrong_kernels import wrong_adamw8bit

DTYPES = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
RETURNING, IN_PLACE = OPERATIONS
NUMBERS = adamw.scalars(3, *REST)
QUICK = [Step((9, 11), 8, 2, seed=1)]


def running(what):
    """Launches run the wrong kernel; "right" leaves them alone."""
    kernel = backend.load("wrong_kernels.wrong_adamw8bit", "interpreter").step_blocks
    return replaced("step_blocks" if what != "right" else "no kernel", kernel, WRONG=what)


def places(thetas, moments, gradients):
    """What a launch may write through addresses, and read."""
    parts = ((q.codes, q.absmax) if isinstance(q, BlockwiseTensor) else (q,) for q in moments)
    written = [*thetas, *(t for part in parts for t in part)]
    return [*(Watched(t, write=True, read=True) for t in written), *map(Watched, gradients)]


def step_with(how, narrow=False, what="right"):
    """`adamw8bit_2` of arrays. In the interpreter every launch is guarded."""

    def step(theta, gradient, *rest):
        moments = moments_8bit(theta, *rest[:5])
        contiguous = gradient.contiguous()  # what the operator reads: it copies what is not
        with guarded(places([theta], moments, [contiguous])), running(what):
            adamw8bit.adamw8bit_2(theta, contiguous, *moments, *rest[5:], backend=how)

    of_arrays = torch_functions.on_tensors(step, bfloat16=(0, 1) if narrow else ())
    of_arrays.__name__ = what
    return of_arrays


def implementation(operation, how, narrow):
    if operation is IN_PLACE:
        return step_with(how, narrow)

    def step(theta, gradient, *rest):
        theta, m, v = adamw8bit.adamw8bit_1(theta, gradient, *moments_8bit(theta, *rest[:5]), *rest[5:])
        return theta, m.codes, m.absmax, v.codes, v.absmax

    return torch_functions.on_tensors(step, bfloat16=(0, 1) if narrow else ())


@pytest.mark.parametrize(("operation", "how"), [(RETURNING, "torch"), (IN_PLACE, "torch"), (IN_PLACE, "interpreter")])
def test_properties(operation, how):
    for case in FIXED:
        if case.dtype in DTYPES[how]:
            for prop in operation.properties:
                prop(implementation(operation, how, case.dtype == "bfloat16"), case)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_drawn(data):
    case = data.draw(IN_PLACE.cases(DTYPES["torch"]))
    for prop in IN_PLACE.properties:
        prop(implementation(IN_PLACE, "torch", case.dtype == "bfloat16"), case)


# More than an outsider promises: the reference's bits, offsets beyond 32 bits.


def has_the_references_bits(f, case):
    """Codes and scales in every backend; in a kernel a float32 θ too. A 16-bit θ is widened, moved and rounded once."""
    for step, eps in ((case.step, 1e-3), (1, 1e-30), (9_999, 1e-8)):
        case, rest = case._replace(step=step), (*REST[:3], eps, REST[4])
        arrays = operations.given(case)
        found = operations.overwritten(f, arrays, case, rest)
        wide = [np.asarray(a, np.float32) for a in arrays[:2]]
        exact = operations.returned(RETURNING.reference, [*wide, *arrays[2:]], case, rest)
        operations.same(found, (exact[0].astype(arrays[0].dtype), *exact[1:]), "beside the reference")


FAR = 1 << 33  # elements


def near():
    """θ, g and moments of 37 numbers in blocks of 16."""
    theta, g, *parts = operations.given(Step((37,), 16, seed=5))
    theta, g, *parts = map(torch.tensor, (theta, g, *parts))
    return [theta], list(moments_8bit(theta, *parts, 16)), [g]


def launched(thetas, moments, gradients):
    parts = [[getattr(q, part)] for part in ("codes", "absmax") for q in moments]
    return adamw8bit.update_launch(thetas, *parts, gradients, [True], NUMBERS, moments[0].block_size, "interpreter")


def beyond_32_bits(f, case):
    """The launch meets its tensors only behind 2³³ elements (`interpreter_memory`)."""
    right, given = near(), near()
    launched(*right).run(CPU)
    launch = launched(*given)
    table, tiles, tables = (a.clone() for a in launch.arguments[:3])
    rows, block_size = launch.options["ROWS"], launch.options["BLOCK_SIZE"]
    table[0, 6] += FAR
    tiles[0, 1] += FAR // (rows * block_size)
    far = places(*given)
    for place in far:
        is_scale = place.tensor.numel() == len(given[1][0].absmax)
        place.far = FAR * place.tensor.element_size() // (block_size if is_scale else 1)
    with running(f.__name__), watch([*far, *map(Watched, (table, tiles, tables))]):
        dataclasses.replace(launch, arguments=(table, tiles, tables, *launch.arguments[3:])).run(CPU)
    for a, b in zip(far, places(*right), strict=True):
        assert torch.equal(a.tensor, b.tensor), "other numbers behind 2³³"


def test_more_than_an_outsider_promises():
    for case in FIXED:
        if case.dtype in DTYPES["interpreter"]:
            has_the_references_bits(step_with("interpreter"), case)
    beyond_32_bits(step_with("interpreter"), None)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("signed", [True, False])
def test_the_guess_is_never_more_than_one_off(signed, fused):
    """Equation (6) of the kernel, at both ends of every interval between thresholds: it is monotone, so everywhere."""
    f32, code = np.float32, DYNAMIC if signed else DYNAMIC_UNSIGNED
    thresholds = reference_blockwise.midpoints(code)
    ends = [*thresholds, *np.nextafter(thresholds, f32(2)), f32(-1 if signed else 0), np.nextafter(f32(1), f32(2))]
    x = np.sort(np.array(ends, f32))
    slopes = [f32(2**e * 10 ** (6 - e) / 0.9) for e in range(7)]
    lines = [(slope, f32(2**e * 8 / 9)) for e, slope in enumerate(slopes)]
    if fused:  # one rounding: the product of two float32 is exact in float64, and the sum nearly so
        values = [(float(a) * np.abs(x).astype(float) + float(b)).astype(f32) for a, b in lines]
    else:
        values = [a * np.abs(x) + b for a, b in lines]
    index = np.min(values, axis=0)
    half = index.astype(int)
    guess = np.maximum(np.where(x < 0, 127 - half, 127 + half), 0) if signed else (index * 2).astype(int) - 1
    off = guess - np.searchsorted(thresholds, x)
    assert (np.abs(off) <= 1).all() and off.min() == -1 and off.max() == 1
    assert (np.diff(guess) >= 0).all() and guess.min() == 0 and guess.max() == 255


@pytest.mark.parametrize("code", [DYNAMIC, DYNAMIC_UNSIGNED], ids=["signed", "unsigned"])
def test_every_threshold_is_met(code):
    """β₁ = β₂ = 0: then m is the gradient and v its square. Each threshold and the next number, or what has a square
    nearest to them."""
    levels = midpoints(on_device(code, CPU)).numpy()
    x = np.concatenate([levels, np.nextafter(levels, np.float32(2))])
    x = np.sign(x) * np.sqrt(np.abs(x)) if code is DYNAMIC_UNSIGNED else x
    x = np.concatenate([np.float32([1]), x.astype(np.float32)])  # one block, whose scale is 1
    theta, rest = np.zeros(len(x), np.float32), (1, 0.1, 0.0, 0.0, 1e-3, 0.0)
    exact = reference.adamw8bit_1(theta, x, *reference.zero_moments(theta, 512, 0), *rest)
    moments = adamw8bit.zero_moments(torch.tensor(theta), 512, 0)
    adamw8bit.adamw8bit_2(torch.tensor(theta), torch.tensor(x), *moments, *rest, backend="interpreter")
    for q, wanted in zip(moments, exact[1:], strict=True):
        same_bits(q.codes.numpy(), wanted.codes, "codes")


# The optimizer: all tensors of a model in one launch.


def some(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(s, generator=generator).to(dtype) for i, s in enumerate(shapes)}


SHAPES = [(40, 30), (700,), (3, 5), (0, 4), (257,), (2, 300)]
MAKE = functools.partial(reference.AdamW8bit, 0.8, 0.95, 1e-3, 0.3, min_8bit_size=200)


def walks_as_the_reference(make, block_size=256):
    """Three steps of many tensors, some of them in 32 bits: codes, scales and a kernel's float32 θ to the bit."""
    arrays = some(SHAPES)
    theirs, expected = MAKE(block_size=block_size), {n: t.numpy().copy() for n, t in arrays.items()}
    ours = make(block_size)
    for step in (1, 2, 3):
        gradients = some(SHAPES, seed=step)
        ours.update(arrays, gradients, 0.03)
        theirs.update(expected, {n: g.numpy() for n, g in gradients.items()}, 0.03)
    for name in arrays:
        if ours.exact:
            same_bits(arrays[name].numpy(), expected[name], name)
        for found, wanted in ((ours.m[name], theirs.m[name]), (ours.v[name], theirs.v[name])):
            assert isinstance(found, BlockwiseTensor) == isinstance(wanted, reference_blockwise.BlockwiseTensor)
            if isinstance(found, BlockwiseTensor):
                same_bits(found.codes.numpy(), wanted.codes, f"codes of {name}")
                same_bits(found.absmax.numpy(), wanted.absmax, f"scales of {name}")
            else:
                same_bits(found.numpy(), wanted, f"moments of {name}")
    assert (ours.step, ours.nbytes) == (3, theirs.nbytes)


def optimizer_with(how, what="right"):
    """`AdamW8bit` whose launches are guarded: what they may touch is known before."""

    class Optimizer(adamw8bit.AdamW8bit):
        exact = how != "torch"

        def update(self, arrays, gradients, learning_rate):
            for name, theta in arrays.items():
                if name not in self.m:
                    self.m[name], self.v[name] = self._zeros(theta)
            moments = [x[n] for n in arrays for x in (self.m, self.v)]
            inside = places(arrays.values(), moments, gradients.values())
            with guarded(inside), running(what):
                super().update(arrays, gradients, learning_rate, backend=how)

    def make(block_size):
        return Optimizer(0.8, 0.95, 1e-3, 0.3, block_size=block_size, min_8bit_size=200)

    make.__name__ = what
    return make


def in_blocks_that_are_no_power_of_two(make, case):
    walks_as_the_reference(make, 100)


def in_blocks_of_256(make, case):
    walks_as_the_reference(make)


def resumes_as_if_nothing_had_happened(make, case):
    """From copies of the arrays and the state after the first step."""
    arrays, whole = some(SHAPES), make(64)
    for step in (1, 2, 3):
        whole.update(arrays, some(SHAPES, seed=step), 0.03)
        if step == 1:
            kept, resumed = copy.deepcopy(arrays), make(64)
            resumed.step, resumed.m, resumed.v = 1, copy.deepcopy(whole.m), copy.deepcopy(whole.v)
    for step in (2, 3):
        resumed.update(kept, some(SHAPES, seed=step), 0.03)
    assert all(torch.equal(kept[n], arrays[n]) for n in arrays)


@pytest.mark.parametrize("how", ["torch", "interpreter"])
def test_optimizer(how):
    for prop in (in_blocks_of_256, in_blocks_that_are_no_power_of_two, resumes_as_if_nothing_had_happened):
        prop(optimizer_with(how), None)


# Wrong versions.


def test_kill_matrix_of_the_formula():
    properties = [p for p in IN_PLACE.properties if p.__name__ not in OTHERS] + [has_the_references_bits]
    for prop in properties:
        prop(step_with("interpreter", what="nothing"), QUICK[0])
    killed = kill_matrix(properties, [step_with("interpreter", what=w) for w in wrong_adamw8bit.FORMULA], QUICK)
    assert {prop for prop, what in killed if what == "fast quotient"} == {"has_the_references_bits"}
    assert ("no_step_is_longer_than_k", "v may be zero") in killed
    assert ("decay_is_apart_from_the_gradient", "L2") in killed


OTHERS = ("any_layout_of_the_gradient", "refuses_what_has_no_finite_square", "changes_only_what_it_should")


def test_kill_matrix_of_what_is_around_the_kernel():
    """Tried on the reference: a kernel is given what is contiguous and has been looked at."""

    def flattens_in_memory_order(theta, gradient, *rest):
        return RETURNING.reference(theta, np.ravel(gradient, order="K").reshape(theta.shape), *rest)

    def does_not_look(theta, gradient, *rest):
        return RETURNING.reference(theta, np.nan_to_num(gradient, posinf=1, neginf=-1).clip(-1e19, 1e19), *rest)

    def scales_the_gradient(theta, gradient, *rest):
        gradient *= 0.5
        return RETURNING.reference(theta, gradient, *rest)

    properties = [p for p in RETURNING.properties if p.__name__ in OTHERS]
    kill_matrix(properties, [flattens_in_memory_order, does_not_look, scales_the_gradient], QUICK)


def test_kill_matrix_of_the_table():
    properties = [in_blocks_of_256, in_blocks_that_are_no_power_of_two, beyond_32_bits]
    right = optimizer_with("interpreter", "nothing")
    for prop in properties:
        prop(right, None)
    killed = kill_matrix(properties, [optimizer_with("interpreter", w) for w in wrong_adamw8bit.TABLE], [None])
    assert {prop for prop, what in killed if what == "32 bits"} == {"beyond_32_bits"}


# What only the twin has.


@pytest.mark.parametrize("aligned", [True, False])
def test_one_launch_for_each_pair_of_types(aligned):
    """θ of two types, misaligned ones too, and one launch for small tensors: the bits of one step after the other."""
    arrays = some([(40, 30), (700,), (3,)]) | {f"h{n}": t for n, t in some([(21, 50)], torch.float16, 1).items()}
    if not aligned:
        arrays = {n: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape) for n, t in arrays.items()}
    gradients = {n: t.flip(0).clone() for n, t in arrays.items()}
    expected, launches = copy.deepcopy(arrays), []
    optimizer = adamw8bit.AdamW8bit(0.8, 0.95, 1e-3, 0.3, min_8bit_size=100)
    with every_launch(lambda launch, device, before: (launches.append(launch), before(launch, device))):
        optimizer.update(arrays, gradients, 0.03, backend="interpreter")
    assert [launch.options["ALIGNED"] for launch in launches] == [aligned] * 3
    assert [launch.options.get("BLOCK_SIZE") for launch in launches] == [256, None, 256]
    for name, theta in expected.items():
        moments = adamw8bit.zero_moments(theta, 256, 100)
        rest = 1, 0.03, 0.8, 0.95, 1e-3, 0.3 if theta.dim() >= 2 else 0.0
        adamw8bit.step_in_place(theta, gradients[name], *moments, *rest, backend="interpreter")
        assert torch.equal(arrays[name], theta), name


@pytest.mark.parametrize("how", ["torch", "interpreter"])
def test_a_graph_from_before_the_step_is_refused(how):
    w = torch.randn(60, 70, requires_grad=True)
    w.grad = torch.ones_like(w)
    y, kept = (w * w).sum(), w.detach().clone()
    adamw8bit.AdamW8bit().update({"w": w}, {"w": w.grad}, 0.1, backend=how)
    assert w.requires_grad and w.is_leaf and not torch.equal(w, kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_does_not_fit_is_refused_before_anything_moves():
    def update(theta, gradient, moments, how="interpreter"):
        optimizer = adamw8bit.AdamW8bit(min_8bit_size=0, block_size=16)
        if moments is not None:
            optimizer.m["p"], optimizer.v["p"] = moments
        try:
            optimizer.update({"p": theta}, {"p": gradient}, 0.1, backend=how)
        finally:
            assert optimizer.step == 0

    x, apart = torch.ones(3, 4), torch.ones(4, 3).T
    fresh, long = adamw8bit.zero_moments(x, 16, 0), adamw8bit.zero_moments(x, 5000, 0)
    for args, message in [
        ((apart, x, None), "AdamW writes into p and its moments: needed contiguous tensors"),
        ((x, x[:2], None), r"the gradient of p: \(2, 4\) on cpu, needed \(3, 4\) on cpu, as the parameter"),
        ((x, x, adamw8bit.zero_moments(x[:2], 16, 0)), r"the moment of p: \(2, 4\) on cpu, needed \(3, 4\) on cpu"),
        ((x, x, fresh[::-1]), "the moments of p: another map than `zero_moments` has"),
        ((x.double(), x.double(), None), "p: float64, but kernels compute in float32: use backend='torch'"),
        ((x, x, long), "block_size: 5,000, a kernel holds blocks of up to 4,096: use backend='torch'"),
        ((x, x, (fresh[0], long[1])), "the moments of p: blocks of 16 and 5,000, needed one size"),
        ((x, x * torch.inf, None), r"the gradient of p is inf at index \(0, 0\), needed at most 1e\+19"),
        ((x, torch.full((3, 4), 2e19), None), "the gradient of p is 1.9+6.*needed at most 1e"),
        ((x, -torch.full((3, 4), torch.nan, dtype=torch.float16), None), "the gradient of p is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            update(*args)
    with pytest.raises(KeyError, match="arrays and gradients differ in"):
        adamw8bit.AdamW8bit().update({"p": x}, {}, 0.1)
    assert (x == 1).all() and not fresh[0].absmax.any()
    adamw8bit.check_gradient(torch.tensor([reference.LARGEST_GRADIENT, -reference.LARGEST_GRADIENT]))
    update_long = functools.partial(adamw8bit.adamw8bit_2, torch.ones(3, 4), x, *long, 1, 0.1)
    update_long(backend="torch")
    assert long[0].absmax.any()


def test_pieces_are_views():
    q = adamw8bit.zero_moments(torch.ones(300), 64, 0)[0]
    part = adamw8bit.piece(q, slice(64, 192), slice(1, 3))
    part.codes[:], part.absmax[:] = 3, 7
    assert (q.codes[64:192] == 3).all() and (q.absmax[1:3] == 7).all() and not q.absmax[[0, 3, 4]].any()


def test_opcheck():
    thetas, moments, gradients = near()
    parts = [[getattr(q, part)] for part in ("codes", "absmax") for q in moments]
    arguments = thetas, *parts, gradients, [True], NUMBERS, 16, "interpreter"
    torch.library.opcheck(torch.ops.minift.adamw8bit_update.default, arguments)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles(target, dtype):
    """In words of 16 bytes, nothing spilled, nothing fused but the guess, quotients exact, few look-ups."""
    empty = functools.partial(torch.empty, device="meta")
    n = 4096 * 4096
    codes, scales = empty(n, dtype=torch.uint8), empty(n // 256)
    weights = [empty(4096, 4096, dtype=dtype)]
    launch = adamw8bit.update_launch(
        weights, [codes], [codes], [scales], [scales], weights, [True], NUMBERS, 256, "triton"
    )
    found = aot.compile_launch(launch, target)
    print(f"step_blocks {target} {dtype}: {found.registers} registers, {found.spilled} spilled, {found.shared} shared")
    assert found.spilled == 0 and found.registers <= 128
    assert found.shared <= 64, "a detour through shared memory: more than the maxima of rows"
    if target != "gfx942":
        of_theta = dtype.itemsize * launch.options["NEIGHBORS"] * 8
        assert of_theta == 128 and found.widths("load").count(128) == 4 // (4 // dtype.itemsize)
        assert found.widths("store").count(128) == 2 // (4 // dtype.itemsize)
        a_lane = launch.options["ROWS"] * 256 // (launch.options["num_warps"] * 32)
        paths = 2  # with a mask and without
        assert found.count(r"fma\.") == 7 * 2 * a_lane * paths and not found.count(r"mad\.\S*f32")
        assert found.count(r"div\.rn\.f32") == found.count(r"div\.\S*f32") > 0
        assert found.count(r"sqrt\.rn\.f32") == found.count(r"sqrt\.") > 0 and ".ftz" not in found.assembly
    else:
        assert 32 * dtype.itemsize in found.widths("load"), "a row is four numbers for each of 64 lanes"
