"""Attention, its mask and its cache: loops, torch, bounds, the laws that know each classic mistake, wrong versions."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
import wrong_nn
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance.ball import Ball
from minift.conformance.bounds import gamma
from minift.conformance.gradients import check_vjp
from minift.nn import attention as module
from minift.nn.attention import KVCache, attention, attention_1, attention_2, attention_3, causal_mask
from nn import checks

# seed, batch, heads, kv_heads, tokens, keys, d, what is visible
CASES = [
    (1, 2, 4, 2, 5, 5, 3, "causal"),
    (2, 1, 6, 2, 3, 7, 4, "causal"),  # four keys before the text
    (3, 2, 3, 3, 4, 6, 2, "holes"),
    (4, 2, 4, 1, 4, 4, 5, "some see nothing"),
    (5, 1, 6, 3, 4, 4, 4, "all"),
    (6, 3, 2, 2, 1, 1, 1, "causal"),
    (7, 1, 4, 2, 0, 3, 2, "causal"),
    (8, 2, 4, 2, 1, 6, 3, "causal"),  # a token that is generated
    (9, 2, 4, 2, 7, 7, 3, "packed"),
    (10, 2, 4, 2, 7, 9, 3, "packed"),  # a prefix of two keys, which belongs to every text
]


def tiled(q, k, v, visible):
    """`attention_3` in tiles of two queries, so that a handful of tokens has several tiles, the last one not full."""
    with patch.object(module, "TILE", 2):
        return attention_3(q, k, v, visible)


FORMS = (attention_1, attention_2, tiled)


def make(case):
    seed, B, H, G, T, S, d, kind = case
    rng = np.random.default_rng(seed)
    q, k, v, dy = (rng.standard_normal(s) for s in ((B, H, T, d), (B, G, S, d), (B, G, S, d), (B, H, T, d)))
    visible = np.broadcast_to(np.arange(S) <= np.arange(S - T, S)[:, None], (B, T, S)).copy()
    if kind == "all":
        visible[:] = True
    elif kind == "packed":
        segments = (np.arange(T) + np.arange(B)[:, None]) // 3  # each row is cut elsewhere
        visible[:, :, S - T :] &= segments[:, :, None] == segments[:, None]
    elif kind != "causal":
        visible &= rng.random((B, T, S)) < 0.6
        visible[..., 0] |= ~visible.any(-1)
        if kind == "some see nothing":
            visible[0, 1] = visible[1, -1] = False
    return q, k, v, visible, dy, rng


def oracle_for(visible):
    """A ball for each result that holds both forms: they round at different places, so the larger radius counts."""

    def oracle(dtype, dy, q, k, v):
        d = q.shape[-1]
        scale, see = 1 / math.sqrt(d), visible[:, None]
        stacked = see if see.shape[0] == len(q) else np.broadcast_to(see, (len(q), *see.shape[1:]))
        stacked = np.broadcast_to(stacked, (*q.shape[:3], k.shape[2])).reshape(len(q), k.shape[1], -1, k.shape[2])
        found = _probabilities(dtype, dy, q, k, v, scale, see), _exponentials(dtype, dy, q, k, v, scale, stacked)
        return tuple(Ball(a.value, dtype, np.maximum(a.radius, b.radius)) for a, b in zip(*found, strict=True))

    return oracle


def _probabilities(dtype, dy, q, k, v, scale, see):
    """Equations (1) and (2) of `attention_3` with one key/value head a query head: what `attention_1` computes."""
    B, H = q.shape[:2]
    group = H // k.shape[1]

    def fold(x):  # cotangents of one key/value head add up
        return x.reshape(B, -1, group, *x.value.shape[2:]).sum(2).reshape(*k.shape)

    q, dy = Ball(q, dtype), Ball(dy, dtype)
    k_, v_ = (Ball(np.repeat(x, group, axis=1), dtype) for x in (k, v))
    e, total = _softmax(q @ k_.T * scale, see)
    p = e / total
    dp = dy @ v_.T
    dscores = p * (dp - (p * dp).sum(-1)) * scale
    return p @ v_, dscores @ k_, fold(dscores.T @ q), fold(p.T @ dy)


def _exponentials(dtype, dy, q, k, v, scale, see):
    """Equations (3) and (4) of `attention_2`, the heads of a group stacked: a sum over tiles is in another order."""
    shape = q.shape
    q, dy = (Ball(x, dtype).reshape(*see.shape[:3], shape[-1]) for x in (q, dy))
    k, v = Ball(k, dtype), Ball(v, dtype)
    q = q * scale
    e, total = _softmax(q @ k.T, see)
    y = e @ v / total
    dy = dy / total
    dscores = e * (dy @ v.T - (dy * y).sum(-1))
    return y.reshape(*shape), (dscores @ k * scale).reshape(*shape), dscores.T @ q, e.T @ dy


def _softmax(scores, see):
    """exp(scores − their maximum) where visible, and its sums; those of a row that sees nothing are one."""
    hidden = np.where(see, scores.value, -np.inf).max(-1, keepdims=True)
    top = Ball(np.where(np.isneginf(hidden), 0, hidden), scores.dtype, scores.radius.max(-1, keepdims=True))
    e = (scores - top).where(see).exp().where(see)
    total = e.sum(-1)
    empty = ~see.any(-1, keepdims=True)
    return e, total + Ball(np.broadcast_to(empty, total.value.shape), scores.dtype)


# --- properties: op(q, k, v, visible) ---------------------------------------------------------------------------------


def one_number_at_a_time(op, case):
    q, k, v, visible, _, _ = make(case)
    y, _ = op(q, k, v, visible)
    balls = oracle_for(visible)(np.float64, q, q, k, v)
    (B, H, T, d), (_, G, S, _) = q.shape, k.shape
    for b, h, t in np.ndindex(B, H, T):
        g = h // (H // G)
        seen = [j for j in range(S) if visible[b, t, j]]
        scores = [math.fsum(q[b, h, t, i] * k[b, g, j, i] for i in range(d)) / math.sqrt(d) for j in seen]
        e = [math.exp(s - max(scores)) for s in scores]
        for i in range(d):
            exact = math.fsum(w * v[b, g, j, i] for w, j in zip(e, seen, strict=True)) / math.fsum(e) if e else 0.0
            error = abs(y[b, h, t, i] - exact)
            assert error <= 2 * balls[0].radius[b, h, t, i], f"{b, h, t, i}: {y[b, h, t, i]}, needed {exact}"


def torch_agrees(op, case):
    """With autograd. A row that sees nothing is NaN there, so it is left out."""
    q, k, v, visible, dy, _ = make(case)
    if not visible.any(-1).all() or not q.size:
        return
    leaves = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=torch.tensor(visible[:, None]), enable_gqa=True
    )
    y.backward(torch.tensor(dy))
    found, vjp = op(q, k, v, visible)
    expected = (y.detach(), *(t.grad for t in leaves))
    balls = oracle_for(visible)(np.float64, dy, q, k, v)
    for what, a, b, ball in zip(("y", "dq", "dk", "dv"), (found, *vjp(dy)), expected, balls, strict=True):
        assert (np.abs(a - b.numpy()) <= 2 * ball.radius).all(), what


def gradients(op, case):
    q, k, v, visible, _, rng = make(case)
    if q.size:
        check_vjp(lambda q, k, v: op(q, k, v, visible), q, k, v, rng=rng)


def within_the_bound(op, case):
    q, k, v, visible, dy, _ = make(case)
    for dtype in checks.DTYPES:
        checks.inside(lambda q, k, v: op(q, k, v, visible), oracle_for(visible), [q, k, v], dy, dtype)


def in_any_layout(op, case):
    q, k, v, visible, dy, _ = make(case)
    for layout in checks.LAYOUTS:
        see = np.asfortranarray(visible)
        checks.inside(lambda q, k, v, see=see: op(q, k, v, see), oracle_for(visible), [q, k, v], dy, np.float32, layout)


def the_future_changes_no_bit(op, case):
    """Huge hidden keys and values; their cotangents are exactly zero."""
    q, k, v, visible, dy, _ = make(case)
    hidden = ~visible.any(axis=1)  # (B, S): seen by no query
    part = visible.copy()
    part[:, :, -1] = False
    hidden[:, -1] = True
    y, vjp = op(q, k, v, part)
    huge = [np.where(hidden[:, None, :, None], 1e9, x) for x in (k, v)]
    y_huge, vjp_huge = op(q, *huge, part)
    checks.same_bits(y_huge, y, "y")
    for what, a, b in zip(("dq", "dk", "dv"), vjp_huge(dy), vjp(dy), strict=True):
        if what == "dq":
            checks.same_bits(a + 0, b + 0, what)
        else:
            assert not a.swapaxes(1, 2)[hidden].any(), f"{what} of what nobody sees"


def no_question_is_the_mean(op, case):
    """q = 0: every visible value counts the same."""
    q, k, v, visible, _, _ = make(case)
    y, _ = op(0 * q, k, v, visible)
    count = np.maximum(visible.sum(-1), 1)[:, None, :, None]
    weights = (visible[:, None] / count) @ np.repeat(v, q.shape[1] // k.shape[1], axis=1)
    size = (visible[:, None] / count) @ np.repeat(np.abs(v), q.shape[1] // k.shape[1], axis=1)
    assert (np.abs(y - weights) <= gamma(2 * v.shape[2] + 4, np.float64) * size).all()


def features_twice_are_root_two(op, case):
    """[q, q], [k, k] against 2^¼ q, 2^¼ k: only the right 1/√d gives the same."""
    q, k, v, visible, _, _ = make(case)
    root = 2**0.25
    y, _ = op(root * q, root * k, v, visible)
    twice, _ = op(*(np.concatenate([x, x], -1) for x in (q, k, v)), visible)
    radius = oracle_for(visible)(np.float64, q, root * q, root * k, v)[0].radius
    radius = radius + 8 * 2.0**-53 * np.abs(v).max(initial=0) * np.abs(q).max(initial=0) * np.abs(k).max() * q.shape[-1]
    assert (np.abs(twice[..., : q.shape[-1]] - y) <= 3 * radius).all()


def large_scores_do_not_overflow(op, case):
    """Scores near 1e5, in float32."""
    q, k, v, visible, dy, _ = make(case)
    checks.inside(lambda q, k, v: op(q, k, v, visible), oracle_for(visible), [1e2 * q, 1e2 * k, v], dy, np.float64)
    y, vjp = op(*(x.astype(np.float32) for x in (300 * q, 300 * k, v)), visible)
    assert np.isfinite(y).all()
    assert all(np.isfinite(c).all() for c in vjp(dy.astype(np.float32)))


def in_the_hull_of_what_it_sees(op, case):
    q, k, v, visible, _, _ = make(case)
    y, _ = op(3 * q, k, v, visible)
    group = q.shape[1] // k.shape[1]
    for b, h, t in np.ndindex(y.shape[:3]):
        seen = v[b, h // group][visible[b, t]]
        if len(seen):
            slack = gamma(len(seen) + 20, np.float64) * np.abs(seen).max()
            assert (y[b, h, t] >= seen.min(0) - slack).all()
            assert (y[b, h, t] <= seen.max(0) + slack).all()
        else:
            assert not y[b, h, t].any(), "a token that sees nothing gets zeros"


def order_of_keys_is_only_in_the_mask(op, case):
    q, k, v, visible, dy, rng = make(case)
    order = rng.permutation(k.shape[2])
    y, vjp = op(q, k, v, visible)
    other, other_vjp = op(q, k[:, :, order], v[:, :, order], visible[..., order])
    balls = oracle_for(visible)(np.float64, dy, q, k, v)
    dq, dk, dv = vjp(dy)
    pairs = zip((y, dq, dk[:, :, order], dv[:, :, order]), (other, *other_vjp(dy)), balls, strict=True)
    for i, (a, b, ball) in enumerate(pairs):
        radius = ball.radius if i < 2 else ball.radius[:, :, order]
        assert (np.abs(a - b) <= 2 * radius).all()


def linear_in_the_values(op, case):
    q, k, v, visible, _, _ = make(case)
    y, _ = op(q, k, v, visible)
    checks.same_bits(op(q, k, 4 * v, visible)[0], 4 * y, "y of 4 v")
    shifted, _ = op(q, k, v + 3, visible)
    ball = oracle_for(visible)(np.float64, q, q, k, np.abs(v) + 4)[0]
    some = visible.any(-1)[:, None, :, None]
    assert (np.abs(shifted - (y + 3 * some)) <= 3 * ball.radius).all()


def changes_nothing(op, case):
    q, k, v, visible, dy, _ = make(case)
    before = visible.tobytes()
    checks.pure(lambda q, k, v: op(q, k, v, visible), (q, k, v), dy)
    assert visible.tobytes() == before


PROPERTIES = (
    one_number_at_a_time,
    torch_agrees,
    gradients,
    within_the_bound,
    in_any_layout,
    the_future_changes_no_bit,
    no_question_is_the_mean,
    features_twice_are_root_two,
    large_scores_do_not_overflow,
    in_the_hull_of_what_it_sees,
    order_of_keys_is_only_in_the_mask,
    linear_in_the_values,
    changes_nothing,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
@pytest.mark.parametrize("op", FORMS)
def test_attention(op, holds, case):
    holds(op, case)


def test_attention_kill_matrix():
    killed = checks.kill_matrix(PROPERTIES, wrong_nn.ATTENTION + wrong_nn.ATTENTION_IN_TILES, CASES)
    for law, wrong in {
        "the_future_changes_no_bit": ("mask=0", "mask=none", "look=1"),
        "no_question_is_the_mean": ("mask=0", "drop_key=True", "look=1"),
        "features_twice_are_root_two": ("scale=1", "scale=1/d"),
        "large_scores_do_not_overflow": ("shifted=False",),
        "in_the_hull_of_what_it_sees": ("mask=after", "grouping=h % G"),
    }.items():
        assert {(law, w) for w in wrong} <= killed, law


def test_the_fast_form_is_the_default():
    assert attention is attention_3


@st.composite
def cases(draw):
    G, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    T = draw(st.integers(0, 5))
    kind = draw(st.sampled_from(("causal", "holes", "all")))
    shape = (draw(st.integers(1, 3)), G * group, G, T, T + draw(st.integers(0 if T else 1, 4)), draw(st.integers(1, 9)))
    return (draw(st.integers(0, 9999)), *shape, kind)


@given(cases(), st.sampled_from((checks.contiguous, *checks.LAYOUTS)), st.sampled_from(checks.DTYPES))
def test_any_shape_and_layout_and_every_form(case, layout, dtype):
    """Each form is within the bound, so two of them are within twice the bound of each other."""
    q, k, v, visible, dy, _ = make(case)
    for op in FORMS:
        checks.inside(lambda q, k, v, op=op: op(q, k, v, visible), oracle_for(visible), [q, k, v], dy, dtype, layout)


@pytest.mark.parametrize("op", FORMS[1:])
def test_a_mask_for_all_sequences_at_once(op):
    q, k, v, visible, dy, _ = make(CASES[0])
    (y, vjp), (shared, shared_vjp) = (op(q, k, v, m) for m in (visible, visible[:1]))
    checks.same_bits(shared, y, "y")
    for a, b in zip(shared_vjp(dy), vjp(dy), strict=True):
        checks.same_bits(a, b, "cotangent")


# --- tiles: what no query of a tile sees is never touched -------------------------------------------------------------

# before the text, the lengths of the texts in a row, and how many scores eight tokens need in tiles of two
ROWS_OF_EIGHT = [
    (0, [8], 2 * (2 + 4 + 6 + 8)),
    (3, [8], 2 * (5 + 7 + 9 + 11)),
    (0, [4, 4], 2 * (2 + 4 + 2 + 4)),
    (0, [3, 5], 2 * (2 + 4 + 3 + 5)),  # the second tile looks at the end of one text and the beginning of the next
]


def row_of_eight(before, texts, rng):
    q, dy = rng.standard_normal((2, 1, 4, 8, 3))
    k, v = rng.standard_normal((2, 1, 2, before + 8, 3))
    segments = np.repeat(np.arange(len(texts)), texts)[None]
    return q, k, v, causal_mask(before + np.arange(8)[None], before + 8, segments), dy


@pytest.mark.parametrize(("before", "texts", "scores"), ROWS_OF_EIGHT)
def test_nothing_above_the_diagonal_is_computed(before, texts, scores, rng):
    q, k, v, visible, _ = row_of_eight(before, texts, rng)
    with patch.object(module, "attention_2", side_effect=attention_2) as calls:
        tiled(q, k, v, visible)
    sizes = [(call.args[0].shape[2], call.args[1].shape[2]) for call in calls.call_args_list]
    assert len(sizes) == 4
    assert sum(queries * keys for queries, keys in sizes) == scores


@pytest.mark.parametrize(("before", "texts", "scores"), ROWS_OF_EIGHT)
def test_not_a_number_beyond_the_reach_of_a_tile(before, texts, scores, rng):
    """For each tile: NaN in every key and value that its queries do not reach. Its y and dq keep their bits."""
    q, k, v, visible, dy = row_of_eight(before, texts, rng)
    y, vjp = tiled(q, k, v, visible)
    dq = vjp(dy)[0]
    for first in range(0, 8, 2):
        rows = slice(first, first + 2)
        seen = np.flatnonzero(visible[0, rows].any(axis=0))
        beyond = (np.arange(before + 8) < seen[0]) | (np.arange(before + 8) > seen[-1])
        assert beyond.any() or first == 6
        poisoned = (np.where(beyond[:, None], np.nan, x) for x in (k, v))
        with np.errstate(invalid="ignore"):  # other tiles do see them
            found, found_vjp = tiled(q, *poisoned, visible)
            found_dq = found_vjp(dy)[0]
        checks.same_bits(found[:, :, rows], y[:, :, rows], f"y of tile {first}")
        checks.same_bits(found_dq[:, :, rows], dq[:, :, rows], f"dq of tile {first}")


def test_keys_that_no_query_sees_are_not_read_and_get_nothing(rng):
    """Slots of a cache behind the text, and before all of a packed row's texts: NaN there is not seen at all."""
    q, k, v, visible, dy = row_of_eight(0, [4, 4], rng)
    around = [(0, 0), (0, 0), (2, 3), (0, 0)]
    wide = np.pad(visible, [(0, 0), (0, 0), (2, 3)])
    y, vjp = tiled(q, *(np.pad(x, around, constant_values=np.nan) for x in (k, v)), wide)
    expected, expected_vjp = tiled(q, k, v, visible)
    checks.same_bits(y, expected, "y")
    (dq, dk, dv), (dq_, dk_, dv_) = vjp(dy), expected_vjp(dy)
    checks.same_bits(dq, dq_, "dq")
    checks.same_bits(dk, np.pad(dk_, around), "dk")
    checks.same_bits(dv, np.pad(dv_, around), "dv")


def test_no_queries_at_all(rng):
    q, k = np.zeros((1, 2, 0, 3), np.float32), rng.standard_normal((1, 1, 4, 3)).astype(np.float32)
    y, vjp = attention_3(q, k, k, np.zeros((1, 0, 4), bool))
    assert y.shape == q.shape
    for found, like in zip(vjp(q), (q, k, k), strict=True):
        checks.same_bits(found, np.zeros_like(like), "cotangent")


# --- who sees whom ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_causal_mask_one_pair_at_a_time(data):
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    before = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    segments = None
    if data.draw(st.booleans()):
        before = [before[0]] * batch  # packed rows have no cache of different lengths
        segments = np.array(data.draw(st.lists(st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens),
                                               min_size=batch, max_size=batch)))  # fmt: skip
    keys = max(before) + tokens
    positions = np.array(before)[:, None] + np.arange(tokens)
    kept = positions.copy(), None if segments is None else segments.copy()
    found = causal_mask(positions, keys, segments)
    assert found.shape == (batch, tokens, keys)
    for b, t, j in np.ndindex(found.shape):
        slot = before[b] + t
        sees = j <= slot
        if segments is not None and j >= before[b]:
            sees = sees and segments[b, j - before[b]] == segments[b, t]
        assert found[b, t, j] == sees, (b, t, j)
    assert np.array_equal(positions, kept[0])
    assert segments is None or np.array_equal(segments, kept[1])


# --- the cache --------------------------------------------------------------------------------------------------------


def test_cache_of_rows_of_different_lengths(rng):
    """Slot m of a row holds its token at position m; padding is overwritten by the row's next tokens."""
    cache = KVCache(2, 3, 2, 8, 4, np.float64)
    k, v = rng.standard_normal((2, 3, 2, 5, 4))
    lengths = np.array([5, 2, 4])
    for layer in range(2):
        keys, values = cache.write(layer, k + layer, v - layer)
        assert keys.shape == values.shape == (3, 2, 5, 4)
        assert np.array_equal(keys, k + layer)
        assert np.array_equal(values, v - layer)
    assert cache.lengths.tolist() == [0, 0, 0]  # until all layers are done
    cache.advance(lengths)
    more_k, more_v = rng.standard_normal((2, 3, 2, 2, 4))
    keys, values = cache.write(0, more_k, more_v)
    assert keys.shape == (3, 2, 7, 4)
    for b, n in enumerate(lengths):
        assert np.array_equal(keys[b, :, :n], k[b, :, :n])
        assert np.array_equal(values[b, :, :n], v[b, :, :n])
        assert np.array_equal(keys[b, :, n : n + 2], more_k[b])
        assert np.array_equal(values[b, :, n : n + 2], more_v[b])
    assert np.array_equal(cache.keys[1, 0, :, :5], k[0] + 1)  # the other layer is untouched
    assert not cache.keys[1, 0, :, 5:].any()


def test_cache_refuses_what_does_not_fit(rng):
    cache = KVCache(1, 2, 1, 4, 3)
    k = rng.standard_normal((2, 1, 3, 3)).astype(np.float32)
    cache.write(0, k, k)
    cache.advance(np.array([1, 2]))
    before = cache.keys.tobytes()
    with pytest.raises(ValueError, match="the cache has 4 slots, 5 are needed"):
        cache.write(0, k, k)
    assert cache.keys.tobytes() == before
    cache.write(0, k[:, :, :2], k[:, :, :2])  # exactly full


def test_prefix_fills_the_first_slots_of_every_row_and_layer(rng):
    prefix = rng.standard_normal((2, 2, 1, 3, 4)).astype(np.float32)
    cache = KVCache(2, 3, 1, 5, 4)
    cache.put_prefix(prefix)
    assert cache.lengths.tolist() == [3, 3, 3]
    for layer, row in np.ndindex(2, 3):
        assert np.array_equal(cache.keys[layer, row, :, :3], prefix[layer, 0])
        assert np.array_equal(cache.values[layer, row, :, :3], prefix[layer, 1])


def test_cache_counts_its_bytes_and_does_not_print_its_contents():
    assert repr(KVCache(1, 2, 1, 4, 3)).startswith("KVCache(layers=1, batch=2, kv_heads=1, capacity=4, head_dim=3")
    assert "keys=" not in repr(KVCache(1, 2, 1, 4, 3))
    assert "values=" not in repr(KVCache(1, 2, 1, 4, 3))
    assert KVCache(2, 3, 4, 5, 6).nbytes == 2 * 2 * 3 * 4 * 5 * 6 * 4
    assert KVCache(2, 3, 4, 5, 6, np.float64).nbytes == 2 * 2 * 3 * 4 * 5 * 6 * 8
