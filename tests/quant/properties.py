"""What a block-wise quantizer must satisfy: functions `(implementation, ...) -> None` that fail with a counterexample.

An implementation of NF4 is anything with `quantize(w, block_size) -> q` and `dequantize(q, dtype=None)`, where q has
`.codes` (two a byte), `.absmax`, `.shape`, `.block_size`. Oracles are loops over scalars, written here and not there.
"""

import itertools
import tracemalloc
from bisect import bisect_left

import numpy as np

from quant.trouble import BNB_TABLE, BNB_THRESHOLDS, f32

U = 2.0**-24  # unit roundoff of float32
SUBNORMAL = 2.0**-150  # half the spacing of subnormal numbers: the rounding error of what underflows


def same_bits(found, expected, what):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, expected {expected.dtype}"
    if found.tobytes() != expected.tobytes():
        flat = found.reshape(-1), expected.reshape(-1)
        i = next(i for i in range(found.size) if flat[0][i].tobytes() != flat[1][i].tobytes())
        raise AssertionError(f"{what}: element {i} is {flat[0][i]!r}, expected {flat[1][i]!r}")


def refused(call, message):
    """ValueError, and its message says this; it ends there if `message` ends with a new line."""
    found = "nothing was raised"
    try:
        call()
    except ValueError as error:
        found = f"{error}\n"
    assert message in found, f"expected a ValueError with {message!r}: {found}"


def peak_memory(call):
    """What a call returns, the second time, and how many bytes it held at most."""
    call()
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Oracles: one number at a time.


def oracle_scales(x, block_size):
    """max |x| a block, in float32, one number at a time."""
    flat = [f32(v) for v in np.asarray(x).ravel().tolist()]
    return np.array([max(abs(v) for v in flat[i : i + block_size]) for i in range(0, len(flat), block_size)], f32)


def oracle_codes(x, thresholds, block_size):
    """How many thresholds lie strictly below fl(x · fl(1 / a)), one number at a time."""
    flat, scales = [f32(v) for v in np.asarray(x).ravel().tolist()], oracle_scales(x, block_size)
    levels = [float(t) for t in thresholds]
    inverse = [f32(1) / max(a, f32(1e-38)) for a in scales]
    return [bisect_left(levels, float(v * inverse[i // block_size])) for i, v in enumerate(flat)]


def nibbles(packed, n):
    """High nibble first."""
    both = [nibble for byte in packed.tolist() for nibble in (byte // 16, byte % 16)]
    assert both[n:] in ([], [7]), f"padding {both[n:]}, expected one code 7 after an odd number"
    return both[:n]


# Properties of one tensor and a block size.


def codes_are_the_oracles(impl, x, block_size):
    q = impl.quantize(x, block_size)
    found, expected = nibbles(q.codes, x.size), oracle_codes(x, BNB_THRESHOLDS, block_size)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a == b, f"element {i} = {x.ravel()[i]!r}: code {a}, expected {b}"


def scales_are_the_oracles(impl, x, block_size):
    same_bits(impl.quantize(x, block_size).absmax, oracle_scales(x, block_size), "absmax")


def packed_high_nibble_first(impl, x, block_size):
    """Against numbers far from any threshold, so that only order and padding can be wrong."""
    codes = np.arange(x.size) * 7 % 16
    codes[::block_size] = 15  # the scale of each block is 1
    packed = impl.quantize(BNB_TABLE[codes], block_size).codes
    assert packed.dtype == np.uint8 and packed.shape == ((x.size + 1) // 2,), f"{packed.dtype} {packed.shape}"
    assert nibbles(packed, x.size) == codes.tolist(), "codes come back in another order"


def decodes_like_the_oracle(impl, x, block_size):
    q = impl.quantize(x, block_size)
    expected = [BNB_TABLE[c] * q.absmax[i // block_size] for i, c in enumerate(nibbles(q.codes, x.size))]
    same_bits(impl.dequantize(q), np.array(expected, f32).reshape(x.shape), "dequantize")


def other_types_round_once_more(impl, x, block_size):
    q = impl.quantize(x, block_size)
    product = impl.dequantize(q)
    with np.errstate(over="ignore", under="ignore"):
        for dtype in (np.float16, np.float64):
            same_bits(impl.dequantize(q, dtype), product.astype(dtype), f"dequantize to {dtype.__name__}")


def half_gaps(table):
    """For each code the farthest that a number in [−1, 1] with this code can be from its entry."""
    gaps = np.diff(table.astype(np.float64)) / 2
    return np.maximum(np.append(0, gaps), np.append(gaps, 0))


def error_is_bounded(impl, x, block_size):
    """|x̂ − x| ≤ a (h_c + 3u) + underflow; h_c is half the wider gap beside the code.

    One u each for the reciprocal, its product with x, the product c·a, and half a unit for the midpoint, all relative
    to numbers ≤ 1, of which a code's own entries leave less than 3 together. 1/a loses 2^-150 more where it is
    subnormal (a > 2^126), x̂ where it is. Below a = 1e-38 only |x̂ − x| ≤ a is promised (blockwise, "tiny numbers")."""
    q = impl.quantize(x, block_size)
    x_hat = impl.dequantize(q).astype(np.float64).ravel()
    flat = x.astype(f32).astype(np.float64).ravel()
    a = np.repeat(oracle_scales(x, block_size).astype(np.float64), block_size)[: x.size]
    h = half_gaps(BNB_TABLE)[nibbles(q.codes, x.size)] if x.size else np.zeros(0)
    bound = np.where(a >= 1e-38, a * (h + 3 * U + a * SUBNORMAL) + SUBNORMAL, a)
    worse = np.abs(x_hat - flat) > bound
    assert not worse.any(), f"{flat[worse][0]!r} came back as {x_hat[worse][0]!r}, bound {bound[worse][0]!r}"


def extremes_come_back(impl, x, block_size):
    """The element that gave a block its scale is ±1 times it, and what was zero is +0.0."""
    flat = x.astype(f32).ravel()
    x_hat = impl.dequantize(impl.quantize(x, block_size)).ravel()
    a = np.repeat(oracle_scales(x, block_size), block_size)[: x.size]
    top = (np.abs(flat) == a) & (a >= f32(1e-38)) | (flat == 0)
    same_bits(x_hat[top], flat[top] + f32(0), "absmax and zero elements")


def quantizing_again_changes_nothing(impl, x, block_size):
    """Not promised below 1e-38, where codes are coarser."""
    q = impl.quantize(np.where(np.abs(x) < 1e-37, 0, x).astype(f32), block_size)
    x_hat = impl.dequantize(q)
    assert np.isfinite(x_hat).all(), f"decoded {x_hat[~np.isfinite(x_hat)][0]} from finite numbers"
    again = impl.quantize(x_hat, block_size)
    same_bits(again.codes, q.codes, "codes of what was decoded")
    same_bits(again.absmax, q.absmax, "absmax of what was decoded")


def powers_of_two_scale_through(impl, x, block_size):
    """x · 2ᵏ has the same codes and scales · 2ᵏ, unless something under- or overflows."""
    x = x.astype(f32)
    x = np.where((np.abs(x) < 2.0**-90) | (np.abs(x) > 2.0**90), f32(0), x)
    q = impl.quantize(x, block_size)
    for factor in (f32(2.0**-12), f32(2.0**12)):
        scaled = impl.quantize(np.asarray(x * factor), block_size)
        same_bits(scaled.codes, q.codes, f"codes of {factor} x")
        same_bits(scaled.absmax, q.absmax * factor, f"absmax of {factor} x")


def order_is_kept(impl, x, block_size):
    """A larger number of the same block never decodes to a smaller one."""
    flat, x_hat = x.astype(f32).ravel(), impl.dequantize(impl.quantize(x, block_size)).ravel()
    for i in range(0, x.size, block_size):
        order = np.argsort(flat[i : i + block_size], kind="stable")
        steps = np.diff(x_hat[i : i + block_size][order])
        assert (steps >= 0).all(), f"block {i // block_size} is not monotone"


def blocks_are_independent(impl, x, block_size):
    """Another block's numbers change nothing in this one: each block alone gives the same bytes."""
    q = impl.quantize(x, block_size)
    x_hat, flat = impl.dequantize(q).ravel(), x.ravel()
    for block, i in enumerate(range(0, min(x.size, 8 * block_size), block_size)):
        alone = impl.quantize(flat[i : i + block_size], block_size)
        same_bits(alone.absmax[0], q.absmax[block], f"absmax of block {block} alone")
        same_bits(alone.codes, q.codes[i // 2 : i // 2 + alone.codes.size], f"codes of block {block} alone")
        same_bits(impl.dequantize(alone), x_hat[i : i + block_size], f"block {block} alone")


def layout_does_not_matter(impl, x, block_size):
    """Transposed, strided (with NaN in the gaps), reversed and offset views of the same numbers give the same bytes."""
    flat = x.ravel()
    gaps = np.full((flat.size, 2), np.nan, x.dtype)
    gaps[:, 0] = flat
    offset = np.concatenate([[np.nan], flat]).astype(x.dtype)[1:]
    views = {"strided": gaps[:, 0], "reversed": flat[::-1].copy()[::-1], "offset": offset}
    if flat.size % 3 == 0:
        views["transposed"] = flat.reshape(3, -1).T.copy().T.reshape(3, -1)
        views["transposed"] = np.asfortranarray(flat.reshape(3, -1))
    expected = impl.quantize(flat, block_size)
    for name, view in views.items():
        q = impl.quantize(view, block_size)
        same_bits(q.codes, expected.codes, f"codes, {name}")
        same_bits(q.absmax, expected.absmax, f"absmax, {name}")
        assert q.shape == view.shape, f"{name}: shape {q.shape}, expected {view.shape}"


def shape_comes_back(impl, x, block_size):
    q = impl.quantize(x, block_size)
    assert q.shape == x.shape, f"shape {q.shape}, expected {x.shape}"
    assert q.absmax.shape == (-(-x.size // block_size),), f"{q.absmax.shape} scales for {x.size} elements"
    assert impl.dequantize(q).shape == x.shape, f"{impl.dequantize(q).shape} came back, expected {x.shape}"


def arguments_are_left_alone(impl, x, block_size):
    before = x.tobytes()
    q = impl.quantize(x, block_size)
    assert x.tobytes() == before, "quantize changed its argument"
    parts = q.codes.tobytes(), q.absmax.tobytes()
    impl.dequantize(q)
    assert (q.codes.tobytes(), q.absmax.tobytes()) == parts, "dequantize changed its argument"


# Properties that choose their own numbers.


def every_threshold_to_the_ulp(impl):
    """At a threshold the lower code, one ulp above it the higher: all 15, in a block whose scale is 1."""
    for offset, direction in ((0, 0), (0, -9), (1, 9)):
        x = np.ones(32, f32)
        x[:15] = BNB_THRESHOLDS if direction == 0 else np.nextafter(BNB_THRESHOLDS, f32(direction))
        found = nibbles(impl.quantize(x, 32).codes, 32)[:15]
        assert found == [i + offset for i in range(15)], f"thresholds moved toward {direction}: codes {found}"


def the_table_is_bitsandbytes(impl):
    x = np.resize(BNB_TABLE, 64)
    same_bits(impl.dequantize(impl.quantize(x, 64)), x, "the sixteen entries")


def errors_of_a_normal_distribution(impl):
    """Mean |x̂ − x| on N(0, 1), both sides: bitsandbytes' published means (its tests) and their standard errors."""
    x = np.random.default_rng(7).standard_normal((512, 512)).astype(f32)
    for block_size, mean, sigma in ((64, 0.072798, 7.4e-5), (256, 0.080337, 1.03e-4)):
        error = np.abs(impl.dequantize(impl.quantize(x, block_size)) - x)
        allowed = 5 * np.hypot(sigma, float(error.std()) / 512)  # five standard errors of the difference
        assert abs(error.mean() - mean) <= allowed, f"block {block_size}: {error.mean():.6f}, expected {mean}"


def not_symmetric(impl):
    """NF4(−x) = −NF4(x) for 12 % of normal numbers and not for more: a symmetric table is another table."""
    x = np.random.default_rng(8).standard_normal(1 << 14).astype(f32)
    plus, minus = impl.quantize(x, 64), impl.quantize(-x, 64)
    mirrored = np.mean(np.add(nibbles(plus.codes, x.size), nibbles(minus.codes, x.size)) == 15)
    assert 0.40 < mirrored < 0.46, f"{mirrored:.1%} of codes mirror, expected 43 %"
    odd = np.mean(impl.dequantize(plus) == -impl.dequantize(minus))
    assert 0.10 < odd < 0.14, f"{odd:.1%} of values mirror, expected 12 %"


def refuses_what_is_not_finite(impl):
    for bad in (np.nan, np.inf, -np.inf):
        for at in ((0, 0), (1, 30), (4, 39)):
            x = np.ones((5, 40), f32)
            x[at] = bad
            refused(lambda x=x: impl.quantize(x, 64), f"cannot quantize {bad} at index {at} (1 of 200 elements")
    too_large = np.array([0, 1, 2, 1e300, 4, 5, -np.inf])
    refused(lambda: impl.quantize(too_large, 64), "cannot quantize 1e+300 at index (3,) (2 of 7 elements")


OF_A_TENSOR = [
    codes_are_the_oracles,
    scales_are_the_oracles,
    packed_high_nibble_first,
    decodes_like_the_oracle,
    other_types_round_once_more,
    error_is_bounded,
    extremes_come_back,
    quantizing_again_changes_nothing,
    powers_of_two_scale_through,
    order_is_kept,
    blocks_are_independent,
    layout_does_not_matter,
    shape_comes_back,
    arguments_are_left_alone,
]
OF_ALL = [
    every_threshold_to_the_ulp,
    the_table_is_bitsandbytes,
    errors_of_a_normal_distribution,
    not_symmetric,
    refuses_what_is_not_finite,
]


# Any codebook. An implementation has `quantize(x, code, block_size) -> q`, `dequantize(q)`; q has `.codes`, `.absmax`.


def any_codes_are_the_oracles(impl, x, code, block_size):
    thresholds = [f32((float(a) + float(b)) / 2) for a, b in itertools.pairwise(code)]
    q = impl.quantize(x, code, block_size)
    same_bits(q.codes, np.array(oracle_codes(x, thresholds, block_size), np.uint8), "codes")


def any_scales_are_the_oracles(impl, x, code, block_size):
    same_bits(impl.quantize(x, code, block_size).absmax, oracle_scales(x, block_size), "absmax")


def any_decodes_like_the_oracle(impl, x, code, block_size):
    q = impl.quantize(x, code, block_size)
    expected = [code[c] * q.absmax[i // block_size] for i, c in enumerate(q.codes.tolist())]
    same_bits(impl.dequantize(q), np.array(expected, f32).reshape(x.shape), "dequantize")


def any_error_is_bounded(impl, x, code, block_size):
    """As `error_is_bounded`; beyond the codebook's own ends the distance to the end counts, and below a = 1e-38
    a codebook without zero can be wrong by 2a."""
    q = impl.quantize(x, code, block_size)
    flat = x.astype(f32).astype(np.float64).ravel()
    a = np.repeat(oracle_scales(x, block_size).astype(np.float64), block_size)[: x.size]
    h = half_gaps(code)
    h[0], h[-1] = max(h[0], code[0] + 1), max(h[-1], 1 - code[-1])
    coarse = a if (code == 0).any() else 2 * a
    bound = np.where(a >= 1e-38, a * (h[q.codes] + 3 * U + a * SUBNORMAL) + SUBNORMAL, coarse)
    worse = np.abs(impl.dequantize(q).astype(np.float64).ravel() - flat) > bound
    assert not worse.any(), f"{flat[worse][0]!r}: code {q.codes[worse][0]}, farther than {bound[worse][0]!r}"


def any_zero_stays_zero(impl, x, code, block_size):
    x_hat = impl.dequantize(impl.quantize(x, code, block_size))
    assert (x_hat[x == 0] == 0).all(), "a zero came back as something else"


OF_A_CODEBOOK = [
    any_codes_are_the_oracles,
    any_scales_are_the_oracles,
    any_decodes_like_the_oracle,
    any_error_is_bounded,
    any_zero_stays_zero,
]


# Double quantization. An implementation has `compress(q, block_size)` and `decompress(q)`; compressed scales have
# `.codes`, `.absmax`, `.offset`, `.decode()`.


def exact_scales(scales, block_size, code):
    """Codes, nested scales and offset, one scale at a time, in Python's own floats and roundings to float32."""
    offset = f32(sum(scales.tolist()) / max(1, scales.size))
    thresholds = [f32((float(a) + float(b)) / 2) for a, b in itertools.pairwise(code)]
    centered = scales - offset
    nested, codes = oracle_scales(centered, block_size), oracle_codes(centered, thresholds, block_size)
    for i, c in enumerate(codes):  # the smallest entry that is not negative, where the nearest is
        while f32(code[c] * nested[i // block_size]) + offset < 0:
            c += 1
        codes[i] = c
    return codes, nested, offset


def dq_codes_are_the_oracles(impl, q, block_size, code):
    codes, nested, offset = exact_scales(q.absmax, block_size, code)
    found = impl.compress(q, block_size).absmax
    assert found.codes.tolist() == codes, "codes of the scales"
    same_bits(found.absmax, nested, "nested absmax")
    same_bits(found.offset, offset, "offset")


def dq_decodes_with_two_roundings(impl, q, block_size, code):
    scales = impl.compress(q, block_size).absmax
    expected = [f32(f32(code[c] * scales.absmax[i // block_size]) + scales.offset) for i, c in enumerate(scales.codes)]
    same_bits(scales.decode(), np.array(expected, f32), "decoded scales")


def dq_scales_are_never_negative(impl, q, block_size, code):
    decoded = impl.compress(q, block_size).scales()
    assert (decoded >= 0).all(), f"scale {q.absmax[decoded < 0][0]} decodes to {decoded[decoded < 0][0]}"


def dq_scale_error_is_bounded(impl, q, block_size, code):
    """|â − a| ≤ h a₂ + 4u (a₂ + ā + a), h half the widest gap of the map, 0.00703125: the a-priori bound of a scale.

    Raising a code to the first that is not negative keeps it: a ≥ 0 lies between the two entries then, and the higher
    is at most a whole gap, 2 h a₂, away."""
    scales = impl.compress(q, block_size).absmax
    a2 = np.repeat(scales.absmax.astype(np.float64), block_size)[: q.absmax.size]
    a, offset = q.absmax.astype(np.float64), float(scales.offset)
    decoded = scales.decode().astype(np.float64)
    centered = a - offset
    raised = centered + 0.00703126 * a2 < decoded - offset
    bound = np.where(raised & (decoded < 2 * 0.00703126 * a2), 2, 1) * 0.00703126 * a2
    worse = np.abs(decoded - a) > bound + 4 * U * (a2 + abs(offset) + a)
    assert not worse.any(), f"scale {a[worse][0]!r} decodes to {decoded[worse][0]!r}"


def dq_weights_keep_their_codes(impl, q, block_size, code):
    compressed = impl.compress(q, block_size)
    same_bits(compressed.codes, q.codes, "the weights' codes")
    assert (compressed.shape, compressed.block_size) == (q.shape, q.block_size)
    back = impl.decompress(compressed)
    same_bits(back.codes, q.codes, "the weights' codes, decompressed")
    same_bits(back.absmax, compressed.absmax.decode(), "decompressed scales")


def dq_counts_its_bytes(impl, q, block_size, code):
    blocks = q.absmax.size
    expected = q.codes.size + blocks + 4 * -(-blocks // block_size) + 4
    found = impl.compress(q, block_size).nbytes
    assert found == expected, f"{found} bytes, expected {expected}"


OF_DOUBLE_QUANTIZATION = [
    dq_codes_are_the_oracles,
    dq_decodes_with_two_roundings,
    dq_scales_are_never_negative,
    dq_scale_error_is_bounded,
    dq_weights_keep_their_codes,
    dq_counts_its_bytes,
]
