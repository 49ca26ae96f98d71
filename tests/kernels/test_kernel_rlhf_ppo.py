"""PPO's loss in torch and Triton: properties, guards, wrong versions, offsets, compilation; its parts in torch."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations import ppo as known
from minift.conformance.operations.ppo import FIXED, OPERATIONS, Minibatch
from minift.rlhf import grpo as grpo_reference
from minift.rlhf import ppo as reference
from minift_kernels import aot, backend
from minift_kernels.rlhf import grpo, ppo
from nn.checks import kill_matrix
from rlhf.rectangles import SHAPES, mask_of
from wrong_kernels import wrong_ppo_kernels

BACKENDS = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [Minibatch((2, 21), "full", 0.2, 0.1, 40.0, seed=2), Minibatch((4, 9), "episodes", 0.2, 0.5, seed=4)]
GUARDED = known.is_within_its_bound, known.what_does_not_count_is_not_seen
SETTINGS = 0.2, 0.3, 0.7, 0.03


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 tokens, so that there are several, the last one short."""
    monkeypatch.setattr(backend.load(ppo.KERNELS, "interpreter"), "TILE", (16, 1))


def implementation(how, dtype=None):
    loss = torch_functions.differentiable(functools.partial(ppo.minibatch_loss, backend=how), dtype=dtype)

    def f(*args):
        y, vjp = loss(*args)

        def what_learns(dloss):
            gradients = vjp(dloss)
            assert all(g is None for g in gradients[3:]), "what is fixed has a gradient"
            return gradients[:3]

        return y, what_learns

    return f


@pytest.mark.parametrize("how", BACKENDS)
def test_properties(how, small_tiles):
    for case in FIXED:
        if case.dtype in BACKENDS[how]:
            for prop in OPERATIONS[0].properties:
                with guarded() if prop in GUARDED else contextlib.nullcontext():
                    prop(implementation(how, "bfloat16" if case.dtype == "bfloat16" else None), case)


@pytest.mark.parametrize("width", [1023, 1024, 1025])
def test_the_tile_that_ships(width):
    with guarded():
        known.is_within_its_bound(implementation("interpreter"), Minibatch((1, width), "full"))


def test_kill_matrix(small_tiles):
    kernel = backend.load("wrong_kernels.wrong_ppo_kernels", "interpreter").minibatch
    make = functools.partial(version, implementation("interpreter"), "minibatch", kernel)
    properties = known.is_within_its_bound, known.what_does_not_count_is_not_seen, known.the_first_ratio_is_one
    for prop in properties:
        for case in QUICK:
            prop(make("nothing"), case)
    kill_matrix(properties, [make(what) for what in wrong_ppo_kernels.MINIBATCH], QUICK)


def test_offsets_have_64_bits():
    """The last tokens of 2³¹ + 64."""
    n = (1 << 31) + 64
    given = [sparse((n,), torch.float16) for _ in range(7)]
    mask, slopes = sparse((n,), torch.bool), [sparse((n,), torch.float32) for _ in range(2)]
    block = backend.load(ppo.KERNELS, "interpreter").TILE[0]
    sums = sparse((-(-n // block),), torch.float32)
    for x in given:
        x[-64:] = torch.randn(64).half()
    mask[-60:] = True
    slopes[0][:64] = 7
    with last_program():
        ppo.minibatch_launch((sums, *slopes), tuple(given), mask, SETTINGS, "interpreter").run(CPU)
    wanted = ppo._minibatch_loss(*(x[-64:] for x in given), mask[-64:], *SETTINGS, "interpreter")
    assert sums[-1] == wanted[0] != 0 and (slopes[0][:64] == 7).all()
    assert all(torch.equal(found[-64:], x) for found, x in zip(slopes, wanted[1:], strict=True))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_opcheck(clip):
    learning = [torch.randn(3, 5, requires_grad=True) for _ in range(3)]
    fixed = [torch.randn(5, 3).T for _ in range(4)]
    args = (*learning, *fixed, torch.rand(3, 5) < 0.8, 0.2, clip, 0.7, 0.03, "interpreter")
    torch.library.opcheck(torch.ops.minift.ppo_minibatch_loss.default, args)


def test_gradcheck():
    given, mask, _ = known.arrays(Minibatch((2, 7), "full", dtype="float64", seed=1))
    learning = [torch.tensor(x, requires_grad=True) for x in given[:3]]
    rest = [torch.tensor(x) for x in (*given[3:], mask)]
    settings = Minibatch((2, 7)).settings
    assert torch.autograd.gradcheck(lambda *x: ppo.minibatch_loss(*x, *rest, settings, 5.0), learning)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles(target, dtype):
    """With nothing spilled; slopes are stored in words of 16 bytes."""
    empty = functools.partial(torch.empty, device="meta")
    x, slope, sums = empty(256, 2048, dtype=dtype), empty(256, 2048), empty(512)
    launch = ppo.minibatch_launch((sums, slope, slope), (x,) * 7, empty(256, 2048, dtype=bool), SETTINGS, "triton")
    found = aot.compile_launch(launch, target)
    print(f"minibatch {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
    assert found.spilled == 0 and max(found.widths("store")) == 128


# --- what is plain PyTorch --------------------------------------------------------------------------------------------


def as_the_reference(theirs, ours, given, fixed, rng):
    """The same value, and gradient by the first argument, in float64."""
    value, vjp = theirs(given, *fixed)
    leaf = torch.tensor(given, requires_grad=True)
    found = ours(leaf, *(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in fixed))
    dloss = rng.standard_normal()
    (gradient,) = torch.autograd.grad(found, leaf, torch.tensor(dloss, dtype=torch.float64))
    assert abs(found.item() - value) <= 1e-14 * (1 + abs(value)) and found.dtype == torch.float64
    assert np.abs(gradient.numpy() - vjp(dloss)).max() <= 1e-14


@pytest.mark.parametrize("case", SHAPES)
def test_parts_are_the_references(case, rng):
    """Policy, values and statistics, with NaN outside of the mask, and with ties, where the free gradient holds."""
    mask = mask_of(case, rng)
    x, y, z = (np.where(mask, a, np.nan) for a in rng.standard_normal((3, *mask.shape)))
    y[0] = x[0]  # ratios of 1, and values that have not moved
    for normalizer in (None, 7.0):
        as_the_reference(reference.policy_loss, ppo.policy_loss, x, (y, z, mask, 0.2, normalizer), rng)
        for clip in (None, 0.3):
            as_the_reference(reference.value_loss, ppo.value_loss, x, (y, z, mask, clip, normalizer), rng)
    given = [torch.from_numpy(a) for a in (x, y, z, mask)]
    found, wanted = ppo.statistics(*given), reference.statistics(x, y, z, mask)
    assert found.keys() == wanted.keys() and all(abs(found[k] - wanted[k]) <= 1e-14 * (1 + wanted[k]) for k in found)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_grpo_is_the_references(case, aggregation, rng):
    mask = mask_of(case, rng)
    logp, old, ref = (np.where(mask, a, np.nan) for a in rng.standard_normal((3, *mask.shape)))
    old[0] = ref[0] = logp[0]
    for normalizer in (None, 7.0):
        options = {"beta": 0.3, "aggregation": aggregation, "normalizer": normalizer}
        theirs, ours = (functools.partial(module.loss, **options) for module in (grpo_reference, grpo))
        as_the_reference(theirs, ours, logp, (old, ref, rng.standard_normal(len(mask)), mask), rng)


def test_group_advantages(rng):
    rewards = rng.standard_normal((4, 5))
    rewards[1] = 0.1  # equally good: exactly 0
    for scale in (True, False):
        found = grpo.group_advantages(torch.tensor(rewards), scale=scale).numpy()
        assert np.abs(found - grpo_reference.group_advantages(rewards, scale=scale)).max() <= 1e-14
        assert not found[1].any()
    with pytest.raises(ValueError, match="groups of 1, needed at least 2"):
        grpo.group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="aggregation is 'word', needed one of"):
        grpo.loss.__wrapped__(
            *[torch.zeros(1, 1)] * 3, torch.zeros(1), torch.ones(1, 1, dtype=bool), aggregation="word"
        )
