"""Advantages in torch and Triton: properties, guards, wrong versions, offsets, compilation; the rest in torch."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from launches import guarded, last_program, sparse, version

from minift.conformance import torch_functions
from minift.conformance.operations import advantages as known
from minift.conformance.operations.advantages import FIXED, OPERATIONS, Episodes
from minift.rlhf import advantages as reference
from minift_kernels import aot, backend
from minift_kernels.rlhf import advantages
from nn.checks import kill_matrix
from rlhf.rectangles import SHAPES, mask_of
from wrong_kernels import wrong_advantages_kernels

BACKENDS = {"torch": ("float32", "float64", "float16", "bfloat16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [
    Episodes((3, 5), "one", bootstrap=True),
    Episodes((1, 35), "full", (1.0, 0.95), True),
    Episodes((2, 19), "episodes", (0.9, 0.97), True, seed=3),
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 tokens: a few dozen are several, the last one short."""
    monkeypatch.setattr(backend.load(advantages.KERNELS, "interpreter"), "TILE", (16, 1))


def implementation(how, dtype=None):
    return torch_functions.plain(functools.partial(advantages.gae_1, backend=how), dtype=dtype)


@pytest.mark.parametrize("how", BACKENDS)
def test_properties(how, small_tiles):
    for case in FIXED:
        if case.dtype in BACKENDS[how]:
            for prop in OPERATIONS[0].properties:
                with guarded() if prop is known.is_the_closed_form else contextlib.nullcontext():
                    prop(implementation(how, "bfloat16" if case.dtype == "bfloat16" else None), case)


@pytest.mark.parametrize("width", [1023, 1024, 1025])
def test_the_tile_that_ships(width):
    """One less than a tile, a tile, one more; held against the recursion, which the closed form is too long for."""
    rng = np.random.default_rng(width)
    rewards, values = rng.standard_normal((2, 1, width)).astype(np.float32)
    mask = np.arange(width)[None] != width - 3
    exact = reference.gae_1(rewards.astype(np.float64), values.astype(np.float64), mask, 1.0, 0.95)
    with guarded():
        found = implementation("interpreter")(rewards, values, mask, 1.0, 0.95, None)
    size = np.abs(rewards).max() + 2 * np.abs(values).max()
    # the term k tokens ahead has (2k + 8) roundings and the size 0.95ᵏ; so many of them as there are roundings of a sum
    k = np.arange(width)
    allowed = 2.0**-24 * size * (0.95**k * (2 * k + 8 + np.log2(width) + 1)).sum()
    assert np.abs(found - exact).max() <= allowed < 0.01


def test_kill_matrix(small_tiles):
    kernel = backend.load("wrong_kernels.wrong_advantages_kernels", "interpreter").gae

    def make(what):
        def changed(*args):
            return version(lambda *a: (implementation("interpreter")(*a), None), "gae", kernel, what)(*args)[0]

        changed.__name__ = what
        return changed

    properties = known.is_the_closed_form, known.what_does_not_count_is_not_seen, known.cut_off_is_not_ended
    for prop in properties:
        for case in QUICK:
            prop(make("nothing"), case)
    kill_matrix(properties, [make(what) for what in wrong_advantages_kernels.GAE], QUICK)


def test_offsets_have_64_bits():
    """The last row of 2³¹ + 192 tokens."""
    n, width = (1 << 31) // 64 + 3, 64
    given = [sparse((n, width), torch.float32) for _ in range(2)]
    mask, found, end = sparse((n, width), torch.bool), sparse((n, width), torch.float32), sparse((n,), torch.float32)
    given[0][-1], given[1][-1], mask[-1, 3:60], end[-1], found[0] = torch.randn(width), torch.randn(width), True, 2, 7
    with last_program():
        advantages.gae_launch(found, *given, mask, 0.9, 0.8, end, "interpreter").run(CPU)
    wanted = advantages._gae(*(x[-1:] for x in given), mask[-1:], 0.9, 0.8, end[-1:], "interpreter")
    assert torch.equal(found[-1:], wanted) and wanted[0, 3] != 0 and (found[0] == 7).all()


@pytest.mark.parametrize("bootstrap", [None, torch.randn(3)])
def test_opcheck(bootstrap):
    given = torch.randn(3, 5), torch.randn(5, 3).T, torch.rand(3, 5) < 0.8
    torch.library.opcheck(torch.ops.minift.gae.default, (*given, 0.9, 0.8, bootstrap, "interpreter"))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles(target, dtype):
    """For rows of 2,048 tokens, with nothing spilled; a lane has its tokens side by side, and stores them at once."""
    x, mask = torch.empty(256, 2048, dtype=dtype, device="meta"), torch.empty(256, 2048, dtype=bool, device="meta")
    found = aot.compile_launch(advantages.gae_launch(x, x, x, mask, 1.0, 0.95, x[:, 0], "triton"), target)
    print(f"gae {target} {dtype}: {found.registers} registers, {found.spilled} spilled")
    assert found.spilled == 0 and max(found.widths("store")) >= 64


# --- what is plain PyTorch --------------------------------------------------------------------------------------------


def on_torch(*args):
    return [torch.from_numpy(np.array(a)) if isinstance(a, np.ndarray) else a for a in args]


def close(found, expected):
    found = found.detach().numpy()
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= 1e-13 * (1 + np.abs(expected).max(initial=0))


@pytest.mark.parametrize("case", SHAPES)
def test_as_the_reference(case, rng):
    """Rewards of tokens, returns, whitening, with NaN outside of the mask."""
    mask = mask_of(case, rng)
    x, y = (np.where(mask, a, np.nan) for a in rng.standard_normal((2, *mask.shape)))
    scores, ended = rng.standard_normal(len(mask)), rng.random(len(mask)) < 0.5
    for options in ({}, {"ended": ended, "missing_eos_penalty": 1.5}):
        there = {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in options.items()}
        found = advantages.token_rewards(*on_torch(scores, x, mask, 0.3), **there)
        close(found, reference.token_rewards(scores, x, mask, 0.3, **options))
    for shift_mean in (True, False):
        found = advantages.whiten(*on_torch(x, mask), shift_mean=shift_mean)
        close(found, reference.whiten(x, mask, shift_mean=shift_mean))
    both = advantages.returns(*on_torch(x, y))
    assert np.array_equal(both, reference.returns(x, y), equal_nan=True)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator, rng):
    """Values and gradients, at equal log-probabilities as well, where k3 has its minimum."""
    logp, ref, dkl = rng.standard_normal((3, 4, 5))
    logp[0] = ref[0]
    logp[1] = ref[1] + 1e-9 * logp[1]  # where a rounding could be negative
    kl, vjp = reference.kl_penalty(logp, ref, estimator)
    leaf = torch.tensor(logp, requires_grad=True)
    found = advantages.kl_penalty(leaf, torch.tensor(ref), estimator)
    assert (found >= 0).all() or estimator == "k1"
    close(found, kl)
    close(torch.autograd.grad(found, leaf, torch.tensor(dkl))[0], vjp(dkl)[0])


def test_refusals():
    x, mask = torch.zeros(2, 3), torch.tensor([[True, True, False], [False, False, False]])
    with pytest.raises(ValueError, match="row 1 has no token that counts"):
        advantages.token_rewards(x[:, 0], x, mask, 0.1)
    with pytest.raises(ValueError, match="missing_eos_penalty needs `ended`"):
        advantages.token_rewards(x[:1, 0], x[:1], mask[:1], 0.1, missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match="estimator is 'k4', needed one of"):
        advantages.kl_penalty.__wrapped__(x, x, "k4")
