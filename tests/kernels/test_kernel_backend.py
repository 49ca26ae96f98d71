"""The three backends: which one is chosen, what is refused, and that both copies of a kernel file live together."""

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from minift_kernels import backend
from minift_kernels.quant import nf4

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_defaults():
    assert backend.choose(None, CPU, torch.bfloat16) == "torch"
    assert backend.choose(None, CUDA, torch.bfloat16) == "triton"
    for name in backend.BACKENDS:
        assert backend.choose(name, CUDA, torch.float16) == name


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("cuda", CPU, torch.float32, "backend: 'cuda', needed one of 'torch', 'triton', 'interpreter' or None"),
        ("triton", CPU, torch.float32, "backend: 'triton' needs CUDA tensors, found cpu: use 'torch' or 'interpreter'"),
        ("interpreter", CPU, torch.bfloat16, "backend: 'interpreter' truncates to bfloat16 instead of rounding"),
    ],
)
def test_refusals(name, device, dtype, message):
    with pytest.raises(ValueError, match=message):
        backend.choose(name, device, dtype)
    q = nf4.quantize(torch.ones(64))
    with pytest.raises(ValueError, match=message):
        nf4.dequantize(q, dtype, backend=name)


def test_bfloat16_on_the_cpu_is_rounded_once_more():
    q = nf4.quantize(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(nf4.dequantize(q, torch.bfloat16), nf4.dequantize(q).to(torch.bfloat16))


def test_one_file_is_loaded_twice():
    compiled, interpreted = (backend.load(nf4.KERNELS, name) for name in ("triton", "interpreter"))
    assert compiled is not interpreted and compiled.__file__ == interpreted.__file__
    for name in ("dequantize_8", "load_scales", "first_of_tile"):
        assert type(getattr(compiled, name)) is JITFunction
        assert type(getattr(interpreted, name)) is InterpretedFunction
    assert backend.load(nf4.KERNELS, "triton") is compiled


def test_tritons_own_functions_are_as_before():
    """`tl.max` is written in Triton: interpreted while an interpreted kernel runs, compiled again afterwards."""
    nf4.quantize(torch.ones(65), backend="interpreter")
    assert type(tl.max) is JITFunction and tl.max is tl.standard.max


def test_an_empty_grid_launches_nothing():
    def never(*arguments, **options):
        raise AssertionError("launched")

    backend.Launch({(0,): never}, (0,), ()).run(CPU)


def test_the_interpreters_bfloat16_still_truncates():
    """If this fails, Triton has been repaired: lift the refusal in `backend.choose`."""
    q = nf4.quantize(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    out = torch.empty(1000, dtype=torch.bfloat16)
    scales = (q.absmax, None, None, None)
    nf4.dequantize_launch(out, q.codes, scales, 64, 0, "interpreter").run(CPU)
    assert not torch.equal(out, nf4.dequantize(q, torch.bfloat16))
