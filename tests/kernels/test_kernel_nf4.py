"""The NF4 kernels: bit for bit the reference's numbers in every backend, and nothing touched that is not theirs."""

import functools
import os
import subprocess
import sys
import textwrap

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from nf4_properties import (
    FLOAT_SCALES,
    FOR_WRONG_VERSIONS,
    NESTED_SCALES,
    OF_A_KERNEL,
    TYPES,
    Case,
    bits,
    equals_the_reference,
    expected,
    parts,
    tensor,
    twin,
)

from minift.quant import nf4 as reference
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.quant import nf4
from minift_kernels.quant.double_quant import DoubleQuantizedScales
from nn.checks import kill_matrix
from wrong_kernels import wrong_nf4

LADDER = range(1, 9)


def kernel(step, tile=(256, 4)):
    return functools.partial(nf4.dequantize_launch, backend="interpreter", step=step, tile=tile)


@pytest.mark.parametrize("prop", OF_A_KERNEL, ids=lambda p: p.__name__)
@pytest.mark.parametrize("step", LADDER)
def test_ladder(step, prop):
    for case in FLOAT_SCALES if prop is equals_the_reference else FLOAT_SCALES[::4]:
        prop(kernel(step), case)


@pytest.mark.parametrize("prop", OF_A_KERNEL, ids=lambda p: p.__name__)
def test_double_quantized(prop):
    for case in NESTED_SCALES if prop is equals_the_reference else NESTED_SCALES[::3]:
        prop(kernel(8), case)


def tiles():
    kernels = backends.load(nf4.KERNELS, "interpreter")
    return [(dtype, tile) for dtype in TYPES for tile in kernels.TILES[TYPES[dtype].itemsize]]


@pytest.mark.parametrize(("dtype", "tile"), tiles())
def test_every_tile(dtype, tile):
    for step in LADDER:
        for block_size in (32, 4096):
            equals_the_reference(kernel(step, tile), Case(tile[0] + 99, block_size, dtype=dtype))
    equals_the_reference(kernel(8, tile), Case(tile[0] + 99, nested=7, dtype=dtype))


def wrong_versions():
    """name -> a maker of launches of the wrong kernel."""
    kernels = backends.load("wrong_kernels.wrong_nf4", "interpreter")

    def launch(out, codes, scales, block_size, nested, *, what):
        right = nf4.dequantize_launch(out, codes, scales, block_size, nested, "interpreter", 8, (256, 4))
        return Launch(kernels.wrong, right.grid, right.arguments, {**right.options, "WRONG": what})

    def named(what):
        version = functools.partial(launch, what=what)
        version.__name__ = what
        return version

    return {what: named(what) for what in ("nothing", *wrong_nf4.WRONG)}


def test_kill_matrix():
    """Every wrong version is rejected; the property that was made for a mistake is the one that sees it."""
    versions = wrong_versions()
    for prop in OF_A_KERNEL:
        for case in FOR_WRONG_VERSIONS:
            prop(versions["nothing"], case)
    killed = kill_matrix(OF_A_KERNEL, [versions[what] for what in wrong_nf4.WRONG], FOR_WRONG_VERSIONS)
    assert ("equals_the_reference", "fused") in killed
    assert ("touches_only_its_own", "twice") in killed
    assert {prop for prop, what in killed if what == "32 bits"} == {"offsets_have_64_bits"}


# The public functions.

BACKENDS = ("torch", "interpreter")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dequantize_is_the_reference(backend):
    for case in FLOAT_SCALES + NESTED_SCALES:
        q = twin(tensor(case))
        found = nf4.dequantize(q, TYPES[case.dtype], backend=backend)
        assert found.dtype == TYPES[case.dtype] and bits(found) == expected(case).tobytes(), case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_is_bitsandbytes(backend, nested, rng):
    """Its codes and statistics in our dataclasses, the weights as it decodes them."""
    w = torch.tensor(rng.standard_normal((50, 70)) * rng.lognormal(0, 1, (50, 1)), dtype=torch.float16)
    packed, state = bnb.quantize_4bit(w, blocksize=32, quant_type="nf4", compress_statistics=nested)
    scales = state.absmax
    if nested:
        scales = DoubleQuantizedScales(scales, state.state2.absmax, state.offset, 256, state.state2.code)
    q = nf4.NF4Tensor(packed.view(-1), scales, (50, 70), 32)
    assert bits(nf4.dequantize(q, w.dtype, backend=backend)) == bits(bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_does_not_matter(backend):
    """Parts that are every second byte of something, or begin in the middle of a word."""
    for case in (Case(257, 32), Case(1000, 32, nested=4)):
        q = twin(tensor(case))
        for spread in (every_second, misaligned):
            scales = parts(q)[0]
            s = scales[0] if not case.nested else type(q.absmax)(*map(spread, (scales[0], scales[1])), scales[3], 4)
            apart = nf4.NF4Tensor(spread(q.codes), s if case.nested else spread(s), q.shape, q.block_size)
            assert not apart.codes.is_contiguous() or apart.codes.data_ptr() % 2
            assert bits(nf4.dequantize(apart, torch.float16, backend=backend)) == expected(case).tobytes()


def every_second(part):
    apart = torch.full((2 * part.numel(),), torch.nan if part.is_floating_point() else 255, dtype=part.dtype)
    apart[::2] = part
    return apart[::2]


def misaligned(part):
    apart = torch.full((part.numel() + 2,), torch.nan if part.is_floating_point() else 255, dtype=part.dtype)
    apart[1:-1] = part
    return apart[1:-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (3, 0), (5, 7), (2, 3, 11)])
def test_shape_comes_back(backend, shape, rng):
    w = rng.standard_normal(shape).astype(np.float32)
    q = nf4.quantize(torch.tensor(w))
    found = nf4.dequantize(q, backend=backend)
    assert q.shape == shape and found.dtype == torch.float32 and found.is_contiguous()
    assert bits(found.reshape(-1)) == reference.dequantize(reference.quantize(w)).tobytes()
    assert tuple(found.shape) == shape


@pytest.mark.parametrize("n", [0, 1, 2, 7, 64])
def test_pack_and_unpack(n, rng):
    codes = rng.integers(0, 16, n).astype(np.uint8)
    packed = nf4.pack(torch.tensor(codes))
    assert bits(packed) == reference.pack(codes).tobytes()
    assert bits(nf4.unpack(packed, n)) == codes.tobytes()


def test_parts_that_do_not_fit_are_refused():
    codes, absmax = torch.full((33,), 0x77, dtype=torch.uint8), torch.ones(2)
    learns = torch.ones(2, requires_grad=True)
    for args, message in [
        ((codes[:-1], absmax, (65,)), r"codes: torch.uint8 \(32,\), needed torch.uint8 \(33,\), two of the 65"),
        ((codes.char(), absmax, (65,)), r"codes: torch.int8 \(33,\), needed torch.uint8"),
        ((codes, absmax[:1], (65,)), r"absmax: torch.float32 \(1,\), needed torch.float32 \(2,\), one for each block"),
        ((codes, absmax, (65,), 48), r"block_size: 48, needed one of 32, "),
        ((codes, absmax.to("meta"), (65,)), r"absmax: on meta, but the codes are on cpu"),
        ((codes, learns, (65,)), r"absmax: requires a gradient, but a quantized weight does not learn"),
    ]:
        with pytest.raises(ValueError, match=message):
            nf4.NF4Tensor(*args)
    q = nf4.NF4Tensor(codes, absmax, (65,))
    with pytest.raises(ValueError, match=r"dtype: torch.int32, needed one of torch.float32, "):
        nf4.dequantize(q, torch.int32)


# Autograd, and the compiler.


@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
def test_linear_has_the_gradient_of_a_constant_matrix(rows):
    generator = torch.Generator().manual_seed(0)
    q = nf4.quantize(torch.randn(7, 10, generator=generator), 32)
    x = torch.randn(*rows, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    y = q.linear(x)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    assert bits(y) == bits(x @ q.dense(torch.float64).T)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert bits(dx) == bits(dy @ q.dense(torch.float64))
    assert torch.autograd.gradcheck(q.linear, x, fast_mode=True)


def test_linear_keeps_the_codes_and_not_the_matrix():
    kept = []
    q = nf4.quantize(torch.ones(64, 64))
    x = torch.ones(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        q.linear(x)
        assert kept == []
        x @ nf4.dequantize(q).T
        assert kept == [(64, 64)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nested", [0, 4])
def test_opcheck(backend, nested):
    q = twin(tensor(Case(1000, 32, nested=nested)))
    scales, nested_block_size = parts(q)
    args = (q.codes, *scales, list(q.shape), 32, nested_block_size, torch.float16, backend)
    torch.library.opcheck(torch.ops.minift.nf4_dequantize.default, args)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(compiler):
    """In a process of its own: here the compiler is off. Both passes of `linear`, both backends, the same bits."""
    program = """
        import sys
        import torch
        from minift_kernels.quant import double_quant, nf4

        generator = torch.Generator().manual_seed(0)
        q = double_quant.compress(nf4.quantize(torch.randn(10, 64, generator=generator), 32), 4)
        s = q.absmax
        for backend in ("torch", "interpreter"):
            def model(x, codes, scale_codes, absmax, offset, code):
                scales = double_quant.DoubleQuantizedScales(scale_codes, absmax, offset, 4, code)
                q = nf4.NF4Tensor(codes, scales, (10, 64), 32)
                return q.linear(x) + 2 * nf4.dequantize(q, backend=backend).sum(0)[:10]

            x = torch.randn(3, 64, generator=generator, requires_grad=True)
            compiled = torch.compile(model, fullgraph=True, backend=sys.argv[1])
            results = [f(x, q.codes, s.codes, s.absmax, s.offset, s.code) for f in (model, compiled)]
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
            assert torch.equal(*results) and torch.equal(*grads)
        print("same bits")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), compiler]
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "same bits\n", done.stderr[-2000:]


def test_numpy_reference_needs_no_torch():
    program = "import sys; sys.modules['torch'] = None; import minift.quant, minift.models, minift.peft, minift.io"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
