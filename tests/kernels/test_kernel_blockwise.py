"""Block-wise quantization in torch and Triton: the reference's codes, scales and numbers, bit for bit."""

import dataclasses
import functools

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from interpreter_memory import Watched, watch
from launches import guarded, replaced

from minift.conformance.common import same_bits
from minift.conformance.strategies import battery
from minift.quant import blockwise as reference
from minift.quant import codebooks as reference_codebooks
from minift.quant import nf4
from minift_kernels import aot, backend
from minift_kernels.quant import blockwise, codebooks
from nn.checks import kill_matrix
from quant.quant_checks import refused
from wrong_kernels import wrong_blockwise

BACKENDS = ("torch", "interpreter")
CPU = torch.device("cpu")
SMALL_TILE = 256  # in tests: a longer block is taken in pieces


def trouble(code, block_size, *names):
    """Cases of the battery for a codebook, all of them or those with these names."""
    every = {name: (x, code, b) for name, x, b in battery(reference.midpoints(code), (block_size,))}
    return [every[name if name in every else f"{name}, {block_size}"] for name in names] if names else [*every.values()]


ALL, SHORT, GROWING = "all kinds", "all kinds and a short block", "growing"
LONG = [(x[:1500], code, block_size) for x, code, block_size in trouble(codebooks.DYNAMIC, 600, ALL, SHORT, GROWING)]
CASES = [
    *trouble(codebooks.DYNAMIC, 32),
    *trouble(codebooks.INT8, 96),
    *trouble(codebooks.FP4, 64, ALL, SHORT),
    *trouble(nf4.CODE, 128, ALL, SHORT, "reciprocal"),
    *LONG,
]


@pytest.fixture
def small_tiles(monkeypatch):
    kernels = backend.load(blockwise.KERNELS, "interpreter")
    monkeypatch.setattr(kernels, "QUANTIZE_TILE", (SMALL_TILE, 4))
    monkeypatch.setattr(kernels, "DEQUANTIZE_TILES", dict.fromkeys((2, 4, 8), (SMALL_TILE, 4)))


class OfArrays:
    """The twin as functions of NumPy arrays; what is wrong with one of its kernels, for the kill matrix."""

    def __init__(self, how, kernel="none", what="nothing"):
        self.how, self.kernel, self.what, self.__name__ = how, kernel, what, what

    def running(self):
        kernels = backend.load("wrong_kernels.wrong_blockwise", "interpreter")
        return replaced(self.kernel, getattr(kernels, self.kernel, None), WRONG=self.what)

    def quantize(self, x, code, block_size):
        with guarded(), self.running():
            q = blockwise.quantize(torch.tensor(x), torch.tensor(code), block_size, backend=self.how)
        return reference.BlockwiseTensor(q.codes.numpy(), q.absmax.numpy(), code, q.shape, q.block_size)

    def dequantize(self, q, dtype=np.float32):
        tensors = (torch.tensor(part) for part in (q.codes, q.absmax, q.code))
        with guarded(), self.running():
            q = blockwise.BlockwiseTensor(*tensors, q.shape, q.block_size)
            return blockwise.dequantize(q, getattr(torch, np.dtype(dtype).name), backend=self.how).numpy()


def equals_the_reference(impl, x, code, block_size):
    q, wanted = impl.quantize(x, code, block_size), reference.quantize(x, code, block_size)
    same_bits(q.codes, wanted.codes, "codes")
    same_bits(q.absmax, wanted.absmax, "absmax")
    for dtype in (np.float32, np.float16, np.float64):
        with np.errstate(over="ignore", under="ignore"):
            same_bits(impl.dequantize(q, dtype), reference.dequantize(wanted, dtype), dtype.__name__)


def refuses_what_is_not_finite(impl, x, code, block_size):
    for bad in (np.nan, np.inf) if x.size else ():
        broken = np.array(x, np.float32)
        broken.reshape(-1)[x.size // 2] = bad
        refused(lambda b=broken: impl.quantize(b, code, block_size), f"cannot quantize {bad} at index (")


def decodes_whatever_it_is_given(impl, x, code, block_size):
    """Every byte, also those that are not in the codebook and mean its last entry; negative scales."""
    rng = np.random.default_rng(x.size)
    codes = rng.permutation(np.resize(np.arange(256), x.size)).astype(np.uint8)
    absmax = (rng.standard_normal(-(-x.size // block_size)) * 1e-3).astype(np.float32)
    q = reference.BlockwiseTensor(np.zeros_like(codes), absmax, code, (x.size,), block_size)
    object.__setattr__(q, "codes", codes)
    product = code[np.minimum(codes, code.size - 1)] * np.repeat(absmax, block_size)[: x.size]
    for dtype in (np.float32, np.float16):
        same_bits(impl.dequantize(q, dtype), product.astype(dtype), dtype.__name__)


FAR = 1 << 33  # elements


def quantizes_beyond_32_bits(impl, x, code, block_size):
    """Where offsets do not fit into 32 bits (`interpreter_memory`), the codes and scales are the same."""
    flat, code = torch.tensor(x, dtype=torch.float32).reshape(-1), torch.tensor(code)
    expected = blockwise._encode(flat, code, block_size, "torch")
    outputs = [torch.zeros_like(part) for part in expected]
    launch = blockwise.quantize_launch(*outputs, flat, code, block_size, "interpreter")
    thresholds, n = launch.arguments[3:5]
    rows = max(launch.options["TILE"] // backend.power_of_two(block_size), 1)  # blocks of a program
    programs = FAR // (rows * block_size)  # that are skipped
    blocks, skipped = programs * rows, programs * rows * block_size
    far = [Watched(t, k * t.element_size(), write=True) for t, k in zip(outputs, (skipped, blocks), strict=True)]
    arguments = (*launch.arguments[:4], n + skipped, *launch.arguments[5:])
    with impl.running(), watch([*far, Watched(flat, 4 * skipped), Watched(thresholds)], programs):
        dataclasses.replace(launch, arguments=arguments).run(CPU)
    assert all(map(torch.equal, outputs, expected)), "other codes or scales behind 2³³ numbers"


def decodes_beyond_32_bits(impl, x, code, block_size):
    code, blocks = torch.tensor(code), FAR // block_size
    codes, absmax = blockwise._encode(torch.tensor(x, dtype=torch.float32).reshape(-1), code, block_size, "torch")
    expected = blockwise._decode(codes, absmax, code, [len(codes)], block_size, torch.float16, "torch")
    out = torch.zeros_like(expected)
    launch = blockwise.dequantize_launch(out, codes, absmax, code, block_size, "interpreter")
    arguments = (*launch.arguments[:4], FAR + len(codes), *launch.arguments[5:])
    far = [Watched(out, 2 * FAR, write=True), Watched(codes, FAR), Watched(absmax, 4 * blocks), Watched(code)]
    with impl.running(), watch(far, FAR // launch.options["TILE"]):
        dataclasses.replace(launch, arguments=arguments).run(CPU)
    assert torch.equal(out, expected), "other numbers behind 2³³"


def of_a_case(prop):
    return functools.wraps(prop)(lambda impl, case: prop(impl, *case))


OURS = [equals_the_reference, refuses_what_is_not_finite, decodes_whatever_it_is_given]
PROPERTIES = [of_a_case(prop) for prop in OURS]
FAR_QUANTIZE, FAR_DEQUANTIZE = of_a_case(quantizes_beyond_32_bits), of_a_case(decodes_beyond_32_bits)


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.__name__)
def test_properties(prop, how, small_tiles):
    for case in CASES[:: 1 if prop.__name__ == "equals_the_reference" else 6]:
        prop(OfArrays(how), case)


def test_the_tiles_that_are_launched(rng):
    for block_size in (1, 7, 64, 4096, 5000):
        x = rng.standard_normal(9001).astype(np.float32)
        equals_the_reference(OfArrays("interpreter"), x, codebooks.DYNAMIC, block_size)
        equals_the_reference(OfArrays("interpreter"), x[:100], np.float32([-1, 1]), block_size)


def test_kill_matrix_of_quantize(small_tiles):
    cases = [
        *trouble(codebooks.DYNAMIC, 32, SHORT),
        *trouble(nf4.CODE, 32, "reciprocal"),
        *trouble(nf4.CODE, 96, GROWING),
    ]
    everything = [*PROPERTIES[:2], *PROPERTIES[3:], FAR_QUANTIZE]
    killed = kills("quantize", everything, wrong_blockwise.QUANTIZE, cases)
    assert {prop for prop, what in killed if what == "32 bits"} == {"quantizes_beyond_32_bits"}
    assert ("refuses_what_is_not_finite", "NaN dropped") in killed


def test_kill_matrix_of_long_blocks(small_tiles):
    kills("quantize_long", [*PROPERTIES[:2], FAR_QUANTIZE], wrong_blockwise.LONG, LONG[2:])


def test_kill_matrix_of_dequantize(small_tiles):
    cases = [*trouble(codebooks.DYNAMIC, 32, SHORT), (np.ones(300), codebooks.FP4, 96)]
    killed = kills("dequantize", [PROPERTIES[0], PROPERTIES[2], FAR_DEQUANTIZE], wrong_blockwise.DEQUANTIZE, cases)
    assert {prop for prop, what in killed if what == "32 bits"} == {"decodes_beyond_32_bits"}


def kills(kernel, props, versions, cases):
    for prop in props:
        for case in cases:
            prop(OfArrays("interpreter", kernel), case)
    return kill_matrix(props, [OfArrays("interpreter", kernel, what) for what in versions], cases)


# The public functions.


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 7)])
def test_any_shape_and_layout(how, shape, rng):
    x = torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
    code = codebooks.on_device(codebooks.DYNAMIC, "cpu")
    expected = reference.quantize(x.numpy(), codebooks.DYNAMIC, 4)
    apart = torch.full((*shape, 2), torch.nan)
    apart[..., 0] = x
    for view in (x, apart[..., 0], x.T.contiguous().T if x.dim() == 2 else x):
        q = blockwise.quantize(view, code, 4, backend=how)
        assert q.shape == shape and q.codes.numpy().tobytes() == expected.codes.tobytes()
        found = blockwise.dequantize(q, torch.float16, backend=how)
        assert tuple(found.shape) == shape and found.numpy().tobytes() == reference.dequantize(expected, "f2").tobytes()
    assert q.nbytes == expected.nbytes and repr(q) == repr(expected)


@pytest.mark.parametrize("how", BACKENDS)
def test_parts_that_begin_in_the_middle_of_a_word(how, rng):
    x = torch.tensor(rng.standard_normal(1000), dtype=torch.float16)
    q = blockwise.quantize(x, codebooks.on_device(codebooks.INT8, "cpu"), 64)
    apart = [torch.cat([part[:1], part])[1:] for part in (q.codes, q.absmax, q.code)]
    misaligned = blockwise.BlockwiseTensor(*apart, q.shape, 64)
    assert torch.equal(blockwise.dequantize(misaligned, backend=how), blockwise.dequantize(q))
    again = blockwise.quantize(torch.cat([x[:1], x])[1:], apart[2], 64, backend=how)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.absmax, q.absmax)


@pytest.mark.parametrize("how", BACKENDS)
def test_round_trip_error(how, rng):
    x = rng.standard_normal((16, 100)).astype(np.float32)
    found = blockwise.round_trip_error(torch.tensor(x), torch.tensor(nf4.CODE), 64, backend=how)
    assert abs(found - reference.round_trip_error(x, nf4.CODE, 64)) < 1e-12


def test_decodes_as_bitsandbytes(rng):
    x = torch.tensor(rng.standard_normal((64, 300)), dtype=torch.float32)
    theirs, state = bnb.quantize_blockwise(x, blocksize=256)
    q = blockwise.BlockwiseTensor(theirs.reshape(-1), state.absmax, state.code, (64, 300), 256)
    for how in BACKENDS:
        assert torch.equal(blockwise.dequantize(q, backend=how), bnb.dequantize_blockwise(theirs, state))


def test_fp4_codes():
    ranks = np.arange(15, dtype=np.uint8).reshape(3, 5)
    found = codebooks.fp4_codes(torch.tensor(ranks))
    assert found.dtype == torch.uint8 and found.numpy().tobytes() == reference_codebooks.fp4_codes(ranks).tobytes()
    assert codebooks.FP4_BY_CODE[found.numpy()].reshape(-1).tolist() == codebooks.FP4.tolist()


def test_what_does_not_fit_is_refused():
    codes, absmax, code = torch.zeros(65, dtype=torch.uint8), torch.ones(2), torch.tensor(codebooks.INT4)
    for args, message in [
        ((codes[1:], absmax, code, (65,), 64), r"codes: torch.uint8 \(64,\), needed torch.uint8 \(65,\), one for each"),
        ((codes, absmax[1:], code, (65,), 64), r"absmax: torch.float32 \(1,\), needed torch.float32 \(2,\), one for"),
        ((codes, absmax, code[:1], (65,), 64), r"code: torch.float32 \(1,\), needed a float32 vector of 2 to 256 ent"),
        ((codes, absmax, code.double(), (65,), 64), "code: torch.float64"),
        ((codes, absmax, code, (65,), 0), "block_size: 0, needed a positive integer"),
        ((codes, absmax, code.to("meta"), (65,), 64), "code: on meta, but the codes are on cpu"),
        ((codes, absmax.clone().requires_grad_(), code, (65,), 64), "absmax: requires a gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            blockwise.BlockwiseTensor(*args)
    x = torch.ones(3)
    with pytest.raises(ValueError, match="strictly increasing"):
        blockwise.quantize(x, code.flip(0))
    with pytest.raises(ValueError, match="block_size: 0, needed a positive"):
        blockwise.quantize(x, code, 0)
    with pytest.raises(ValueError, match=r"dtype: torch.int8, needed one of torch.float32, "):
        blockwise.dequantize(blockwise.quantize(x, code), torch.int8)


@pytest.mark.parametrize("how", BACKENDS)
def test_opcheck(how):
    x, code = torch.randn(300), torch.tensor(codebooks.DYNAMIC)
    torch.library.opcheck(torch.ops.minift.blockwise_quantize.default, (x, code, 64, how))
    codes, absmax = blockwise._quantize(x, code, 64, how)
    args = codes, absmax, code, [3, 100], 64, torch.float16, how
    torch.library.opcheck(torch.ops.minift.blockwise_dequantize.default, args)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_compiles(target, dtype):
    """In words of 16 bytes, with nothing spilled, the quotient exact; decoding takes no detour."""
    empty, n, block_size = functools.partial(torch.empty, device="meta"), 4096 * 4096, 256
    codes, absmax, code, x = empty(n, dtype=torch.uint8), empty(n // block_size), empty(256), empty(n, dtype=dtype)
    quantize = blockwise.quantize_launch(codes, absmax, x, code, block_size, "triton")
    dequantize = blockwise.dequantize_launch(x, codes, absmax, code, block_size, "triton")
    found = [aot.compile_launch(launch, target) for launch in (quantize, dequantize)]
    for name, compiled in zip(("quantize", "dequantize"), found, strict=True):
        print(f"{name} {target} {dtype}: {compiled.registers} registers, {compiled.spilled} spilled")
        assert compiled.spilled == 0 and compiled.registers <= 64
        assert not compiled.count(r"fma\.|mad\.\S*f32")
    stores = [c.widths("store") for c in found]
    assert max(found[0].widths("load")) == 128 and max(stores[0]) == 128, "16 numbers a load, 16 codes a store"
    assert set(stores[1]) == {128} and found[1].shared == 0
    if target != "gfx942":
        assert found[0].count(r"div\.rn\.f32") == found[0].count(r"div\.\S*f32") > 0
        assert ".ftz" not in found[0].assembly
    long = blockwise.quantize_launch(codes, empty(n // 8192), x, code, 8192, "triton")
    assert aot.compile_launch(long, target).spilled == 0
