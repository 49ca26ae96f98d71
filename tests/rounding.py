"""How close two computations of a deep network must be.

A product of K terms that is computed in any order is the exact product with weights changed by at most γ_K, in all
likelihood by √K u (Higham & Mary 2019). So the error of the whole computation is what a change of the weights by √K u
does to the exact result, which is measured in float64: a bound from the model's conditioning and its widths alone,
before any two results are compared.
"""

import numpy as np

from minift.conformance.bounds import unit_roundoff
from minift.models import llama
from minift.nn.weight import dense

BFLOAT16 = 2.0**-8  # u of a format with 8 bits


def rounding_bound(params, config, tokens, seed=0, u=None):
    """What weights changed by √K u, K the longest sum of the model, do to the logits; and the exact logits.

    u is float32's unless it is given."""
    return bound_of(lambda p: llama.forward(p, tokens, config, recompute=True)[0], params, config, seed, u)


def bound_of(outputs, params, config, seed=0, u=None):
    """The same of any `outputs(params) -> array`, such as the scores of a reward model."""
    rng = np.random.default_rng(seed)
    exact_params = {name: dense(w).astype(np.float64) for name, w in params.items()}
    exact = outputs(exact_params)
    longest = max(config.intermediate_size, config.hidden_size)
    size = np.sqrt(longest) * (unit_roundoff(np.float32) if u is None else u)
    for weight in exact_params.values():  # in place: a real model takes a gigabyte
        weight *= 1 + size * rng.choice(np.array([-1, 1], np.int8), weight.shape)
    return np.abs(outputs(exact_params) - exact).max(), exact
