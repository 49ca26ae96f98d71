"""Attention in torch and Triton: the properties, guards around every launch, wrong versions, lists of tiles, the cache."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import torch
from launches import guarded, last_program, replaced, sparse

from minift.conformance import torch_functions
from minift.conformance.operations import attention as laws
from minift.conformance.operations.attention import FIXED, OPERATIONS, PROPERTIES, Heads
from minift.nn import attention as reference
from minift_kernels import aot, backend
from minift_kernels.nn import attention
from nn.checks import kill_matrix
from wrong_kernels import wrong_attention

BACKENDS = {"torch": ("float32", "float64", "float16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [Heads(1, 4, 2, 18, 34, 17, "causal", "float32", 11), Heads(2, 4, 2, 5, 5, 3, "some see nothing", "float16", 1)]
ON_GUARD = (laws.is_within_its_bound, laws.any_layout)
KERNELS = ("forward", "backward_q", "backward_kv")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 × 16, so that few tokens have several of them."""
    kernels = backend.load(attention.KERNELS, "interpreter")
    for size in kernels.CONFIGURATIONS:
        monkeypatch.setitem(kernels.CONFIGURATIONS, size, {name: (16, 16, 128, 1) for name in KERNELS})


def implementation(how):
    return torch_functions.differentiable(functools.partial(attention.attention, backend=how))


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("how", BACKENDS)
def test_properties(prop, how, small_tiles):
    for case in FIXED:
        if case.dtype not in BACKENDS[how]:
            continue
        if how == "interpreter" and prop is laws.any_layout and case.tokens * case.keys > 50:
            continue  # four layouts under guard: a second for every tile
        with guarded() if how == "interpreter" and prop in ON_GUARD else contextlib.nullcontext():
            prop(implementation(how), case)


def wrong(name, what, watched=False):
    """Attention with the kernel of this name replaced by one with WRONG = what, in both passes."""
    kernels = backend.load("wrong_kernels.wrong_attention", "interpreter")
    f = implementation("interpreter")

    @contextlib.contextmanager
    def instead():
        with guarded() if watched else contextlib.nullcontext(), replaced(name, getattr(kernels, name), WRONG=what):
            yield

    def changed(*args):
        with instead():
            y, vjp = f(*args)

        def changed_vjp(dy):
            with instead():
                return vjp(dy)

        return y, changed_vjp

    changed.__name__ = what
    return changed


KILLERS = {
    "forward": (laws.is_within_its_bound, laws.what_sees_nothing_gets_nothing, laws.large_scores_do_not_overflow),
    "backward_q": (laws.is_within_its_bound,),
    "backward_kv": (laws.is_within_its_bound,),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kill_matrix(name, small_tiles):
    for case in QUICK:
        laws.is_within_its_bound(wrong(name, "nothing", watched=True), case)
        for prop in KILLERS[name]:
            prop(wrong(name, "nothing"), case)
    kill_matrix(KILLERS[name], [wrong(name, what) for what in getattr(wrong_attention, name.upper())], QUICK)
