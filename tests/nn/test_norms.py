"""RMSNorm and LayerNorm: gradients, laws, and wrong versions that must be rejected."""

import numpy as np
import pytest

from minift.conformance.gradients import check_vjp
from minift.nn.norms import layer_norm, rms_norm
from minift.nn.weight import Frozen


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 7), (1, 1)])
def test_rms_norm_gradient(shape, rng):
    check_vjp(rms_norm, rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng=rng)
