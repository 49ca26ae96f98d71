"""Philox, its uniform numbers, and dropout: every bit, against one element at a time on Python's integers."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.operation import Operation, arithmetic, rounded, storage
from minift.nn import dropout

WORD = 2**32 - 1
SIGMAS = 6  # a right generator fails about twice in 10⁹ runs; a key's numbers never change


def philox_one(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10) -> tuple[int, int, int, int]:
    """Philox4x32 on Python integers: (c0, c1, c2, c3), (k0, k1) -> four words. Salmon et al. 2011, figure 2.

    The left half L and the right half R of each pair: L′ = high(M R) ⊕ key ⊕ L, R′ = low(M R), the pairs exchanged."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def triton_rand(key: int, counter: int) -> np.float32:
    """`tl.rand`, transcribed from triton/language/random.py (3.x) on Python integers.

    `randint` is the first word of philox; `uint_to_uniform_float` reads it as int32, takes −x − 1 of negative ones,
    and multiplies in float32 by 4.6566127342e-10, "the maximum value such that MAX_INT * scale < 1.0"."""
    word = philox_one((counter & WORD, counter >> 32, 0, 0), (key & WORD, key >> 32))[0]
    signed = word - 2**32 if word >= 2**31 else word
    return np.float32(-signed - 1 if signed < 0 else signed) * np.float32(4.6566127342e-10)


# Random123's kat_vectors, philox4x32 10: counter, key, answer
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

# --- philox and uniform -----------------------------------------------------------------------------------------------


class Counters(NamedTuple):
    key: int
    counters: tuple[int, ...]
    rounds: int = 10
    dtype: str = "float32"


def gives_the_known_answer(f, case):
    found = f(0, np.array([0], np.uint64))[:, 0].tolist()
    assert found == list(KNOWN[0][2]), f"counter 0 of key 0: {found}, needed {KNOWN[0][2]}"


def words_one_at_a_time(f, case):
    found = f(case.key, np.array(case.counters, np.uint64), case.rounds)
    wanted = [
        philox_one((c & WORD, c >> 32, 0, 0), (case.key & WORD, case.key >> 32), case.rounds) for c in case.counters
    ]
    common.same_bits(found, np.array(wanted, np.uint32).reshape(-1, 4).T, "words")


def numbers_one_at_a_time(f, case):
    found = f(case.key, np.array(case.counters, np.uint64))
    wanted = [triton_rand(case.key, c) for c in case.counters]
    common.same_bits(found, np.array(wanted, np.float32), "uniform numbers")


def counter_cases(dtypes):
    word = st.integers(0, 2**64 - 1)
    return st.builds(Counters, word, st.lists(word, max_size=5).map(tuple), st.integers(1, 12))


COUNTERS = (
    Counters(0, (0, 1, WORD, WORD + 1, 2**64 - 1)),
    Counters(2**64 - 1, (2**63, 7)),
    Counters(0x299F31D0A4093822, (0x85A308D3243F6A88,)),
    Counters(0xDEADBEEF, tuple(range(50))),
    Counters(5, (2**40 + 3, 9), 7),
    Counters(3, ()),
)

# --- dropout ----------------------------------------------------------------------------------------------------------


class Dropped(NamedTuple):
    shape: tuple[int, ...]
    p: float
    key: int
    offset: int = 0
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Dropped) -> tuple[np.ndarray, np.ndarray]:
    """x and dy, rounded to the dtype."""
    rng = np.random.default_rng(case.seed)
    x, dy = (rounded(rng.standard_normal(case.shape), case.dtype) for _ in range(2))
    return x, dy


def kept(case: Dropped) -> np.ndarray:
    """Element i of the row-major order is kept where `tl.rand` of offset + i is above p."""
    n = math.prod(case.shape)
    found = [triton_rand(case.key, case.offset + i) > np.float32(case.p) for i in range(n)]
    return np.array(found, bool).reshape(case.shape)


def exact(x: np.ndarray, keep: np.ndarray, p: float, dtype: str) -> np.ndarray:
    """x m / (1 − p): one rounding of 1 / (1 − p), one of the product, one to the dtype that it is stored in."""
    type_ = arithmetic(dtype)
    with np.errstate(invalid="ignore"):  # 0 · ∞
        return rounded(x.astype(type_) * (keep * type_(1 / (1 - p))), dtype)


def one_element_at_a_time(f, case):
    """Every bit of y and dx, also of −0, in every layout."""
    (x, dy), keep = arrays(case), kept(case)
    for layout in (np.ascontiguousarray, common.strided, common.transposed, common.misaligned, common.apart):
        y, vjp = f(*(layout(x) if x.ndim else x,), case.p, case.key, case.offset)
        common.same_bits(y, exact(x, keep, case.p, case.dtype), f"y of {layout.__name__} x")
        dx = vjp(layout(dy) if dy.ndim else dy)
        common.same_bits(dx, exact(dy, keep, case.p, case.dtype), f"dx of {layout.__name__} dy")


def dropout_changes_nothing(f, case):
    x, dy = arrays(case)
    common.changes_nothing(lambda x: f(x, case.p, case.key, case.offset), [x], dy, case.dtype)


def a_part_has_the_mask_of_the_whole(f, case):
    """Rows behind the first one, with the first row's size more as the offset: the same bits."""
    x, dy = arrays(case)
    if not x.ndim:
        return
    y, vjp = f(x, case.p, case.key, case.offset)
    rest, rest_vjp = f(x[1:], case.p, case.key, case.offset + x[:1].size)
    common.same_bits(rest, y[1:], "y of the rows behind the first")
    common.same_bits(rest_vjp(dy[1:]), vjp(dy)[1:], "dx of the rows behind the first")


def what_is_dropped_is_exactly_p(f, case):
    """u > p keeps: with p one of the numbers that u takes, that one is dropped; with the number before it, kept."""
    ones: np.ndarray = np.ones(3, storage(case.dtype))
    for i in range(3):
        u = triton_rand(case.key, case.offset + i)
        for p, wanted in ((u, False), (np.nextafter(u, np.float32(0)), True)):
            found = f(ones, float(p), case.key, case.offset)[0][i] != 0
            assert found == wanted, f"u is {u!r} and p {p!r}: {'kept' if found else 'dropped'}"


def nan_stays_nan(f, case):
    """0 · x and not 0: what is broken is not hidden by a mask."""
    x: np.ndarray = np.array([np.nan, np.inf, -1.0], storage(case.dtype))
    with np.errstate(invalid="ignore"):
        y, _ = f(x, 0.9999, case.key, case.offset)
    wanted = exact(x, kept(case._replace(shape=(3,), p=0.9999)), 0.9999, case.dtype)
    assert np.array_equal(np.isnan(y), np.isnan(wanted)), f"{y}, needed {wanted}"


def refuses_probabilities_outside(f, case):
    x, _ = arrays(case)
    for p in (-0.1, 1.0, 1.5, math.nan):
        try:
            f(x, p, case.key, case.offset)
        except ValueError as error:
            assert str(p) in str(error), f"p = {p}: the error does not say so"
        else:
            raise AssertionError(f"p = {p} was accepted")


def dropout_cases(dtypes):
    word = st.integers(0, 2**64 - 1)
    shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
    p = st.floats(0, 0.99)
    return st.builds(
        Dropped, shapes, p, word, st.integers(0, 2**60), st.sampled_from(sorted(dtypes)), st.integers(0, 99)
    )


DROPPED = (
    Dropped((5, 8), 0.3, 7),
    Dropped((2, 3, 7), 0.5, 2**63 + 1, 1000, "float16"),
    Dropped((40,), 0.9, 12345, WORD - 3),
    Dropped((3, 5), 0.0, 2**64 - 1, 1, "float16"),
    Dropped((0, 3), 0.2, 4),
    Dropped((6, 2), 0.01, 2**32 + 16, 2**40),
    Dropped((1027,), 0.25, 1, 16, seed=3),
    Dropped((2, 1025), 0.75, 1 << 31, 2**62, "float16"),
    Dropped((2, 5), 0.3, 11, 3, "float64"),
    Dropped((3, 3), 0.3, 11, 3, "bfloat16"),
)

OPERATIONS = (
    Operation(
        "dropout.philox",
        dropout.philox,
        "f(key, counter (n,) uint64, rounds) -> words (4, n) uint32",
        counter_cases,
        COUNTERS,
        (gives_the_known_answer, words_one_at_a_time),
    ),
    Operation(
        "dropout.uniform",
        dropout.uniform,
        "f(key, counter (n,) uint64) -> u (n,) float32",
        counter_cases,
        COUNTERS,
        (numbers_one_at_a_time,),
    ),
    Operation(
        "dropout.dropout",
        dropout.dropout,
        "f(x (...), p, key, offset) -> y (...), vjp; vjp(dy) -> dx",
        dropout_cases,
        DROPPED,
        (
            one_element_at_a_time,
            dropout_changes_nothing,
            a_part_has_the_mask_of_the_whole,
            what_is_dropped_is_exactly_p,
            nan_stays_nan,
            refuses_probabilities_outside,
        ),
    ),
)
