"""A weight trained in full is an ndarray to everything that uses it, and to what comes off it is the base."""

import dataclasses

import numpy as np
import pytest

from minift.conformance.gradients import check_vjp
from minift.nn.embedding import embedding
from minift.nn.linear import linear
from minift.nn.norms import layer_norm, rms_norm
from minift.nn.weight import Frozen, dense, freeze, learns, replace, trainable, unwrap
from minift.peft.tuned import Tuned, tied


def tuned(rng, *shape):
    return Tuned(Frozen(rng.standard_normal(shape)), rng.standard_normal(shape))


def test_it_multiplies_and_learns_as_an_array(rng):
    x, weight, dy = rng.standard_normal((2, 3, 7)), tuned(rng, 5, 7), rng.standard_normal((2, 3, 5))
    (y, vjp), (expected, expected_vjp) = linear(x, weight), linear(x, weight.array)
    assert np.array_equal(y, expected)
    dx, dweight, _ = vjp(dy)
    assert dweight.keys() == {"weight"}
    for found, right in zip((dx, dweight["weight"]), expected_vjp(dy)[:2], strict=True):
        assert np.array_equal(found, right)
    check_vjp(lambda x, W: linear_of(x, Tuned(weight.base, W)), x, weight.array, rng=rng)


def linear_of(x, weight):
    y, vjp = linear(x, weight)
    return y, lambda dy: (vjp(dy)[0], vjp(dy)[1]["weight"])


def test_gains_and_tables(rng):
    x, dy, gain = rng.standard_normal((4, 7)), rng.standard_normal((4, 7)), tuned(rng, 7)
    assert unwrap(gain) == (gain.array, True)
    shift, table = np.zeros(7), tuned(rng, 9, 7)
    for op in (lambda g: rms_norm(x, g), lambda g: layer_norm(x, g, shift)):
        (y, vjp), (expected, expected_vjp) = op(gain), op(gain.array)
        assert np.array_equal(y, expected)
        assert all(np.array_equal(a, b) for a, b in zip(vjp(dy), expected_vjp(dy), strict=True))
    tokens = np.array([3, 1, 3, 8])
    (y, vjp), (expected, expected_vjp) = embedding(tokens, table), embedding(tokens, table.array)
    assert np.array_equal(y, expected)
    assert np.array_equal(vjp(dy), expected_vjp(dy))


def test_it_is_named_as_the_weight_that_it_replaces(rng):
    params = {"lm_head.weight": tuned(rng, 5, 7), "model.norm.weight": tuned(rng, 7)}
    arrays = trainable(params)
    assert arrays.keys() == params.keys()
    assert all(arrays[name] is params[name].array is dense(params[name]) for name in params)
    new = {name: rng.standard_normal(a.shape) for name, a in arrays.items()}
    replaced = replace(params, new)
    assert all(replaced[n].array is new[n] and replaced[n].base is params[n].base for n in params)
    assert all(learns(w) for w in replaced.values())
    with pytest.raises(ValueError, match="merge or detach its adapter"):
        freeze(params)


def test_its_size_and_type(rng):
    weight = tuned(rng, 5, 7)
    assert (weight.shape, weight.nbytes) == ((5, 7), 2 * 8 * 35)
    assert weight.dense(np.float32).dtype == np.float32
    assert weight.dense() is weight.dense(np.float64) is weight.array
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.array = weight.base
    with pytest.raises(ValueError, match=r"shape \(7,\) cannot replace a weight of shape \(5, 7\)"):
        Tuned(weight.base, np.ones(7))
    with pytest.raises(ValueError, match="learns itself"):
        Tuned(weight, weight.array)


def test_tied():
    both = {"model.embed_tokens.weight": np.ones((3, 2))}
    assert tied(both, ["model.norm", "model.embed_tokens"]) == "model.embed_tokens"
    assert tied(both, ["lm_head"]) == "lm_head"
    assert tied(both, ["model.norm"]) is None
    assert tied({"wte.weight": np.ones((3, 2))}, ["wte"]) == "wte"
    for head in ("lm_head.weight", "score.weight"):
        assert tied(both | {head: np.ones((3, 2))}, ["model.embed_tokens"]) is None
