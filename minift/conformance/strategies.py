"""Inputs that aim at trouble: ties and their neighbors, zeros, outliers, tiny and huge numbers, short last blocks.

A case holds its numbers themselves, so that a counterexample can be printed, and made smaller until nothing can be left
out: hypothesis does so with what it draws, `simpler` says how with the longer fixed cases.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance.operation import rounded, storage

f32 = np.float32
MANY = 20_000  # numbers: more are for statistics


class Numbers(NamedTuple):
    """An array to quantize. Its text is what a counterexample begins with."""

    w: tuple[float, ...]
    block_size: int = 64
    shape: tuple[int, ...] | None = None  # None: a vector
    dtype: str = "float32"
    table: str = ""  # the name of a codebook, where there is a choice
    name: str = "w"

    @classmethod
    def of(cls, w: np.ndarray, block_size: int = 64, **rest) -> Numbers:
        """The array's numbers, rounded to its dtype, and clipped to what float32 (or float16) can hold."""
        dtype = rest.setdefault("dtype", w.dtype.name)
        top = float(np.finfo(np.float16 if dtype == "float16" else np.float32).max)
        kept = rounded(np.clip(w, -top, top), dtype)
        return cls(tuple(kept.ravel().tolist()), block_size, None if w.ndim == 1 else w.shape, **rest)

    def array(self) -> np.ndarray:
        flat: np.ndarray = np.array(self.w, storage(self.dtype))
        return flat if self.shape is None else flat.reshape(self.shape)

    def simpler(self) -> Iterator[Numbers]:
        """What to try in its place, the boldest first. Each has fewer numbers, or plainer ones.

        Of very many numbers a property says something only together."""
        if len(self.w) > MANY:
            return
        if self.shape is not None:
            yield self._replace(shape=None)
        for w in shorter(self.w):
            yield self._replace(w=w, shape=None)
        for w in plainer(self.w, self.dtype):
            yield self._replace(w=w)

    def __str__(self) -> str:
        text = f"{self.name} = {written(self.w, self.dtype)}, block_size {self.block_size}"
        return text + _details(self.shape, self.dtype, self.table)


class Codes(NamedTuple):
    """Codes and scales to decode; `dtype` is the type that is asked for."""

    codes: tuple[int, ...]
    absmax: tuple[float, ...]
    block_size: int = 64
    shape: tuple[int, ...] | None = None
    dtype: str = "float32"
    table: str = ""
    offset: float | None = None  # of scales that are in 8 bits themselves

    def size(self) -> tuple[int, ...]:
        return (len(self.codes),) if self.shape is None else self.shape

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """One code an element, and float32 scales."""
        return np.array(self.codes, np.uint8), np.array(self.absmax, f32)

    def simpler(self) -> Iterator[Codes]:
        if self.shape is not None:
            yield self._replace(shape=None)
        for codes in shorter(self.codes):
            yield self._replace(codes=codes, absmax=self.absmax[: -(-len(codes) // self.block_size)], shape=None)
        for codes in zeroed(self.codes):
            yield self._replace(codes=codes)
        for absmax in plainer(self.absmax, "float32"):
            yield self._replace(absmax=absmax)

    def __str__(self) -> str:
        text = f"codes = {written(self.codes, 'uint8')}, absmax = {written(self.absmax, 'float32')}"
        offset = "" if self.offset is None else f", offset {f32(self.offset)}"
        return f"{text}{offset}, block_size {self.block_size}" + _details(self.shape, self.dtype, self.table)


def _details(shape: tuple[int, ...] | None, dtype: str, table: str) -> str:
    """What differs from a float32 vector."""
    parts = (f", shape {shape}" * (shape is not None), f", {dtype}" * (dtype != "float32"), f", code {table}")
    return "".join(parts[: 3 if table else 2])


def written(values: Sequence, dtype: str, most: int = 14) -> str:
    """[1.0, 0.0 × 62, 0.5]: numbers as their type prints them, repetitions once, without the middle of long lists."""
    kind = np.dtype(dtype).type if dtype == "uint8" else storage(dtype)
    runs = [(str(kind(value)), len(list(group))) for value, group in itertools.groupby(values, key=_with_sign)]
    parts = [text if n == 1 else f"{text} × {n}" for text, n in runs]
    if len(parts) > most:
        parts = [*parts[: most - 4], "…", *parts[-3:]]
        return f"[{', '.join(parts)}] ({len(values)} numbers)"
    return f"[{', '.join(parts)}]"


def _with_sign(value: float) -> float | str:
    return "-0.0" if value == 0 and math.copysign(1, value) < 0 else value


def shorter(values: tuple) -> Iterator[tuple]:
    """Without a half, a quarter, … a single one of the values."""
    size = -(-len(values) // 2)
    while size:
        for start in range(0, len(values), size):
            yield values[:start] + values[start + size :]
        size //= 2


def zeroed(values: tuple) -> Iterator[tuple]:
    """Zeros in place of a half, a quarter, … a single one of the values."""
    size = len(values)
    while size:
        for start in range(0, len(values), size):
            if any(values[start : start + size]):
                yield values[:start] + (0,) * len(values[start : start + size]) + values[start + size :]
        size //= 2


def plainer(values: tuple, dtype: str) -> Iterator[tuple]:
    """Zeros in place of some of the values; then ±1 or fewer digits in place of one."""
    yield from zeroed(values)
    kind = storage(dtype)
    for i, value in enumerate(values):
        plain = [math.copysign(1.0, value)] if abs(value) not in (0, 1) else []
        fewer = (float(kind(f"{value:.{digits}g}")) for digits in (1, 2, 3))
        plain += [v for v in fewer if len(str(kind(v))) < len(str(kind(value)))]
        for v in plain:
            yield (*values[:i], v, *values[i + 1 :])


def neighbors(values: np.ndarray, ulps: int = 2) -> np.ndarray:
    """Every value and its float32 neighbors, up to `ulps` away on both sides."""
    found = [values]
    up = down = values
    for _ in range(ulps):
        up, down = np.nextafter(up, f32(np.inf)), np.nextafter(down, f32(-np.inf))
        found += [up, down]
    return np.concatenate(found)


@lru_cache(maxsize=16)
def reciprocal_matters(thresholds: tuple[float, ...], count: int = 24) -> list[tuple[float, float]]:
    """Pairs (a, x): fl(x · fl(1/a)) and fl(x / a) lie on two sides of a threshold. One in millions of random ones."""
    levels = np.array(thresholds, f32)
    a = np.random.default_rng(1).uniform(1, 2, 20_000).astype(f32)
    m = levels[np.arange(a.size) % levels.size]
    pairs: list[tuple[float, float]] = []
    for x in (np.nextafter(a * m, f32(-9)), a * m, np.nextafter(a * m, f32(9))):
        differ = (((x * (1 / a)) > m) != ((x / a) > m)) & (np.abs(x) <= a)
        pairs += zip(a[differ].tolist(), x[differ].tolist(), strict=True)
    return pairs[:count]


def kinds(rng: np.random.Generator, thresholds: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """name -> float32 (n,): one block each."""
    normal = rng.standard_normal(n).astype(f32)
    outlier = normal.copy()
    outlier[rng.integers(n)] = 100
    wide = (normal * 2.0 ** rng.integers(-60, 60, n)).astype(f32)
    near = rng.choice(neighbors(thresholds), n).astype(f32)
    near[rng.integers(n)] = rng.choice([-1, 1])  # so that absmax is 1 and the thresholds are met exactly
    return {
        "normal": normal,
        "outlier": outlier,
        "wide": wide,
        "zero": np.zeros(n, f32),
        "negative zero": np.full(n, -0.0, f32),
        "constant": np.full(n, normal[0], f32),
        "thresholds": near,
        "thresholds / 8": near / 8,
        "one": np.eye(1, n, n // 2, dtype=f32)[0],
        "tiny normal": normal * f32(1e-30),
        "subnormal": normal * f32(1e-39),
        "below 1e-38": rng.choice(thresholds, n) * f32(1e-38) * rng.choice(np.array([0.9995, 1.0005], f32), n),
        "huge": np.clip(normal, -3, 3) * f32(1.1e38),
        "integers": rng.integers(-7, 8, n).astype(f32),
    }


def battery(thresholds: np.ndarray, block_sizes: Sequence[int] = (32, 64, 256)) -> list[tuple[str, np.ndarray, int]]:
    """(name, x, block_size): every kind alone and all kinds as blocks of one tensor, sizes around a block."""
    rng = np.random.default_rng(0)
    cases = []
    for block_size in block_sizes:
        blocks = kinds(rng, thresholds, block_size)
        cases += [(f"{name}, {block_size}", x, block_size) for name, x in blocks.items()]
        every = np.concatenate(list(blocks.values()))
        cases.append((f"all kinds, {block_size}", every.reshape(-1, block_size // 4), block_size))
        cases.append((f"all kinds and a short block, {block_size}", every[: -block_size // 2 - 1], block_size))
        for n in (0, 1, 2, block_size - 1, block_size + 1, 2 * block_size + 1):
            cases.append((f"{n} elements, {block_size}", rng.standard_normal(n).astype(f32), block_size))
        scales = np.repeat(10.0 ** np.arange(-3, 4), block_size)
        cases.append((f"growing, {block_size}", (rng.standard_normal(scales.size) * scales).astype(f32), block_size))
    pairs = np.array(reciprocal_matters(tuple(thresholds.tolist())), f32).reshape(-1, 2)
    reciprocal = np.zeros((len(pairs), 32), f32)
    reciprocal[:, 0], reciprocal[:, 5] = pairs.T
    cases += [
        ("no axes", np.array(0.7, f32), 64),
        ("a row", rng.standard_normal((1, 66)).astype(f32), 64),
        ("three axes", rng.standard_normal((3, 5, 7)).astype(f32), 64),
        ("empty matrix", np.zeros((3, 0), f32), 64),
        ("float16", rng.standard_normal((5, 27)).astype(np.float16), 64),
        ("float64", rng.standard_normal((5, 27)), 64),
        ("reciprocal", reciprocal, 32),
    ]
    return cases


def every_threshold(thresholds: np.ndarray, block_size: int) -> np.ndarray:
    """A block for every so many thresholds: 1, then thresholds and their neighbors."""
    near = neighbors(thresholds, 1)
    rows = [near[i : i + block_size - 1] for i in range(0, near.size, block_size - 1)]
    return np.concatenate([np.append(f32(1), row) for row in rows])


@lru_cache(maxsize=16)
def _trouble(thresholds: tuple[float, ...]) -> list[float]:
    """Numbers that go wrong in a block whose absmax is 1, and some that go wrong anywhere."""
    near = neighbors(np.array(thresholds, f32), 1).tolist()
    return [0.0, 1.0, -1.0, *near, -0.0, *np.array([1e-40, 1e-45, 5e-39, -2e-38, 3e38, 1e-4], f32).tolist()]


@st.composite
def numbers(draw, thresholds: tuple[float, ...], block_sizes: Sequence[int], dtypes: Sequence[str], **rest) -> Numbers:
    """A few numbers, one of them many times, a few more: enough for several blocks, and short to print."""
    dtype, block_size = draw(st.sampled_from(dtypes)), draw(st.sampled_from(block_sizes))
    width: Any = 16 if dtype == "float16" else 32
    one = st.sampled_from(_trouble(thresholds)) | st.floats(width=width, allow_nan=False, allow_infinity=False)
    pairs = [list(pair) for pair in reciprocal_matters(thresholds)]
    first = draw(st.lists(one, max_size=8) | st.sampled_from(pairs or [[]]))
    filling = draw(st.just([]) | st.builds(lambda value, n: [value] * n, one, st.integers(1, 70)))
    w = np.array([*first, *filling, *draw(st.lists(one, max_size=3))])
    shapes = [w.shape, *([(2, w.size // 2)] * (w.size % 2 == 0)), (1, w.size), *([()] * (w.size == 1))]
    return Numbers.of(w.reshape(draw(st.sampled_from(shapes))), block_size, dtype=dtype, **rest)


@st.composite
def codes(draw, entries: int, block_sizes: Sequence[int], dtypes: Sequence[str], **rest) -> Codes:
    """Codes of a table with this many entries, and a scale for every block."""
    dtype, block_size = draw(st.sampled_from(dtypes)), draw(st.sampled_from(block_sizes))
    first = draw(st.lists(st.integers(0, entries - 1), max_size=10))
    filling = [draw(st.integers(0, entries - 1))] * draw(st.sampled_from((0, 1, 16, 55, 64, 86, 120)))
    found = (*first, *filling)
    scale = st.sampled_from(np.array([1, 0, 0.75, 3e-5, 1e-39, 123.456], f32).tolist()) | st.floats(
        0, 2.0**15, width=32
    )
    blocks = -(-len(found) // block_size)
    absmax = draw(st.lists(scale, min_size=blocks, max_size=blocks))
    shapes = [None, *([(2, len(found) // 2)] * (len(found) % 2 == 0)), *([()] * (len(found) == 1))]
    return Codes(found, tuple(absmax), block_size, draw(st.sampled_from(shapes)), dtype, **rest)
