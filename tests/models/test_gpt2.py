"""GPT-2 against transformers with all gradients; every way of saying the same thing must say the same.

The tolerance is measured on the spot, as in test_llama.py: how far float32 moves the same result, times 2⁻²⁵.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
import wrong_gpt2
from model_checks import defaults, dropout_keys, watch_blocks
from test_llama import agree, allowed, params_of_float32, single, their_gradients

from minift.conformance.ball import Ball
from minift.models import gpt2, llama, module_of
from minift.nn.attention import KVCache
from minift.nn.dropout import fold_in
from minift.nn.losses import IGNORE_INDEX, cross_entropy
from minift.nn.weight import Frozen, freeze, trainable
from minift.peft import lora, qlora
from nn import checks

CONFIG = gpt2.Config(29, 12, 20, 2, 3, 40, layer_norm_epsilon=3e-3)  # the MLP is not 4 d wide; ε can be seen
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)


def model(seed=0, config=CONFIG, dtype=np.float64):
    """Random parameters far from their initial values; gains are not one, biases not zero."""
    rng = np.random.default_rng([seed, 7])
    return {n: (0.5 * rng.standard_normal(s)).astype(dtype) for n, s in gpt2.shapes(config).items()}


# --- transformers -----------------------------------------------------------------------------------------------------


def turned(name, array):
    """Between our (out, in) and the (in, out) of transformers' Conv1D."""
    return array.T if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else array


def theirs(params, config, dtype=torch.float64):
    """GPT2LMHeadModel with these parameters; its softmax and LayerNorm are float64 if the model is."""
    network = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.hidden_size,
            n_inner=config.intermediate_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_positions=config.max_position_embeddings,
            layer_norm_epsilon=config.layer_norm_epsilon,
            tie_word_embeddings=config.tie_word_embeddings,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    state = {n: torch.tensor(turned(n, w)) for n, w in params.items()}
    if config.tie_word_embeddings:
        state[gpt2.HEAD] = state[gpt2.EMBEDDING]
    network.to(dtype).eval().load_state_dict(state)
    return network


def both_gradients(network, tokens, dlogits):
    logits, gradients = their_gradients(network, tokens, dlogits)
    return logits, {n: turned(n, g) for n, g in gradients.items()}


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_transformers_agrees_with_all_gradients(config, rng):
    params, tokens = model(1, config), rng.integers(0, 29, (2, 40))
    dlogits = rng.standard_normal((2, 40, 29))
    expected, gradients = both_gradients(theirs(params, config), tokens, dlogits)
    logits, vjp = gpt2.forward(params, tokens, config)
    low, low_vjp = gpt2.forward(single(params), tokens, config)
    assert logits.dtype == np.float64 and low.dtype == np.float32
    agree(logits, expected, allowed(logits, low), "logits")
    found, low_found = vjp(dlogits), low_vjp(dlogits.astype(np.float32))
    assert found.keys() == gradients.keys() == low_found.keys() == gpt2.shapes(config).keys()
    for name, gradient in found.items():
        assert low_found[name].dtype == np.float32
        agree(gradient, gradients[name], allowed(gradient, low_found[name]), name)
        assert np.abs(gradient).max() > 1e-3, f"{name} says nothing"


def test_in_float32_we_are_no_further_from_the_truth_than_twice_transformers(rng):
    params, tokens = model(2), rng.integers(0, 29, (2, 40))
    dlogits = rng.standard_normal((2, 40, 29)).astype(np.float32)
    exact, exact_vjp = gpt2.forward(params_of_float32(params), tokens, CONFIG)
    exact_gradients = exact_vjp(dlogits.astype(float)) | {"logits": exact}
    logits, vjp = gpt2.forward(single(params), tokens, CONFIG)
    ours = vjp(dlogits) | {"logits": logits}
    their_logits, their = both_gradients(theirs(single(params), CONFIG, torch.float32), tokens, dlogits)
    their |= {"logits": their_logits}

    def relative_error(found):
        return math.sqrt(np.mean([((found[n] - t) ** 2).sum() / (t**2).sum() for n, t in exact_gradients.items()]))

    assert relative_error(ours) <= 2 * relative_error(their)


def test_transformers_loss_of_every_parameter(rng):
    params, tokens = model(3), rng.integers(0, 29, (3, 9))
    labels = np.where(rng.random((3, 9)) < 0.4, IGNORE_INDEX, tokens)
    network = theirs(params, CONFIG)
    flat = network(torch.tensor(tokens), use_cache=False).logits[:, :-1].reshape(-1, 29)
    loss = torch.nn.functional.cross_entropy(flat, torch.tensor(labels[:, 1:].reshape(-1)))
    loss.backward()
    (found, gradients), (low, low_gradients) = (loss_of(p, tokens, labels) for p in (params, single(params)))
    agree(np.asarray(found), np.asarray(loss.item()), allowed(np.asarray(found), np.asarray(low)), "loss")
    for name, gradient in gradients.items():
        expected = turned(name, dict(network.named_parameters())[name].grad.numpy())
        agree(gradient, expected, allowed(gradient, low_gradients[name]), name)


def loss_of(params, tokens, labels):
    logits, vjp = gpt2.forward(params, tokens[:, :-1], CONFIG)
    loss, loss_vjp = cross_entropy(logits, labels[:, 1:])
    return loss, vjp(loss_vjp(1.0))


def test_names_and_shapes_are_transformers():
    for config in (CONFIG, UNTIED):
        state = dict(theirs(model(0, config), config).named_parameters())
        assert {n: turned(n, p.detach().numpy()).shape for n, p in state.items()} == gpt2.shapes(config)
        bare = {f"{gpt2.PREFIX}{n}" for n, _ in theirs(model(0, config), config).transformer.named_parameters()}
        assert bare == gpt2.shapes(config).keys() - {gpt2.HEAD}
    assert gpt2.head_name(CONFIG) == "transformer.wte.weight" and gpt2.head_name(UNTIED) == "lm_head.weight"
    assert module_of(CONFIG) is gpt2 and module_of(llama.Config(9, 4, 4, 1, 1, 1, 4)) is llama


# --- the forward pass within a proved bound ---------------------------------------------------------------------------


def forward_in_balls(params, tokens, config, dtype):
    """The docstring's equations, one head at a time; value and bound."""
    w = {n: Ball(a.astype(float), dtype) for n, a in params.items()}

    def norm(h, name):
        centered = h - h.mean()
        return (
            centered * (1 / ((centered * centered).mean() + config.layer_norm_epsilon).sqrt()) * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    def affine(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    T, d = len(tokens), config.head_dim
    visible = np.tri(T, dtype=bool)
    h = w[gpt2.EMBEDDING][tokens] + w[gpt2.POSITIONS][np.arange(T)]
    for layer in range(config.num_hidden_layers):
        name = gpt2.block_name(layer)
        qkv = affine(norm(h, f"{name}ln_1"), f"{name}attn.c_attn")
        outs = []
        for head in range(config.num_attention_heads):
            q, k, v = (
                qkv[:, part * config.hidden_size + head * d : part * config.hidden_size + (head + 1) * d]
                for part in range(3)
            )
            scores = q @ k.T * (1 / math.sqrt(d))
            top = np.where(visible, scores.value, -np.inf).max(1, keepdims=True)
            e = (scores - Ball(top, dtype, scores.radius.max(1, keepdims=True))).where(visible).exp().where(visible)
            outs.append(e / e.sum(-1) @ v)
        context = Ball(
            *(np.concatenate([o.value for o in outs], 1), dtype, np.concatenate([o.radius for o in outs], 1))
        )
        h = h + affine(context, f"{name}attn.c_proj")
        up = affine(norm(h, f"{name}ln_2"), f"{name}mlp.c_fc")
        inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up * up * up)
        h = h + affine(0.5 * up * (inner.tanh() + 1), f"{name}mlp.c_proj")
    return norm(h, "transformer.ln_f") @ w[gpt2.head_name(config)].T


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_the_forward_pass_is_within_the_bound(config, dtype, rng):
    """One block: worst cases multiply, so a proved bound over many layers soon says nothing."""
    config = dataclasses.replace(config, num_hidden_layers=1)
    params, tokens = model(5, config, dtype), rng.integers(0, 29, (2, 7))
    params = {n: w / 2 if ".c_" in n else w for n, w in params.items()}
    logits, _ = gpt2.forward(params, tokens, config)
    for row, found in zip(tokens, logits, strict=True):
        ball = forward_in_balls(params, row, config, dtype)
        assert ball.radius.max() <= 0.01 * np.abs(ball.value).max(), "a bound this wide would say nothing"
        ball.check(found, "logits")


# --- one text in many forms: properties of the model under test -------------------------------------------------------


def forward(params, tokens, **options):
    return gpt2.forward(params, tokens, CONFIG, **options)


def both(params, *rest, **kwargs):
    """The float64 result, and what float32 allows it."""
    y = forward(params, *rest, **kwargs)[0]
    return y, allowed(y, forward(single(params), *rest, **kwargs)[0])


def case(seed, shape=(3, 7)):
    rng = np.random.default_rng([seed, 1])
    return model(seed), rng.integers(0, 29, shape), rng


def new_cache(batch, capacity, dtype=np.float64):
    return KVCache(CONFIG.num_hidden_layers, batch, CONFIG.num_attention_heads, capacity, CONFIG.head_dim, dtype)


def transformers_agrees(seed):
    params, tokens, rng = case(seed)
    dlogits = rng.standard_normal((3, 7, 29))
    expected, gradients = both_gradients(theirs(params, CONFIG), tokens, dlogits)
    logits, vjp = forward(params, tokens)
    low, low_vjp = forward(single(params), tokens)
    agree(logits, expected, allowed(logits, low), "logits")
    low_found = low_vjp(dlogits.astype(np.float32))
    for name, gradient in vjp(dlogits).items():
        agree(gradient, gradients[name], allowed(gradient, low_found[name]), name)


def no_token_looks_ahead(seed):
    params, tokens, _ = case(seed)
    y, _ = forward(params, tokens)
    other = tokens.copy()
    other[:, 4:] = (other[:, 4:] + 11) % 29
    changed, _ = forward(params, other)
    checks.same_bits(changed[:, :4], y[:, :4], "what came before")
    assert (np.abs(changed[:, 4:] - y[:, 4:]).max(-1) > 1e-6).all()


def any_cut_of_the_text_through_the_cache(seed):
    params, tokens, _ = case(seed)
    whole, slack = both(params, tokens)
    for cut in ([7], [1] * 7, [3, 4], [2, 1, 4]):
        cache, at = new_cache(3, 8), 0
        for n in cut:
            y, _ = forward(params, tokens[:, at : at + n], cache=cache)
            agree(y, whole[:, at : at + n], slack, f"cut {cut} at {at}")
            at += n


def rows_of_different_lengths_through_the_cache(seed):
    """Right-padded prompts, then tokens one by one: each row as if it were alone."""
    params, tokens, _ = case(seed)
    whole, slack = both(params, tokens)
    lengths = np.array([4, 1, 3])
    cache = new_cache(3, 9)
    y, _ = forward(params, np.where(np.arange(4) < lengths[:, None], tokens[:, :4], 28), cache=cache, lengths=lengths)
    for b, n in enumerate(lengths):
        agree(y[b, :n], whole[b, :n], slack, f"row {b}")
    for step in range(3):
        y, _ = forward(params, tokens[np.arange(3), lengths + step][:, None], cache=cache)
        for b, n in enumerate(lengths):
            agree(y[b, 0], whole[b, n + step], slack, f"row {b}, step {step}")


def packed_texts_do_not_see_each_other(seed):
    """Texts of 3, 1 and 3 tokens in a row: values, and gradients that add up, of the texts alone."""
    params, tokens, rng = case(seed, (1, 7))
    y, vjp = forward(params, tokens, segments=np.array([[0, 0, 0, 1, 2, 2, 2]]))
    low, low_vjp = forward(single(params), tokens, segments=np.array([[0, 0, 0, 1, 2, 2, 2]]))
    slack, dy, total = allowed(y, low), rng.standard_normal(y.shape), {}
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        alone, alone_vjp = forward(params, tokens[:, start:stop])
        agree(y[:, start:stop], alone, slack, f"text {start}:{stop}")
        for name, g in alone_vjp(dy[:, start:stop]).items():
            total[name] = total.get(name, 0) + g
    low_gradients = low_vjp(dy.astype(np.float32))
    for name, g in vjp(dy).items():
        agree(g, total[name], allowed(g, low_gradients[name]), name)


def greedy_text_is_transformers(seed):
    params, tokens, _ = case(seed)
    prompt = {"inputs": torch.tensor(tokens), "attention_mask": torch.ones(3, 7)}
    text = theirs(params, CONFIG).generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert np.array_equal(gpt2.generate(params, tokens, CONFIG, 20), text.numpy())


PROPERTIES = (
    transformers_agrees,
    no_token_looks_ahead,
    any_cut_of_the_text_through_the_cache,
    rows_of_different_lengths_through_the_cache,
    packed_texts_do_not_see_each_other,
    greedy_text_is_transformers,
)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("holds", PROPERTIES)
def test_gpt2(holds, seed):
    holds(seed)


def test_gpt2_kill_matrix(monkeypatch):
    """Every wrong version is rejected, and every property is needed for one of them."""

    def kills(holds, attribute, wrong):
        with monkeypatch.context() as patch:
            patch.setattr(gpt2, attribute, wrong)
            return checks.rejected(lambda _, seed: holds(seed), None, [1])

    matrix = {
        f"{attribute} {wrong.__name__}": [p for p in PROPERTIES if kills(p, attribute, wrong)]
        for attribute, versions in wrong_gpt2.VERSIONS.items()
        for wrong in versions
    }
    for name, by in matrix.items():
        print(f"{name:44s} {len(by)}: {', '.join(p.__name__ for p in by)}")
    assert all(matrix.values()), [name for name, by in matrix.items() if not by]
    assert {p for by in matrix.values() for p in by} == set(PROPERTIES)
    for holds, name in wrong_gpt2.NEEDED_FOR.items():
        assert holds in {p.__name__ for p in matrix[name]}, f"{holds} accepts {name}"


# --- adapters, quantized weights, what is kept ------------------------------------------------------------------------


def test_every_kind_of_weight_equals_its_dense_matrix(rng):
    params, tokens = model(6), rng.integers(0, 29, (2, 7))
    carried = {"lora": lora.attach(params, r=3, rng=rng), "qlora": qlora.attach(single(params), r=3, rng=rng)}
    for name, tuned in carried.items():
        tuned = {
            n: dataclasses.replace(w, B=rng.standard_normal(w.B.shape).astype(w.B.dtype))
            if isinstance(w, lora.LoRA)
            else w
            for n, w in tuned.items()
        }
        assert {n.split(".")[-2] for n, w in tuned.items() if isinstance(w, lora.LoRA)} == set(gpt2.LINEAR_MODULES)
        merged = gpt2.fuse(tuned)
        dtype = merged[gpt2.EMBEDDING].array.dtype
        wide = {n: w.array.astype(np.float64) for n, w in merged.items()}
        exact, narrow = gpt2.forward(wide, tokens, CONFIG)[0], gpt2.forward(single(wide), tokens, CONFIG)[0]
        slack = allowed(exact, narrow) if dtype == np.float64 else 16 * np.abs(exact - narrow).max()
        agree(gpt2.forward(tuned, tokens, CONFIG)[0].astype(np.float64), exact, slack, name)


def test_only_what_learns_has_a_gradient_and_blocks_below_keep_nothing(rng):
    params, tokens = model(7), rng.integers(0, 29, (2, 5))
    full = gpt2.forward(params, tokens, CONFIG)[1](dy := rng.standard_normal((2, 5, 29)))
    frozen = freeze(params)
    for name in params:
        learned = frozen | {name: params[name]}
        found = gpt2.forward(learned, tokens, CONFIG)[1](dy)
        assert found.keys() == {name} == trainable(learned).keys()
        checks.same_bits(found[name], full[name], name)
    assert isinstance(frozen[gpt2.EMBEDDING], Frozen) and not gpt2.forward(frozen, tokens, CONFIG)[1](dy)


def test_what_a_pass_keeps_and_which_blocks_are_run_backward(monkeypatch, rng):
    params, tokens = model(7), rng.integers(0, 29, (2, 5))
    dhidden, words = rng.standard_normal((2, 5, 12)), params[gpt2.EMBEDDING][tokens]
    top = {n: w for n, w in params.items() if n.startswith("transformer.h.1.")}
    end = {n: w for n, w in params.items() if n.startswith("transformer.ln_f")}
    cases = (params, tokens, [0, 1]), (top, tokens, [1]), (end, tokens, []), ({}, words, [0, 1])
    for learned, inputs, layers in cases:
        for options in ({}, {"recompute": True}):
            with monkeypatch.context() as patch:
                kept, run_backward = watch_blocks(gpt2, patch)
                _, vjp = gpt2.backbone(freeze(params) | learned, inputs, CONFIG, **options)
                assert kept() == ([] if options else layers)
                vjp(dhidden)
                assert run_backward == layers[::-1]
    kept, _ = watch_blocks(gpt2, monkeypatch)
    _, vjp = gpt2.backbone(params, tokens, CONFIG, cache=new_cache(2, 5))
    assert kept() == []


def test_dropout_keys_come_from_the_layer_and_the_module(monkeypatch, rng):
    """Four streams a block, which no other code may shift: a run that is resumed draws the same masks."""
    keys = dropout_keys(gpt2, monkeypatch)
    gpt2.backbone(model(), rng.integers(0, 29, (1, 2)), CONFIG, dropout_key=11)
    assert keys == [fold_in(fold_in(11, layer), module) for layer in range(2) for module in range(4)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_bit(dropout, rng):
    tokens, dy = rng.integers(0, 29, (2, 5)), rng.standard_normal((2, 5, 29))
    params = lora.attach(model(8), r=2, lora_dropout=dropout, rng=rng)
    (y, vjp), (y2, vjp2) = (forward(params, tokens, dropout_key=3, recompute=again) for again in (False, True))
    checks.same_bits(y2, y, "logits")
    gradients, again = vjp(dy), vjp2(dy)
    assert gradients.keys() == again.keys() == trainable(params).keys()
    for name, g in gradients.items():
        checks.same_bits(again[name], g, name)
    if dropout:
        other, name = forward(params, tokens, dropout_key=4)[1](dy), "transformer.h.0.attn.c_attn.lora_B.weight"
        assert not np.array_equal(other[name], gradients[name])


def test_embeddings_in_place_of_tokens_and_their_cotangent(rng):
    params, tokens = model(9), rng.integers(0, 29, (2, 5))
    words = params[gpt2.EMBEDDING][tokens]
    hidden, vjp = gpt2.backbone(params, tokens, CONFIG)
    same, same_vjp = gpt2.backbone(params, words, CONFIG)
    checks.same_bits(same, hidden, "hidden")
    dhidden = rng.standard_normal(hidden.shape)
    none, no_prefix, gradients = vjp(dhidden)
    dwords, _, without_words = same_vjp(dhidden)
    assert none is no_prefix is None and without_words.keys() == gradients.keys() - {gpt2.EMBEDDING}
    table = np.zeros_like(params[gpt2.EMBEDDING])
    np.add.at(table, tokens, dwords)
    agree(gradients[gpt2.EMBEDDING], table, 16 * 2.0**-53 * np.abs(table).max(), "the table's gradient")
    _, frozen_vjp = gpt2.backbone(freeze(params), words, CONFIG)
    checks.same_bits(frozen_vjp(dhidden)[0], dwords, "through a model of which nothing learns")


def test_defaults():
    """GPT-2 small's sizes where transformers has them; greedy; everything kept, nothing dropped."""
    assert defaults(gpt2.Config) == {
        "max_position_embeddings": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    passing = {"lengths": None, "segments": None, "cache": None, "dropout_key": None, "recompute": False}
    assert defaults(gpt2.backbone) == passing
    for function in (gpt2.stream, gpt2.generate):
        assert defaults(function) == {"max_new_tokens": 64, "temperature": 0.0, "rng": None}
    assert len({CONFIG, dataclasses.replace(CONFIG), UNTIED}) == 2  # sizes are a value


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_text_longer_than_the_table_of_positions():
    params, tokens = model(), np.zeros((1, 41), np.int64)
    with pytest.raises(ValueError, match=r"41 tokens, and the model has learned 40 positions"):
        forward(params, tokens)
    assert gpt2.generate(params, tokens[:, :36], CONFIG, 5).shape == (1, 41)  # the last token is never read
    with pytest.raises(ValueError, match=r"a text of 41 tokens.* fewer new tokens"):
        gpt2.stream(params, tokens[:, :36], CONFIG, 6)  # and not only when it comes to the last of them
    assert gpt2.generate(params, tokens[:, :40], CONFIG, 1).shape == (1, 41)
    with pytest.raises(ValueError, match="a text of 41 tokens"):
        gpt2.stream(params, tokens, CONFIG, 0)
    segments = np.repeat([0, 1], [20, 21])[None]
    assert forward(params, tokens, segments=segments)[0].shape == (1, 41, 29)  # positions start again


def test_other_bad_input():
    params = model()
    with pytest.raises(ValueError, match=r"shape \(2, 0\), needed \(batch, tokens\) with at least one token$"):
        forward(params, np.zeros((2, 0), np.int64))
    with pytest.raises(ValueError, match=r"shape \(2, 0, 12\), needed \(batch, tokens, hidden_size\) with at least"):
        forward(params, np.zeros((2, 0, 12)))
    with pytest.raises(IndexError, match=r"token ids span 29\.\.29"):
        forward(params, np.full((1, 1), 29))
    with pytest.raises(ValueError, match="hidden_size is 12, needed a multiple of num_attention_heads, which is 5"):
        dataclasses.replace(CONFIG, num_attention_heads=5)
    with pytest.raises(ValueError, match=r"has no pullback: run it again without the cache$"):
        forward(params, np.zeros((1, 1), np.int64), cache=new_cache(1, 2))[1](np.zeros((1, 1, 29)))
