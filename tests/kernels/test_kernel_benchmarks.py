"""The benchmark scripts, as far as they go without a GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from minift_kernels.modules import QLoRALinear
from minift_kernels.quant import double_quant, nf4

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmark")
@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "compiled"))
def test_without_a_gpu_nothing_is_timed(name):
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        script(name).Benchmark().run()


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_is_given_the_same_tensor(nested):
    """What it would decode on a GPU, decoded on the CPU (which cannot write to a given output)."""
    benchmark = script("nf4")
    q = nf4.quantize(torch.randn(64, 200, generator=torch.Generator().manual_seed(0)))
    q = benchmark._copy(double_quant.compress(q) if nested else q)
    call = benchmark._bitsandbytes(q, torch.empty(q.shape, dtype=torch.float16))
    found = call.func(*call.args)
    assert torch.equal(found, nf4.dequantize(q, torch.float16))


def test_peft_is_given_the_same_layer():
    """Its result is ours, up to the roundings of 16 bits."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64, bias=False)
    ours = QLoRALinear.from_linear(linear, 4, 8)
    torch.nn.init.normal_(ours.lora_B.weight)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    theirs = script("lora").peft_layer(linear, ours, 0.0)
    torch.testing.assert_close(theirs(x).to(x.dtype), ours(x), rtol=2**-6, atol=2**-4)


def test_compiled_says_what_a_step_becomes():
    report = script("compiled").Report()
    row = report.row(8, "sm_90", torch.float16, nested=256)
    assert row[0] == "dequantize_8, double-quantized" and row[3:5] == ["0", "0"] and row[-1] == "128"
