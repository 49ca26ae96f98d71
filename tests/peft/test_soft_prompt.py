"""Soft prompts: each of the three against what it must equal exactly, its gradients, and wrong versions.

The oracles are the model itself: a prompt copied from a text is the text typed, a prefix copied from the cache that a
text has left is the text before, a folded encoder is the encoder, a prompt of no length is none. Two float64 results
of one network by different orders of summation may differ by its condition times 2⁻⁵³, which `both` measures: how far
float32 moves the result, times 2⁻²⁹, times 16 (as in tests/models/test_llama.py).
"""

import dataclasses

import numpy as np
import pytest
import torch
import wrong_soft_prompt

import peft
from minift.conformance.gradients import check_gradients
from minift.data.batches import pack, pad
from minift.models import bert, gpt2, llama
from minift.nn.attention import KVCache
from minift.nn.losses import IGNORE_INDEX
from minift.nn.weight import Frozen, freeze, learns, replace, trainable
from minift.peft import lora, p_tuning, prefix_tuning, prompt_tuning, qlora, soft_prompt
from minift.peft.reparameterization import EMBEDDING
from minift.peft.soft_prompt import SoftPrompt
from minift.train import sft
from nn import checks

CONFIG = llama.Config(29, 12, 20, 2, 6, 2, 4, rope_theta=500.0, rms_norm_eps=3e-3)
P = 3
KINDS = {
    "prompt": lambda params, p, rng: prompt_tuning.attach(params, p, rng=rng),
    "prefix": lambda params, p, rng: prefix_tuning.attach(params, p, rng=rng),
    "prefix, network": lambda params, p, rng: prefix_tuning.attach(params, p, rng=rng, encoder_hidden_size=5),
    "p, MLP": lambda params, p, rng: p_tuning.attach(params, p, rng=rng, encoder_hidden_size=7),
    "p, LSTM": lambda params, p, rng: p_tuning.attach(params, p, rng=rng, encoder="LSTM", encoder_hidden_size=5),
}
CASES = [(kind, seed) for seed, kind in enumerate(KINDS)]


def model(rng, dtype=np.float64):
    """Random parameters far from their initial values; gains are not one. No embedding is so small that its norm bends
    the network within the step of a difference quotient."""
    params = {name: (0.5 * rng.standard_normal(s)).astype(dtype) for name, s in llama.shapes(CONFIG).items()}
    return params | {llama.EMBEDDING: 2 * params[llama.EMBEDDING]}


def prompted(case, p=P, dtype=np.float64):
    """(base, the same with a soft prompt in the middle of training, generator)"""
    kind, seed = case
    rng = np.random.default_rng([seed, 11])
    base = model(rng)
    params = KINDS[kind](base, p, rng)
    learned = {name: 0.7 * rng.standard_normal(array.shape) for name, array in trainable(params).items()}
    return base, replace(params, learned), rng


def cast(params, dtype):
    arrays = {n: (w.array if isinstance(w, Frozen) else w).astype(dtype) for n, w in params.items()}
    return {n: a if learns(params[n]) else Frozen(a) for n, a in arrays.items()}


def both(function, params):
    """function(params) in float64, and how far another right result may be from it."""
    double, single = function(cast(params, np.float64)), function(cast(params, np.float32))
    assert double.dtype == np.float64 and single.dtype == np.float32
    return double, 16 * 2.0**-29 * np.abs(double - single).max(initial=1e-12)


def agree(found, expected, slack, what):
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, needed {expected.shape}"
    error = np.abs(found - expected).max(initial=0)
    assert error <= slack, f"{what}: off by {error:.3g} where {slack:.3g} is allowed"


def hidden(params, tokens, **options):
    return llama.backbone(params, tokens, CONFIG, **options)[0]


def logits(params, tokens, **options):
    return llama.forward(params, tokens, CONFIG, **options)[0]


def cache_of(params, tokens, capacity=16):
    cache = KVCache(2, len(tokens), CONFIG.num_key_value_heads, capacity, CONFIG.head_dim, np.float64)
    llama.backbone(params, tokens, CONFIG, cache=cache)
    return cache


# --- properties: (implementation, case), an implementation is a context in which something may be replaced ------------


def copied_from_a_text_it_is_the_text(implementation, case):
    """To the bit: the same numbers go the same way."""
    if case[0] != "prompt":
        return
    base, _, rng = prompted(case)
    typed, text = rng.integers(0, 29, P), rng.integers(0, 29, (2, 5))
    with implementation():
        for dtype in (np.float32, np.float64):
            params = prompt_tuning.attach(cast(base, dtype), P, tokens=typed)
            whole = np.concatenate([np.tile(typed, (2, 1)), text], axis=1)
            checks.same_bits(hidden(params, text), hidden(cast(base, dtype), whole)[:, P:], "hidden states")


def copied_from_a_cache_it_is_the_text(implementation, case):
    """Positions, mask and layout: up to rounding, since the text before was computed in a pass of its own."""
    if case[0] != "prefix":
        return
    base, _, rng = prompted(case)
    typed, text = rng.integers(0, 29, (1, P)), rng.integers(0, 29, (2, 5))
    whole = np.concatenate([np.tile(typed, (2, 1)), text], axis=1)
    expected, slack = both(lambda p: logits(p, whole)[:, P:], base)
    cache = cache_of(base, typed)
    kept = np.stack([cache.keys[:, 0, :, :P], cache.values[:, 0, :, :P]], axis=1)
    params = freeze(base) | {prefix_tuning.TABLE: prefix_tuning.table(kept)}
    with implementation():
        agree(logits(params, text), expected, slack, "behind a copied prefix")


def loss_is_that_of_the_typed_text(implementation, case):
    """Labels of the prompt do not count, and every other label stays with its token."""
    if case[0] != "prompt":
        return
    base, _, rng = prompted(case)
    typed = rng.integers(0, 29, P)
    texts = [rng.integers(0, 29, n).astype(np.int32) for n in (5, 2, 4)]
    batch = pad([(t, np.where(np.arange(len(t)) == 1, IGNORE_INDEX, t)) for t in texts])
    front = np.tile(typed, (3, 1)).astype(np.int32)
    labels = np.concatenate([np.full_like(front, IGNORE_INDEX), batch.labels], axis=1)
    long = dataclasses.replace(
        batch, tokens=np.concatenate([front, batch.tokens], axis=1), labels=labels, lengths=batch.lengths + P
    )
    expected, slack = both(lambda p: np.asarray(sft.loss(p, long, CONFIG)[0]), base)
    with implementation():
        params = prompt_tuning.attach(base, P, tokens=typed)
        agree(np.asarray(sft.loss(params, batch, CONFIG)[0]), expected, slack, "loss")


def folded_it_is_the_encoder(implementation, case):
    """To the bit; and what is left to learn is the table."""
    _, params, rng = prompted(case)
    text = rng.integers(0, 29, (2, 5))
    with implementation():
        for dtype in (np.float32, np.float64):
            whole = cast(params, dtype)
            folded = soft_prompt.fold(whole)
            checks.same_bits(hidden(folded, text), hidden(whole, text), "hidden states")
            (table,) = trainable(folded).values()
            sizes = (P, 2 * 2 * 2 * 4) if case[0].startswith("prefix") else (P, 12)
            assert table.shape == sizes, f"a table of shape {table.shape}, needed {sizes}"


def encoder_is_that_of_torch(implementation, case):
    """PEFT's modules, put together again in torch: the table, and autograd's gradients for all that learns."""
    kind, _ = case
    _, params, rng = prompted(case)
    if kind in ("prompt", "prefix"):
        return
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in trainable(params).items()}

    def linear(x, path, n):
        return torch.nn.functional.linear(x, leaves[f"{path}.{n}.weight"], leaves[f"{path}.{n}.bias"])

    x = leaves[EMBEDDING]
    if kind == "prefix, network":
        made = linear(torch.tanh(linear(x, prefix_tuning.TRANSFORM, 0)), prefix_tuning.TRANSFORM, 2)
    elif kind == "p, MLP":
        made = linear(linear(linear(x, p_tuning.HEAD, 0).relu(), p_tuning.HEAD, 2).relu(), p_tuning.HEAD, 4)
    else:
        weights = [leaves[n] for n in leaves if n.startswith(p_tuning.LSTM)]
        start = torch.zeros(2, 4, 1, 5, dtype=x.dtype).unbind()
        out, _, _ = torch.lstm(x[None], start, weights, True, 2, 0.0, False, True, True)
        made = linear(linear(out[0], p_tuning.HEAD, 0).relu(), p_tuning.HEAD, 2)
    dtable = rng.standard_normal(made.shape)
    made.backward(torch.tensor(dtable))
    with implementation():
        expected, slack = both(lambda p: soft_prompt.encode(p)[0], params)
        agree(made.detach().numpy(), expected, slack, "table")
        for name, leaf in leaves.items():
            part, slack = both(lambda p, n=name: dict(soft_prompt.encode(p)[1](dtable.astype(p[n].dtype)))[n], params)
            agree(leaf.grad.numpy(), part, slack, name)


def gradients_of_all_that_learns(implementation, case):
    """Three rows that share the prompt, and a table of embeddings that learns beside it."""
    base, params, rng = prompted(case)
    tokens = rng.integers(0, 29, (3, 4))
    params[llama.EMBEDDING] = base[llama.EMBEDDING]
    with implementation():
        check_gradients(lambda p: llama.forward(p, tokens, CONFIG), params, rng=rng)


def tokens_come_one_by_one_or_all_at_once(implementation, case):
    """With a cache the prompt comes first, once; rows of different lengths, the shorter one padded."""
    _, params, rng = prompted(case)
    text, lengths = rng.integers(0, 29, (2, 6)), np.array([4, 2])
    with implementation():
        expected, slack = both(lambda p: logits(p, text), params)
        cache = KVCache(2, 2, CONFIG.num_key_value_heads, P + 6, CONFIG.head_dim, np.float64)
        first = logits(params, text[:, :4], lengths=lengths, cache=cache)
        agree(first[0], expected[0, :4], slack, "the prompt's pass")
        for step in range(2):
            new = text[[0, 1], lengths + step][:, None]
            found = logits(params, new, cache=cache)
            for row in range(2):
                agree(found[row, 0], expected[row, lengths[row] + step], slack, f"row {row}, step {step}")


IN_THE_MODEL = (
    copied_from_a_text_it_is_the_text,
    copied_from_a_cache_it_is_the_text,
    loss_is_that_of_the_typed_text,
    gradients_of_all_that_learns,
    tokens_come_one_by_one_or_all_at_once,
)
OF_THE_ENCODER = (folded_it_is_the_encoder, encoder_is_that_of_torch)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("holds", IN_THE_MODEL + OF_THE_ENCODER, ids=lambda p: p.__name__)
def test_soft_prompt(holds, case):
    holds(wrong_soft_prompt.right, case)


def test_kill_matrix_of_the_model():
    tables = [case for case in CASES if case[0] in ("prompt", "prefix")]
    checks.kill_matrix(IN_THE_MODEL, wrong_soft_prompt.MODEL, tables)


def test_kill_matrix_of_the_encoders():
    checks.kill_matrix(OF_THE_ENCODER, wrong_soft_prompt.ENCODER, CASES)


# --- the model around it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_length_is_the_base_to_the_bit(case):
    base, params, rng = prompted(case, p=0)
    text = rng.integers(0, 29, (2, 5))
    y, vjp = llama.forward(params, text, CONFIG)
    checks.same_bits(y, logits(base, text), "logits")
    assert all(not gradient.any() for gradient in vjp(rng.standard_normal(y.shape)).values())
    assert soft_prompt.length(params) == 0 and len(soft_prompt.detach(params)[1].table) == 0
    found, expected = (llama.generate(p, text, CONFIG, max_new_tokens=3) for p in (params, base))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_but_the_prompt_learns(case):
    base, params, rng = prompted(case)
    y, vjp = llama.forward(params, rng.integers(0, 29, (2, 5)), CONFIG)
    gradients = vjp(rng.standard_normal(y.shape))
    assert gradients.keys() == trainable(params).keys() == params.keys() - base.keys()
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_prompt_may_be_frozen_in_part_or_whole(case):
    """Its own embedding alone: the network behind it gets no gradient, the embedding the same one."""
    _, params, rng = prompted(case)
    text = rng.integers(0, 29, (2, 5))
    y, vjp = llama.forward(params, text, CONFIG)
    dy = rng.standard_normal(y.shape)
    assert llama.forward(freeze(params), text, CONFIG)[1](dy) == {}
    if EMBEDDING in params:
        again = llama.forward(freeze(params) | {EMBEDDING: params[EMBEDDING]}, text, CONFIG)[1](dy)
        assert again.keys() == {EMBEDDING}
        checks.same_bits(again[EMBEDDING], vjp(dy)[EMBEDDING], EMBEDDING)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recomputed_blocks_give_the_same_bits(case):
    _, params, rng = prompted(case)
    batch = pad([(t, t) for t in (rng.integers(0, 29, n).astype(np.int32) for n in (5, 3))])
    (kept, kept_vjp), (again, again_vjp) = (sft.loss(params, batch, CONFIG, recompute=r) for r in (False, True))
    assert kept == again
    for name, gradient in kept_vjp(0.7).items():
        checks.same_bits(again_vjp(0.7)[name], gradient, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_in_place_of_tokens_get_their_gradient(case):
    """The trunk's first result is the cotangent of what was passed in, not of the prompt before it."""
    base, params, rng = prompted(case)
    text = rng.integers(0, 29, (2, 5))
    x = base[llama.EMBEDDING][text]
    y, vjp = llama.backbone(params, x, CONFIG)
    checks.same_bits(y, hidden(params, text), "hidden states")
    dy = rng.standard_normal(y.shape)
    dx, dprefix, _ = vjp(dy)
    assert dx.shape == x.shape and dprefix is None
    thawed = params | {llama.EMBEDDING: base[llama.EMBEDDING]}
    table = llama.backbone(thawed, text, CONFIG)[1](dy)[2][llama.EMBEDDING]
    for token in np.unique(text):
        np.testing.assert_allclose(dx[text == token].sum(axis=0), table[token], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generated_tokens_are_the_likeliest_behind_the_prompt(case):
    """Greedy, from rows of different lengths, against the whole text run again for each token; also when fused."""
    _, params, rng = prompted(case)
    texts = [rng.integers(0, 29, n) for n in (4, 2)]
    padded = np.array([texts[0], [*texts[1], 0, 0]])
    for ready in (params, llama.fuse(params), soft_prompt.fold(params)):
        found = llama.generate(ready, padded, CONFIG, max_new_tokens=4, lengths=np.array([4, 2]))[:, 4:]
        for row, text in enumerate(texts):
            for token in found[row]:
                assert token == logits(params, text[None])[0, -1].argmax()
                text = np.append(text, token)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_rows(case):
    """Each text of a packed row sees a prefix; a prompt at the input would have to stand before each of them."""
    _, params, rng = prompted(case)
    texts = [rng.integers(0, 29, n).astype(np.int32) for n in (5, 3, 4)]
    packed = pack([(t, t) for t in texts], length=8)
    if not case[0].startswith("prefix"):
        with pytest.raises(ValueError, match=r"packed rows, needed one text a row: use `pad`$"):
            sft.loss(params, packed, CONFIG)
        return
    expected, slack = both(lambda p: np.asarray(sft.loss(p, pad([(t, t) for t in texts]), CONFIG)[0]), params)
    agree(np.asarray(sft.loss(params, packed, CONFIG)[0]), expected, slack, "loss")


@pytest.mark.parametrize("case", [case for case in CASES if not case[0].startswith("prefix")], ids=str)
def test_every_prompt_at_the_input_is_some_prefix(case):
    """Run it once and keep its keys and values: the same logits, without its embeddings."""
    base, params, rng = prompted(case)
    text = rng.integers(0, 29, (2, 5))
    expected, slack = both(lambda p: logits(p, text), params)
    cache = cache_of(params, text[:1, :1])
    kept = np.stack([cache.keys[:, 0, :, :P], cache.values[:, 0, :, :P]], axis=1)
    agree(logits(freeze(base) | {prefix_tuning.TABLE: prefix_tuning.table(kept)}, text), expected, slack, "logits")


def test_a_cache_of_which_one_row_is_filled_is_not_empty(rng):
    """No prompt comes into the middle of a text."""
    base, params, _ = prompted(("prompt", 0))
    text = rng.integers(0, 29, (2, 3))
    found = []
    for model_ in (base, params):
        cache = KVCache(2, 2, CONFIG.num_key_value_heads, 16, CONFIG.head_dim, np.float64)
        hidden(base, text, lengths=np.array([3, 0]), cache=cache)
        found.append(hidden(model_, text, cache=cache))
    checks.same_bits(*found, "hidden states")


def test_a_prompt_is_a_value():
    prompt = SoftPrompt("P_TUNING", np.zeros((2, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.kind = "PREFIX_TUNING"


def test_a_model_without_one_is_as_it_was(rng):
    base = model(rng)
    assert soft_prompt.length(base) == 0 and soft_prompt.kind(base) is None
    y, vjp = llama.forward(base, rng.integers(0, 29, (2, 3)), CONFIG)
    assert vjp(y).keys() == base.keys() == soft_prompt.bare(base).keys()


def test_two_prompts_are_refused():
    _, params, rng = prompted(("prompt", 0))
    prefix, text = rng.standard_normal((2, 2, 2, P, 4)), rng.integers(0, 29, (1, 3))
    for call in (llama.forward, llama.generate):
        with pytest.raises(ValueError, match=r"a prefix, and a soft prompt in the parameters: needed one of the two$"):
            call(params, text, CONFIG, prefix=prefix)


def test_every_base_carries_one(rng):
    """4-bit weights under a prompt; a LoRA beside it; and an adapter never lands on a prompt."""
    base = model(rng, np.float32)
    text = rng.integers(0, 29, (2, 5))
    for attach in KINDS.values():
        over_nf4 = attach(qlora.quantize(base), P, rng)
        beside = lora.attach(base, r=2, rng=rng) | {n: w for n, w in over_nf4.items() if n not in base}
        for params in (over_nf4, beside):
            y, vjp = llama.forward(params, text, CONFIG)
            assert vjp(y).keys() == trainable(params).keys()
        assert lora.targets(over_nf4, "all-linear") == lora.targets(base, "all-linear")


# --- the tables -------------------------------------------------------------------------------------------------------


def test_parameter_counts():
    """p·d; 2·L·p·d with the key's length for d; Lester et al.'s 20,480 for five tokens of T5-XXL."""
    assert prompt_tuning.trainable_parameters(5, 4096) == 20_480
    assert prefix_tuning.trainable_parameters(5, 24, 1024) == 2 * 24 * 5 * 1024
    for kind, expected in (("prompt", P * 12), ("prefix", 2 * 2 * P * 8)):
        _, params, _ = prompted((kind, 0))
        assert sum(a.size for a in trainable(params).values()) == expected
    assert prompt_tuning.trainable_parameters(P, 12) == P * 12
    assert prefix_tuning.trainable_parameters(P, 2, 8) == 2 * 2 * P * 8


def test_a_text_is_repeated_or_cut(rng):
    base = model(rng)
    table = base[llama.EMBEDDING]
    for p, expected in ((2, [7, 3]), (5, [7, 3, 4, 7, 3]), (3, [7, 3, 4])):
        made = prompt_tuning.attach(base, p, tokens=np.array([7, 3, 4]))[prompt_tuning.TABLE]
        checks.same_bits(made, table[expected], "copied")
        assert not np.shares_memory(made, table)


def test_names_and_shapes_are_pefts(rng):
    """Of what learns: as in PEFT's two networks, behind the name that PEFT gives them in a model."""
    sizes = {"num_virtual_tokens": P, "num_transformer_submodules": 1, "num_layers": 2, "num_attention_heads": 2}
    mlp = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 7, "token_dim": 12}
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5, "token_dim": 12}
    prefix = {"prefix_projection": True, "encoder_hidden_size": 5, "token_dim": 8}
    theirs = {
        "p, MLP": peft.PromptEncoder(peft.PromptEncoderConfig(**sizes, **mlp)),
        "p, LSTM": peft.PromptEncoder(peft.PromptEncoderConfig(**sizes, **lstm)),
        "prefix, network": peft.PrefixEncoder(peft.PrefixTuningConfig(**sizes, **prefix)),
    }
    needed = {
        "prompt": {"prompt_embeddings": (P, 12)},
        "prefix": {"prefix_embeddings": (P, 2 * 2 * 8)},
        **{k: {f"prompt_encoder.{n}": tuple(w.shape) for n, w in v.state_dict().items()} for k, v in theirs.items()},
    }
    base = model(rng)
    for kind, attach in KINDS.items():
        assert {n: a.shape for n, a in trainable(attach(base, P, rng)).items()} == needed[kind], kind


def test_a_fresh_prefix_is_drawn_with_a_deviation_of_one_fiftieth(rng):
    """Known to float32's last bit from the seed: two machines that share it start from the same prefix."""
    table = prefix_tuning.attach(model(rng), P, rng=np.random.default_rng(5))[prefix_tuning.TABLE]
    drawn = np.random.default_rng(5).standard_normal((P, 32)) / 50
    assert np.abs(table - drawn).max() <= 2 * 2.0**-24 * np.abs(drawn).max()


def test_the_smallest_model_and_the_narrowest_network_will_do(rng):
    """One layer; one hidden number, or one token to copy a prompt from."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    base = {name: 0.5 * rng.standard_normal(shape) for name, shape in llama.shapes(config).items()}
    text = rng.integers(0, 29, (1, 2))
    for params in (
        prefix_tuning.attach(base, P, rng=rng, encoder_hidden_size=1),
        p_tuning.attach(base, P, rng=rng, encoder_hidden_size=1),
        prompt_tuning.attach(base, P, tokens=np.array([4])),
    ):
        y, vjp = llama.forward(params, text, config)
        assert vjp(rng.standard_normal(y.shape)).keys() == trainable(params).keys()
        checks.same_bits(llama.forward(soft_prompt.fold(params), text, config)[0], y, "logits")


@pytest.mark.parametrize("other", [gpt2, bert], ids=lambda module: module.__name__)
def test_models_that_look_for_no_prompt_get_none(other, rng):
    """They would run as if there were none."""
    params = {n: rng.standard_normal(s) for n, s in other.shapes(other.Config(29, 12, 20, 1, 2, 8)).items()}
    for attach in KINDS.values():
        with pytest.raises(ValueError, match=r"no table of embeddings|no self_attn\.k_proj\.weight"):
            attach(params, P, rng)


def test_fresh_values(rng):
    """Random tokens as large as real ones; a prefix of 0.02; encoders as torch draws them. All repeatable."""
    base = {n: a.astype(np.float32) for n, a in model(rng).items()}
    base[llama.EMBEDDING] *= 3
    for kind, attach in KINDS.items():
        first, second = (attach(base, 4000, np.random.default_rng(5)) for _ in range(2))
        for name, array in trainable(first).items():
            assert array.dtype == np.float32
            checks.same_bits(trainable(second)[name], array, name)
            if name == EMBEDDING or name in soft_prompt.TABLES:
                std = {"prompt": base[llama.EMBEDDING].std(), "prefix": 0.02}.get(kind, 1.0)
                assert abs(array.std() / std - 1) < 0.02 and abs(array.mean()) < 0.02 * std
            else:
                d_in = array.shape[1] if array.ndim == 2 else first[name.replace("bias", "weight")].shape[1]
                bound = 1 / np.sqrt(5 if "lstm" in name else d_in)
                assert 0.6 * bound < np.abs(array).max() <= bound and array.min() < 0 < array.max()


def test_defaults(rng):
    base = model(rng)
    params = p_tuning.attach(base, P, rng=rng)
    assert params[f"{p_tuning.HEAD}.2.weight"].shape == (12, 12) and p_tuning.LSTM not in " ".join(params)
    names = p_tuning.attach(base, P, rng=rng, encoder="LSTM")
    assert names[f"{p_tuning.LSTM}.weight_ih_l1_reverse"].shape == (48, 24)
    assert f"{p_tuning.LSTM}.weight_ih_l2" not in names
    one = p_tuning.attach(base, P, rng=rng, encoder="LSTM", encoder_num_layers=1)
    assert f"{p_tuning.LSTM}.weight_ih_l1" not in one
    hidden(one, rng.integers(0, 29, (1, 2)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_off_and_on_again(case):
    """A prompt comes off as a table, goes on in place of another one, and the base keeps its bytes."""
    base, params, rng = prompted(case)
    bare, prompt = soft_prompt.detach(params)
    assert bare.keys() == base.keys() and all(bare[n].array is base[n] for n in base)
    assert (
        prompt.kind == soft_prompt.kind(params) and prompt.kind in repr(prompt) and "3 virtual tokens" in repr(prompt)
    )
    text = rng.integers(0, 29, (2, 5))
    carried = bare
    for other, _ in CASES:
        carried = soft_prompt.insert(KINDS[other](base, 2, rng), prompt)
        checks.same_bits(hidden(carried, text), hidden(params, text), other)
    assert len(trainable(carried)) == 1 and soft_prompt.bare(carried).keys() == base.keys()
    wide = SoftPrompt(prompt.kind, np.zeros((P, prompt.table.shape[1] + 1)))
    what = "2 · layers · kv heads · head_dim" if case[0].startswith("prefix") else "hidden_size"
    with pytest.raises(ValueError, match=f"does not fit: this model needs rows of {what} = {prompt.table.shape[1]}$"):
        soft_prompt.insert(base, wide)


def test_prefix_layout_is_its_own_inverse(rng):
    prefix = rng.standard_normal((3, 2, 2, P, 4))
    table = prefix_tuning.table(prefix)
    assert table.shape == (P, 48) and np.array_equal(prefix_tuning.split(table, 2, 4), prefix)
    assert np.array_equal(table[1, 16:24].reshape(2, 4), prefix[1, 0, :, 1])  # the second token's key in layer 1


def test_refusals(rng):
    base = model(rng)
    prompt, prefix, p = prompt_tuning.attach, prefix_tuning.attach, p_tuning.attach
    tokens = np.array([1])
    for call, message in (
        (lambda: prompt(base, -1, rng=rng), "num_virtual_tokens is -1, needed 0"),
        (lambda: prefix(base, -1, rng=rng), "num_virtual_tokens is -1, needed 0"),
        (lambda: p(base, -1, rng=rng), "num_virtual_tokens is -1, needed 0"),
        (lambda: prompt(base, 2), r"^needed one of rng .* and tokens \(to copy it from a text\)$"),
        (lambda: prompt(base, 2, rng=rng, tokens=tokens), r"^needed one of rng .* and tokens \(to copy it .*\)$"),
        (lambda: prompt(base, 2, tokens=tokens[:0]), r"^tokens is empty, needed .* to copy the prompt from$"),
        (lambda: prompt({"a.weight": np.ones((2, 2))}, 2, rng=rng), "no table of embeddings"),
        (lambda: prefix({"a.weight": np.ones((2, 2))}, 2, rng=rng), r"no self_attn\.k_proj\.weight, .* a key is$"),
        (lambda: prefix(base, 2, rng=rng, encoder_hidden_size=0), "encoder_hidden_size is 0, needed 1"),
        (lambda: p(base, 2, rng=rng, encoder_hidden_size=0), "encoder_hidden_size is 0, needed 1"),
        (lambda: p(base, 2, rng=rng, encoder="LSTM", encoder_num_layers=0), "encoder_num_layers is 0, needed 1"),
        (lambda: prompt(lora.attach(base, rng=rng), 2, rng=rng), "merge or detach its adapter"),
        (lambda: soft_prompt.detach(base), r"carry no soft prompt: attach or insert one first$"),
        (lambda: soft_prompt.fold(base), r"carry no soft prompt: attach or insert one first$"),
        (
            lambda: hidden(freeze(base) | {prompt_tuning.TABLE: np.ones((2, 9))}, np.ones((1, 2), int)),
            "rows of 9 numbers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"^encoder is 'GRU', needed one of \('MLP', 'LSTM'\)$"):  # past the checker
        p_tuning.fresh.__wrapped__(12, 2, rng=rng, encoder="GRU", encoder_hidden_size=None, encoder_num_layers=2)
