"""Philox's known answers, its uniform numbers, and dropout whose mask is a function of the element."""

import math

import numpy as np
import pytest
import wrong_nn
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance.ball import Ball
from minift.conformance.gradients import check_vjp
from minift.conformance.operations.dropout import KNOWN, SIGMAS, WORD, philox_one, triton_rand
from minift.nn.dropout import dropout, fold_in, philox, uniform
from nn import checks


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_scalar_oracle_gives_the_known_answers(counter, key, answer):
    assert philox_one(counter, key) == answer


def known_answer(op, case):
    assert op(0, np.array([0]))[:, 0].tolist() == list(KNOWN[0][2])


def one_word_at_a_time(op, case):
    key, counters, rounds = case
    found = op(key, np.array(counters, np.uint64), rounds)
    assert found.dtype == np.uint32
    assert found.shape == (4, len(counters))
    for i, counter in enumerate(counters):
        expected = philox_one((counter & WORD, counter >> 32, 0, 0), (key & WORD, key >> 32), rounds)
        assert tuple(found[:, i].tolist()) == expected, f"counter {counter}"


PHILOX_CASES = [
    (0, (0, 1, WORD, WORD + 1, 2**64 - 1), 10),
    (2**64 - 1, (2**63, 7), 10),
    (0x299F31D0A4093822, (0x85A308D3243F6A88,), 10),
    (0xDEADBEEF, tuple(range(50)), 10),
    (5, (2**40 + 3, 9), 7),
]
PHILOX = (known_answer, one_word_at_a_time)


@pytest.mark.parametrize("case", PHILOX_CASES)
@pytest.mark.parametrize("holds", PHILOX)
def test_philox(holds, case):
    holds(philox, case)


def wrong_philox(
    *,
    m0=0xD2511F53,
    m1=0xCD9E8D57,
    w0=0x9E3779B9,
    w1=0xBB67AE85,
    rounds_off=0,
    c1_used=True,
    k1_used=True,
    exchanged=True,
    bump_first=False,
    order=(0, 1, 2, 3),
):
    def op(key, counter, rounds=10):
        columns = []
        for n in counter.astype(np.uint64).tolist():
            c = [n & WORD, n >> 32 if c1_used else 0, 0, 0]
            k0, k1 = key & WORD, key >> 32 if k1_used else 0
            for _ in range(rounds + rounds_off):
                if bump_first:
                    k0, k1 = (k0 + w0) % 2**32, (k1 + w1) % 2**32
                high0, low0 = divmod(m0 * c[0], 2**32)
                high1, low1 = divmod(m1 * c[2], 2**32)
                c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
                c = c if exchanged else [c[2], c[3], c[0], c[1]]
                if not bump_first:
                    k0, k1 = (k0 + w0) % 2**32, (k1 + w1) % 2**32
            columns.append([c[i] for i in order])
        return np.array(columns, np.uint32).T

    return op


def test_philox_kill_matrix():
    switches = [
        {"m0": 0xD2511F55}, {"m1": 0xCD9E8D59}, {"w0": 0x9E3779B8}, {"w1": 0xBB67AE84}, {"rounds_off": -1},
        {"c1_used": False}, {"k1_used": False}, {"exchanged": False}, {"bump_first": True}, {"order": (3, 2, 1, 0)},
    ]  # fmt: skip
    wrong = [wrong_philox(**switch) for switch in switches]
    for op, switch in zip(wrong, switches, strict=True):
        op.__name__ = str(switch)
    checks.kill_matrix(PHILOX, wrong, PHILOX_CASES)
    for case in PHILOX_CASES:  # with no switch turned it is right
        one_word_at_a_time(wrong_philox(), case)


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**64 - 1), max_size=5), st.integers(1, 12))
def test_philox_anywhere(key, counters, rounds):
    one_word_at_a_time(philox, (key, tuple(counters), rounds))


# --- uniform ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 9))
def test_uniform_is_tritons(key, start):
    counters = np.arange(start, start + 8, dtype=np.uint64)
    checks.same_bits(uniform(key, counters), np.array([triton_rand(key, int(c)) for c in counters]), "uniform")


def test_the_largest_uniform_number_is_below_one():
    assert np.float32(2**31 - 1) * np.float32(4.6566127342e-10) < 1


N = 1 << 16


@pytest.mark.parametrize("key", [0, 1, 2**63 + 11])
def test_uniform_numbers_are_uniform(key):
    u = uniform(key, np.arange(N)).astype(float)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) <= SIGMAS * math.sqrt(1 / 12 / N)
    assert abs(u.var() - 1 / 12) <= SIGMAS * math.sqrt(1 / 180 / N)  # Var[(u − ½)²] = 1/180
    assert abs(np.mean((u[1:] - 0.5) * (u[:-1] - 0.5))) <= SIGMAS / 12 / math.sqrt(N - 1)  # neighbors
    other = uniform(key + 1, np.arange(N)).astype(float)
    assert abs(np.mean((u - 0.5) * (other - 0.5))) <= SIGMAS / 12 / math.sqrt(N)  # keys
    # Dvoretzky–Kiefer–Wolfowitz: P(sup |F_n − F| > t) ≤ 2 exp(−2 n t²) = 2e-9
    t = math.sqrt(math.log(1e9) / (2 * N))
    grid = (np.arange(N) + 1) / N
    assert np.abs(np.sort(u) - grid).max() <= t + 1 / N


def test_fold_in_makes_streams_of_their_own():
    """The first two words as a 64-bit key, one of them for each number; no two of a few thousand agree."""
    keys = [fold_in(key, data) for key in (0, 1, 2**64 - 1) for data in range(1000)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    assert any(key >> 32 for key in keys)
    words = philox_one((7, 0, 0, 0), (3, 1))
    assert fold_in(3 + 2**32, 7) == words[0] + (words[1] << 32)
    assert fold_in(fold_in(5, 1), 2) != fold_in(fold_in(5, 2), 1)


# --- dropout: op(x, p, key, offset) -----------------------------------------------------------------------------------

CASES = [
    (1, (5, 8), 0.3, 7, 0),
    (2, (2, 3, 7), 0.5, 2**63 + 1, 1000),
    (3, (40,), 0.9, 12345, WORD - 3),
    (4, (3, 5), 0.0, 3, 1),
    (5, (0, 3), 0.2, 4, 0),
    (6, (6, 2), 0.01, 9, 2**40),
]


def make(case):
    seed, shape, p, key, offset = case
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), p, key, offset, rng.standard_normal(shape), rng


def one_element_at_a_time(op, case):
    """Element i of the row-major order is kept where tl.rand of offset + i is above p."""
    x, p, key, offset, dy, _ = make(case)
    for dtype in checks.DTYPES:
        y, vjp = op(x.astype(dtype), p, key, offset)
        dx = vjp(dy.astype(dtype))
        for n, i in enumerate(np.ndindex(x.shape)):
            factor = dtype(1 / (1 - p)) if triton_rand(key, offset + n) > np.float32(p) else dtype(0)
            assert y[i] == dtype(x[i]) * factor, f"element {n}"
            assert dx[i] == dtype(dy[i]) * factor, f"element {n}"


def keeps_the_dtype_in_any_layout(op, case):
    x, p, key, offset, dy, _ = make(case)
    keep = np.array([triton_rand(key, offset + n) > np.float32(p) for n in range(x.size)]).reshape(x.shape)

    def oracle(dtype, dy, x):
        factor = Ball(keep, dtype) * (1 / (1 - p))
        return Ball(x, dtype) * factor, Ball(dy, dtype) * factor

    for layout in (checks.contiguous, *checks.LAYOUTS):
        for dtype in checks.DTYPES:
            checks.inside(lambda x: op(x, p, key, offset), oracle, [x], dy, dtype, layout)


def gradient(op, case):
    x, p, key, offset, _, rng = make(case)
    if x.size:
        check_vjp(lambda x: op(x, p, key, offset), x, rng=rng)


def a_part_has_the_mask_of_the_whole(op, case):
    x, p, key, offset, dy, _ = make(case)
    x = np.abs(x) + 1
    y, vjp = op(x, p, key, offset)
    rest, rest_vjp = op(x[1:], p, key, offset + x[:1].size)
    checks.same_bits(rest, y[1:], "y")
    checks.same_bits(rest_vjp(dy[1:]), vjp(dy)[1:], "dx")


def share_and_mean(op, case):
    """Of 2¹⁴ ones, 1 − p are kept, and their mean stays 1: within six standard deviations."""
    _, p, key, offset, _, _ = make(case)
    n = 1 << 14
    y, vjp = op(np.ones(n), p, key, offset)
    assert abs((y != 0).mean() - (1 - p)) <= SIGMAS * math.sqrt(p * (1 - p) / n)
    assert abs(y.mean() - 1) <= SIGMAS * math.sqrt(p / (1 - p) / n) + 1e-12
    dy = np.random.default_rng(n).standard_normal(n)
    checks.same_bits(vjp(dy), dy * y, "the mask of the pullback")
    if p:
        other = op(np.ones(n), p, key + 1, offset)[0]
        both = ((y != 0) & (other != 0)).mean()
        q = (1 - p) ** 2
        assert abs(both - q) <= SIGMAS * math.sqrt(q * (1 - q) / n), "another key is another mask"


def changes_nothing(op, case):
    x, p, key, offset, dy, _ = make(case)
    checks.pure(lambda x: op(x, p, key, offset), (x,), dy)


def refuses_probabilities_outside(op, case):
    x, _, key, offset, _, _ = make(case)
    for p in (-0.1, 1.0, 1.5, math.nan):
        try:
            op(x, p, key, offset)
        except ValueError as error:
            assert str(p) in str(error)
        else:
            raise AssertionError(f"p = {p} was accepted")


PROPERTIES = (
    one_element_at_a_time,
    keeps_the_dtype_in_any_layout,
    gradient,
    a_part_has_the_mask_of_the_whole,
    share_and_mean,
    changes_nothing,
    refuses_probabilities_outside,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_dropout(holds, case):
    holds(dropout, case)


def test_dropout_kill_matrix():
    checks.kill_matrix(PROPERTIES, wrong_nn.DROPOUT, CASES)


def test_without_an_offset_it_starts_at_zero(rng):
    x = rng.standard_normal((4, 5))
    checks.same_bits(dropout(x, 0.5, 9)[0], dropout(x, 0.5, 9, 0)[0], "y")
    assert not np.array_equal(dropout(x, 0.5, 9)[0], dropout(x, 0.5, 9, 1)[0])
    checks.same_bits(dropout(x, 0.0, 9)[0], x, "p = 0")


def test_what_is_dropped_is_exactly_p():
    """u > p keeps: with p one of the numbers that u takes, that one is dropped."""
    u = uniform(3, np.arange(64))
    kept = dropout(np.ones(64, np.float32), float(u[10]), 3)[0] != 0
    assert np.array_equal(kept, u > u[10])
    assert not kept[10]
