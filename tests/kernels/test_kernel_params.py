"""Parameters from NumPy to torch and back: every kind of weight, bit for bit, and no shared memory."""

import dataclasses

import numpy as np
import pytest
import torch

from minift.models import llama
from minift.nn.weight import freeze, replace, trainable
from minift.peft import lora, merge, qlora
from minift_kernels import params as twins
from minift_kernels.nn import weight as twin_weight
from minift_kernels.peft import lora as twin_lora
from minift_kernels.peft import merge as twin_merge
from minift_kernels.peft import qlora as twin_qlora

CONFIG = llama.Config(23, 12, 20, 2, 4, 2, 6)


@pytest.fixture
def params(rng):
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in llama.shapes(CONFIG).items()}


def every_kind(params, rng):
    """Arrays, frozen ones, NF4 with both kinds of scales, adapters over each, a weight that is trained in full."""
    quantized = qlora.quantize(params, ["q_proj", "up_proj"], 32)
    quantized |= qlora.quantize(params, ["k_proj", "down_proj"], 32, use_double_quant=False)
    carried = lora.attach(quantized, ["q_proj", "k_proj", "v_proj"], 3, 7, rng=rng, lora_dropout=0.25, use_rslora=True,
                          modules_to_save=["norm"])  # fmt: skip
    return carried | {"score.weight": rng.standard_normal((1, 12)).astype(np.float32)}


def leaves(weight):
    """Every number of a weight, with the path to it; arrays with their bytes."""
    if isinstance(weight, np.ndarray | np.generic):
        return [("array", weight.dtype, weight.shape, weight.tobytes())]
    if not dataclasses.is_dataclass(weight):
        return [weight]
    parts = [(f.name, leaves(getattr(weight, f.name))) for f in dataclasses.fields(weight)]
    return [type(weight), *parts]


def arrays_of(weight):
    if isinstance(weight, np.ndarray):
        return [weight]
    fields = dataclasses.fields(weight) if dataclasses.is_dataclass(weight) else []
    return [a for f in fields for a in arrays_of(getattr(weight, f.name))]


def tensors_of(weight):
    if isinstance(weight, torch.Tensor):
        return [weight]
    fields = dataclasses.fields(weight) if dataclasses.is_dataclass(weight) else []
    return [t for f in fields for t in tensors_of(getattr(weight, f.name))]


def test_there_and_back_is_the_same_to_the_bit(params, rng):
    given = every_kind(params, rng)
    kinds = {type(w).__name__ for w in given.values()} | {type(w.base).__name__ for w in given.values() if
                                                          hasattr(w, "A")}  # fmt: skip
    assert kinds == {"ndarray", "Frozen", "NF4Tensor", "LoRA", "Tuned"}
    back = twins.to_numpy(twins.from_numpy(given))
    assert list(back) == list(given)
    for name, weight in given.items():
        assert leaves(back[name]) == leaves(weight), name


def test_nothing_shares_memory(params, rng):
    given = every_kind(params, rng)
    before = {name: leaves(w) for name, w in given.items()}
    tensors = twins.from_numpy(given)
    with torch.no_grad():
        for weight in tensors.values():
            for tensor in tensors_of(weight):
                tensor.zero_()
    assert {name: leaves(w) for name, w in given.items()} == before
    back = twins.to_numpy(tensors)
    for weight in back.values():
        for array in arrays_of(weight):
            if array.flags.writeable:
                array[...] = 1
    assert not any(t.any() for w in tensors.values() for t in tensors_of(w))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_frozen_takes_the_type_and_what_learns_does_not(dtype, params, rng):
    given = every_kind(params, rng)
    tensors = twins.from_numpy(given, "cpu", dtype)
    learning = twin_weight.trainable(tensors)
    assert learning.keys() == trainable(given).keys()
    for name, tensor in learning.items():
        assert tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf, name
        assert tensor.detach().numpy().tobytes() == trainable(given)[name].tobytes()
    for name, weight in tensors.items():
        base = getattr(weight, "base", weight)
        if isinstance(base, twin_weight.Frozen):
            assert base.array.dtype == dtype, name
            wanted = torch.from_numpy(getattr(given[name], "base", given[name]).array).to(dtype)
            assert torch.equal(base.array, wanted) and not base.array.requires_grad
        elif not isinstance(base, torch.Tensor):
            assert leaves(twins.to_numpy({name: base})[name]) == leaves(getattr(given[name], "base", given[name]))


def test_float64_that_learns_stays_float64(rng):
    w = rng.standard_normal((3, 4))
    tensors = twins.from_numpy({"w.weight": w})
    assert tensors["w.weight"].dtype == torch.float64
    assert twins.to_numpy(tensors)["w.weight"].tobytes() == w.tobytes()


def test_the_model_computes_the_same(params, rng):
    """Each linear layer, in both libraries."""
    given = every_kind(params, rng)
    tensors = twins.from_numpy(given)
    for name, weight in given.items():
        if len(weight.shape) == 2 and not isinstance(weight, np.ndarray):
            x = rng.standard_normal((5, weight.shape[1])).astype(np.float32)
            y, _ = weight.linear(x, 9)
            found = tensors[name].linear(torch.from_numpy(x), 9)
            np.testing.assert_allclose(found.detach().numpy(), y, rtol=2e-5, atol=2e-5, err_msg=name)


def test_what_is_no_weight_is_refused():
    with pytest.raises(TypeError, match="layer: float, needed an ndarray, Frozen, SixteenBitTensor, NF4Tensor, LoRA"):
        twins.from_numpy({"layer": 1.0})
    with pytest.raises(TypeError, match="layer: ndarray, needed a Tensor, Frozen, NF4Tensor, LoRA, Tuned or Int8"):
        twins.to_numpy({"layer": np.ones(3)})


# Adapters as values: the bookkeeping on tensors gives what it gives on arrays.


def same(found, wanted):
    back = twins.to_numpy(found)
    assert list(back) == list(wanted)
    for name in wanted:
        assert leaves(back[name]) == leaves(wanted[name]), name


SETTINGS = {"use_rslora": True, "lora_dropout": 0.25, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 11},
            "modules_to_save": ["norm"]}  # fmt: skip


def test_attach_detach_insert(params):
    given, tensors = freeze(params), twins.from_numpy(freeze(params))
    wanted = lora.attach(given, ["q_proj", "v_proj"], 3, 7, rng=np.random.default_rng(5), **SETTINGS)
    found = twin_lora.attach(tensors, ["q_proj", "v_proj"], 3, 7, rng=np.random.default_rng(5), **SETTINGS)
    same(found, wanted)
    assert all(t.requires_grad and t.is_leaf for t in twin_weight.trainable(found).values())
    base, adapter = twin_lora.detach(found)
    assert all(base[name] is tensors[name] for name in base)
    wanted_base, wanted_adapter = lora.detach(wanted)
    same(base, wanted_base)
    for field in dataclasses.fields(adapter):
        if field.name != "arrays":
            assert getattr(adapter, field.name) == getattr(wanted_adapter, field.name)
    assert repr(adapter) == repr(wanted_adapter) and adapter.ranks == wanted_adapter.ranks
    same(twin_lora.insert(base, adapter), wanted)
    assert twin_lora.bare(found) == base
    with pytest.raises(ValueError, match="carry no adapter"):
        twin_lora.detach(base)
    with pytest.raises(KeyError, match=r"the model has no model.layers.0.self_attn.q_proj.weight"):
        twin_lora.insert({}, adapter)


def test_mix_merge_unmerge(params):
    rng = np.random.default_rng(6)
    adapters = []
    for r in (2, 3):
        attached = lora.attach(params, ["q_proj"], r, 7, rng=rng)
        moved = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in trainable(attached).items()}
        adapters.append(lora.detach(replace(attached, moved))[1])
    as_tensors = [dataclasses.replace(a, arrays={n: torch.tensor(v) for n, v in a.arrays.items()}) for a in adapters]
    wanted = lora.mix(zip(adapters, (0.5, -2), strict=True))
    found = twin_lora.mix(zip(as_tensors, (0.5, -2), strict=True))
    for name, array in wanted.arrays.items():
        assert found.arrays[name].numpy().tobytes() == array.tobytes(), name
    base = twins.from_numpy(freeze(params))
    merged, wanted_merged = twin_lora.merge(twin_lora.insert(base, found)), lora.merge(lora.insert(params, wanted))
    unmerged = twin_lora.unmerge(merged, found)
    for name, weight in wanted_merged.items():
        np.testing.assert_allclose(merged[name].array.numpy(), weight.array, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(unmerged[name].array.numpy(), params[name], rtol=1e-5, atol=1e-5)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[name].array, base[name].array)
    with pytest.raises(ValueError, match="carry no adapter"):
        twin_lora.merge(base)


@pytest.mark.parametrize("use_double_quant", [False, True])
def test_qlora(use_double_quant, params):
    """The reference's codes, scales and A to the bit, but for the mean of the scales, whose last bit may differ."""
    tensors, settings = twins.from_numpy(params), {"use_double_quant": use_double_quant, "block_size": 32}
    wanted = qlora.attach(params, "all-linear", 3, 7, rng=np.random.default_rng(5), lora_dropout=0.25, **settings)
    found = twin_qlora.attach(tensors, "all-linear", 3, 7, rng=np.random.default_rng(5), lora_dropout=0.25, **settings)
    for name, weight in twins.to_numpy(found).items():
        if isinstance(weight, lora.LoRA) and use_double_quant:
            assert weight.base.codes.tobytes() == wanted[name].base.codes.tobytes()
            assert weight.A.tobytes() == wanted[name].A.tobytes()
            np.testing.assert_allclose(weight.base.scales(), wanted[name].base.scales(), rtol=1e-2)
        else:
            assert leaves(weight) == leaves(wanted[name]), name
    with pytest.raises(ValueError, match="merge or detach the adapter before quantizing"):
        twin_qlora.quantize(twin_lora.attach(tensors, r=3, rng=np.random.default_rng(5)))
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=rf"{name}: .*nan"):
        twin_qlora.quantize(tensors | {name: tensors[name].detach() * torch.nan})


@pytest.mark.parametrize("over_nf4", [False, True])
def test_three_ways_of_merging(over_nf4, params):
    rng = np.random.default_rng(7)
    base = qlora.quantize(params, block_size=32, use_double_quant=False) if over_nf4 else params
    attached = lora.attach(base, ["q_proj", "up_proj"], 3, 7, rng=rng)
    moved = {n: rng.standard_normal(a.shape).astype(np.float32) / 4 for n, a in trainable(attached).items()}
    trained = replace(attached, moved)
    tensors, originals = twins.from_numpy(trained), twins.from_numpy(params)
    assert twin_merge.exact_way(tensors) == merge.exact_way(trained)
    for found, wanted in (
        (twin_merge.merge_original(tensors, originals), merge.merge_original(trained, params)),
        (twin_merge.merge_dequantized(tensors), merge.merge_dequantized(trained)),
        (twin_merge.merge_requantized(tensors, 32), merge.merge_requantized(trained, 32)),
    ):
        back = twins.to_numpy(found)
        assert [type(back[name]) for name in wanted] == [type(w) for w in wanted.values()]
        error, wanted_error = twin_merge.merge_error(found, tensors), merge.merge_error(wanted, trained)
        assert error == pytest.approx(wanted_error, rel=1e-3, abs=1e-6)
        for name in wanted:
            if type(wanted[name]).__name__ == "Frozen":
                np.testing.assert_allclose(back[name].array, wanted[name].array, rtol=1e-3, atol=1e-3)
    assert not any(twin_weight.learns(w) for w in found.values())
    assert twin_merge.squares(torch.tensor([3.0, 4.0])) == 25
