"""Weights and the flat dictionaries of them: what learns, under which name, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.nn.weight import (
    Frozen,
    Weight,
    add,
    dense,
    freeze,
    gradients,
    learns,
    replace,
    thaw,
    times,
    trainable,
    unwrap,
)
from minift.peft.lora import LoRA
from minift.quant import nf4
from nn import checks


def adapter(rng, d_out=4, d_in=6, r=2):
    return LoRA(
        Frozen(rng.standard_normal((d_out, d_in))), *(rng.standard_normal(s) for s in ((r, d_in), (d_out, r))), 3
    )


def mixed(rng):
    """One weight of every kind."""
    return {
        "a.weight": rng.standard_normal((3, 5)),
        "b.weight": Frozen(rng.standard_normal((5, 3))),
        "c.q_proj.weight": adapter(rng),
        "c.norm.bias": rng.standard_normal(3),
        "d.weight": nf4.quantize(rng.standard_normal((4, 64)).astype(np.float32)),
    }


NAMES = ["a.weight", "c.norm.bias", "c.q_proj.lora_A.weight", "c.q_proj.lora_B.weight"]


def test_trainable_under_pefts_names(rng):
    params = mixed(rng)
    arrays = trainable(params)
    assert sorted(arrays) == NAMES
    assert arrays["a.weight"] is params["a.weight"]
    assert arrays["c.q_proj.lora_A.weight"] is params["c.q_proj.weight"].A
    assert arrays["c.q_proj.lora_B.weight"] is params["c.q_proj.weight"].B
    assert [learns(w) for w in params.values()] == [True, False, True, True, False]


# properties of the pair (trainable, replace)


def inverse(pair, case):
    """replace(p, trainable(p)) is p, and trainable(replace(p, a)) is a: the arrays themselves, no copies."""
    find, put = pair
    rng = np.random.default_rng(case)
    params = mixed(rng)
    same = put(params, find(params))
    assert list(same) == list(params)
    for name, weight in params.items():
        if isinstance(weight, LoRA):
            assert same[name].A is weight.A
            assert same[name].B is weight.B
            assert same[name].base is weight.base
            assert same[name].scaling == weight.scaling
        else:
            assert same[name] is weight
    new = {name: rng.standard_normal(a.shape) for name, a in find(params).items()}
    found = find(put(params, new))
    assert found.keys() == new.keys()
    assert all(found[name] is new[name] for name in new)


def some_only(pair, case):
    find, put = pair
    rng = np.random.default_rng(case)
    params = mixed(rng)
    for name in NAMES:
        new = rng.standard_normal(find(params)[name].shape)
        found = find(put(params, {name: new}))
        for other, array in find(params).items():
            assert found[other] is (new if other == name else array), f"{other} after replacing {name}"


def the_given_is_unchanged(pair, case):
    find, put = pair
    rng = np.random.default_rng(case)
    params = mixed(rng)
    before = {name: (w, dense(w).tobytes()) for name, w in params.items()}
    put(params, {name: rng.standard_normal(a.shape) for name, a in find(params).items()})
    assert list(params) == list(before)
    assert all(params[name] is w and dense(w).tobytes() == b for name, (w, b) in before.items())


def unknown_names_are_refused(pair, case):
    _, put = pair
    params = mixed(np.random.default_rng(case))
    for name in ("e.weight", "b.weight", "d.weight", "c.q_proj.weight", "lora_A.weight"):
        try:
            put(params, {name: np.zeros((5, 3))})
        except KeyError as error:
            assert name in str(error)
        else:
            raise AssertionError(f"{name} was accepted")


def other_shapes_are_refused(pair, case):
    find, put = pair
    params = mixed(np.random.default_rng(case))
    for name, array in find(params).items():
        for shape in ((*array.shape, 1), array.shape[::-1] if array.ndim > 1 else (1,)):
            try:
                put(params, {name: np.zeros(shape)})
            except ValueError as error:
                assert str(array.shape) in str(error)
                assert str(shape) in str(error)
            else:
                raise AssertionError(f"{name}: {shape} was accepted")


PAIR_PROPERTIES = (inverse, some_only, the_given_is_unchanged, unknown_names_are_refused, other_shapes_are_refused)


@pytest.mark.parametrize("holds", PAIR_PROPERTIES)
def test_trainable_and_replace(holds):
    holds((trainable, replace), 1)


def test_trainable_and_replace_kill_matrix():
    def copies(params, arrays):
        return replace(params, {name: a.copy() for name, a in arrays.items()})

    def drops_the_frozen(params, arrays):
        return {name: w for name, w in replace(params, arrays).items() if learns(w)}

    def accepts_anything(params, arrays):
        known = trainable(params)
        return replace(params, {n: a for n, a in arrays.items() if n in known and a.shape == known[n].shape})

    def resets_the_rest(params, arrays):
        zeros = {name: np.zeros_like(a) for name, a in trainable(params).items()}
        return replace(params, zeros | arrays)

    def exchanges_the_adapter(params, arrays):
        found = {}
        for name, a in arrays.items():
            other = name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")
            found[other if other in arrays and arrays[other].shape == a.T.shape and other != name else name] = a
        return replace(params, {n: (a if a.shape == trainable(params)[n].shape else a.T) for n, a in found.items()})

    def writes_into_the_given(params, arrays):
        found = replace(params, arrays)
        for name, a in arrays.items():
            if isinstance(params.get(name), np.ndarray):
                params[name][...] = a
        return found

    def reversed_order(params, arrays):
        return dict(reversed(replace(params, arrays).items()))

    def only_ndarrays(params):
        return {name: w for name, w in params.items() if isinstance(w, np.ndarray)}

    def with_the_frozen(params):
        return trainable(params) | {n: w.array for n, w in params.items() if isinstance(w, Frozen)}

    puts = (copies, drops_the_frozen, accepts_anything, resets_the_rest, exchanges_the_adapter, writes_into_the_given,
            reversed_order)  # fmt: skip
    pairs = [named((trainable, put), put) for put in puts]
    pairs += [named((find, replace), find) for find in (only_ndarrays, with_the_frozen)]
    checks.kill_matrix(PAIR_PROPERTIES, pairs, (1, 2))


def named(pair, function):
    class Pair(tuple):
        __slots__ = ()
        __name__ = function.__name__

    return Pair(pair)


# --- gradients --------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("x.weight", "y.q_proj.weight", "z.bias")),
            st.sampled_from(("array", "named", "none")),
            st.integers(-9, 9),
        ),
        max_size=8,
    )
)
def test_contributions_to_one_name_add_up(contributions):
    """Whole numbers, in any number and order; what was given is not changed."""
    parts = {
        "array": lambda n: np.full(3, n * 1.0),
        "none": lambda n: None,
        "named": lambda n: {"lora_A.weight": np.full(2, n * 1.0), "lora_B.weight": np.full(2, -n * 1.0)},
    }
    given_ = [(name, parts[kind](n)) for name, kind, n in contributions]
    found = gradients(iter(given_))
    expected = {}
    for name, kind, n in contributions:
        if kind == "array":
            expected[name] = expected.get(name, 0) + n
        elif kind == "named":
            stem = name[: -len("weight")] if name.endswith("weight") else name
            for part, value in (("lora_A.weight", n), ("lora_B.weight", -n)):
                expected[stem + part] = expected.get(stem + part, 0) + value
    assert {name: (set(a.tolist()), len(a)) for name, a in found.items()} == {
        name: ({float(n)}, 2 if "lora" in name else 3) for name, n in expected.items()
    }
    for (name, kind, n), (_, cotangent) in zip(contributions, given_, strict=True):
        if kind == "array":
            assert (cotangent == n).all(), f"the contribution to {name} was changed in place"
        elif kind == "named":
            assert (cotangent["lora_A.weight"] == n).all()
            assert (cotangent["lora_B.weight"] == -n).all()


def test_add_is_in_place_in_the_total_only():
    total, part = np.array([1.0, 2.0]), np.array([10.0, 20.0])
    assert add(total, part) is total
    assert total.tolist() == [11, 22]
    assert part.tolist() == [10, 20]
    assert add(None, part) is part
    assert add(total, None) is total
    assert total.tolist() == [11, 22]
    assert add(None, None) is None


def test_add_of_named_parts_loses_no_name():
    """Each side may have names that the other lacks: what learns in one part of a batch only."""
    a, b, c, d = (np.full(2, n) for n in (1.0, 2.0, 30.0, 400.0))
    total = {"a": a, "b": b}
    assert add(total, {"b": c, "d": d}) is total
    assert {name: array.tolist() for name, array in total.items()} == {"a": [1, 1], "b": [32, 32], "d": [400, 400]}
    assert total["b"] is b
    assert c.tolist() == [30, 30]
    assert d.tolist() == [400, 400]


@pytest.mark.parametrize("factor", [3.0, np.float64(3), np.float32(3)])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_times_keeps_the_type_and_what_it_was_given(factor, dtype):
    given_ = np.array([1, -2], dtype)
    for found in (times(factor, given_), times(factor, {"A": given_})["A"]):
        checks.same_bits(found, np.array([3, -6], dtype), "product")
    assert times(factor, None) is None
    assert times(1.0, given_) is not given_  # the caller may add to it in place
    assert given_.tolist() == [1, -2]


# --- freezing ---------------------------------------------------------------------------------------------------------


def test_freeze_and_thaw(rng):
    params = {n: w for n, w in mixed(rng).items() if not isinstance(w, LoRA)}
    frozen = freeze(params)
    assert trainable(frozen) == {}
    assert list(frozen) == list(params)
    assert frozen["a.weight"].array is params["a.weight"]  # no copy
    assert frozen["b.weight"] is params["b.weight"]
    assert frozen["d.weight"] is params["d.weight"]
    again = freeze(frozen)
    assert all(again[n] is frozen[n] for n in frozen)
    thawed = thaw(frozen)
    assert thawed["a.weight"] is params["a.weight"]
    assert thawed["b.weight"] is params["b.weight"].array
    assert thawed["c.norm.bias"] is params["c.norm.bias"]
    assert thawed["d.weight"] is params["d.weight"]  # quantized: there is nothing to give back
    assert isinstance(params["a.weight"], np.ndarray)  # the given is as it was
    assert isinstance(params["b.weight"], Frozen)


def test_freezing_an_adapter_is_refused(rng):
    with pytest.raises(ValueError, match=r"c\.q_proj\.weight is LoRA.*merge or detach its adapter before freezing"):
        freeze(mixed(rng))
    assert thaw(mixed(rng))["c.q_proj.weight"].A.shape == (2, 6)


def test_frozen_multiplies_and_gives_no_gradient(rng):
    W, x, dy = (rng.integers(-5, 6, s).astype(np.float32) for s in ((4, 3), (2, 5, 3), (2, 5, 4)))
    weight = Frozen(W)
    y, vjp = weight.linear(x, dropout_key=3)  # it has no dropout
    dx, dweight = vjp(dy)
    checks.same_bits(y, np.einsum("btd,od->bto", x, W), "y")
    checks.same_bits(dx, np.einsum("bto,od->btd", dy, W), "dx")
    assert dweight is None
    assert (weight.shape, weight.nbytes) == ((4, 3), 48)
    assert weight.arrays() == {}
    assert weight.with_arrays({}) is weight
    assert weight.dense() is W
    assert weight.dense(np.dtype(np.float32)) is W
    checks.same_bits(weight.dense(np.dtype(np.float64)), W.astype(np.float64), "dense")
    assert repr(weight) == "Frozen(float32 (4, 3), 48 bytes)"
    assert repr(Frozen(np.zeros((100, 20)))) == "Frozen(float64 (100, 20), 16,000 bytes)"


def test_every_kind_is_a_weight_and_an_array_is_not(rng):
    for weight in mixed(rng).values():
        assert isinstance(weight, Weight) != isinstance(weight, np.ndarray)


def test_dense_and_unwrap(rng):
    params = mixed(rng)
    array, frozen, lora, q = (params[n] for n in ("a.weight", "b.weight", "c.q_proj.weight", "d.weight"))
    assert dense(array) is array
    assert dense(frozen) is frozen.array
    np.testing.assert_allclose(dense(lora), lora.base.array + 1.5 * lora.B @ lora.A, rtol=1e-13)
    checks.same_bits(dense(q), nf4.dequantize(q), "dense")
    assert unwrap(array)[0] is array
    assert unwrap(array)[1] is True
    table, table_learns = unwrap(frozen)
    assert table is frozen.array
    assert table_learns is False
    assert unwrap(q)[1] is False
    with pytest.raises(TypeError, match=r"LoRA\(.*is used as a table or gain, where an adapter has no meaning"):
        unwrap(lora)
