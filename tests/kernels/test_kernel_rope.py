"""Rotary positions in torch and Triton: the properties, guards around every launch, wrong versions, compilation."""

import functools

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations import rope as laws
from minift.conformance.operations.rope import FAR, FIXED, OPERATIONS, Turned
from minift.nn import rope as reference
from minift_kernels import aot, backend
from minift_kernels.nn import rope
from nn.checks import kill_matrix
from wrong_kernels import wrong_rope

BACKENDS = {"torch": ("float32", "float64", "float16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [Turned(2, 3, 5, 8), Turned(2, 2, 3, 6, 1e4, FAR, "float16")]
TURN, ROTATIONS = OPERATIONS


def implementation(how):
    """No gradient is asked of the angles, so they are no arguments of what is differentiated."""

    def f(x, cos, sin):
        angles = torch.from_numpy(cos), torch.from_numpy(sin)
        return torch_functions.differentiable(lambda x: rope.rope(x, *angles, backend=how))(x)

    return f


def rotations(positions, omega):
    return tuple(a.numpy() for a in rope.rotations(torch.from_numpy(positions), torch.from_numpy(omega)))


@pytest.mark.parametrize("how", ["reference", *BACKENDS])
def test_properties(how):
    f = reference.rope if how == "reference" else implementation(how)
    for case in FIXED:
        if case.dtype in BACKENDS.get(how, ("float32", "float64")):
            for prop in TURN.properties:
                with guarded():
                    prop(f, case)


@pytest.mark.parametrize("f", [reference.rotations, rotations], ids=["reference", "torch"])
def test_angles(f):
    for case in FIXED:
        for prop in ROTATIONS.properties:
            prop(f, case)


def test_kill_matrix():
    kernels = backend.load("wrong_kernels.wrong_rope", "interpreter")
    make = functools.partial(version, implementation("interpreter"), "turn", kernels.turn)
    elsewhere = laws.pullback_is_the_transpose_of_the_derivative, laws.changes_nothing
    properties = [p for p in TURN.properties if p not in (*elsewhere, laws.any_layout)]
    for prop in (*properties, laws.any_layout):
        for case in QUICK:
            prop(make("nothing"), case)
    kill_matrix(properties, [make(what) for what in wrong_rope.TURN], QUICK)
    kill_matrix([laws.any_layout], [make(what) for what in wrong_rope.TURN[:2]], QUICK[:1])  # it is slow


def test_kill_matrix_of_what_needs_float64():
    """Mistakes around the kernel: the gradient of another rotation, and a result that lies over its argument."""

    def twice_the_gradient(x, cos, sin):
        y, vjp = reference.rope(x, cos, sin)
        return y, lambda dy: 2 * vjp(dy)

    def in_place(x, cos, sin):
        y, vjp = reference.rope(x, cos, sin)
        x[...] = y
        return x, vjp

    properties = [laws.pullback_is_the_transpose_of_the_derivative, laws.changes_nothing]
    kill_matrix(properties, [twice_the_gradient, in_place], [Turned(2, 2, 3, 10, 5e5, 99, "float64")])


def test_kill_matrix_of_angles():
    """The published bugs: angles or positions in too few bits."""

    def wrong(name, angle):
        def f(positions, omega):
            phi = angle(positions, omega)
            return np.cos(phi).astype(np.float32), np.sin(phi).astype(np.float32)

        f.__name__ = name
        return f

    def shifted(positions, omega):
        positions += 1
        return reference.rotations(positions, omega)

    versions = [
        wrong("angle in float32", lambda m, w: m[..., None].astype(np.float32) * w.astype(np.float32)),
        wrong("positions in float16", lambda m, w: m.astype(np.float16).astype(np.float64)[..., None] * w),
        wrong("frequencies in float32", lambda m, w: m[..., None] * w.astype(np.float32).astype(np.float64)),
        wrong("from one", lambda m, w: (m[..., None] + 1) * w),
        shifted,
    ]
    kill_matrix(ROTATIONS.properties, versions, [Turned(1, 2, 4, 6, 500000.0, FAR)])


@pytest.mark.parametrize("scaling", [None, ("linear", 4.0), ("llama3", 8.0, 1.0, 4.0, 64)])
def test_frequencies_are_the_references(scaling):
    """To a few units: a power in float64, of NumPy and of torch."""
    scaling = scaling and rope.RopeScaling(*scaling)
    for head_dim, theta in ((2, 1e4), (64, 5e5), (128, 1e6)):
        found, expected = rope.frequencies(head_dim, theta, scaling), reference.frequencies(head_dim, theta, scaling)
        assert found.dtype == torch.float64 and found.shape == (head_dim // 2,)
        # the blend of llama3 has the slope 1 in ω·context/2π / 3, which is at most 64 / 2π / 3 here
        assert (np.abs(found.numpy() / expected - 1) <= 2.0**-53 * 8 * (1 + 64)).all()


def test_frequencies_refuse():
    with pytest.raises(ValueError, match="head_dim is 5, needed an even number"):
        rope.frequencies(5)
    with pytest.raises(ValueError, match=r"rope_type 'yarn' is not known; known are 'linear' and 'llama3'"):
        rope.frequencies(4, 1e4, rope.RopeScaling("yarn", 2.0))


def test_offsets_have_64_bits():
    """The last program of one head of 2³¹ + 192 numbers, and of as many heads."""
    n, d = (1 << 31) // 64 + 3, 64
    cos, sin = torch.randn(2, 1, 3, d // 2)
    for heads, tokens in ((1, n), (n // 3 + 1, 3)):
        x, y = (sparse((1, heads, tokens, d), torch.float16) for _ in range(2))
        c, s = (sparse((1, tokens, d // 2), torch.float32) for _ in range(2))
        c[:, -3:], s[:, -3:] = cos, sin
        last = x[:, -1:, -3:]
        last[:] = torch.randn(last.shape)
        with last_program():
            rope.launch(y, x, c, s, 1.0, "interpreter").run(CPU)
        near = rope.rope(last.clone(), cos, sin, backend="interpreter")
        written = (tokens - 1) % 8 + 1  # tokens of the last program
        assert torch.equal(y[:, -1:, -3:][:, :, -written:], near[:, :, -written:]) and near[:, :, -1].any()


def test_opcheck():
    x, (cos, sin) = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(2, 1, 4, 3)
    torch.library.opcheck(torch.ops.minift.rope.default, (x, cos, sin, 1.0, "interpreter"))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_compiles(target, dtype, d, monkeypatch):
    """For queries as a projection leaves them, (batch, tokens, heads, d): words of 16 bytes, nothing spilled."""
    monkeypatch.setattr(torch.version, "hip", "6.4" if target == "gfx942" else None)
    x = torch.empty(2, 2048, 32, d, dtype=dtype, device="meta").transpose(1, 2)
    angle = torch.empty(1, 2048, d // 2, device="meta")
    found = aot.compile_launch(rope.launch(x, x, angle, angle, 1.0, "triton"), target)
    print(f"turn {target} {dtype} {d}: {found.registers} registers, {found.shared} bytes, {found.spilled} spilled")
    assert found.spilled == 0 and set(found.widths("store")) == {128} and max(found.widths("load")) == 128
