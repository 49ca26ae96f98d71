"""Merging, three ways: each by hand in float64, the bounds of what it loses, and wrong versions that are rejected."""

import warnings
from typing import get_args

import numpy as np
import pytest
import transformers
import wrong_merge

import peft
from minift.conformance import bounds
from minift.io import save_adapter, save_model
from minift.models import llama
from minift.nn.weight import Frozen, dense, replace, trainable
from minift.peft import lora, merge, qlora
from minift.peft.lora import LoRA
from minift.quant import double_quant, nf4
from minift.quant.nf4 import NF4Tensor

CONFIG = llama.Config(61, 48, 80, 2, 4, 2, 12)
TARGETS = ["q_proj", "down_proj", "lm_head"]  # square, not square, and one that all-linear does not mean
f64 = np.float64


def model(over_nf4, seed=0, size=0.01):
    """(original weights, the model with a trained adapter): α ≠ r, and an adapter about as large as NF4's error."""
    rng = np.random.default_rng(seed)
    shapes = llama.shapes(CONFIG).items()
    original = {n: (rng.standard_normal(s) * rng.uniform(0.01, 0.2)).astype(np.float32) for n, s in shapes}
    base = qlora.quantize(original) if over_nf4 else original
    attached = lora.attach(base, TARGETS, r=3, lora_alpha=7, rng=rng, use_rslora=seed % 2 == 1)
    learned = {n: (size**0.5 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in trainable(attached).items()}
    wrong_merge.ORIGINAL = original
    return original, replace(attached, learned)


def by_hand(W, w):
    """W + s B A in float64, with s from its definition; and how far float32 may be from it."""
    s = 7 / (np.sqrt(3) if w.use_rslora else 3)
    exact = W.astype(f64) + s * (w.B.astype(f64) @ w.A.astype(f64))
    return exact, bounds.lora_merge(W.astype(f64), w.A.astype(f64), w.B.astype(f64), s, np.float32)


def quantized_by_hand(W):
    return double_quant.compress(nf4.quantize(W)).dense()


def is_linear(name):
    return name.split(".")[-2] in llama.LINEAR_MODULES


# --- properties, each taking the implementation -----------------------------------------------------------------------


def dequantized_and_original_are_what_they_say(impl):
    """W_q + s B A and W + s B A, within the rounding of one float32 product and sum; the rest W_q or W, bit for bit."""
    for over_nf4 in (True, False):
        for seed in (0, 1):
            original, trained = model(over_nf4, seed)
            in_4_bits = {n: quantized_by_hand(w) if is_linear(n) else w for n, w in original.items()}
            for merged, base in (
                (impl.merge_dequantized(trained), in_4_bits),
                (impl.merge_original(trained, original), original),
            ):
                assert list(merged) == list(trained)
                assert all(isinstance(w, Frozen) for w in merged.values())
                for name, w in merged.items():
                    if not isinstance(trained[name], LoRA):
                        assert np.array_equal(dense(w), base[name]), name
                        continue
                    exact, bound = by_hand(base[name], trained[name])
                    assert (np.abs(dense(w) - exact) <= bound).all(), name


def the_exact_way_loses_rounding_only(impl):
    for over_nf4, expected in ((True, "dequantized"), (False, "original")):
        original, trained = model(over_nf4)
        assert impl.exact_way(trained) == expected
        assert get_args(impl.Way) == ("dequantized", "original", "requantized")
        merged = {"dequantized": impl.merge_dequantized(trained), "original": impl.merge_original(trained, original)}
        adapted = {n: w for n, w in trained.items() if isinstance(w, LoRA)}
        rounding = np.sqrt(sum(np.square(by_hand(w.base.dense(), w)[1]).sum() for w in adapted.values()))
        bound = rounding / np.sqrt(sum(np.square(w.delta(), dtype=f64).sum() for w in adapted.values()))
        other = "original" if over_nf4 else "dequantized"
        assert impl.merge_error(merged[expected], trained) <= bound < 1e-4
        assert impl.merge_error(merged[other], trained) > 1e3 * bound


def requantized_error_is_bounded(impl):
    """Equation (6), for every number of every block; and W_trained, not W, is what it is near to."""
    for over_nf4 in (True, False):
        for use_double_quant in (True, False):
            for block_size in (64, 32):
                _, trained = model(over_nf4)
                merged = impl.merge_requantized(trained, block_size, use_double_quant)
                assert list(merged) == list(trained)
                closest = 0.0
                for name, w in trained.items():
                    if not isinstance(w, LoRA) or not is_linear(name):
                        continue
                    q = merged[name]
                    assert isinstance(q, NF4Tensor) and q.block_size == block_size
                    assert isinstance(q.absmax, np.ndarray) is not use_double_quant
                    exact, rounding = (x.reshape(-1) for x in by_hand(w.base.dense(), w))
                    padded = np.pad(np.abs(exact) + rounding, (0, -exact.size % block_size))
                    a = padded.reshape(-1, block_size).max(axis=1)
                    bound = np.repeat(bounds.nf4(a, q.absmax if use_double_quant else None), block_size)[: exact.size]
                    error = np.abs(q.dense().reshape(-1) - exact)
                    assert (error <= bound + rounding).all(), name
                    closest = max(closest, (error / bound).max())
                assert closest > 0.8, "the bound says something"


def what_has_no_adapter_keeps_its_bits(impl):
    """In 4 bits already: the same codes and the same scales, in 8 bits or written out."""
    original, trained = model(over_nf4=True)
    for use_double_quant in (True, False):
        merged = impl.merge_requantized(trained, use_double_quant=use_double_quant)
        for name, w in trained.items():
            if isinstance(w, NF4Tensor):
                assert np.array_equal(merged[name].codes, w.codes), name
                assert merged[name].scales().tobytes() == w.scales().tobytes(), name
                assert isinstance(merged[name].absmax, np.ndarray) is not use_double_quant
            elif not isinstance(w, LoRA):
                assert np.array_equal(dense(merged[name]), original[name])
        head = merged[llama.HEAD]
        exact, bound = by_hand(original[llama.HEAD], trained[llama.HEAD])
        assert (np.abs(dense(head) - exact) <= bound).all()


def scales_are_as_asked(impl):
    """float32 unless asked otherwise; asked for 8 bits, layers with float32 scales get what `compress` gives."""
    original, _ = model(over_nf4=True)
    base = qlora.quantize(original, use_double_quant=False)
    trained = lora.attach(base, ["q_proj"], r=2, rng=np.random.default_rng(0))
    for options in ({}, {"use_double_quant": True}):
        merged = impl.merge_requantized(trained, **options)
        for name, w in base.items():
            if isinstance(w, NF4Tensor):
                expected = double_quant.compress(w) if options else w
                assert isinstance(merged[name].absmax, np.ndarray) is not bool(options)
                assert merged[name].scales().tobytes() == expected.scales().tobytes(), name


def a_base_of_both_kinds_is_left_as_it_is(impl):
    """Where only some layers are in 4 bits the adapter was trained over just that, so nothing more is quantized."""
    original, _ = model(over_nf4=True)
    base = qlora.quantize(original, ["q_proj"])
    attached = lora.attach(base, TARGETS, r=2, rng=np.random.default_rng(0))
    trained = replace(attached, {n: a + np.float32(0.1) for n, a in trainable(attached).items()})
    assert impl.exact_way(trained) == "dequantized"
    assert impl.merge_error(impl.merge_dequantized(trained), trained) < 1e-5
    up = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(dense(impl.merge_dequantized(trained)[up]), original[up])


def error_is_the_ratio_of_two_norms(impl):
    """Over all adapted layers as if they were one long vector; what else changed does not count."""
    for over_nf4 in (True, False):
        original, trained = model(over_nf4)
        adapted = {n: w for n, w in trained.items() if isinstance(w, LoRA)}
        for merged in (
            merge.merge_original(trained, original),
            merge.merge_dequantized(trained),
            merge.merge_requantized(trained, use_double_quant=True),
            {n: w.base if isinstance(w, LoRA) else w for n, w in trained.items()},
        ):
            exact = {n: by_hand(w.base.dense(), w)[0] for n, w in adapted.items()}
            lost = np.concatenate([(dense(merged[n]) - exact[n]).ravel() for n in adapted])
            learned = np.concatenate([(exact[n] - w.base.dense()).ravel() for n, w in adapted.items()])
            expected = np.linalg.norm(lost) / np.linalg.norm(learned)
            assert abs(impl.merge_error(merged, trained) - expected) <= 1e-9 * expected
        assert abs(impl.merge_error(merged, trained) - 1) <= 1e-9  # the base without the adapter


PROPERTIES = (
    dequantized_and_original_are_what_they_say,
    the_exact_way_loses_rounding_only,
    requantized_error_is_bounded,
    what_has_no_adapter_keeps_its_bits,
    scales_are_as_asked,
    a_base_of_both_kinds_is_left_as_it_is,
    error_is_the_ratio_of_two_norms,
)


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.__name__)
def test_battery(prop):
    prop(merge)


@pytest.mark.parametrize("version", wrong_merge.VERSIONS)
def test_wrong_versions_are_rejected(version):
    with pytest.raises(AssertionError):
        for prop in PROPERTIES:
            prop(wrong_merge.VERSIONS[version])


def test_how_much_of_an_adapter_is_lost(rng):
    """A normal matrix and an adapter a tenth of its size: W + s B A and 4 bits lose most of what was learned, and of
    an adapter half its size a fifth. (NF4's own error is 9.2 % of the weights.)"""
    W = (0.02 * rng.standard_normal((512, 512))).astype(np.float32)
    lost = {}
    for share in (0.1, 0.5):
        attached = lora.attach(qlora.quantize({"a.q_proj.weight": W}), r=64, lora_alpha=16, rng=rng)
        learned = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in trainable(attached).items()}
        w = replace(attached, learned)["a.q_proj.weight"]
        size = share * 0.02 / w.delta().std()
        trained = {"a.q_proj.weight": w.with_arrays({lora.A_NAME: w.A, lora.B_NAME: w.B * np.float32(size)})}
        ways = (
            merge.merge_dequantized(trained),
            merge.merge_original(trained, {"a.q_proj.weight": W}),
            merge.merge_requantized(trained),
        )
        lost[share] = [merge.merge_error(merged, trained) for merged in ways]
    assert lost[0.1][0] < 1e-5 and lost[0.5][0] < 1e-6
    np.testing.assert_allclose(lost[0.1][1:], [0.92, 0.79], atol=0.01)
    np.testing.assert_allclose(lost[0.5][1:], [0.18, 0.21], atol=0.01)


@pytest.mark.parametrize("double", [False, True])
def test_requantized_is_what_peft_merges(tmp_path, double):
    """PEFT on a model of transformers and bitsandbytes: `merge_and_unload` dequantizes, adds and quantizes again. Its
    codes are ours, unless rounding decides: then the number lies at a midpoint, as near as the sum is exact."""
    config = llama.Config(61, 64, 128, 2, 4, 2, 16)  # rows of whole blocks: others it dequantizes wrongly on AVX-512
    rng = np.random.default_rng(5)
    original = {n: (0.05 * rng.standard_normal(s)).astype(np.float32) for n, s in llama.shapes(config).items()}
    base = qlora.quantize(original, use_double_quant=double)
    attached = lora.attach(base, r=3, lora_alpha=7, rng=rng)
    learned = {n: (0.05 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in trainable(attached).items()}
    trained = replace(attached, learned)
    save_model(tmp_path / "q", config, base)
    save_adapter(tmp_path / "a", lora.detach(trained)[1])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    peers = peft.PeftModel.from_pretrained(loaded, tmp_path / "a").train()  # for inference the weights are packed anew
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merge lora module to 4-bit linear may get different generations")
        merged = dict(peers.merge_and_unload().named_parameters())
    ours = merge.merge_requantized(trained, use_double_quant=double)
    layers = {name: q for name, q in ours.items() if isinstance(q, NF4Tensor)}
    assert len(layers) == 14
    for name, q in layers.items():
        w = trained[name]
        exact, rounding = (x.reshape(-1) for x in by_hand(w.base.dense(), w))
        theirs, mine = (nf4.unpack(c, exact.size) for c in (merged[name].data.numpy().reshape(-1), q.codes))
        for at in np.nonzero(theirs != mine)[0]:
            a = np.abs(exact.reshape(-1, 64)[at // 64]).max()
            nearest = np.abs(exact[at] / a - nf4.MIDPOINTS.astype(f64)).min()
            assert nearest <= 2 * rounding[at] / a + 4 * bounds.unit_roundoff(np.float32), (name, at)
        assert np.count_nonzero(theirs != mine) < 1e-3 * exact.size
        assert merged[name].quant_state.nested is double


def test_an_adapter_that_has_learned_nothing(rng):
    original, trained = model(over_nf4=True)
    fresh = lora.attach(qlora.quantize(original), TARGETS, r=3, rng=rng)
    assert merge.merge_error(merge.merge_dequantized(fresh), fresh) == 0
    assert merge.merge_error(merge.merge_original(fresh, original), fresh) == np.inf
    for call in (merge.merge_dequantized, merge.merge_requantized, lambda p: merge.merge_original(p, original)):
        with pytest.raises(ValueError, match="these parameters carry no adapter"):
            call(lora.detach(trained)[0])


@pytest.mark.parametrize("over_nf4", [False, True])
def test_what_was_trained_in_full_is_in_every_merged_model(over_nf4, rng):
    original, _ = model(over_nf4)
    base = qlora.quantize(original) if over_nf4 else original
    attached = lora.attach(base, ["q_proj"], r=3, lora_alpha=7, rng=rng, modules_to_save=["norm"])
    learned = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in trainable(attached).items()}
    trained = replace(attached, learned)
    whole = [name for name in learned if name.endswith("norm.weight")]
    merged = (
        merge.merge_dequantized(trained),
        merge.merge_original(trained, original),
        merge.merge_requantized(trained),
    )
    assert len(whole) == 2 * CONFIG.num_hidden_layers + 1
    for params in merged:
        assert all(np.array_equal(dense(params[name]), learned[name]) for name in whole)
