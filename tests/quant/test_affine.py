"""Affine integers: the rule, its bound, and who shares a scale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minift.quant import affine, blockwise, codebooks
from minift.quant.affine import AffineTensor
from nn.checks import kill_matrix, same_bits
from quant.quant_checks import refused
from quant.wrong_integers import AFFINE, Affine, affine_round_trip

f32 = np.float32


def within_half_a_step(round_trip, case):
    """|x̂ − x| ≤ s / 2 + u |x̂|, s from the block's own range; and a bit of the subnormal numbers for s itself."""
    x, bits, block_size = case
    _, back = round_trip(x, bits, block_size)
    assert back.dtype == np.float32 and back.shape == x.shape
    flat, back = x.ravel().astype(np.float64), back.ravel().astype(np.float64)
    for i in range(0, flat.size, block_size):
        block = flat[i : i + block_size]
        s = (block.max() - block.min()) / (2**bits - 1)
        bound = s / 2 * (1 + 2.0**-20) + 2.0**-24 * np.abs(back[i : i + block_size]) + 256 * 2.0**-149
        assert (np.abs(back[i : i + block_size] - block) <= bound).all(), (block, back[i : i + block_size])


def codes_of_the_rule(round_trip, case):
    """Equal to the rule written plainly, ties included."""
    x, bits, block_size = case
    codes, back = round_trip(x, bits, block_size)
    wanted = Affine()(x, bits, block_size)
    same_bits(codes, wanted[0], "codes")
    same_bits(back, wanted[1], "decoded")


def a_grid_comes_back(round_trip, case):
    """Numbers m + k s with k = 0 and 2^b − 1 among them: exact where s and m are short."""
    _, bits, block_size = case
    top = 2**bits - 1
    k = np.random.default_rng(3).integers(0, top + 1, (5, max(block_size, 2)))
    k[:, 0], k[:, -1] = 0, top
    grid = (f32(-1.5) + k * f32(0.125)).astype(f32)
    np.testing.assert_array_equal(round_trip(grid, bits, k.shape[1])[1], grid)


def what_is_constant_comes_back(round_trip, case):
    _, bits, block_size = case
    x = np.repeat(f32([0.3, -7, 0, 1e-44, 3e38]), block_size)
    np.testing.assert_array_equal(round_trip(x, bits, block_size)[1], x)


PROPERTIES = (within_half_a_step, codes_of_the_rule, a_grid_comes_back, what_is_constant_comes_back)


def cases():
    rng = np.random.default_rng(0)
    ties = np.append(np.arange(15) + f32(0.5), f32([0, 15])).astype(f32)
    for bits in (2, 4, 8):
        for block_size in (1, 7, 32, 200):
            yield rng.standard_normal((13, 11)).astype(f32), bits, block_size
    yield ties, 4, 17
    yield (rng.random(64) + 1).astype(f32), 4, 32
    yield f32([-3e38, 3e38, 0, 1]), 4, 4
    yield f32([1e-45, 3e-45, 0, 1e-44]), 3, 4
    yield np.zeros((0, 3), f32), 4, 32


@pytest.mark.parametrize("prop", PROPERTIES)
def test_properties(prop):
    for case in cases():
        prop(affine_round_trip, case)
        prop(Affine(), case)


def test_wrong_versions_are_rejected():
    def holds(prop):
        def of_a_class(wrong, case):
            prop(wrong(), case)

        of_a_class.__name__ = prop.__name__
        return of_a_class

    kill_matrix([holds(p) for p in PROPERTIES], AFFINE, list(cases()))


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(arrays(f32, st.integers(0, 70), elements=finite), st.integers(2, 8), st.integers(1, 40))
def test_drawn(x, bits, block_size):
    within_half_a_step(affine_round_trip, (x, bits, block_size))
    codes_of_the_rule(affine_round_trip, (x, bits, block_size))


def test_steps_against_absmax(rng):
    """14/15 of the symmetric step where both ends are as far from zero, 7/15 where all numbers have one sign."""
    x = np.append(rng.uniform(-1, 1, 62), [-1, 1]).astype(f32)
    symmetric = blockwise.quantize(x, codebooks.INT4, 64).absmax / 7
    np.testing.assert_allclose(affine.quantize(x, 4, 64).step / symmetric, 14 / 15, rtol=1e-6)
    positive = np.append(rng.uniform(0, 1, 62), [0, 1]).astype(f32)
    np.testing.assert_allclose(affine.quantize(positive, 4, 64).step / symmetric, 7 / 15, rtol=1e-6)


def test_one_format_for_tensors_rows_and_blocks(rng):
    w = rng.standard_normal((6, 20)).astype(f32)
    for per, parts in (("tensor", [w]), ("row", list(w)), (5, list(w.reshape(-1, 5)))):
        width = blockwise.numbers_per_scale(w.shape, per)
        whole = affine.dequantize(affine.quantize(w, 4, width))
        alone = [affine.dequantize(affine.quantize(part, 4, part.size)) for part in parts]
        same_bits(whole, np.concatenate([a.ravel() for a in alone]).reshape(w.shape), str(per))
    assert blockwise.numbers_per_scale((), "row") == blockwise.numbers_per_scale((0, 3), "tensor") == 1
    refused(lambda: blockwise.numbers_per_scale((2,), "column"), "per: 'column', needed 'tensor', 'row' or a block")


def test_bits_and_refusals(rng):
    x = rng.standard_normal((4, 32)).astype(f32)
    q = affine.quantize(x)
    assert q.bits_per_parameter == 4 + 64 / 32 and repr(q) == "AffineTensor((4, 32), 4 bits, blocks of 32)"
    assert affine.quantize(x[0, :1]).bits_per_parameter == 4 + 64
    assert affine.quantize(x[:0]).bits_per_parameter == 4
    assert affine.quantize(x.astype(np.float64)).codes.tobytes() == q.codes.tobytes()
    for value in (np.nan, np.inf, -np.inf):
        x[1, 2] = value
        refused(lambda: affine.quantize(x), f"cannot quantize {value} at index (1, 2)")
    for bits in (1, 9, 2000, True):
        refused(lambda bits=bits: affine.quantize(f32([1]), bits), f"bits: {bits}, needed 2 … 8\n")
    refused(lambda: affine.quantize(f32([1]), 4, 0), "block_size: 0, needed a positive integer\n")


def test_parts_that_do_not_fit_are_refused(rng):
    q = affine.quantize(rng.standard_normal((4, 32)).astype(f32))
    codes, step, least, shape, block_size = parts = q.codes, q.step, q.least, q.shape, q.block_size
    assert AffineTensor(*parts).bits == 4
    for args, bits, message in [
        ((codes[1:], step, least, shape, block_size), 4, "codes: uint8 (127,), needed uint8 (128,), one for each elem"),
        ((codes, step[1:], least, shape, block_size), 4, "step: float32 (3,), needed float32 (4,), one for each block"),
        ((codes, step, least[1:], shape, block_size), 4, "least: float32 (3,), needed float32 (4,), one for each bloc"),
        (parts, 3, "codes: found 15, 3 bits hold 0 … 7\n"),
        (parts, 9, "bits: 9, needed 2 … 8\n"),
    ]:
        refused(lambda args=args, bits=bits: AffineTensor(*args, bits=bits), message)


def test_frozen_and_compared_by_identity():
    q, same = (affine.quantize(np.ones(64, f32)) for _ in range(2))
    assert q == q and q != same and len({q, same}) == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        q.block_size = 16
