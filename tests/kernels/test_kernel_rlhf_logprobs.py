"""Log-probabilities and entropies in torch and Triton: properties, guards, wrong versions, and texts.

The kernels are those of cross-entropy, and their offsets, compilation and operators are tested beside it.
"""

import contextlib
import functools

import numpy as np
import pytest
import torch
from launches import guarded, version

from minift.conformance import torch_functions
from minift.conformance.operations import logprobs as known
from minift.conformance.operations.logprobs import FIXED, OPERATIONS, Sampled
from minift.nn.weight import Frozen as FrozenArray
from minift.rlhf import logprobs as reference
from minift_kernels import backend
from minift_kernels.nn import losses
from minift_kernels.nn.weight import trainable
from minift_kernels.params import from_numpy
from minift_kernels.rlhf import logprobs
from nn.checks import kill_matrix
from rlhf import small_policy
from wrong_kernels import wrong_losses

GUARDED = known.is_within_its_bound, known.the_entropy_may_be_left_out
BACKENDS = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
QUICK = [Sampled((3,), 37, "rising"), Sampled((2,), 17, "shifted", 2.5), Sampled((2,), 19, "peaked", 1.0)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 logits: a few dozen tokens are several, the last one short."""
    monkeypatch.setattr(backend.load(losses.KERNELS, "interpreter"), "TILES", dict.fromkeys((2, 4, 8), (16, 1)))


@pytest.fixture
def two_rows(monkeypatch):
    monkeypatch.setattr(losses, "ROWS", 2)


def implementation(how, dtype=None):
    return torch_functions.differentiable(functools.partial(logprobs.token_log_probs, backend=how), dtype=dtype)


@pytest.mark.parametrize("how", BACKENDS)
def test_properties(how, small_tiles):
    for case in FIXED:
        if case.dtype in BACKENDS[how]:
            for prop in OPERATIONS[0].properties:
                with guarded() if prop in GUARDED else contextlib.nullcontext():  # watched accesses take their time
                    prop(implementation(how, case.dtype), case)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_kill_matrix(name, small_tiles):
    kernel = getattr(backend.load("wrong_kernels.wrong_losses", "interpreter"), name)
    make = functools.partial(version, implementation("interpreter"), name, kernel)
    properties = known.is_within_its_bound, known.what_cannot_be_has_no_part
    for prop in properties:
        for case in QUICK:
            prop(make("nothing"), case)
    kill_matrix(properties, [make(what) for what in getattr(wrong_losses, f"ENTROPY_{name.upper()}")], QUICK)


def test_a_token_outside_on_a_gpu_is_nan(monkeypatch, small_tiles):
    """Nobody looks at tokens there; −100, which is no token either, is no exception."""
    monkeypatch.setattr(losses, "_checked", lambda labels, vocab: labels.to(torch.int64).contiguous())
    tokens = torch.tensor([-1, 2, -100, 5])
    tokens = torch.where(tokens == reference.IGNORE_INDEX, -1, tokens)
    found = losses.losses_and_entropies(torch.randn(4, 5), tokens, 0.7, "interpreter")
    assert all(torch.equal(x.isnan(), torch.tensor([True, False, True, True])) for x in found)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match=r"^temperature is .*, needed a positive number$"):
        logprobs.token_log_probs(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), temperature)


# --- through the output matrix, and of texts --------------------------------------------------------------------------


def close(found, expected, what=""):
    """Of float64 numbers of size 1: roundings are 1e-16."""
    found = found.detach().numpy()
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    error = np.abs(found - expected).max(initial=0)
    assert error <= 1e-10 * (1 + np.abs(expected).max(initial=0)), f"{what}: off by {error:.2e}"


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_few_rows_at_a_time(rows, two_rows, rng):
    """The reference's values and gradients, of the matrix too; nothing is learned by one that is frozen."""
    x, W = rng.standard_normal((rows, 4)), rng.standard_normal((7, 4))
    tokens, cotangents = rng.integers(0, 7, rows), rng.standard_normal((2, rows))
    pair, vjp = reference.linear_token_log_probs(x, W, tokens, 0.7)
    there, weight = (torch.tensor(a, requires_grad=True) for a in (x, W))
    found = logprobs.linear_token_log_probs(there, weight, torch.tensor(tokens), 0.7)
    gradients = torch.autograd.grad(found, (there, weight), [torch.tensor(d) for d in cotangents])
    for what, ours, theirs in zip(
        ("log p", "H", "dx", "dU"), (*found, *gradients), (*pair, *vjp(*cotangents)), strict=True
    ):
        close(ours, theirs, what)
    (again, _), _ = reference.linear_token_log_probs(x, FrozenArray(W), tokens, 0.7)
    frozen = weight.detach()
    close(logprobs.linear_token_log_probs(there, frozen, torch.tensor(tokens), 0.7)[0], again)


def test_the_logits_never_exist_all_at_once(monkeypatch):
    """Between the passes nothing is kept that is as long as the logits of a few rows."""
    monkeypatch.setattr(losses, "ROWS", 10)
    x, W = torch.randn(60, 3, requires_grad=True), torch.randn(500, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        logprobs.linear_token_log_probs(x, W, torch.randint(0, 500, (60,)))
    assert saved and max(saved) <= W.numel() and sum(n for n in saved if n > 180) <= 6 * W.numel()


@pytest.mark.parametrize("kind", small_policy.KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_sequences_are_the_references(kind, recompute, two_rows, rng):
    """Whole models with adapters, on rows with padding that must not matter."""
    params, batch = small_policy.params(kind), small_policy.batch()
    cotangents = rng.standard_normal((2, *batch.tokens.shape))
    pair, vjp = reference.sequence_log_probs(params, batch, small_policy.CONFIG, temperature=0.7)
    gradients = vjp(*cotangents)
    there = from_numpy(params, dtype=torch.float64)
    for text in (batch, small_policy.other_padding(batch)):
        found = logprobs.sequence_log_probs(there, text, small_policy.CONFIG, temperature=0.7, recompute=recompute)
        for ours, theirs in zip(found, pair, strict=True):
            assert np.abs(ours.detach().numpy() - theirs).max() <= 1e-6 * (1 + np.abs(theirs).max())
            assert not ours[torch.tensor(~reference.counts(batch))].any()
    learned = trainable(there)
    assert learned.keys() == gradients.keys()
    of_model = torch.autograd.grad(found, list(learned.values()), [torch.tensor(d) for d in cotangents])
    for name, dw in zip(learned, of_model, strict=True):  # adapters are kept in float32
        assert np.abs(dw.numpy() - gradients[name]).max() <= 1e-5 * np.abs(gradients[name]).max(), name
