"""Inputs that aim at trouble: a fixed battery for the kill matrix, and the same kinds drawn by hypothesis."""

import numpy as np
from hypothesis import strategies as st

f32 = np.float32

# bitsandbytes' own numbers, copied from its sources (functional.py `get_4bit_type`, csrc/kernels.cu `dQuantizeNF4`)
BNB_TABLE = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], f32)  # fmt: skip
BNB_THRESHOLDS = np.array(
    [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
     -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
     0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011],
    f32)  # fmt: skip


def neighbors(values, ulps=2):
    """Every value and its float32 neighbors, up to `ulps` away on both sides."""
    found = [values]
    up = down = values
    for _ in range(ulps):
        up, down = np.nextafter(up, f32(np.inf)), np.nextafter(down, f32(-np.inf))
        found += [up, down]
    return np.concatenate(found)


def reciprocal_matters(thresholds, count=24):
    """Blocks (a, x): fl(x · fl(1/a)) and fl(x / a) lie on two sides of a threshold. One in millions of random ones."""
    a = np.random.default_rng(1).uniform(1, 2, 20_000).astype(f32)
    m = thresholds[np.arange(a.size) % thresholds.size]
    pairs = []
    for x in (np.nextafter(a * m, f32(-9)), a * m, np.nextafter(a * m, f32(9))):
        differ = ((x * (1 / a)) > m) != ((x / a) > m)
        pairs += list(zip(a[differ], x[differ], strict=True))
    assert len(pairs) >= count
    blocks = np.zeros((count, 32), f32)
    blocks[:, 0], blocks[:, 5] = np.transpose(pairs[:count])
    return blocks


def kinds(rng, thresholds, n):
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
        "below 1e-38": rng.choice(thresholds, n) * f32(1e-38) * rng.choice(f32([0.9995, 1.0005]), n),
        "huge": np.clip(normal, -3, 3) * f32(1.1e38),
        "integers": rng.integers(-7, 8, n).astype(f32),
    }


def battery(thresholds, block_sizes=(32, 64, 256)):
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
    cases += [
        ("no axes", np.array(0.7, f32), 64),
        ("a row", rng.standard_normal((1, 66)).astype(f32), 64),
        ("three axes", rng.standard_normal((3, 5, 7)).astype(f32), 64),
        ("empty matrix", np.zeros((3, 0), f32), 64),
        ("float16", rng.standard_normal((5, 27)).astype(np.float16), 64),
        ("float64", rng.standard_normal((5, 27)), 64),
        ("reciprocal", reciprocal_matters(thresholds), 32),
    ]
    return cases


@st.composite
def tensors(draw, thresholds, block_sizes=(32, 64, 128), max_blocks=4):
    """(x, block_size): blocks of drawn kinds, with a drawn short last block, shape and floating type."""
    block_size = draw(st.sampled_from(block_sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    one_of = kinds(rng, thresholds, block_size)
    names = draw(st.lists(st.sampled_from(list(one_of)), max_size=max_blocks))
    x = np.concatenate([np.zeros(0, f32), *(kinds(rng, thresholds, block_size)[name] for name in names)])
    x = x[: x.size - draw(st.integers(0, min(x.size, block_size - 1)))]
    if x.size % 2 == 0 and draw(st.booleans()):
        x = x.reshape(2, -1)
    return x.astype(draw(st.sampled_from([np.float32, np.float32, np.float64]))), block_size


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
