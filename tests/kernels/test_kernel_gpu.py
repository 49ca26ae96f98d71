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
