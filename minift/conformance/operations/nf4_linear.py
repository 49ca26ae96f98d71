"""x Ŵᵀ with an NF4 matrix: the weights of `nf4.dequantize` to the last bit, and sums within the bound of float32.

An implementation is `f(q, x) -> y, vjp` with `vjp(dy) -> dx, None`, for an `NF4Tensor` of the reference. Its weights
are looked at by multiplying with rows of the identity: a sum of zeros and one weight has no rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import common
from minift.conformance.ball import Ball
from minift.conformance.operation import Operation, arithmetic, rounded, storage
from minift.quant import nf4
from minift.quant.double_quant import DoubleQuantizedScales
from minift.quant.nf4 import NF4Tensor

KINDS = ("normal", "wide", "exact")


class Product(NamedTuple):
    rows: tuple[int, ...]  # the shape of x without its last axis
    shape: tuple[int, int]  # (out, in)
    block_size: int = 64
    nested: int = 0  # how many scales share a nested scale; 0: float32 scales
    dtype: str = "float32"
    kind: str = "normal"
    seed: int = 0


@cache
def tensor(case: Product) -> NF4Tensor:
    """Random codes; scales that differ from block to block, by powers of two over a wide range, and negative if they
    are double-quantized ("wide"); or weights −s, 0 and s with s a power of two ("exact")."""
    rng = np.random.default_rng([case.seed, *case.shape, *case.kind.encode()])
    n = case.shape[0] * case.shape[1]
    blocks = -(-n // case.block_size)
    codes = rng.choice(
        np.array([0, nf4.ZERO, 15], np.uint8) if case.kind == "exact" else np.arange(16, dtype=np.uint8), n
    )
    scales: np.ndarray = rng.uniform(0.5, 1.5, blocks)
    if case.kind == "wide":
        scales *= 2.0 ** rng.integers(-5, 5, blocks)
    if case.kind == "exact":
        scales = 2.0 ** rng.integers(-2, 3, blocks)
    packed, absmax = nf4.pack(codes), scales.astype(np.float32)
    if not case.nested or case.kind == "exact":
        return NF4Tensor(packed, absmax, case.shape, case.block_size)
    nested = rng.uniform(0.3, 2, -(-blocks // case.nested)).astype(np.float32)
    offset = np.float32(0.1 if case.kind == "wide" else 1.1)
    scale_codes = rng.integers(0, 256, blocks).astype(np.uint8)
    return NF4Tensor(
        packed, DoubleQuantizedScales(scale_codes, nested, offset, case.nested), case.shape, case.block_size
    )


def weights(case: Product) -> np.ndarray:
    """Ŵ rounded to the dtype."""
    return rounded(nf4.dequantize(tensor(case)), case.dtype)


def arrays(case: Product) -> tuple[np.ndarray, np.ndarray]:
    """x and dy: in the exact kind small integers."""
    rng = np.random.default_rng([case.seed, 1])
    out, in_ = case.shape
    if case.kind == "exact":
        return rng.integers(-3, 4, (*case.rows, in_)) * 1.0, rng.integers(-3, 4, (*case.rows, out)) * 1.0
    return rng.standard_normal((*case.rows, in_)), rng.standard_normal((*case.rows, out))


def oracle_of(case: Product) -> Callable:
    def oracle(number, dy, x):
        w = number(weights(case).astype(np.float64))
        return number(x) @ w.T, number(dy) @ w, None

    return oracle


def given(f: Callable, case: Product) -> tuple[Callable, list[np.ndarray], np.ndarray]:
    """The implementation with its matrix, x, dy."""
    x, dy = arrays(case)
    return lambda x: f(tensor(case), x), [x], dy


def is_within_its_bound(f: Callable, case: Product) -> None:
    """|fl(y) − y| ≤ γ_K |x||Ŵ|ᵀ, K terms a sum, in any order; for the gradient too. The weights have no error."""
    g, args, dy = given(f, case)
    common.within(g, oracle_of(case), args, dy, case.dtype)


def any_layout(f: Callable, case: Product) -> None:
    g, args, dy = given(f, case)
    common.any_layout(g, oracle_of(case), args, dy, case.dtype)


def changes_nothing(f: Callable, case: Product) -> None:
    """Also not the codes and scales."""
    q = tensor(case)
    s = q.absmax
    parts = [q.codes, *([s.codes, s.absmax, s.code] if isinstance(s, DoubleQuantizedScales) else [q.scales()])]
    before = [part.tobytes() for part in parts]
    g, args, dy = given(f, case)
    common.changes_nothing(g, args, dy, case.dtype)
    assert [part.tobytes() for part in parts] == before, "the codes or scales were changed"


def multiplies_with_the_decoded_weights(f: Callable, case: Product) -> None:
    """One row, three rows and the last 70 rows of the identity give those of Ŵᵀ, and in the gradient those of Ŵ."""
    w = weights(case)
    same_weights(lambda rows: f(tensor(case), rows)[0], w.T, case, "x Ŵᵀ")

    def gradient(rows):
        return common.as_tuple(f(tensor(case), np.zeros((len(rows), case.shape[1]), storage(case.dtype)))[1](rows))[0]

    same_weights(gradient, w, case, "dy Ŵ")


def same_weights(multiply: Callable, w: np.ndarray, case: Product, what: str) -> None:
    identity: np.ndarray = np.eye(len(w), dtype=storage(case.dtype))
    last = len(w) - 1
    for rows in ([last], [0, last // 2, last], list(range(max(len(w) - 70, 0), len(w)))):
        found = multiply(identity[rows])
        different = np.argwhere(~(found == w[rows]))  # 0 and −0 are the same weight
        if len(different):
            i, j = (int(k) for k in different[0])
            raise AssertionError(
                f"{what} of {len(rows)} rows of the identity: weight ({rows[i]}, {j}) is {found[i, j]!r}, "
                f"dequantized {w[rows[i], j]!r} ({len(different)} of {found.size} differ)"
            )


def integers_are_exact(f: Callable, case: Product) -> None:
    """Sums of small integers times powers of two have no rounding: bit for bit."""
    if case.kind == "exact":
        g, (x,), dy = given(f, case)
        w = weights(case).astype(np.float64)
        y, vjp = g(x.astype(storage(case.dtype)))
        dx = common.as_tuple(vjp(dy.astype(storage(case.dtype))))[0]
        for found, exact, what in ((y, x @ w.T, "y"), (dx, dy @ w, "dx")):
            common.same_bits(np.asarray(found) + 0, rounded(exact, case.dtype) + 0, what)  # + 0: no −0


def a_row_alone_is_the_row_in_a_batch(f: Callable, case: Product) -> None:
    """But for the order of the sum: two results within one bound are 2 γ_K |x||Ŵ|ᵀ apart, and two roundings. What is
    in the other rows, NaN for instance, has no part in it."""
    g, (x,), dy = given(f, case)
    if len(case.rows) != 1 or case.rows[0] < 2:
        return
    x, dy = common.prepared([x, dy], case.dtype)
    exact = oracle_of(case)(lambda a: Ball(a, arithmetic(case.dtype)), dy.astype(float), x.astype(float))
    apart = [2 * ball.stored(case.dtype).radius[-1:] for ball in exact[:2]]
    poisoned, dpoisoned = x.copy(), dy.copy()
    poisoned[:-1] = dpoisoned[:-1] = np.nan
    for batch, dbatch in ((x, dy), (poisoned, dpoisoned)):
        y, vjp = g(batch)
        alone, vjp_alone = g(x[-1:])
        pairs = (y, alone), (common.as_tuple(vjp(dbatch))[0], common.as_tuple(vjp_alone(dy[-1:]))[0])
        for (many, one), bound, what in zip(pairs, apart, ("y", "dx"), strict=True):
            off = np.abs(many[-1:].astype(float) - one.astype(float))
            assert (off <= bound).all(), f"{what} of the last row: {off.max():.3g} from the same row alone"


def pullback_is_the_transpose_of_the_derivative(f: Callable, case: Product) -> None:
    if case.dtype == "float64":
        g, args, _ = given(f, case)

        def without_the_weight(x):
            y, vjp = g(x)
            return y, lambda dy: common.as_tuple(vjp(dy))[0]

        common.is_differentiated(without_the_weight, args, np.random.default_rng(case.seed))


PROPERTIES = (
    is_within_its_bound,
    multiplies_with_the_decoded_weights,
    integers_are_exact,
    a_row_alone_is_the_row_in_a_batch,
    any_layout,
    changes_nothing,
    pullback_is_the_transpose_of_the_derivative,
)


def cases(dtypes):
    sizes = st.integers(1, 70)
    rows = st.tuples(st.integers(0, 20)) | st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.just(())
    whole = st.tuples(sizes, st.sampled_from((64, 128)))
    return st.builds(
        Product,
        rows,
        st.tuples(sizes, sizes) | whole,
        st.sampled_from((32, 64, 128, 4096)),
        st.sampled_from((0, 0, 1, 7, 256)),
        st.sampled_from(sorted(dtypes)),
        st.sampled_from(KINDS),
        st.integers(0, 99),
    )


# Blocks that are, lie in, and span rows; an odd number of weights; nested scales; one row and more than a tile.
FIXED = (
    Product((1,), (33, 64)),
    Product((3,), (5, 128), 32, nested=7, kind="wide"),
    Product((2, 9), (17, 64), 64, nested=2),
    Product((), (3, 64), 32),
    Product((0,), (3, 64), 32),
    Product((5,), (9, 33), 32, kind="wide"),
    Product((2,), (7, 50), 64, nested=1, kind="wide"),
    Product((19,), (3, 96), 4096, kind="exact"),
    *(Product((rows,), (9, 64), 32, kind="exact", dtype=d) for rows in (2, 17) for d in ("float32", "float16")),
    *(Product((rows,), (18, 64), 32, 3, "float16", "wide") for rows in (1, 2, 5, 20)),
    Product((3,), (5, 33), 32, 0, "float16"),
    *(Product((4,), (6, 32), 32, 2, dtype, "wide") for dtype in ("float64", "bfloat16")),
)

OPERATIONS = (
    Operation(
        "nf4.linear",
        NF4Tensor.linear,
        "f(q: NF4Tensor (out, in), x (..., in)) -> y (..., out), vjp; vjp(dy) -> dx, None",
        cases,
        FIXED,
        PROPERTIES,
    ),
)
