"""Attention in torch and Triton: the properties, guards around every launch, wrong versions, tiles, the cache."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import torch
from launches import guarded, last_program, replaced, sparse

from minift.conformance import torch_functions
from minift.conformance.operations import attention as laws
from minift.conformance.operations.attention import FIXED, PROPERTIES, Heads
from minift.nn import attention as reference
from minift_kernels import aot, backend
from minift_kernels.nn import attention
from nn import wrong_nn
from nn.checks import kill_matrix
from wrong_kernels import wrong_attention

BACKENDS = {"torch": ("float32", "float64", "float16"), "interpreter": ("float32", "float16")}
CPU = torch.device("cpu")
QUICK = [Heads(1, 4, 2, 3, 26, 3, "causal", "float32", 11), Heads(2, 2, 1, 5, 5, 3, "some see nothing", "float16", 1)]
KERNELS = ("forward", "backward_q", "backward_kv")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 × 16, so that few tokens have several of them."""
    kernels = backend.load(attention.KERNELS, "interpreter")
    for size in kernels.CONFIGURATIONS:
        monkeypatch.setitem(kernels.CONFIGURATIONS, size, dict.fromkeys(KERNELS, (16, 16, 128, 1)))


def implementation(how):
    return torch_functions.differentiable(functools.partial(attention.attention, backend=how))


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("how", BACKENDS)
def test_properties(prop, how, small_tiles):
    for case in FIXED:
        if case.dtype not in BACKENDS[how]:
            continue
        size = case.batch * case.heads * case.keys
        bound = prop is laws.is_within_its_bound
        if how == "interpreter" and not bound and size > 30:
            continue  # a second for every tile
        with guarded() if bound else contextlib.nullcontext():
            prop(implementation(how), case)


def wrong(name, what, watched=False):
    """Attention with the kernel of this name replaced by one with WRONG = what, in both passes."""
    kernels = backend.load("wrong_kernels.wrong_attention", "interpreter")
    f = implementation("interpreter")

    @contextlib.contextmanager
    def instead():
        with guarded() if watched else contextlib.nullcontext(), replaced(name, getattr(kernels, name), WRONG=what):
            yield

    def changed(*args):
        with instead():
            y, vjp = f(*args)

        def changed_vjp(dy):
            with instead():
                return vjp(dy)

        return y, changed_vjp

    changed.__name__ = what
    return changed


@pytest.mark.parametrize("name", KERNELS)
def test_kill_matrix(name, small_tiles):
    for case in QUICK:
        laws.is_within_its_bound(wrong(name, "nothing", watched=True), case)
    versions = {what: wrong(name, what) for what in getattr(wrong_attention, name.upper())}
    if name == "forward":  # which overflows for large scores only
        laws.large_scores_do_not_overflow(wrong(name, "nothing"), QUICK[1])
        kill_matrix([laws.large_scores_do_not_overflow], [versions.pop("no maximum")], QUICK[1:])
    kill_matrix([laws.is_within_its_bound], versions.values(), QUICK)


def test_every_property_rejects_a_wrong_version():
    """In NumPy, where there is time for all of them."""
    cases = [FIXED[3], *(case for case in FIXED if case.dtype == "float64")]  # scores in too few bits: float32

    def overwrites(q, k, v, visible):
        y, vjp = reference.attention(q, k, v, visible)
        q[...] *= 2
        return y, vjp

    def other_for_one_mask(q, k, v, visible):
        y, vjp = reference.attention(q, k, v, visible)
        return (y if len(visible) == len(q) else y * q.dtype.type(1.5)), vjp

    kill_matrix(PROPERTIES, [*wrong_nn.ATTENTION, overwrites, other_for_one_mask], cases)


# --- tiles ------------------------------------------------------------------------------------------------------------


def fresh(case):
    """The case's tensors: dy, q, k, v, visible."""
    return [torch.from_numpy(x) for x in laws.arrays(case)]


@pytest.mark.parametrize("size", [(2, 64), (2, 128), (2, 256), (4, 64), (4, 128)], ids=str)
def test_every_configuration_is_within_the_bound(size):
    """The tiles that are launched on a GPU, not full; so two sizes differ by twice the bound at most."""
    dtype = "float16" if size[0] == 2 else "float32"
    case = Heads(1, 1, 1, 70, 150, size[1] // 2 + 5, "causal", dtype, 3)
    laws.is_within_its_bound(implementation("interpreter"), case)


def test_one_configuration_walks_over_the_same_tiles():
    kernels = backend.load(attention.KERNELS, "interpreter")
    for found in kernels.CONFIGURATIONS.values():
        assert found["forward"][:2] == found["backward_q"][:2]
    assert kernels.configuration(2, 16) == kernels.CONFIGURATIONS[2, 64]
    assert kernels.configuration(4, 256) == kernels.CONFIGURATIONS[4, 128]


@pytest.mark.parametrize("kind", laws.KINDS)
def test_lists_of_tiles_one_tile_at_a_time(kind):
    *_, visible = fresh(Heads(2, 1, 1, 7, 11, 2, kind, seed=5))
    for mask in (visible, visible.transpose(1, 2)):
        lists = attention._lists(mask, 3, 2)
        assert lists.dtype == torch.int32 and lists.shape == (2, -(-mask.shape[1] // 3), 2 + -(-mask.shape[2] // 2))
        for b, i in np.ndindex(*lists.shape[:2]):
            tiles = [mask[b, 3 * i : 3 * i + 3, j : j + 2] for j in range(0, mask.shape[2], 2)]
            whole = [j for j, t in enumerate(tiles) if t.all() and t.shape[1] == 2]
            part = [j for j, t in enumerate(tiles) if t.any() and j not in whole]
            assert lists[b, i, :2].tolist() == [len(whole), len(part)]
            assert lists[b, i, 2 : 2 + len(whole) + len(part)].tolist() == whole + part


def test_a_causal_text_costs_half():
    """Of 16 × 16 tiles, those on the diagonal look at the mask, those below it do not, and the others do not appear."""
    visible = attention.causal_mask(torch.arange(256)[None], 256)
    lists = attention._lists(visible, 16, 16)
    assert lists[0, :, :2].tolist() == [[i, 1] for i in range(16)]


def test_tiles_are_made_once_for_all_layers(small_tiles):
    _, q, k, v, visible = fresh(QUICK[0])
    tiles = attention.tile_map(visible, q.shape[-1], q.dtype, backend="interpreter")
    given, made = (attention.attention(q, k, v, visible, tiles=t, backend="interpreter") for t in (tiles, None))
    assert torch.equal(given, made)
    assert attention.tile_map(visible, 64, q.dtype) is None, "plain PyTorch needs none"
    with pytest.raises(ValueError, match=r"tiles: of a mask of shape \(1, 3, 26\), needed \(1, 3, 25\): call tile_map"):
        attention.attention(q, k[:, :, 1:], v[:, :, 1:], visible[:, :, 1:], tiles=tiles, backend="interpreter")
    shared = attention.tile_map(visible.expand(5, -1, -1), 64, q.dtype, backend="interpreter")
    assert shared.by_query.shape[0] == 1, "one list for sequences that share a mask"


def test_float64_has_no_tiles():
    with pytest.raises(ValueError, match=r"dtype: torch\.float64 has no kernel, needed at most 32 bits: use"):
        attention.tile_map(torch.ones(1, 1, 1, dtype=torch.bool), 64, torch.float64, backend="interpreter")


def test_generation_takes_small_tiles():
    visible = torch.ones(1, 1, 4096, dtype=torch.bool)
    tiles = attention.tile_map(visible, 128, torch.float16, backend="interpreter")
    assert tiles.sizes[0] == 16
    assert tiles.by_query[0, 0, :2].tolist() == [4096 // tiles.sizes[1], 0]


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_keys_and_no_queries(tokens, small_tiles):
    q, k = (
        torch.randn(1, 2, tokens, 4, requires_grad=True),
        torch.randn(1, 1, 0 if tokens else 5, 4, requires_grad=True),
    )
    visible = torch.ones(1, tokens, k.shape[2], dtype=torch.bool)
    with guarded():
        y = attention.attention(q, k, k, visible, backend="interpreter")
        dq, dk = torch.autograd.grad(y, (q, k), torch.ones_like(y))
    assert not y.any() and not dq.any() and not dk.any() and y.shape == q.shape


# --- what no case of a usual size shows -------------------------------------------------------------------------------


def test_offsets_of_rows_have_64_bits():
    """The last queries of 2³¹ + 2,112 numbers, and a mask with more places than that."""
    tokens, keys, d = (1 << 31) // 64 + 33, 80, 64
    q, y, dy, dq = (sparse((1, 1, tokens, d), torch.float16) for _ in range(4))
    k, v = torch.randn(2, 1, 1, keys, d).half()
    lse, delta = (sparse((1, 1, tokens), torch.float32) for _ in range(2))
    visible = sparse((1, tokens, keys), torch.uint8).view(torch.bool)
    end = slice(tokens - 33, None)  # 2³¹ / 64 queries before them: a multiple of 16
    q[:, :, end], dy[:, :, end] = torch.randn(2, 1, 1, 33, d).half()
    visible[:, end] = torch.rand(1, 33, keys) < 0.7
    near = [x[:, :, end].clone() for x in (q, dy)]
    mask = visible[:, end].clone()
    lists = attention._lists(mask, 16, 16)
    n_tiles = -(-tokens // 16)
    by_query = sparse((1, n_tiles, lists.shape[2]), torch.int32)
    by_query[:, -3:] = lists
    sizes = [16, 16, 16, 16]

    def first_program(launch):
        dataclasses.replace(launch, grid=(1,)).run(CPU)  # it has the last queries

    first_program(attention.forward_launch(y, lse, q, k, v, visible, by_query, sizes, "interpreter"))
    y_near, lse_near = attention._attention(near[0], k, v, mask, lists, lists, sizes, "interpreter")
    assert torch.equal(y[:, :, -1:], y_near[:, :, -1:]) and torch.equal(lse[:, :, -1:], lse_near[:, :, -1:])
    assert y_near[:, :, -1].any()
    args = dq, delta, dy, y, q, k, v, lse, visible, by_query, sizes, "interpreter"
    first_program(attention.backward_q_launch(*args))
    dq_near, delta_near = torch.empty_like(near[0]), torch.empty_like(lse_near)
    args = dq_near, delta_near, near[1], y_near, near[0], k, v, lse_near, mask, lists, sizes, "interpreter"
    attention.backward_q_launch(*args).run(CPU)
    assert torch.equal(dq[:, :, -1:], dq_near[:, :, -1:]) and dq_near[:, :, -1].any()


def test_offsets_of_heads_have_64_bits():
    """The last of 2¹⁷ + 3 key/value heads of 256 keys, which begins behind 2³¹ numbers."""
    heads, tokens, d = (1 << 17) + 3, 256, 64
    q, k, v, dy, dk, dv = (sparse((1, heads, tokens, d), torch.float16) for _ in range(6))
    lse, delta = (sparse((1, heads, tokens), torch.float32) for _ in range(2))
    near = torch.randn(4, 1, 1, tokens, d).half()
    for x, values in zip((q, k, v, dy), near, strict=True):
        x[:, -1:] = values
    visible = attention.causal_mask(torch.arange(tokens)[None], tokens)
    by_key = attention._lists(visible.transpose(1, 2), 16, 16)
    sizes = [16, 16, 16, 16]
    with last_program():
        args = dk, dv, dy, q, k, v, lse, delta, visible, by_key, sizes, "interpreter"
        attention.backward_kv_launch(*args).run(CPU)
    found = torch.empty(2, 1, 1, tokens, d).half()
    args = near[3], near[0], near[1], near[2], lse[:, -1:].clone(), delta[:, -1:].clone(), visible, by_key, sizes
    attention.backward_kv_launch(*found, *args, "interpreter").run(CPU)
    assert torch.equal(dk[0, -1, -16:], found[0, 0, 0, -16:]) and torch.equal(dv[0, -1, -16:], found[1, 0, 0, -16:])
    assert found[:, 0, 0, -1].any()


def test_opcheck(small_tiles):
    _, q, k, v, visible = fresh(Heads(1, 2, 1, 3, 4, 3))
    tiles = attention.tile_map(visible, 3, q.dtype, backend="interpreter")
    learning = [x.requires_grad_() for x in (q, k, v)]
    args = (visible, tiles.by_query, tiles.by_key, tiles.sizes, "interpreter")
    torch.library.opcheck(torch.ops.minift.attention.default, (*learning, *args))


@pytest.mark.parametrize(
    ("target", "dtype", "d"),
    [
        *(("sm_80", torch.float16, 64), ("sm_90", torch.bfloat16, 128), ("gfx942", torch.bfloat16, 128)),
        pytest.param("sm_80", torch.bfloat16, 128, marks=pytest.mark.slow),
        pytest.param("sm_90", torch.float16, 64, marks=pytest.mark.slow),
        pytest.param("gfx942", torch.float16, 64, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles(target, dtype, d, monkeypatch):
    """For tensor cores, in words of 16 bytes, with nothing spilled, and tiles that fit into shared memory. Results,
    which are stored once, go in words of 8 bytes on AMD's: as many neighbors has a lane after a product."""
    monkeypatch.setattr(torch.version, "hip", "6.4" if target == "gfx942" else None)  # half as many warps
    limit = {"sm_80": 163, "sm_90": 227, "gfx942": 64}[target] * 1024
    for launch in launches(dtype, d):
        found = aot.compile_launch(launch, target)
        name = launch.kernel.fn.__name__
        print(
            f"{name} {target} {dtype} {d}: {found.registers} registers, {found.shared} bytes, {found.spilled} spilled"
        )
        assert found.count({"sm_80": r"mma\.", "sm_90": r"wgmma\.mma", "gfx942": "v_mfma"}[target])
        assert found.spilled == 0 and found.shared <= limit
        assert max(found.widths("load")) == 128
        assert max(found.widths("store")) == (64 if target == "gfx942" else 128)


def launches(dtype, d, tokens=2048):
    """Of a model that makes queries as rows of (batch, tokens, heads, d), eight query heads on two key/value heads."""
    empty = functools.partial(torch.empty, device="meta")
    q, k = (empty(2, tokens, heads, d, dtype=dtype).transpose(1, 2) for heads in (8, 2))
    lse, visible = empty(2, 8, tokens), empty(1, tokens, tokens, dtype=torch.bool)
    found = backend.load(attention.KERNELS, "triton").configuration(dtype.itemsize, d)
    sizes = [*found["forward"][:2], *found["backward_kv"][:2]]
    lists = [empty(1, tokens // own, 2 + tokens // step, dtype=torch.int32) for own, step in (sizes[:2], sizes[2:])]
    yield attention.forward_launch(q, lse, q, k, k, visible, lists[0], sizes, "triton")
    yield attention.backward_q_launch(q, lse, q, q, q, k, k, lse, visible, lists[0], sizes, "triton")
    yield attention.backward_kv_launch(k, k, q, q, k, k, lse, lse, visible, lists[1], sizes, "triton")


# --- the mask and the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(0, 0), (3, 3), (1, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_mask_is_the_references(before, packed):
    positions = np.array(before)[:, None] + np.arange(5)
    segments = np.array([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]) if packed else None
    keys = max(before) + 5
    found = attention.causal_mask(torch.tensor(positions), keys, None if segments is None else torch.tensor(segments))
    assert found.numpy().tolist() == reference.causal_mask(positions, keys, segments).tolist()


def test_cache_is_the_references():
    """Rows of equal and of different lengths, a prefix, and what does not fit; every slot, layer by layer."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = attention.KVCache(2, 3, 2, 9, 4, torch.float64), reference.KVCache(2, 3, 2, 9, 4, np.float64)
    prefix = torch.randn(2, 2, 2, 1, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    ours.put_prefix(prefix)
    theirs.put_prefix(prefix.detach().numpy())
    for lengths, tokens in (([3, 1, 2], 3), ([1, 1, 1], 1), ([2, 2, 1], 2)):
        for layer in range(2):
            k, v = torch.randn(2, 3, 2, tokens, 4, dtype=torch.float64, generator=generator)
            found, expected = ours.write(layer, k, v), theirs.write(layer, k.numpy(), v.numpy())
            assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, expected, strict=True))
        ours.advance(torch.tensor(lengths))
        theirs.advance(np.array(lengths))
        assert ours.lengths.tolist() == theirs.lengths.tolist()
        assert np.array_equal(ours.keys.numpy(), theirs.keys) and np.array_equal(ours.values.numpy(), theirs.values)
    assert not ours.keys.requires_grad and ours.nbytes == theirs.nbytes
    before = ours.keys.clone()
    with pytest.raises(ValueError, match="the cache has 9 slots, 10 are needed"):
        ours.write(0, k[:, :, :1].expand(-1, -1, 3, -1), v[:, :, :1].expand(-1, -1, 3, -1))
    assert torch.equal(ours.keys, before)
    assert repr(ours).startswith(
        "KVCache(layers=2, batch=3, kv_heads=2, capacity=9, head_dim=4"
    ) and "keys" not in repr(ours)
