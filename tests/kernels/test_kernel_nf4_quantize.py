"""Quantizing to NF4 in torch and in the kernel: the reference's codes and scales, bit for bit."""

import functools

import numpy as np
import pytest
import torch
from interpreter_memory import Watched, watch
from nf4_properties import CPU, bits

from minift.conformance.operations.nf4 import THRESHOLDS
from minift.conformance.strategies import battery
from minift.quant import nf4 as reference
from minift_kernels import aot, backend
from minift_kernels.backend import Launch
from minift_kernels.quant import nf4
from nn.checks import kill_matrix
from wrong_kernels import wrong_nf4_quantize

BACKENDS = ("torch", "interpreter")
CASES = battery(THRESHOLDS, (32, 64, 256, 4096))


def in_the_kernel(launch, w, block_size):
    """(codes, absmax) of a launch maker, with every access watched; both outputs are poisoned first."""
    flat = torch.tensor(w).reshape(-1)
    codes = torch.full(((w.size + 1) // 2,), 0xEE, dtype=torch.uint8)
    absmax = torch.full((-(-w.size // block_size),), torch.nan)
    places = [Watched(codes, write=True), Watched(absmax, write=True)]
    with watch([*places, Watched(flat)]):
        launch(codes, absmax, flat, block_size, "interpreter").run(CPU)
    for place, name in zip(places, ("codes", "absmax"), strict=True):
        assert len(place.touched) == place.tensor.numel(), f"{name}: not all of them were stored"
    return codes, absmax


def equals_the_reference(launch, case):
    name, w, block_size = case
    codes, absmax = in_the_kernel(launch, w, block_size)
    q = reference.quantize(w, block_size)
    assert bits(absmax) == q.absmax.tobytes(), f"absmax of {name}"
    assert bits(codes) == q.codes.tobytes(), f"codes of {name}"


def says_where_a_nan_is(launch, case):
    """The scale of its block is NaN, so that the caller can refuse; the others are as they were."""
    _, w, block_size = case
    if w.size <= block_size:
        return
    w = w.reshape(-1).copy()
    w[block_size] = np.nan
    _, absmax = in_the_kernel(launch, w, block_size)
    assert np.flatnonzero(np.isnan(absmax.numpy())).tolist() == [1]


PROPERTIES = [equals_the_reference, says_where_a_nan_is]


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.__name__)
def test_kernel(prop):
    for case in CASES:
        prop(nf4.quantize_launch, case)


def test_kill_matrix():
    kernels = backend.load("wrong_kernels.wrong_nf4_quantize", "interpreter")

    def launch(codes, absmax, w, block_size, how, *, what):
        right = nf4.quantize_launch(codes, absmax, w, block_size, how)
        return Launch(kernels.quantize, right.grid, right.arguments, {**right.options, "WRONG": what})

    def version(what):
        wrong = functools.partial(launch, what=what)
        wrong.__name__ = what
        return wrong

    kinds = ("all kinds and a short block, 64", "reciprocal", "65 elements, 64", "growing, 32")
    cases = [case for case in CASES if case[0] in kinds]
    assert len(cases) == len(kinds)
    for prop in PROPERTIES:
        for case in cases:
            prop(version("nothing"), case)
    kill_matrix(PROPERTIES, [version(what) for what in wrong_nf4_quantize.WRONG], cases)


@pytest.mark.parametrize("how", BACKENDS)
def test_quantize_is_the_reference(how):
    for name, w, block_size in CASES:
        found = nf4.quantize(torch.tensor(w), block_size, backend=how)
        wanted = reference.quantize(w, block_size)
        assert bits(found.codes) == wanted.codes.tobytes(), name
        assert bits(found.absmax) == wanted.absmax.tobytes(), name
        assert found.shape == wanted.shape and found.block_size == wanted.block_size


@pytest.mark.parametrize("how", BACKENDS)
def test_any_layout_and_nothing_that_is_not_finite(how, rng):
    w = torch.tensor(rng.standard_normal((64, 33)), dtype=torch.float32)
    assert bits(nf4.quantize(w.T, backend=how).codes) == bits(nf4.quantize(w.T.contiguous(), backend=how).codes)
    for bad in (torch.inf, -torch.inf, torch.nan):
        w[3, 4] = bad
        with pytest.raises(ValueError, match=rf"cannot quantize {bad} at index \(3, 4\) \(1 of 2,112 elements"):
            nf4.quantize(w, backend=how)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_compiles_with_the_reciprocal_rounded_correctly(target, dtype):
    n = 4096 * 4096
    codes, absmax = torch.empty(n // 2, dtype=torch.uint8, device="meta"), torch.empty(n // 64, device="meta")
    launch = nf4.quantize_launch(codes, absmax, torch.empty(n, dtype=dtype, device="meta"), 64, "triton")
    found = aot.compile_launch(launch, target)
    assert set(found.widths("load")) == {128} and found.spilled == 0
    if target == "gfx942":
        assert found.count("v_div_fixup_f32"), "the last step of a correctly rounded division"
    else:
        assert found.count(r"div\.rn\.f32") == found.count(r"div\.") > 0
        assert ".ftz" not in found.assembly and not found.count("fma")
