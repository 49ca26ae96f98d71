"""LoRA in torch and Triton: the properties, also over NF4, guards, wrong versions, what is kept, compilation."""

import functools

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations import lora as operation
from minift.conformance.operations.lora import FIXED, KEY, PROPERTIES, Layer
from minift.peft import lora as reference
from minift_kernels import aot, backend
from minift_kernels.params import from_numpy, to_numpy
from minift_kernels.peft import lora
from minift_kernels.quant import double_quant, nf4
from nn.checks import kill_matrix
from wrong_kernels import wrong_lora

BACKENDS = {"torch": ("float32", "float64", "float16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [
    Layer((5,), 9, 6, 3, 0.25),
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
        for case in FIXED:
            if case.dtype in BACKENDS[how]:
                prop(implementation(how), case)


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_over_nf4(how, dtype, few_programs):
    """QLoRA is the same function."""
    case = Layer((3, 7), 40, 9, 5, 0.25, "signs", dtype)
    for prop in PROPERTIES[:2]:
        prop(over_nf4(how, nested=False), case)


@pytest.mark.parametrize("name", ["down", "up", "outer"])
def test_kill_matrix(name, few_programs):
    kernels = backend.load("wrong_kernels.wrong_lora", "interpreter")
    make = functools.partial(version, implementation("interpreter"), name, getattr(kernels, name))
    properties = PROPERTIES[:3] if name == "down" else PROPERTIES[:1]
    for prop in properties:
        for case in QUICK:
            prop(make("nothing"), case)
    wrong = [make(what) for what in getattr(wrong_lora, name.upper())]
    kill_matrix(PROPERTIES[:1], wrong, QUICK)
