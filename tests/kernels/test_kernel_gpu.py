"""What only a GPU can show: compiled kernels in bfloat16 too, races, and accesses that its own tools watch.

    make gpu

runs these tests. The interpreter runs one program after the other, so a race between programs shows here only.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from launches import repeated

from minift.conformance import implementations, operations
from minift.conformance.run import hold
from minift_kernels.quant import int8_vectorwise as int8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: there are no races on a CPU")

REPEATS = 200
COMPILED = implementations.find("triton")
SANITIZER = shutil.which("compute-sanitizer")


def held(operation, implementation, examples):
    for prop in operation.properties:
        result = hold(implementation, operation, prop, examples, 30.0)
        assert result.passed is not False, result.counterexample


@pytest.mark.parametrize("implementation", COMPILED, ids=lambda i: i.name)
@pytest.mark.parametrize("operation", operations.every().values(), ids=lambda o: o.name)
def test_every_property(operation, implementation):
    held(operation, implementation, examples=50)


@pytest.mark.parametrize("implementation", COMPILED, ids=lambda i: i.name)
@pytest.mark.parametrize("operation", operations.every().values(), ids=lambda o: o.name)
def test_the_same_bits_two_hundred_times(operation, implementation):
    """Every launch of the fixed cases."""
    with repeated(REPEATS):
        held(operation, implementation, examples=0)


@pytest.mark.parametrize("n,d,out", [(1, 1, 1), (17, 8, 8), (16, 1041, 3), (40, 2100, 9), (0, 5, 2)])
def test_sums_of_8_bit_products_are_exact(n, d, out):
    """The library's product, of shapes that it takes and of shapes that are filled up; and what is made of it."""
    draw = torch.Generator().manual_seed(0)
    q, p = (torch.randint(-127, 128, (rows, d), dtype=torch.int8, generator=draw) for rows in (n, out))
    assert torch.equal(int8.integer_product_2(q.cuda(), p.cuda()).cpu(), int8.integer_product_2(q, p))
    x, w = torch.randn(n, d, generator=draw), int8.quantize(torch.randn(out, d, generator=draw))
    there = int8.Int8Tensor(w.codes.cuda(), w.absmax.cuda())
    assert torch.equal(int8.forward(x.cuda(), there, 0.0).cpu(), int8.forward(x, w, 0.0))
    assert torch.equal(there.dense().cpu(), w.dense())


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not here: it comes with the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool):
    """The whole suite on its fixed cases, in a process whose memory PyTorch does not cache: that would hide accesses
    from one tensor into the next."""
    suite = [sys.executable, "-m", "minift", "conformance", "--impl", "triton", "--examples", "0", "--seconds", "900"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, f"--tool={tool}", "--error-exitcode=9", *suite]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
