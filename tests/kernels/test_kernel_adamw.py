"""AdamW in torch and Triton: the properties, the reference's bits, guards, wrong versions, compilation."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter_memory import Watched, watch
from launches import every_launch, guarded, replaced

from minift.conformance import bounds, common, torch_functions
from minift.conformance.operations import adamw as operations
from minift.conformance.operations.adamw import OPERATIONS, Clip, Run, Step
from minift.optim import adamw as reference
from minift_kernels import aot, backend
from minift_kernels.optim import adamw
from nn.checks import kill_matrix
from wrong_kernels import wrong_adamw

DTYPES = {
    "reference": ("float32", "float64"),
    "torch": ("float32", "float64", "float16", "bfloat16"),
    "interpreter": ("float32", "float16"),
}
CPU = torch.device("cpu")
SINGLE, IN_PLACE, OPTIMIZER, CLIPPING = OPERATIONS
SETTINGS = operations.settings(Step(()))
NUMBERS = adamw.scalars(*SETTINGS)


def wrong(name, what):
    """Launches of the kernel of this name run the one of `wrong_adamw`; "right" leaves them alone."""
    kernels = backend.load("wrong_kernels.wrong_adamw", "interpreter")
    return replaced(name if what != "right" else "no kernel", getattr(kernels, name), WRONG=what)


# The twins as functions of arrays. Each launch in the interpreter is guarded.


def step_with(how, narrow=False, what="right"):
    """`adamw_2`. A name for the kill matrix: what is wrong with it."""
    function = functools.partial(adamw.adamw_2, backend=how)
    of_arrays = torch_functions.on_tensors(function, bfloat16=(0, 1) if narrow else ())

    def step(*args):
        with guarded(), wrong("step_one", what):
            return of_arrays(*args)

    step.__name__ = what
    return step


def optimizer_with(what="right"):
    """`AdamW` in the interpreter. Its launch writes through addresses: the guard is told which tensors they are of."""

    class Optimizer(torch_functions.optimizer(adamw.AdamW)):
        def update(self, arrays, gradients, learning_rate):
            for name, a in arrays.items():
                for moments in (self.inner.m, self.inner.v):
                    moments.setdefault(name, adamw.zero_moment(torch.from_numpy(a)))
            written = [*map(torch.from_numpy, arrays.values()), *self.inner.m.values(), *self.inner.v.values()]
            places = [Watched(t, write=True, read=True) for t in written]
            places += [Watched(torch.from_numpy(g)) for g in gradients.values()]
            update = functools.partial(self.inner.update, backend="interpreter")
            with guarded(places), wrong("step_all", what):
                torch_functions.on_tensors(update)(arrays, gradients, learning_rate)

    Optimizer.__name__ = what
    return Optimizer


def clip_with(what="right"):
    """`clip_by_global_norm` in the interpreter, whose gradients are read through addresses."""
    function = functools.partial(adamw.clip_by_global_norm, backend="interpreter")

    def clip(gradients, max_norm):
        with guarded([Watched(torch.from_numpy(g)) for g in gradients.values()]), wrong("squares", what):
            return torch_functions.on_tensors(function)(gradients, max_norm)

    clip.__name__ = what
    return clip


def implementation(operation, how, narrow):
    """`narrow`: parameters and gradients are converted to bfloat16."""
    if how == "reference":
        return operation.reference
    if operation is SINGLE:
        return torch_functions.on_tensors(adamw.adamw_1, bfloat16=(0, 1) if narrow else ())
    if operation is IN_PLACE:
        return step_with(how, narrow)
    if how == "interpreter":
        return optimizer_with() if operation is OPTIMIZER else clip_with()
    if operation is OPTIMIZER:
        return torch_functions.optimizer(adamw.AdamW, bfloat16=narrow, backend=how)
    function = functools.partial(adamw.clip_by_global_norm, backend=how)
    return torch_functions.on_tensors(function, bfloat16=(0,) if narrow else ())


@pytest.mark.parametrize("how", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_properties(operation, how):
    if operation is SINGLE and how == "interpreter":
        return  # adamw_1 is plain PyTorch everywhere
    for case in operation.fixed:
        if case.dtype in DTYPES[how]:
            for prop in operation.properties:
                prop(implementation(operation, how, case.dtype == "bfloat16"), case)


@pytest.mark.parametrize("how", ["reference", "torch"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_drawn(operation, how, data):
    case = data.draw(operation.cases(DTYPES[how]))
    for prop in operation.properties:
        prop(implementation(operation, how, case.dtype == "bfloat16"), case)


# More than an outsider promises: the reference's bits, offsets beyond 32 bits, a tighter length.


def has_the_references_bits(f, case):
    """In float32 for any ε and step; a 16-bit θ is widened, moved and rounded once."""
    theta, g, m, v = operations.given(case)
    for step, eps in ((case.step, 1e-3), (1, 1e-40), (9_999, 1e-8)):
        rest = step, *SETTINGS[1:4], eps, 0.3
        found = operations.overwritten(f, theta, g, m, v, *rest)
        exact = reference.adamw_1(*(a.astype(np.float32) for a in (theta, g)), m, v, *rest)
        expected = exact[0].astype(theta.dtype), *exact[1:]
        for name, a, b in zip("θmv", found, expected, strict=True):
            common.same_bits(a, b, name)


def goes_on_where_the_reference_stopped(f, case):
    """Two steps of the reference, two of ours from its state, and the bits of four of the reference."""
    if case.dtype != "float32":
        return
    arrays, theirs = operations.start(case), reference.AdamW(*operations.STATE)
    for step in (1, 2):
        theirs.update(arrays, operations.gradients_of(case, step), 0.03)
    ours = operations.copies(arrays), f(*operations.STATE, 2, *map(operations.copies, (theirs.m, theirs.v)))
    for step in (3, 4):
        theirs.update(arrays, operations.gradients_of(case, step), 0.03)
        ours[1].update(ours[0], operations.gradients_of(case, step), 0.03)
    for found, expected in ((ours[0], arrays), (ours[1].m, theirs.m), (ours[1].v, theirs.v)):
        for name in expected:
            common.same_bits(found[name], expected[name], name)


def the_length_is_tighter(f, case):
    """Within γ₁₇ / 2 and a rounding, relatively: far below the γ_n / 2 of any order, for squares of one size."""
    gradients = {"a": np.full(40_001, 0.1, np.float32), "b": np.full((3, 16384), 0.3, np.float32)}
    exact = np.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in gradients.values()))
    _, norm = f(gradients, case.max_norm)
    assert abs(norm - exact) <= exact * (bounds.gamma(17, np.float32) / 2 + 1e-12), f"{norm}, exactly {exact}"


FAR = 1 << 33  # elements


def near():
    """θ, m, v, g of a short tile."""
    rng = np.random.default_rng(0)
    dtypes = torch.float16, torch.float32, torch.float32, torch.float16
    return [torch.tensor(rng.random(37) + 0.5, dtype=dtype) for dtype in dtypes]


def far(tensors, launch, arguments, name, what, programs=0):
    """The launch with other arguments, where it meets the tensors only behind 2³³ elements (`interpreter_memory`)."""
    *written, g = tensors
    places = [Watched(t, FAR * t.element_size(), write=True, read=True) for t in written]
    places.append(Watched(g, FAR * g.element_size()))
    if not programs:  # what else it is given: the table of addresses, and the partial sums
        others = [a for a in arguments if isinstance(a, torch.Tensor)]
        places += [Watched(a, write=a.dtype == torch.float64) for a in others]
    with wrong(name, what), watch(places, programs):
        dataclasses.replace(launch, arguments=arguments).run(CPU)


def one_step_beyond_32_bits(f, case):
    tensors, expected = near(), near()
    adamw.step_launch(*expected, NUMBERS, "interpreter").run(CPU)
    launch = adamw.step_launch(*tensors, NUMBERS, "interpreter")
    arguments = *tensors, FAR + 37, *NUMBERS
    far(tensors, launch, arguments, "step_one", f.__name__, FAR // launch.options["TILE"])
    assert all(map(torch.equal, tensors, expected)), "other numbers behind 2³³"


def in_the_table(launch):
    """The launch's table and tiles, as if its tensor had 2³³ elements more."""
    table, tiles = (a.clone() for a in launch.arguments if isinstance(a, torch.Tensor) and a.dtype != torch.float64)
    table[0, 4] += FAR
    tiles[0, 1] += FAR // launch.options["TILE"]
    return table, tiles


def an_update_beyond_32_bits(f, case):
    tensors, expected = near(), near()
    launch, right = (adamw.update_launch(*([x] for x in t), NUMBERS, "interpreter") for t in (tensors, expected))
    right.run(CPU)
    far(tensors, launch, (*in_the_table(launch), *NUMBERS), "step_all", f.__name__)
    assert all(map(torch.equal, tensors, expected)), "other numbers behind 2³³"


def squares_beyond_32_bits(f, case):
    tensors, partials = near(), torch.full((2, 1), torch.nan, dtype=torch.float64)
    launches = [adamw.squares_launch(partial, tensors[3:], "interpreter") for partial in partials]
    launches[0].run(CPU)
    far(tensors, launches[1], (partials[1], *in_the_table(launches[1])), "squares", f.__name__)
    assert partials[0] == partials[1], f"{partials[1]} behind 2³³, needed {partials[0]}"


def test_more_than_an_outsider_promises():
    for case in IN_PLACE.fixed:
        if case.dtype in DTYPES["interpreter"]:
            has_the_references_bits(step_with("interpreter"), case)
    for case in OPTIMIZER.fixed:
        goes_on_where_the_reference_stopped(optimizer_with(), case)
    the_length_is_tighter(clip_with(), Clip(1.0))
    the_length_is_tighter(implementation(CLIPPING, "torch", False), Clip(1.0))


# Wrong versions.


def test_kill_matrix_of_the_formula():
    layout = IN_PLACE.properties[5]
    properties = [p for p in IN_PLACE.properties if p is not layout]
    properties += [has_the_references_bits, one_step_beyond_32_bits]
    cases = [Step((5, 7))]
    for prop in properties:
        prop(step_with("interpreter", what="nothing"), cases[0])
    killed = kill_matrix(properties, [step_with("interpreter", what=what) for what in wrong_adamw.FORMULA], cases)
    assert {prop for prop, what in killed if what == "32 bits"} == {"one_step_beyond_32_bits"}
    assert {prop for prop, what in killed if what == "fast quotient"} == {"has_the_references_bits"}
    assert ("decay_is_apart_from_the_gradient", "L2") in killed

    def flattens_in_memory_order(theta, gradient, *rest):  # which a kernel is spared: it is given what is contiguous
        return reference.adamw_2(theta, np.ravel(gradient, order="K").reshape(theta.shape), *rest)

    kill_matrix([layout], [flattens_in_memory_order], cases)


def test_kill_matrix_of_the_table():
    properties = [*OPTIMIZER.properties[:3], goes_on_where_the_reference_stopped, an_update_beyond_32_bits]
    cases = [Run(((3, 4), (5,), (1025,)))]
    for prop in properties:
        prop(optimizer_with("nothing"), cases[0])
    killed = kill_matrix(properties, [optimizer_with(what) for what in wrong_adamw.TABLE], cases)
    assert {prop for prop, what in killed if what == "32 bits"} == {"an_update_beyond_32_bits"}
    assert ("only_matrices_decay", "vectors decay") in killed


class StepOfItsOwn(reference.AdamW):
    """Counts from its own beginning, so that after a pause the moments are corrected as if they were new."""

    def __init__(self, *state):
        super().__init__(*state)
        self.given, self.step = self.step, 0


class NewArrays(reference.AdamW):
    """Puts new arrays in place of those that it was given."""

    def update(self, arrays, gradients, learning_rate):
        own = operations.copies(arrays)
        super().update(own, gradients, learning_rate)
        arrays.update(own)


class ClearsGradients(reference.AdamW):
    def update(self, arrays, gradients, learning_rate):
        super().update(arrays, gradients, learning_rate)
        for g in gradients.values():
            g.fill(0)


class CountsWhatItRefuses(reference.AdamW):
    def update(self, arrays, gradients, learning_rate):
        self.step += arrays.keys() != gradients.keys()
        super().update(arrays, gradients, learning_rate)


class SkipsWhatHasNoGradient(reference.AdamW):
    def update(self, arrays, gradients, learning_rate):
        both = arrays.keys() & gradients.keys()
        super().update({n: a for n, a in arrays.items() if n in both}, {n: gradients[n] for n in both}, learning_rate)


def test_kill_matrix_of_the_state():
    """What is wrong around the kernel, tried on the reference."""
    versions = [StepOfItsOwn, NewArrays, ClearsGradients, CountsWhatItRefuses, SkipsWhatHasNoGradient]
    kill_matrix(OPTIMIZER.properties[3:], versions, [Run(((3, 4), (5,)))])


def test_kill_matrix_of_the_length():
    leaves = CLIPPING.properties[1]
    properties = [p for p in CLIPPING.properties if p is not leaves]
    properties += [the_length_is_tighter, squares_beyond_32_bits]
    for prop in properties:
        prop(clip_with("nothing"), Clip(0.5))
    kill_matrix(properties, [clip_with(what) for what in wrong_adamw.SQUARES], [Clip(0.5)])

    def in_place(gradients, max_norm):  # which a kernel cannot do: the guard lets it read gradients only
        clipped, norm = reference.clip_by_global_norm(gradients, max_norm)
        for name, g in gradients.items():
            g[...] = clipped[name]
        return gradients, norm

    kill_matrix([leaves], [in_place], [Clip(0.5)])


# What only the twin has.


def some(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(s, generator=generator).to(dtype) for i, s in enumerate(shapes)}


@pytest.mark.parametrize("aligned", [True, False])
def test_one_launch_for_each_pair_of_types(aligned):
    """θ of two types, misaligned ones too: the bits of one step after the other."""
    arrays = some([(40, 30), (7,)]) | {f"h{n}": t for n, t in some([(3, 5), (1030,)], torch.float16, 1).items()}
    if not aligned:
        arrays = {n: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape) for n, t in arrays.items()}
    gradients = {n: t.flip(0).clone() for n, t in arrays.items()}
    expected = {n: t.clone() for n, t in arrays.items()}
    launches = []
    optimizer = adamw.AdamW(0.8, 0.95, 1e-3, 0.3)
    with every_launch(lambda launch, device, before: (launches.append(launch), before(launch, device))):
        optimizer.update(arrays, gradients, 0.03, backend="interpreter")
    assert [launch.options["ALIGNED"] for launch in launches] == [aligned, aligned]
    for name, theta in expected.items():
        moments = adamw.zero_moment(theta), adamw.zero_moment(theta)
        rest = 1, 0.03, 0.8, 0.95, 1e-3, 0.3 if theta.dim() >= 2 else 0.0
        adamw.adamw_2(theta, gradients[name], *moments, *rest, backend="interpreter")
        assert torch.equal(arrays[name], theta) and torch.equal(optimizer.m[name], moments[0])
    assert optimizer.nbytes == sum(8 * t.numel() for t in arrays.values())


@pytest.mark.parametrize("how", ["torch", "interpreter"])
def test_a_graph_from_before_the_step_is_refused(how):
    """Leaves that require a gradient are updated; a backward pass with the values of before would be silently wrong."""
    w = torch.randn(3, 4, requires_grad=True)
    w.grad = torch.ones_like(w)
    y = (w * w).sum()
    kept = w.detach().clone()
    adamw.AdamW().update({"w": w}, {"w": w.grad}, 0.1, backend=how)
    assert w.requires_grad and w.is_leaf and not torch.equal(w, kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_torch_walks_the_same_way():
    """Five steps in float64, within the sum of the steps' own bounds."""
    arrays, optimizer = some([(3, 4), (2, 5)], torch.float64), adamw.AdamW(0.8, 0.95, 1e-3, 0.3)
    leaves = {n: t.clone().requires_grad_() for n, t in arrays.items()}
    theirs = torch.optim.AdamW(leaves.values(), 0.03, (0.8, 0.95), 1e-3, 0.3)
    for step in range(5):
        gradients = some([(3, 4), (2, 5)], torch.float64, step + 9)
        for name, leaf in leaves.items():
            leaf.grad = gradients[name]
        theirs.step()
        optimizer.update(arrays, gradients, 0.03)
    for name, leaf in leaves.items():
        assert ((arrays[name] - leaf).abs() <= 5 * 40 * 2.0**-53 * (1 + leaf.abs())).all()


def test_the_first_form_is_differentiable():
    arrays = [torch.rand(5, dtype=torch.float64, requires_grad=True) + 0.5 for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *a: adamw.adamw_1(*a, *SETTINGS), arrays, fast_mode=True)


def test_what_does_not_fit_is_refused_before_anything_moves():
    def update(theta, gradient, m, v, how):
        optimizer = adamw.AdamW(m={"p": m}, v={"p": v})
        try:
            optimizer.update({"p": theta}, {"p": gradient}, 0.1, backend=how)
        finally:
            assert optimizer.step == 0

    x, apart = torch.ones(3, 4), torch.ones(4, 3).T
    for args, how, message in [
        ((apart, x, x, x), "torch", "AdamW writes into p and its moments: needed contiguous tensors, see Tensor.cont"),
        ((x, x, apart, x), "interpreter", "AdamW writes into p and its moments: needed contiguous tensors"),
        ((x, x[:2], x, x), "torch", r"the gradient of p: \(2, 4\) on cpu, needed \(3, 4\) on cpu, as the parameter"),
        ((x, x, x, x.half()), "interpreter", "the moment of p: torch.float16, needed torch.float32 for parameters in"),
        ((x.double(), x, x, x), "torch", "the moment of p: torch.float32, needed torch.float64 for parameters in"),
        ((x, x.double(), x, x), "interpreter", "the gradient of p: torch.float64, needed float32, float16 or bfloat16"),
        ((x.double(),) * 4, "interpreter", "p: float64, but kernels compute in float32: use backend='torch'"),
    ]:
        with pytest.raises(ValueError, match=message):
            update(*args, how)
    with pytest.raises(KeyError, match="arrays and gradients differ in"):
        adamw.AdamW().update({"p": x}, {}, 0.1)
    assert (x == 1).all()


def test_opcheck():
    theta, m, v, g = torch.randn(4, 5, 7)
    v = v.abs()
    ops = torch.ops.minift
    torch.library.opcheck(ops.adamw_step.default, (theta, m, v, g, NUMBERS, "interpreter"))
    lists = [[x, x[:2].clone()] for x in (theta, m, v, g)]
    torch.library.opcheck(ops.adamw_update.default, (*lists, NUMBERS, "interpreter"))
    torch.library.opcheck(ops.sums_of_squares.default, (lists[3], "interpreter"))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles(target, dtype):
    """In words of 16 bytes (a 16-bit parameter: 8), nothing spilled, no detour, nothing fused, quotients exact."""
    empty = functools.partial(torch.empty, device="meta")
    n = 4096 * 4096
    theta, m, v, g = empty(n, dtype=dtype), empty(n), empty(n), empty(n, dtype=dtype)
    one = aot.compile_launch(adamw.step_launch(theta, m, v, g, NUMBERS, "triton"), target)
    many = aot.compile_launch(adamw.update_launch(*([x, x[:999]] for x in (theta, m, v, g)), NUMBERS, "triton"), target)
    squares = aot.compile_launch(adamw.squares_launch(empty(1025, dtype=torch.float64), [g], "triton"), target)
    for name, found in (("step_one", one), ("step_all", many), ("squares", squares)):
        print(f"{name} {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
        assert found.spilled == 0 and max(found.widths("load")) >= (128 if name != "squares" else 64)
    of_theta = 8 * 4 * dtype.itemsize  # four neighbors
    assert set(one.widths("store")) == {of_theta, 128} and min(one.widths("load")) == of_theta
    assert many.widths("store").count(128) == 2 * many.widths("store").count(64) or dtype == torch.float32
    for found in (one, many):
        assert found.shared == 0 and found.registers <= 64
        assert not found.count(r"fma\.|mad\.\S*f32")
        if target != "gfx942":
            assert found.count(r"div\.rn\.f32") == found.count(r"div\.\S*f32") > 0
            assert found.count(r"sqrt\.rn\.f32") == found.count(r"sqrt\.") > 0 and ".ftz" not in found.assembly
