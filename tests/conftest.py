"""Shapes in signatures are checked at run time while the tests run."""

import os
import sys
import zlib

# One order of summation, so that bitwise tests mean something; and the first parallel call of torch in a process can
# be off by 1e-3 (seen with 2.13.0 on two cores), which no oracle should be.
for library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes compiles on the CPU, for many seconds
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping

import typechecker

NUMERIC = ["minift.nn", "minift.models", "minift.quant", "minift.peft", "minift.optim", "minift.rlhf"]
NUMERIC += ["minift.data.batches"]
NUMERIC += ["minift_kernels.quant", "minift_kernels.nn", "minift_kernels.peft", "minift_kernels.optim"]
NUMERIC += ["minift_kernels.rlhf"]
_hook = jaxtyping.install_import_hook(NUMERIC, f"{typechecker.__name__}.check")
_hook.__enter__()

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def torch_draws_the_same_every_time(request):
    """A seed of its own for every test, where torch is there at all."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def rng(request):
    """A generator of its own for every test, the same one every time."""
    return np.random.default_rng([len(request.node.name), *request.node.name.encode()])
