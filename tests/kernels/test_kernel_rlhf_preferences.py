"""The pairwise loss and DPO's in torch and Triton: properties, guards, wrong versions, compilation; whole models."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations import dpo as known_dpo
from minift.conformance.operations import reward_model as known_pairs
from minift.conformance.operations.dpo import Preferred
from minift.conformance.operations.reward_model import Compared
from minift.models.classifier import SCORE
from minift.rlhf import dpo as dpo_reference
from minift.rlhf import reward_model as reference
from minift.rlhf.pairs import Pairs
from minift_kernels import aot, backend
from minift_kernels.nn.weight import trainable
from minift_kernels.params import from_numpy
from minift_kernels.rlhf import dpo, reward_model
from nn.checks import kill_matrix
from rlhf import small_policy
from wrong_kernels import wrong_reward_kernels

BACKENDS = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
OPERATIONS = {
    "pairwise": (known_pairs, reward_model.pairwise_loss),
    "preference": (known_dpo, dpo.preference_loss),
}
QUICK = {
    "pairwise": [Compared(19, "decided", True, 3.0), Compared(5, "hopeless", True, 4.0), Compared(5)],
    "preference": [
        Preferred(19, "decided", 0.3, 0.0, normalizer=3.0),
        Preferred(5, "hopeless", 0.5, 0.2, normalizer=4.0),
        Preferred(5, seed=1),
    ],
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 pairs, so that there are several, the last one short."""
    monkeypatch.setattr(backend.load(reward_model.KERNELS, "interpreter"), "TILE", (16, 1))


def implementation(name, how, dtype=None):
    loss = torch_functions.differentiable(functools.partial(OPERATIONS[name][1], backend=how), dtype=dtype)

    def f(*args):
        y, vjp = loss(*args)

        def what_learns(dloss):
            gradients = vjp(dloss)
            assert all(g is None for g in gradients[2:]), "what is fixed has a gradient"
            return gradients[:2]

        return y, what_learns

    return f


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_properties(name, how, small_tiles):
    known, _ = OPERATIONS[name]
    for case in known.FIXED:
        if case.dtype in BACKENDS[how]:
            for prop in known.OPERATIONS[0].properties:
                with guarded() if prop is known.is_within_its_bound else contextlib.nullcontext():
                    prop(implementation(name, how, "bfloat16" if case.dtype == "bfloat16" else None), case)


@pytest.mark.parametrize("pairs", [255, 256, 257])
def test_the_tile_that_ships(pairs):
    with guarded():
        known_pairs.is_within_its_bound(implementation("pairwise", "interpreter"), Compared(pairs, margin=True))
        known_dpo.is_within_its_bound(
            implementation("preference", "interpreter"), Preferred(pairs, label_smoothing=0.1)
        )


@pytest.mark.parametrize("name", OPERATIONS)
def test_kill_matrix(name, small_tiles):
    known, _ = OPERATIONS[name]
    kernel = getattr(backend.load("wrong_kernels.wrong_reward_kernels", "interpreter"), name)
    make = functools.partial(version, implementation(name, "interpreter"), name, kernel)
    last = known.a_tie_costs_log_2 if name == "pairwise" else known.is_log_2_at_the_start
    for prop in (known.is_within_its_bound, last):
        for case in QUICK[name]:
            prop(make("nothing"), case)
    wrong = [make(what) for what in getattr(wrong_reward_kernels, name.upper())]
    kill_matrix((known.is_within_its_bound, last), wrong, QUICK[name])


def test_offsets_have_64_bits():
    """The last pairs of 2³¹ + 64."""
    n, block = (1 << 31) + 64, backend.load(reward_model.KERNELS, "interpreter").TILE[0]
    given, slopes = ([sparse((n,), torch.float16) for _ in range(k)] for k in (4, 3))
    sums = sparse((-(-n // block),), torch.float32)
    for x in given:
        x[-64:] = torch.randn(64).half()
    slopes[0][:64] = slopes[2][:64] = 7
    near = [x[-64:] for x in given]
    with last_program():
        reward_model.pairwise_launch((sums, *slopes[:2]), *given[:3], 0.1, "interpreter").run(CPU)
        wanted = reward_model._pairwise(*near[:3], 0.1, "interpreter")
        assert sums[-1] == wanted[0] != 0 and torch.equal(slopes[1][-64:].float(), wanted[2].half().float())
        dpo.preference_launch((sums, slopes[2]), tuple(given), 0.3, 0.1, False, "interpreter").run(CPU)
        wanted = dpo._preference(*near, 0.3, 0.1, False, "interpreter")
    assert sums[-1] == wanted[0] != 0 and torch.equal(slopes[2][-64:].float(), wanted[1].half().float())
    assert (slopes[0][:64] == 7).all() and (slopes[2][:64] == 7).all()


@pytest.mark.parametrize("margin", [None, torch.rand(5)])
def test_opcheck(margin):
    chosen, rejected = (torch.randn(10)[::2].requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.minift.pairwise_loss.default, (chosen, rejected, margin, 0.1, "interpreter"))
    fixed = torch.randn(5), torch.randn(5)
    for ipo in (False, True):
        args = (chosen, rejected, *fixed, 0.3, 0.1, ipo, "interpreter")
        torch.library.opcheck(torch.ops.minift.preference_loss.default, args)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles(target, dtype):
    """With nothing spilled."""
    empty = functools.partial(torch.empty, device="meta")
    x, slope, sums = empty(2048, dtype=dtype), empty(2048), empty(8)
    for launch in (
        reward_model.pairwise_launch((sums, slope, slope), x, x, x, 0.1, "triton"),
        dpo.preference_launch((sums, slope), (x, x, x, x), 0.1, 0.1, False, "triton"),
        dpo.preference_launch((sums, slope), (x, x, x, x), 0.1, 0.0, True, "triton"),
    ):
        found = aot.compile_launch(launch, target)
        print(f"{launch.kernel.fn.__name__} {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
        assert found.spilled == 0


# --- centering, rankings, and whole models ----------------------------------------------------------------------------


def close(found, expected, within=1e-14):
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    error, size = np.abs(found - expected).max(initial=0), np.abs(expected).max(initial=0)
    assert error <= within * (1 + size), f"off by {error:.2e} at a size of {size:.2e}"


@pytest.mark.parametrize("how", BACKENDS)
def test_centering_in_the_same_pass(how, small_tiles, rng):
    """The sum of both losses, and of their gradients, from one launch."""
    chosen, rejected, margin = (rng.standard_normal(19).astype(np.float32) for _ in range(3))
    (value, vjp), (more, more_vjp) = (
        reference.pairwise_loss(chosen, rejected, margin),
        reference.centering(chosen, rejected),
    )
    there = [torch.tensor(x, requires_grad=True) for x in (chosen, rejected)]
    with guarded():
        found = reward_model._centered_loss(*there, torch.tensor(margin), None, 0.3, how)
    assert abs(found.item() - (value + 0.3 * more)) <= 1e-6
    for ours, a, b in zip(torch.autograd.grad(found, there), vjp(1.0)[:2], more_vjp(0.3), strict=True):
        close(ours, a + b, 1e-6)


def test_rankings(rng):
    rewards, ranks = rng.standard_normal((4, 5)), rng.integers(0, 3, (4, 5))
    value, vjp = reference.ranking_loss_2(rewards, ranks)
    leaf = torch.tensor(rewards, requires_grad=True)
    found = reward_model.ranking_loss_2(leaf, torch.tensor(ranks))
    close(found, value)
    close(torch.autograd.grad(found, leaf, torch.tensor(0.7, dtype=torch.float64))[0], vjp(0.7))
    close(reward_model.preferred(leaf), reference.preferred(rewards))


def gradients_agree(found, there, vjp):
    learned, gradients = trainable(there), vjp(0.7)
    assert learned.keys() == gradients.keys()
    of_model = torch.autograd.grad(found, list(learned.values()), torch.tensor(0.7, dtype=found.dtype))
    for name, dw in zip(learned, of_model, strict=True):  # adapters are kept in float32
        assert np.abs(dw.numpy() - gradients[name]).max() <= 1e-5 * np.abs(gradients[name]).max(), name


@pytest.mark.parametrize("kind", small_policy.KINDS)
def test_reward_models_are_the_references(kind, rng):
    params = reference.with_head(small_policy.params(kind), np.random.default_rng(5))
    pairs = Pairs(small_policy.batch(), margin=np.array([0.3, 0.7]))
    value, vjp = reference.loss(params, pairs, small_policy.CONFIG, center=0.2)
    there = from_numpy(params, dtype=torch.float64)
    found = reward_model.loss(there, pairs, small_policy.CONFIG, center=0.2)
    close(found, value, 1e-6)
    gradients_agree(found, there, vjp)
    padded = reward_model.score(there, small_policy.other_padding(pairs.batch), small_policy.CONFIG)
    close(padded, reference.score(params, pairs.batch, small_policy.CONFIG)[0], 1e-6)
    own = reward_model.with_head(from_numpy(small_policy.params(kind), dtype=torch.float64), np.random.default_rng(5))
    assert np.array_equal(own[SCORE].detach(), params[SCORE])
    with pytest.raises(ValueError, match="row 1 has no token"):
        batch = small_policy.batch()
        reward_model.score(
            there, type(batch)(batch.tokens, batch.labels, batch.lengths * [1, 0, 1, 1]), small_policy.CONFIG
        )


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_is_the_references(kind, loss_type):
    params, batch = small_policy.params(kind), small_policy.batch()
    average = loss_type == "ipo"
    (logps,) = dpo_reference.reference_log_probs(params, [batch], small_policy.CONFIG, average=average)
    pairs = Pairs(batch, reference=logps.reshape(-1, 2))
    options = {"beta": 0.3, "label_smoothing": 0.1 * (not average), "loss_type": loss_type}
    value, vjp = dpo_reference.loss(params, pairs, small_policy.CONFIG, **options)
    there = from_numpy(params, dtype=torch.float64)
    (found,) = dpo.reference_log_probs(there, [batch], small_policy.CONFIG, average=average)
    close(found, logps, 1e-6)
    assert not found.requires_grad
    loss = dpo.loss(there, pairs, small_policy.CONFIG, **options)
    close(loss, value, 1e-5)
    gradients_agree(loss, there, vjp)
    x, y = np.random.default_rng(1).standard_normal((2, 6, 2))
    wanted = dpo_reference.statistics(x, y, 0.3)
    close(np.array([dpo.statistics(torch.tensor(x), torch.tensor(y), 0.3)[k] for k in wanted]), list(wanted.values()))


def test_refusals():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="beta is 0, needed a positive number"):
        dpo.preference_loss(x, x, x, x, 0)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5, needed 0 <= label_smoothing < 0\.5"):
        dpo.preference_loss(x, x, x, x, 0.1, 0.5)
    with pytest.raises(ValueError, match="loss_type is 'hinge', needed one of"):
        dpo.preference_loss.__wrapped__(x, x, x, x, loss_type="hinge")
    with pytest.raises(ValueError, match="carry no reference log-probabilities"):
        dpo.loss({}, Pairs(small_policy.batch()), small_policy.CONFIG)
