"""LoRA: the worked example, the laws, adapters as values, and wrong versions that must be rejected."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
import wrong_lora
from hypothesis import given
from hypothesis import strategies as st

from minift.conformance import bounds
from minift.conformance.gradients import check_vjp
from minift.conformance.operations import lora as operation
from minift.models import llama
from minift.nn.dropout import uniform
from minift.nn.linear import linear
from minift.nn.weight import Frozen, freeze, learns, replace, trainable
from minift.peft import lora, qlora
from minift.peft.lora import LoRA
from minift.peft.tuned import Tuned
from minift.quant import double_quant, nf4
from nn.checks import kill_matrix

CONFIG = llama.Config(23, 12, 20, 2, 4, 2, 6)
LAYER = "model.layers.1.self_attn.q_proj."


def make(rng, d_out=5, d_in=7, r=3, n=(4,), dtype=np.float64):
    arrays = (rng.standard_normal(s) for s in ((*n, d_in), (d_out, d_in), (r, d_in), (d_out, r)))
    return tuple(a.astype(dtype) for a in arrays)


@pytest.fixture
def params(rng):
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in llama.shapes(CONFIG).items()}


def trained(params, rng):
    """An adapter in the middle of training: B is not zero."""
    return replace(params, {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in trainable(params).items()})


# --- properties of `forward`, each taking the implementation ----------------------------------------------------------


def worked_example(forward):
    """By hand: W (4, 3), r = 1, α = 2, B = 0, then one step of gradient descent at 0.5, then the gradient again."""
    W = np.array([[1.0, 0, 2], [0, 1, 0], [1, 1, 0], [2, 0, 1]])
    A, B = np.array([[1.0, 0, -1]]), np.zeros((4, 1))
    x, dy = np.array([[1.0, 2, 0]]), np.array([[1.0, 0, -1, 2]])
    y, vjp = forward(x, W, A, B, 2.0)
    dx, dW, dA, dB = vjp(dy)
    assert y.tolist() == [[1, 2, 3, 2]]
    assert dW is None
    assert dA.tolist() == [[0, 0, 0]]
    assert dB.tolist() == [[2], [0], [-2], [4]]
    B = B - 0.5 * dB
    y, vjp = forward(x, W, A, B, 2.0)
    assert y.tolist() == [[-1, 2, 5, -2]]
    dx, dW, dA, dB = vjp(dy)
    assert dA.tolist() == [[-12, -24, 0]]
    assert dx.tolist() == (dy @ (W + 2 * B @ A)).tolist()


def gradients(forward):
    rng = np.random.default_rng(1)
    x, W, A, B = make(rng, n=(2, 4))
    check_vjp(lambda *args: forward(*args, scaling=0.7), x, W, A, B, rng=rng, frozen=[1])


def gradients_with_dropout(forward):
    rng = np.random.default_rng(2)
    x, W, A, B = make(rng)
    check_vjp(lambda *args: forward(*args, scaling=1.7, p=0.4, dropout_key=9), x, W, A, B, rng=rng, frozen=[1])


def equals_the_hand_built_matrix(forward):
    rng = np.random.default_rng(3)
    x, W, A, B = make(rng)
    np.testing.assert_allclose(forward(x, W, A, B, 1.7)[0], x @ (W + 1.7 * B @ A).T, rtol=1e-13, atol=1e-13)


def dropout_on_the_detour_only(forward):
    rng = np.random.default_rng(4)
    x, W, A, B = make(rng)
    keep = uniform(9, np.arange(x.size)).reshape(x.shape) > np.float32(0.4)
    expected = x @ W.T + 1.7 * ((x * keep / 0.6) @ A.T) @ B.T
    np.testing.assert_allclose(forward(x, W, A, B, 1.7, 0.4, 9)[0], expected, rtol=1e-13, atol=1e-13)
    assert np.array_equal(forward(x, W, A, B, 1.7, 0.4, None)[0], forward(x, W, A, B, 1.7)[0])


FORWARD_PROPERTIES = (
    worked_example,
    gradients,
    gradients_with_dropout,
    equals_the_hand_built_matrix,
    dropout_on_the_detour_only,
)


@pytest.mark.parametrize("holds", FORWARD_PROPERTIES)
def test_forward(holds):
    holds(lora.forward)


def rejected(holds, implementation):
    try:
        holds(implementation)
    except (AssertionError, ValueError, TypeError):
        return True
    return False


@pytest.mark.parametrize("wrong", wrong_lora.FORWARD)
def test_wrong_forward_is_rejected(wrong):
    assert any(rejected(holds, wrong) for holds in FORWARD_PROPERTIES)


@pytest.mark.parametrize("holds", FORWARD_PROPERTIES)
def test_every_property_rejects_something(holds):
    assert any(rejected(holds, wrong) for wrong in wrong_lora.FORWARD)


@pytest.mark.parametrize("holds", operation.PROPERTIES, ids=lambda p: p.__name__)
def test_what_the_kernels_must_satisfy(holds):
    for case in operation.FIXED:
        if case.dtype in ("float32", "float64"):
            holds(lora.forward, case)


def test_what_the_kernels_must_satisfy_rejects_wrong_versions():
    of_numbers = [p for p in operation.PROPERTIES if p not in (operation.any_layout, operation.changes_nothing)]
    kill_matrix(of_numbers, wrong_lora.FORWARD, operation.FIXED[:2] + operation.FIXED[-1:])


# --- laws ------------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_no_bit_and_only_b_has_a_gradient(params, rng):
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 6))
    attached = lora.attach(params, r=3, lora_alpha=7, rng=rng)
    y, _ = llama.forward(params, tokens, CONFIG)
    y_attached, vjp = llama.forward(attached, tokens, CONFIG)
    assert np.array_equal(y, y_attached)
    for name, gradient in vjp(rng.standard_normal(y.shape).astype(np.float32)).items():
        assert gradient.any() == name.endswith("lora_B.weight"), name


@given(k=st.integers(1, 300), r=st.integers(1, 20), seed=st.integers(0, 99), scale=st.floats(-8, 8))
def test_forward_in_float32_is_within_the_bound(k, r, seed, scale):
    x, W, A, B = make(np.random.default_rng(seed), d_in=k, r=r, dtype=np.float32)
    exact = x.astype(float) @ W.T.astype(float) + scale * (x.astype(float) @ A.T.astype(float)) @ B.T.astype(float)
    allowed = bounds.lora(x.astype(float), W, A, B, scale, np.float32)
    assert (np.abs(lora.forward(x, W, A, B, scale)[0] - exact) <= allowed).all()


def test_integers_are_exact(rng):
    """Sums of small whole numbers are exact in float32, so every bit must agree with integer arithmetic."""
    x, W, A, B = (rng.integers(-4, 5, s) for s in ((3, 50), (9, 50), (4, 50), (9, 4)))
    y, _ = lora.forward(*(a.astype(np.float32) for a in (x, W, A, B)), scaling=0.5)
    assert np.array_equal(2 * y, 2 * (x @ W.T) + (x @ A.T) @ B.T)


def test_rank_gauge_and_linearity(rng):
    x, W, A, B = make(rng)
    weight = LoRA(Frozen(W), A, B, lora_alpha=5)
    assert np.linalg.matrix_rank(weight.delta()) == 3
    G = rng.standard_normal((3, 3))
    same = LoRA(Frozen(W), np.linalg.solve(G, A), B @ G, lora_alpha=5)  # (BG)(G⁻¹A) = BA
    np.testing.assert_allclose(weight.linear(x)[0], same.linear(x)[0], rtol=1e-9, atol=1e-9)
    doubled = LoRA(Frozen(W), A, B, lora_alpha=10)
    np.testing.assert_allclose(
        doubled.linear(x)[0] - x @ W.T, 2 * (weight.linear(x)[0] - x @ W.T), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("rslora", "expected"), [(False, 7 / 4), (True, 7 / 2)])
def test_scaling(rng, rslora, expected):
    _, W, A, B = make(rng, r=4)
    weight = LoRA(Frozen(W), A, B, lora_alpha=7, use_rslora=rslora)
    assert weight.scaling == lora.scaling(7, 4, rslora) == expected
    np.testing.assert_allclose(weight.delta(), expected * B @ A, rtol=1e-13)
    np.testing.assert_allclose(weight.dense(), W + expected * B @ A, rtol=1e-13)


# --- attach and targets -----------------------------------------------------------------------------------------------


def paths(params, target_modules):
    return {n.removeprefix("model.layers.").removesuffix(".weight") for n in lora.targets(params, target_modules)}


def test_targets(params):
    both = ("self_attn.q_proj", "mlp.up_proj")
    assert paths(params, ["q_proj", "mlp.up_proj"]) == {f"{i}.{m}" for i in (0, 1) for m in both}
    assert paths(params, ["model.layers.1.self_attn.v_proj"]) == {"1.self_attn.v_proj"}
    assert paths(params, r".*\.1\..*(q|k)_proj") == {"1.self_attn.q_proj", "1.self_attn.k_proj"}
    everything = lora.targets(params, "all-linear")
    assert len(everything) == 2 * 7
    assert everything == [n for n in params if n in everything]
    assert not any("embed" in n or "lm_head" in n or "norm" in n for n in everything)
    assert lora.targets(params, ["lm_head"]) == ["lm_head.weight"]  # who names the head, means it


@pytest.mark.parametrize("target", ["proj", "q_pro", "input_layernorm", "self_attn", "nothing"])
def test_a_target_that_matches_no_layer_is_refused(params, target, rng):
    modules = re.escape(str(sorted([*llama.LINEAR_MODULES, "lm_head"])))
    with pytest.raises(ValueError, match=rf"'{target}' matches no linear layer; there are {modules}$"):
        lora.attach(params, ["q_proj", target], rng=rng)


def test_a_regular_expression_that_matches_nothing_is_refused(params):
    with pytest.raises(ValueError, match="matches none of"):
        lora.targets(params, "q_proj")  # must match the whole path


@pytest.mark.parametrize("r", [0, -1, 2.0, 2.5, True])
def test_a_rank_that_is_no_whole_number_from_one_on_is_refused(params, rng, r):
    attach = inspect.unwrap(lora.attach)  # the tests check types, users do not
    with pytest.raises(ValueError, match=f"r is {r}, needed a rank of at least 1, a whole number"):
        attach(params, r=r, rng=rng)
    with pytest.raises(ValueError, match=f"r is {r}, needed a rank"):
        attach(params, rank_pattern={"q_proj": r}, rng=rng)


@pytest.mark.parametrize("nothing", [[], (), ""])
def test_no_target_at_all_is_refused(params, rng, nothing):
    with pytest.raises(ValueError, match=r"target_modules is empty, needed some of \['down_proj', .*, or 'all-linear'"):
        lora.attach(params, nothing, rng=rng)


def test_attach_freezes_everything_else(params, rng):
    attached = lora.attach(params, ["q_proj"], r=3, lora_alpha=7, lora_dropout=0.2, use_rslora=True, rng=rng)
    assert list(attached) == list(params)
    for name, weight in attached.items():
        if "q_proj" in name:
            assert isinstance(weight, LoRA)
            assert (weight.lora_alpha, weight.lora_dropout, weight.use_rslora) == (7, 0.2, True)
            assert weight.base.array is params[name]  # nothing is copied
        else:
            assert not learns(weight)
            assert weight.array is params[name]
    assert set(trainable(attached)) == {
        f"model.layers.{i}.self_attn.q_proj.lora_{m}.weight" for i in (0, 1) for m in "AB"
    }


def test_a_is_uniform_in_one_over_root_in_and_depends_on_the_generator(params, rng):
    big = {"model.layers.0.mlp.up_proj.weight": np.zeros((3, 10_000), np.float32)}
    (weight,) = lora.attach(big, r=8, rng=rng).values()
    bound = 1 / math.sqrt(10_000)
    assert weight.A.dtype == weight.B.dtype == np.float32
    assert np.abs(weight.A).max() <= bound
    assert not weight.B.any()
    # 80,000 uniform numbers: mean 0 ± 6 σ/√n with σ = bound/√3; extremes within a thousandth of the ends
    assert abs(weight.A.mean()) < 6 * bound / math.sqrt(3 * 80_000)
    assert weight.A.max() > 0.999 * bound
    assert weight.A.min() < -0.999 * bound
    again = lora.attach(big, r=8, rng=np.random.default_rng(5))
    once_more = lora.attach(big, r=8, rng=np.random.default_rng(5))
    assert all(np.array_equal(again[n].A, once_more[n].A) for n in big)
    assert not any(np.array_equal(again[n].A, lora.attach(big, r=8, rng=np.random.default_rng(6))[n].A) for n in big)


def test_attaching_twice_is_refused(params, rng):
    attached = lora.attach(params, ["q_proj"], rng=rng)
    with pytest.raises(ValueError, match=r"q_proj.*which learns: merge or detach"):
        lora.attach(attached, ["v_proj"], rng=rng)


def test_factors_that_do_not_fit_are_refused(rng):
    _, W, A, B = make(rng)
    for wrong_a, wrong_b in ((A[:2], B), (A[:, :-1], B), (A, B[:-1])):
        with pytest.raises(ValueError, match=r"do not fit a weight of shape \(5, 7\)"):
            LoRA(Frozen(W), wrong_a, wrong_b, 1)


# --- adapters as values -----------------------------------------------------------------------------------------------


def test_detach_and_insert(params, rng):
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 6))
    carried = trained(lora.attach(params, ["q_proj", "down_proj"], r=3, lora_alpha=7, lora_dropout=0.1, rng=rng), rng)
    base, adapter = lora.detach(carried)
    assert all(isinstance(w, Frozen) and w.array is params[n] for n, w in base.items())
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.use_rslora) == (3, 7, 0.1, False)
    assert adapter.target_modules == ("down_proj", "q_proj")
    assert set(adapter.arrays) == set(trainable(carried))
    with_adapter, _ = llama.forward(carried, tokens, CONFIG)
    without, _ = llama.forward(base, tokens, CONFIG)
    assert np.array_equal(without, llama.forward(params, tokens, CONFIG)[0])
    assert not np.array_equal(without, with_adapter)
    back = lora.insert(base, adapter)
    assert np.array_equal(llama.forward(back, tokens, CONFIG)[0], with_adapter)
    assert np.array_equal(llama.forward(lora.insert(params, adapter), tokens, CONFIG)[0], with_adapter)


def test_switching_between_named_adapters_copies_no_weights(params, rng):
    tokens = rng.integers(0, CONFIG.vocab_size, (1, 5))
    adapters, outputs = {}, {}
    for name, modules in (("poems", ["q_proj"]), ("code", ["v_proj", "up_proj"])):
        carried = trained(lora.attach(params, modules, r=2, lora_alpha=5, rng=rng), rng)
        outputs[name] = llama.forward(carried, tokens, CONFIG)[0]
        adapters[name] = lora.detach(carried)[1]
    current = freeze(params)
    for name in ("poems", "code", "poems"):
        current = lora.insert(current, adapters[name])
        assert np.array_equal(llama.forward(current, tokens, CONFIG)[0], outputs[name])
        assert all((w.base if isinstance(w, LoRA) else w).array is params[n] for n, w in current.items())


def test_whole_paths_are_kept_where_names_would_mean_more(params, rng):
    carried = lora.attach(params, ["model.layers.1.self_attn.q_proj"], r=2, rng=rng)
    adapter = lora.detach(carried)[1]
    assert adapter.target_modules == ("model.layers.1.self_attn.q_proj",)


def test_insert_refuses_what_does_not_belong(params, rng):
    adapter = lora.detach(lora.attach(params, ["q_proj"], r=2, rng=rng))[1]
    other = {n.replace("layers.1", "layers.7"): a for n, a in adapter.arrays.items()}
    with pytest.raises(KeyError, match=r"the model has no model\.layers\.7"):
        lora.insert(params, lora.Adapter(other, 2, 16, ("q_proj",)))
    half = {n: a for n, a in adapter.arrays.items() if n != LAYER + "lora_B.weight"}
    with pytest.raises(KeyError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight is missing"):
        lora.insert(params, lora.Adapter(half, 2, 16, ("q_proj",)))
    other_half = {n: a for n, a in adapter.arrays.items() if n != LAYER + "lora_A.weight"}
    with pytest.raises(KeyError, match="is not the A or B of a layer"):
        lora.insert(params, lora.Adapter(other_half, 2, 16, ("q_proj",)))
    wide = {n: np.concatenate([a, a], axis=1) for n, a in adapter.arrays.items()}
    with pytest.raises(ValueError, match="do not fit"):
        lora.insert(params, lora.Adapter(wide, 2, 16, ("q_proj",)))


def test_detach_refuses_no_adapter_and_a_mixture_of_settings(params, rng):
    with pytest.raises(
        ValueError, match=r"carry no adapter: attach or insert one first \(or was it merged already\?\)$"
    ):
        lora.detach(params)
    one = lora.attach(params, ["q_proj"], rng=rng)
    for other in ({"use_rslora": True}, {"lora_dropout": 0.1}):
        two = lora.attach(params, ["v_proj"], rng=rng, **other)
        with pytest.raises(ValueError, match=r"layers differ in \(use_rslora, lora_dropout\)"):
            lora.detach(one | {n: w for n, w in two.items() if isinstance(w, LoRA)})


def mixture(mix):
    """Against the sum of hand-built differences; ranks, scales, weights and targets differ."""
    rng = np.random.default_rng(7)
    params = {n: rng.standard_normal(s).astype(np.float32) for n, s in llama.shapes(CONFIG).items()}
    parts, expected, magnitude = [], {}, {}
    for r, alpha, rslora, weight in ((2, 5, False, 0.3), (2, 3, False, -1.2)):
        carried = trained(lora.attach(params, ["q_proj"], r=r, lora_alpha=alpha, use_rslora=rslora, rng=rng), rng)
        parts.append((lora.detach(carried)[1], weight))
        for n, w in carried.items():
            if isinstance(w, LoRA):
                exact, size = product(w, weight * lora.scaling(alpha, r, rslora))
                expected[n] = expected.get(n, 0) + exact
                magnitude[n] = magnitude.get(n, 0) + size
    inserted = lora.insert(params, mix(parts))
    for n, delta in expected.items():
        # a sum of r₁ + r₂ = 4 products, each scaled once when mixed and once in `delta`
        assert (np.abs(inserted[n].delta() - delta) <= bounds.gamma(4 + 2, np.float32) * magnitude[n]).all()


def product(weight, scale):
    """s B A in float64, and |s| |B| |A|, in which its rounding errors are measured."""
    A, B = weight.A.astype(float), weight.B.astype(float)
    return scale * B @ A, abs(scale) * np.abs(B) @ np.abs(A)


def test_mix():
    mixture(lora.mix)


@pytest.mark.parametrize("wrong", wrong_lora.MIX)
def test_wrong_mix_is_rejected(wrong):
    with pytest.raises(AssertionError):
        mixture(wrong)


def test_mix_of_adapters_on_different_layers_and_with_rslora(params, rng):
    one = trained(lora.attach(params, ["q_proj"], r=2, lora_alpha=5, rng=rng), rng)
    other = trained(lora.attach(params, ["q_proj", "up_proj"], r=4, lora_alpha=3, use_rslora=True, rng=rng), rng)
    adapters = [lora.detach(w)[1] for w in (one, other)]
    mixed = lora.mix([(adapters[0], 0.5), (adapters[1], 2.0)])
    assert mixed.r == 6
    assert mixed.lora_alpha / mixed.r == 1
    assert not mixed.use_rslora
    assert mixed.target_modules == ("q_proj", "up_proj")
    inserted = lora.insert(params, mixed)
    for n, w in inserted.items():
        if isinstance(w, LoRA):
            exact, size = product(other[n], 2.0 * 3 / 2)  # α / √r
            first = product(one[n], 0.5 * 5 / 2) if isinstance(one[n], LoRA) else (0, 0)
            allowed = bounds.gamma(6 + 2, np.float32) * (size + first[1])
            assert (np.abs(w.delta() - (exact + first[0])) <= allowed).all()
    alone = lora.insert(params, lora.mix([(adapters[1], 1.0)]))  # one adapter at weight one is itself
    for n, w in alone.items():
        if isinstance(w, LoRA):
            exact, size = product(other[n], 3 / 2)
            assert (np.abs(w.delta() - exact) <= bounds.gamma(4 + 2, np.float32) * size).all()
    with pytest.raises(ValueError, match=r"^nothing to mix: pass at least one \(adapter, weight\)$"):
        lora.mix([])


def test_a_layer_has_the_rank_that_the_parts_add_up_to(params, rng):
    """No zeros for an adapter that leaves a layer alone."""
    one = lora.detach(lora.attach(params, ["q_proj"], r=2, rng=rng))[1]
    other = lora.detach(lora.attach(params, ["q_proj", "v_proj"], r=3, rank_pattern={"v_proj": 4}, rng=rng))[1]
    mixed = lora.mix([(one, 1.0), (other, 1.0)])
    assert {path.split(".")[-1]: r for path, r in mixed.ranks.items()} == {"q_proj": 5, "v_proj": 4}
    assert {mixed.scaling(path) for path in mixed.ranks} == {1.0}


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_mix_refuses_a_weight_that_is_not_finite(params, rng, weight):
    adapter = lora.detach(lora.attach(params, ["q_proj"], rng=rng))[1]
    with pytest.raises(ValueError, match=f"weight is {weight}, needed a finite number"):
        lora.mix([(adapter, 1.0), (adapter, weight)])


def test_mix_keeps_to_one_base(params, rng):
    adapter = lora.detach(lora.attach(params, ["q_proj"], rng=rng))[1]
    over_nf4 = dataclasses.replace(adapter, over_nf4=True)
    assert lora.mix([(over_nf4, 1.0), (over_nf4, 2.0)]).over_nf4
    assert not lora.mix([(adapter, 1.0)]).over_nf4
    with pytest.raises(ValueError, match=r"some .* over NF4 weights .*replace\(adapter, over_nf4=\.\.\.\)$"):
        lora.mix([(over_nf4, 1.0), (adapter, 1.0)])


# --- layers that differ -----------------------------------------------------------------------------------------------

PATTERNS = {
    "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "down_proj": 1},
    "alpha_pattern": {r"layers\.1\..*": 3.5, "q_proj": 11},  # the first key that matches decides
}
MODULES = ["q_proj", "v_proj", "down_proj"]
EXPECTED = {  # (r, alpha), by hand
    "model.layers.0.self_attn.q_proj": (5, 11),
    "model.layers.0.self_attn.v_proj": (3, 7),
    "model.layers.0.mlp.down_proj": (1, 7),
    "model.layers.1.self_attn.q_proj": (3, 3.5),
    "model.layers.1.self_attn.v_proj": (3, 3.5),
    "model.layers.1.mlp.down_proj": (1, 3.5),
}


def patterned(params, rng, **settings):
    return trained(lora.attach(params, MODULES, r=3, lora_alpha=7, rng=rng, **PATTERNS, **settings), rng)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_their_own(params, rng, rslora):
    """Attached, detached, inserted, mixed, merged and unmerged, each layer keeps its own, against W + s B A by hand."""
    carried = patterned(params, rng, use_rslora=rslora)
    found = {n.removesuffix(".weight"): (len(w.A), w.lora_alpha) for n, w in carried.items() if isinstance(w, LoRA)}
    assert found == EXPECTED
    base, adapter = lora.detach(carried)
    assert (adapter.r, adapter.lora_alpha) == (3, 3.5)  # those of most layers
    assert adapter.ranks == {p: r for p, (r, _) in EXPECTED.items()}
    assert adapter.alpha_pattern == {p: alpha for p, (_, alpha) in EXPECTED.items() if alpha != 3.5}
    inserted = lora.insert(base, adapter)
    merged, mixed = lora.merge(inserted), lora.insert(base, lora.mix([(adapter, -0.5)]))
    back = lora.unmerge(merged, adapter)
    u = bounds.unit_roundoff(np.float32)
    for path, (r, alpha) in EXPECTED.items():
        name, s = f"{path}.weight", alpha / (math.sqrt(r) if rslora else r)
        W, weight = params[name], inserted[name]
        assert weight.scaling == adapter.scaling(path) == s
        exact = W.astype(float) + s * weight.B.astype(float) @ weight.A.astype(float)
        allowed = bounds.lora_merge(W, weight.A, weight.B, s, np.float32)
        assert (np.abs(merged[name].array - exact) <= allowed).all()
        half, size = product(weight, -0.5 * s)
        assert (np.abs(mixed[name].delta() - half) <= bounds.gamma(r + 2, np.float32) * size).all()
        error = np.abs(back[name].array - W)
        assert (error <= u * (np.abs(merged[name].array) + np.abs(W)) * (1 + 1e-6)).all()


@pytest.mark.parametrize("what", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_refused(params, rng, what):
    for key in ("q_prj", "k_proj", "layers.2.self_attn.q_proj", "_proj"):  # k_proj is there, and not a target
        with pytest.raises(ValueError, match=f"{what}: '{key}' matches no target"):
            lora.attach(params, ["q_proj"], rng=rng, **{what: {key: 2}})
    with pytest.raises(ValueError, match="is no regular expression"):
        lora.attach(params, ["q_proj"], rng=rng, **{what: {"q_(": 2}})


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_an_alpha_of_a_pattern_is_checked_too(params, rng, alpha):
    with pytest.raises(ValueError, match=f"lora_alpha is {alpha}, needed a positive number"):
        lora.attach(params, alpha_pattern={"q_proj": alpha}, rng=rng)


# --- weights that are trained in full ---------------------------------------------------------------------------------

SAVED = ["lm_head", "model.norm", "embed_tokens", "layers.1.self_attn"]
WHOLE = {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"} | {
    f"model.layers.1.self_attn.{m}_proj.weight" for m in "qkvo"
}


def test_whole_weights_learn_beside_adapters(params, rng):
    carried = lora.attach(params, ["q_proj"], r=3, rng=rng, modules_to_save=SAVED)
    assert {n for n, w in carried.items() if isinstance(w, Tuned)} == WHOLE
    pair = {f"model.layers.0.self_attn.q_proj.lora_{m}.weight" for m in "AB"}  # none on the one that learns itself
    assert set(trainable(carried)) == WHOLE | pair
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 6))
    y, vjp = llama.forward(carried, tokens, CONFIG)
    y_base, base_vjp = llama.forward(params, tokens, CONFIG)
    assert np.array_equal(y, y_base)  # at the start they are copies of what they replace
    dy = rng.standard_normal(y.shape).astype(np.float32)
    gradients, expected = vjp(dy), base_vjp(dy)
    assert gradients.keys() == WHOLE | pair
    assert all(np.array_equal(gradients[name], expected[name]) for name in WHOLE)  # and have its gradients


def test_whole_weights_come_off_and_leave_every_bit(params, rng):
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 6))
    before = {n: w.tobytes() for n, w in params.items()}
    carried = trained(lora.attach(params, ["q_proj"], r=3, rng=rng, modules_to_save=SAVED), rng)
    base, adapter = lora.detach(carried)
    assert all(base[n].array is params[n] for n in params)
    assert {n: w.tobytes() for n, w in params.items()} == before
    assert set(adapter.modules_to_save) == {n.removesuffix(".weight") for n in WHOLE}
    y = llama.forward(carried, tokens, CONFIG)[0]
    assert np.array_equal(llama.forward(lora.insert(params, adapter), tokens, CONFIG)[0], y)
    assert not np.array_equal(llama.forward(base, tokens, CONFIG)[0], y)
    merged = lora.merge(carried)
    assert not any(learns(w) for w in merged.values())
    assert all(merged[n].array is carried[n].array for n in WHOLE)
    other = lora.detach(lora.attach(params, ["v_proj"], rng=rng))[1]
    switched = lora.insert(carried, other)  # another adapter's place: what was trained in full goes with the first
    assert all((w.base if isinstance(w, LoRA) else w).array is params[n] for n, w in switched.items())
    for impossible in (lambda: lora.unmerge(merged, adapter), lambda: lora.mix([(adapter, 1.0)])):
        with pytest.raises(ValueError, match=r"was (replaced as a whole|trained in full)"):
            impossible()


def test_whole_weights_over_nf4_are_of_full_precision(params, rng):
    carried = lora.attach(qlora.quantize(params), ["q_proj"], rng=rng, modules_to_save=["up_proj"])
    weight = carried["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(weight.base, nf4.NF4Tensor)
    assert np.array_equal(weight.array, weight.base.dense())


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["lm_head", "score"], "modules_to_save: 'score' matches no module of the model"),
        ([""], "modules_to_save: '' matches no module"),
        (["lm_hea"], "'lm_hea' matches no module"),
        (["model.layers.1.self_attn.q_proj.weight"], "matches no module"),
    ],
)
def test_a_module_to_save_that_is_not_there_is_refused(params, rng, modules, message):
    with pytest.raises(ValueError, match=message):
        lora.attach(params, ["q_proj"], rng=rng, modules_to_save=modules)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_refused_with_what_to_do(params, rng, module):
    """(That doing it gives what PEFT computes is tested in tests/io/test_peft_variants.py.)"""
    alone = {n: w for n, w in params.items() if n != "lm_head.weight"}
    with pytest.raises(ValueError) as error:
        lora.attach(alone, rng=rng, modules_to_save=[module])
    assert str(error.value) == (
        f"{module}: the model's output matrix is its table of embeddings, needed two; "
        "give params['lm_head.weight'] a copy of it, and the config tie_word_embeddings=False"
    )


def test_insert_refuses_whole_weights_that_do_not_belong(params, rng):
    adapter = lora.detach(lora.attach(params, ["q_proj"], rng=rng, modules_to_save=["lm_head"]))[1]

    def with_array(name, array):
        return dataclasses.replace(adapter, arrays=adapter.arrays | {name: array})

    with pytest.raises(KeyError, match=r"score.weight is not the A or B of a layer, and the model has no weight"):
        lora.insert(params, with_array("score.weight", np.ones((2, 12))))
    with pytest.raises(ValueError, match=r"shape \(22, 12\) cannot replace a weight of shape \(23, 12\)"):
        lora.insert(params, with_array("lm_head.weight", np.ones((22, 12))))
    with pytest.raises(ValueError, match="learns itself, and cannot be trained in full as well"):
        lora.insert(params, with_array(LAYER + "weight", params[LAYER + "weight"]))


def test_a_module_that_learns_in_full_may_have_a_bias(params, rng):
    """Weight and bias learn under their own names, come off with the adapter, and go on again."""
    bias = np.arange(23.0)
    params = params | {"lm_head.bias": bias}
    carried = lora.attach(params, ["q_proj"], rng=rng, modules_to_save=["lm_head"])
    assert {"lm_head.weight", "lm_head.bias"} < trainable(carried).keys()
    learned = replace(carried, {"lm_head.bias": bias + 1})
    x, dy = np.ones((2, 12)), np.ones((2, 23))
    y, vjp = linear(x, learned["lm_head.weight"], learned["lm_head.bias"])
    assert np.array_equal(y, x @ params["lm_head.weight"].T + bias + 1)
    assert np.array_equal(vjp(dy)[2], np.full(23, 2.0))
    base, adapter = lora.detach(learned)
    assert adapter.modules_to_save == ("lm_head",)
    assert linear(x, base["lm_head.weight"], base["lm_head.bias"])[1](dy)[2] is None  # frozen again, and as it was
    assert np.array_equal(base["lm_head.bias"].dense(), bias)
    again = lora.insert(base, adapter)
    assert np.array_equal(again["lm_head.bias"].dense(), bias + 1)


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merge_is_the_hand_built_matrix(params, rng):
    carried = trained(lora.attach(params, ["q_proj", "down_proj"], r=3, lora_alpha=7, rng=rng), rng)
    merged = lora.merge(carried)
    assert not any(learns(w) for w in merged.values())
    for name, weight in carried.items():
        if not isinstance(weight, LoRA):
            assert merged[name] is weight
            continue
        exact = params[name].astype(float) + 7 / 3 * weight.B.astype(float) @ weight.A.astype(float)
        allowed = bounds.lora_merge(params[name], weight.A, weight.B, 7 / 3, np.float32)
        assert (np.abs(merged[name].array - exact) <= allowed).all()
        assert not np.array_equal(merged[name].array, params[name])
    with pytest.raises(ValueError, match="carry no adapter"):
        lora.merge(merged)  # never twice


def test_merged_equals_unmerged_and_base_bytes_are_untouched(params, rng):
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 6))
    before = {n: w.tobytes() for n, w in params.items()}
    doubled = {n: w.astype(np.float64) for n, w in params.items()}
    carried = lora.attach(doubled, r=3, lora_alpha=7, rng=rng)
    carried = replace(carried, {n: rng.standard_normal(a.shape) for n, a in trainable(carried).items()})
    y, _ = llama.forward(carried, tokens, CONFIG)
    np.testing.assert_allclose(llama.forward(lora.merge(carried), tokens, CONFIG)[0], y, rtol=1e-9, atol=1e-9)
    assert {n: w.tobytes() for n, w in params.items()} == before


def test_unmerge_returns_within_rounding(params, rng):
    carried = trained(lora.attach(params, ["q_proj"], r=3, lora_alpha=7, rng=rng), rng)
    _, adapter = lora.detach(carried)
    merged = lora.merge(carried)
    back = lora.unmerge(merged, adapter)
    u = bounds.unit_roundoff(np.float32)
    for name, weight in carried.items():
        if isinstance(weight, LoRA):
            error = np.abs(back[name].array - params[name])
            assert (error <= u * (np.abs(merged[name].array) + np.abs(params[name])) * (1 + 1e-6)).all()
            assert not np.array_equal(back[name].array, merged[name].array)
        else:
            assert back[name].array is params[name]


# --- over 4 bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_over_nf4_it_is_the_lora_on_the_dequantized_weight(rng, nested):
    x, W, A, B = make(rng, d_out=33, d_in=65, n=(3, 2), dtype=np.float32)
    q = nf4.quantize(W)
    q = double_quant.compress(q) if nested else q
    before = q.codes.tobytes()
    y, vjp = lora.forward(x, q, A, B, 1.5)
    y_dense, vjp_dense = lora.forward(x, nf4.dequantize(q), A, B, 1.5)
    assert np.array_equal(y, y_dense)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    for found, expected in zip(vjp(dy), vjp_dense(dy), strict=True):
        assert found is expected is None or np.array_equal(found, expected)
    assert q.codes.tobytes() == before


def test_merging_over_nf4_merges_into_what_was_trained_on(rng):
    _, W, A, B = make(rng, d_out=33, d_in=65, dtype=np.float32)
    q = double_quant.compress(nf4.quantize(W))
    merged = lora.merge({"q_proj.weight": LoRA(q, A, B, 6)})["q_proj.weight"].array
    exact = nf4.dequantize(q).astype(float) + 2 * B.astype(float) @ A.astype(float)
    assert (np.abs(merged - exact) <= bounds.lora_merge(nf4.dequantize(q), A, B, 2.0, np.float32)).all()
    assert np.abs(merged - (W + 2 * B @ A)).max() > 0.01  # not into the weights before quantization


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults(params, rng):
    """A change of a default changes what a script written yesterday does."""
    x, W, A, B = make(rng)
    np.testing.assert_allclose(lora.forward(x, W, A, B, dropout_key=3)[0], x @ (W + B @ A).T, rtol=1e-13, atol=1e-13)
    weight = LoRA(Frozen(W), A, B, lora_alpha=6)
    assert (weight.use_rslora, weight.lora_dropout) == (False, 0)
    assert lora.scaling(6, 3) == 2
    attached = lora.attach(params, rng=rng)
    adapter = lora.detach(attached)[1]
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.lora_dropout) == (8, 16, False, 0)
    assert set(adapter.target_modules) == set(llama.LINEAR_MODULES)
    bare = lora.Adapter({}, 1, 2, ())
    assert (bare.use_rslora, bare.lora_dropout, bare.over_nf4) == (False, 0, False)
    for value in (weight, bare):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.lora_alpha = 3


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "wte", "wpe", "score"])
def test_all_linear_leaves_tables_and_heads_alone(name):
    one = {f"model.{name}.weight": np.ones((3, 4)), "model.h.0.attn.c_proj.weight": np.ones((4, 4))}
    assert lora.targets(one, "all-linear") == ["model.h.0.attn.c_proj.weight"]
    if name in ("lm_head", "score"):  # who names the head, means it
        assert lora.targets(one, [name]) == [f"model.{name}.weight"]
        return
    with pytest.raises(ValueError, match=rf"'{name}' matches no linear layer; there are \['c_proj'\]"):
        lora.targets(one, [name])  # rows of a table are looked up, and an adapter would fail in the forward pass


@pytest.mark.parametrize(
    ("option", "refused", "fine"),
    [
        ("lora_alpha", [0, -4, float("nan"), float("inf")], [1e-9, 0.5]),
        ("lora_dropout", [1, 1.5, -0.1, float("nan")], [0, 0.99]),
    ],
)
def test_a_scale_or_a_dropout_out_of_range_is_refused(params, rng, option, refused, fine):
    """At once: the loader refuses an adapter that has them."""
    for value in refused:
        with pytest.raises(ValueError, match=f"{option} is {value}, needed "):
            lora.attach(params, rng=rng, **{option: value})
    for value in fine:
        assert lora.detach(lora.attach(params, rng=rng, **{option: value}))[1].r == 8


def test_the_adapter_has_the_type_of_its_base(rng):
    for dtype in (np.float64, np.float32):
        (weight,) = lora.attach({"q_proj.weight": np.ones((5, 7), dtype)}, r=1, rng=rng).values()
        assert weight.A.dtype == weight.B.dtype == weight.dense().dtype == dtype
        assert (weight.A.shape, weight.B.shape, weight.shape) == ((1, 7), (5, 1), (5, 7))
    assert weight.dense(np.float16).dtype == np.float16
    assert weight.nbytes == 4 * (5 * 7 + 7 + 5)


# --- arithmetic and looks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [16, 128])
def test_trainable_parameters_break_even_at_half_the_width(d):
    assert lora.trainable_parameters(d, d, 4) == 2 * d * 4
    assert lora.trainable_parameters(d, d, d // 2) == d * d
    assert lora.trainable_parameters(3 * d, d, 2) == 2 * (3 * d + d)


def test_reprs_say_what_one_wants_to_know(params, rng):
    carried = lora.attach(params, ["q_proj"], r=3, lora_alpha=7, rng=rng)
    assert repr(carried[LAYER + "weight"]) == (
        "LoRA(r=3, lora_alpha=7, 108 numbers on Frozen(float32 (24, 12), 1,152 bytes))"
    )
    assert repr(lora.detach(carried)[1]) == "Adapter(r=3, lora_alpha=7, q_proj: 216 numbers, 864 bytes)"
    two = lora.detach(lora.attach(params, ["q_proj", "k_proj"], r=1, rng=rng))[1]
    assert repr(two).startswith("Adapter(r=1, lora_alpha=16, k_proj, q_proj: ")
    whole = lora.attach(params, ["q_proj"], r=1, rng=rng, modules_to_save=["model.norm"])
    assert repr(lora.detach(whole)[1]).startswith("Adapter(r=1, lora_alpha=16, q_proj, all of model.norm: 84 numbers")
    assert repr(whole["model.norm.weight"]) == "Tuned(float32 (12,) in place of Frozen(float32 (12,), 48 bytes))"
