"""Attention: within the bound of each form that one may compute it in, and the laws that know each classic mistake."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.attention_oracle import allowed, oracle_for
from minift.conformance.ball import Ball
from minift.conformance.bounds import gamma
from minift.conformance.gradients import check_vjp
from minift.conformance.operation import Operation, arithmetic
from minift.nn import attention

KINDS = ("causal", "holes", "some see nothing", "all", "packed")


class Heads(NamedTuple):
    """`tokens` queries among `keys`; the keys before the text are a prefix or a cache. In a packed row every third
    token begins another text, elsewhere in each row of the batch."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    keys: int
    d: int
    kind: str = "causal"
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Heads) -> list[np.ndarray]:
    """dy, q, k, v and what is visible, rounded to the case's dtype."""
    batch, heads, kv_heads, tokens, keys, d, kind, dtype, seed = case
    rng = np.random.default_rng(seed)
    dy, q = rng.standard_normal((2, batch, heads, tokens, d))
    k, v = rng.standard_normal((2, batch, kv_heads, keys, d))
    visible = np.broadcast_to(np.arange(keys) <= np.arange(keys - tokens, keys)[:, None], (batch, tokens, keys)).copy()
    if kind == "all":
        visible[:] = True
    elif kind == "packed":
        visible[:, :, keys - tokens :] &= segments(case)[:, :, None] == segments(case)[:, None]
    elif kind != "causal":
        visible &= rng.random(visible.shape) < 0.6
        visible[..., :1] |= ~visible.any(-1, keepdims=True)
        if kind == "some see nothing":
            visible[0, :2] = visible[-1, -1:] = False
    return common.prepared([dy, q, k, v, visible], dtype)


def segments(case: Heads) -> np.ndarray:
    return (np.arange(case.tokens) + np.arange(case.batch)[:, None]) // 3


def is_within_its_bound(f, case):
    dy, *args = arrays(case)
    common.within(f, oracle_for(case.dtype), args, dy, case.dtype)


def changes_nothing(f, case):
    dy, *args = arrays(case)
    common.changes_nothing(f, args, dy, case.dtype)


def any_layout(f, case):
    dy, *args = arrays(case)
    common.any_layout(f, oracle_for(case.dtype), args, dy, case.dtype)


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64" and case.tokens:
        _, q, k, v, visible = arrays(case)
        check_vjp(lambda q, k, v: f(q, k, v, visible), q, k, v, rng=np.random.default_rng(case.seed))


def what_nobody_sees_changes_no_bit(f, case):
    """Huge keys and values that are hidden, the last one among them; their own cotangents are exactly zero."""
    dy, q, k, v, visible = arrays(case)
    visible[:, :, -1:] = False
    hidden = ~np.any(visible, axis=1, keepdims=True).reshape(case.batch, 1, case.keys, 1)  # seen by no query
    y, vjp = f(q, k, v, visible)
    huge = 3e4 if case.dtype == "float16" else 1e9
    y_huge, vjp_huge = f(q, *(np.where(hidden, x.dtype.type(huge), x) for x in (k, v)), visible)
    common.same_bits(y_huge, y, "y beside huge hidden values")
    for name, a, b in zip(("dq", "dk", "dv"), vjp_huge(dy), vjp(dy), strict=True):
        common.same_bits(a + a.dtype.type(0), b + b.dtype.type(0), f"{name} beside huge hidden values")
        if name != "dq":
            assert not (hidden & (a != 0)).any(), f"{name} of what nobody sees is not zero"


def what_sees_nothing_gets_nothing(f, case):
    """y and dq of such a token are zero, and its cotangent, however large, reaches nobody."""
    dy, q, k, v, visible = arrays(case)
    visible[:, case.tokens // 2 :: 3] = False
    blind = np.broadcast_to(~np.any(visible, axis=-1, keepdims=True)[:, None], q.shape)
    y, vjp = f(q, k, v, visible)
    assert not y[blind].any(), "y of a token that sees nothing is not zero"
    loud = np.where(blind, dy.dtype.type(100), dy)
    cotangents, others = vjp(dy), vjp(loud)
    assert not cotangents[0][blind].any(), "dq of a token that sees nothing is not zero"
    for name, a, b in zip(("dq", "dk", "dv"), others, cotangents, strict=True):
        assert np.array_equal(a, b), f"{name} depends on the cotangent of a token that sees nothing"


def without_a_question_the_mean(f, case):
    """q = 0: every visible value counts the same."""
    _, q, k, v, visible = arrays(case)
    number = np.repeat(v, q.shape[1] // k.shape[1], axis=1).astype(np.float64)
    count = np.maximum(visible.sum(-1), 1)[:, None, :, None].astype(np.float64)
    type_ = arithmetic(case.dtype)
    mean = (Ball(visible[:, None].astype(np.float64), type_) @ Ball(number, type_)) * (1 / Ball(count, type_))
    mean.stored(case.dtype).check(f(0 * q, k, v, visible)[0], "y for q = 0")


def four_times_the_features_are_twice_the_scores(f, case):
    """[q q q q] and [k k k k] against 2q and k: only the right 1/√d gives the same."""
    dy, q, k, v, visible = arrays(case)
    wide = [np.concatenate([x, x, x, x], axis=-1) for x in (dy, q, k, v)]
    y, _ = f(2 * q, k, v, visible)
    found, _ = f(*wide[1:], visible)
    wider = allowed(case.dtype, wide[0], wide[1], wide[2], wide[3], visible)
    radius = allowed(case.dtype, dy, 2 * q, k, v, visible)[0] + wider[0][..., : case.d]
    assert _near(found[..., : case.d], y, radius), "1/√d is not what it should be"


def large_scores_do_not_overflow(f, case):
    """Scores near 1e5."""
    dy, q, k, v, visible = arrays(case)
    y, vjp = f(300 * q, 300 * k, v, visible)
    for name, x in zip(("y", "dq", "dk", "dv"), (y, *vjp(dy)), strict=True):
        assert np.isfinite(x).all(), f"{name} is not finite for scores near 1e5"


def in_the_hull_of_what_it_sees(f, case):
    _, q, k, v, visible = arrays(case)
    y, _ = f(3 * q, k, v, visible)
    type_ = arithmetic(case.dtype)
    rounding = float(np.finfo(k.dtype).eps) * 2 + gamma(case.keys + 99, type_)
    for b, h, t in np.ndindex(y.shape[:3]):
        seen = v[b, h // (case.heads // case.kv_heads)][visible[b, t]].astype(np.float64)
        if len(seen):
            slack = rounding * np.abs(seen).max() + 2.0**-24
            inside = (y[b, h, t] >= seen.min(0) - slack) & (y[b, h, t] <= seen.max(0) + slack)
            assert inside.all(), f"y of head {h}, token {t} lies outside of what it sees"


def a_shift_of_all_keys_changes_nothing(f, case):
    """k + c moves all scores of a query alike. On a grid, so that the sum is exact."""
    dy, q, k, v, visible = arrays(case)
    k = np.round(k * 64) / 64
    c = np.round(np.linspace(-2, 2, case.d) * 64).astype(k.dtype) / k.dtype.type(64)
    k, shifted = k.astype(q.dtype), (k + c).astype(q.dtype)
    radius = sum(allowed(case.dtype, dy, q, x, v, visible)[0] for x in (k, shifted))
    assert _near(f(q, shifted, v, visible)[0], f(q, k, v, visible)[0], radius), "y depends on a shift of all keys"


def linear_in_the_values(f, case):
    dy, q, k, v, visible = arrays(case)
    y, _ = f(q, k, v, visible)
    times4, normal = f(q, k, 4 * v, visible)[0], np.abs(y) > 1e-3  # subnormal float16 numbers round elsewhere
    assert np.array_equal(times4[normal], 4 * y[normal]), "y of 4 v is not 4 y"
    v = np.round(v * 64).astype(v.dtype) / v.dtype.type(64)
    some = np.any(visible, axis=-1, keepdims=True)[:, None]
    radius = sum(allowed(case.dtype, dy, q, k, x, visible)[0] for x in (v, v + 3))
    found = f(q, k, v + 3, visible)[0].astype(np.float64)
    assert _near(found, f(q, k, v, visible)[0].astype(np.float64) + 3 * some, radius), "y of v + 3 is not y + 3"


def order_of_keys_is_only_in_the_mask(f, case):
    dy, q, k, v, visible = arrays(case)
    order = np.random.default_rng(case.seed).permutation(case.keys)
    y, vjp = f(q, k, v, visible)
    other, other_vjp = f(q, k[:, :, order], v[:, :, order], visible[..., order])
    found = (other, *other_vjp(dy))
    expected = (y, *(c if i == 0 else c[:, :, order] for i, c in enumerate(vjp(dy))))
    radii = (r if i < 2 else r[:, :, order] for i, r in enumerate(allowed(case.dtype, dy, q, k, v, visible)))
    for name, a, b, radius in zip(("y", "dq", "dk", "dv"), found, expected, radii, strict=True):
        assert _near(a, b, 2 * radius), f"{name} depends on the order of the keys"


def shared_heads_are_repeated_heads(f, case):
    """One key/value head a query head, several of them equal; their cotangents add up to the shared one's."""
    dy, q, k, v, visible = arrays(case)
    group = case.heads // case.kv_heads
    repeated = [np.repeat(x, group, axis=1) for x in (k, v)]
    y, vjp = f(q, k, v, visible)
    other, other_vjp = f(q, *repeated, visible)

    def folded(x):
        return x.reshape(case.batch, case.kv_heads, group, *x.shape[2:]).sum(2, dtype=np.float64)

    dq, *others = other_vjp(dy)
    radii = allowed(case.dtype, dy, q, k, v, visible)
    more = allowed(case.dtype, dy, q, repeated[0], repeated[1], visible)
    more = (*more[:2], *map(folded, more[2:]))
    pairs = zip((other, dq, *map(folded, others)), (y, *vjp(dy)), radii, more, strict=True)
    for name, (a, b, r1, r2) in zip(("y", "dq", "dk", "dv"), pairs, strict=True):
        assert _near(a, b, r1 + r2 + gamma(group, np.float64) * np.abs(a)), f"{name} is not that of repeated heads"


def packed_texts_are_separate_texts(f, case):
    """A row of several texts against each text alone, behind the prefix that all of them see."""
    if case.kind == "packed":
        dy, q, k, v, visible = arrays(case)
        y, vjp = f(q, k, v, visible)
        dq = vjp(dy)[0]
        before = case.keys - case.tokens
        radii = allowed(case.dtype, dy, q, k, v, visible)
        for text in np.unique(segments(case)[0]):
            row, at = np.s_[:1], np.flatnonzero(segments(case)[0] == text)
            keys = np.concatenate([np.arange(before), before + at])
            part = (q[row][:, :, at], *(x[row][:, :, keys] for x in (k, v)), visible[row][:, at][:, :, keys])
            alone, alone_vjp = f(*part)
            more = allowed(case.dtype, dy[row][:, :, at], *part)
            pairs = ((alone, y, 0), (alone_vjp(dy[row][:, :, at])[0], dq, 1))
            for a, b, i in pairs:
                radius = more[i] + radii[i][row][:, :, at]
                assert _near(a, b[row][:, :, at], radius), f"{('y', 'dq')[i]} of text {text} depends on the others"


def one_mask_for_all_sequences(f, case):
    dy, q, k, v, visible = arrays(case)
    (y, vjp), (shared, shared_vjp) = (f(q, k, v, m) for m in (np.repeat(visible[:1], case.batch, 0), visible[:1]))
    common.same_bits(shared, y, "y with one mask for all sequences")
    for a, b in zip(shared_vjp(dy), vjp(dy), strict=True):
        common.same_bits(a, b, "a cotangent with one mask for all sequences")


def _near(a, b, radius) -> bool:
    return bool((np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) <= radius).all())


def cases(dtypes):
    def build(batch, kv_heads, group, tokens, before, d, kind, dtype, seed):
        keys = max(tokens + before, 1)
        return Heads(batch, kv_heads * group, kv_heads, tokens, keys, d, kind, dtype, seed)

    small = st.integers(1, 3)
    shape = small, small, small, st.integers(0, 20), st.integers(0, 20), st.integers(1, 9)
    return st.builds(build, *shape, st.sampled_from(KINDS), st.sampled_from(sorted(dtypes)), st.integers(0, 99))


FIXED = (
    Heads(2, 4, 2, 5, 5, 3, "packed", "float32", 1),
    Heads(1, 6, 2, 3, 7, 4, "causal", "float32", 2),  # four keys before the text
    Heads(2, 2, 2, 4, 6, 2, "holes", "float16", 3),
    Heads(1, 4, 1, 4, 4, 5, "some see nothing", "float32", 4),
    Heads(2, 1, 1, 1, 1, 1, "causal", "float16", 6),
    Heads(1, 4, 2, 0, 3, 2, "causal", "float32", 7),
    Heads(2, 2, 1, 1, 6, 3, "causal", "float32", 8),  # a token that is generated
    Heads(1, 2, 1, 7, 9, 3, "packed", "float16", 10),  # a prefix of two keys, which belongs to every text
    Heads(1, 2, 1, 18, 34, 17, "causal", "float32", 11),  # several tiles of 16, the last ones not full
    Heads(1, 2, 1, 17, 19, 16, "some see nothing", "float16", 12),
    *(Heads(2, 4, 2, 5, 7, 3, kind, "float64", 13) for kind in KINDS),
)

PROPERTIES = (
    is_within_its_bound,
    changes_nothing,
    any_layout,
    pullback_is_the_transpose_of_the_derivative,
    what_nobody_sees_changes_no_bit,
    what_sees_nothing_gets_nothing,
    without_a_question_the_mean,
    four_times_the_features_are_twice_the_scores,
    large_scores_do_not_overflow,
    in_the_hull_of_what_it_sees,
    a_shift_of_all_keys_changes_nothing,
    linear_in_the_values,
    order_of_keys_is_only_in_the_mask,
    shared_heads_are_repeated_heads,
    packed_texts_are_separate_texts,
    one_mask_for_all_sequences,
)

TAKES = (
    "f(q (batch, heads, tokens, d), k, v (batch, kv_heads, keys, d), visible (#batch, tokens, keys) bool)"
    " -> y (batch, heads, tokens, d), vjp; vjp(dy) -> dq, dk, dv"
)

OPERATIONS = (Operation("attention.attention", attention.attention, TAKES, cases, FIXED, PROPERTIES),)
