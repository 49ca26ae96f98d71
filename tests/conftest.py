"""Shapes in signatures are checked at run time while the tests run."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one BLAS order, so that bitwise tests mean something

import jaxtyping

_hook = jaxtyping.install_import_hook("minift", "typechecker.check")
_hook.__enter__()

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def rng(request):
    """A generator of its own for every test, the same one every time."""
    return np.random.default_rng([len(request.node.name), *request.node.name.encode()])
