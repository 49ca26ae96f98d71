"""The trunk: against transformers with all gradients, and every way of saying the same thing must say the same.

Float64 results of one network by two orders of summation differ by its condition times 2⁻⁵³. `allowed` measures the
condition on the spot: how far float32 moves the same result, times 2⁻²⁹ (the ratio of the two roundoffs) times 16, for
what one run happens to be luckier in than another. No tolerance is written down, and a wrong term is 10⁶ times larger.
"""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import transformers
import wrong_nn_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minift.conformance import bounds
from minift.conformance.ball import ELEMENTARY, Ball
from minift.models import llama
from minift.nn.attention import KVCache
from minift.nn.losses import IGNORE_INDEX, cross_entropy
from minift.nn.rope import RopeScaling, frequencies
from minift.nn.weight import Frozen, freeze, trainable
from minift.peft import lora
from nn import checks, wrong_nn

CONFIG = llama.Config(29, 12, 20, 2, 6, 2, 4, rope_theta=500.0, rms_norm_eps=3e-3)  # W_q is 24 × 12; ε can be seen
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
LINEAR = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 3.0))
LLAMA3 = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32), max_position_embeddings=64)


def model(seed=0, config=CONFIG, dtype=np.float64):
    """Random parameters far from their initial values; gains are not one."""
    rng = np.random.default_rng([seed, 7])
    return {n: (0.5 * rng.standard_normal(s)).astype(dtype) for n, s in llama.shapes(config).items()}


def single(params):
    return {n: w.astype(np.float32) for n, w in params.items()}


def allowed(in_double, in_single):
    """How far apart two right float64 results may be, from what float32 does to them."""
    return 16 * 2.0**-29 * np.abs(in_double - in_single.astype(float)).max(initial=1e-12)


def agree(found, expected, slack, what=""):
    assert found.shape == expected.shape, what
    error = np.abs(found - expected).max(initial=0)
    assert error <= slack, f"{what}: off by {error:.3g} where {slack:.3g} is allowed"


# --- transformers -----------------------------------------------------------------------------------------------------


def theirs(params, config, dtype=torch.float64, in_double=True):
    """LlamaForCausalLM with these parameters. Its angles, and its RMSNorm inside, are float32 whatever the model's
    dtype (so is its eager softmax, hence sdpa), so for float64 they are replaced by torch's own in float64. That the
    frequencies are transformers' is tested in tests/nn/test_rope.py, and float32 below is transformers untouched."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= dataclasses.asdict(config.rope_scaling)
    sizes = {n: v for n, v in dataclasses.asdict(config).items() if n not in ("rope_theta", "rope_scaling")}
    their_config = transformers.LlamaConfig(
        **sizes,
        rope_parameters=rope,
        attn_implementation="sdpa",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    network = transformers.LlamaForCausalLM(their_config).to(dtype).eval()
    state = {n: torch.tensor(w) for n, w in params.items()}
    if config.tie_word_embeddings:
        state[llama.HEAD] = state[llama.EMBEDDING]
    network.load_state_dict(state)
    if in_double:
        omega = torch.tensor(frequencies(config.head_dim, config.rope_theta, config.rope_scaling))

        def angles(x, position_ids):
            phi = position_ids[..., None].double() * omega
            both = torch.cat([phi, phi], -1)
            return both.cos().to(x.dtype), both.sin().to(x.dtype)

        network.model.rotary_emb.forward = angles
        for module in network.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = functools.partial(norm_in_double, module)
    return network


def norm_in_double(module, x):
    return torch.nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def their_gradients(network, tokens, dlogits, **inputs):
    logits = network(torch.tensor(tokens), use_cache=False, **inputs).logits
    network.zero_grad()
    logits.backward(torch.tensor(dlogits, dtype=logits.dtype))
    return logits.detach().numpy(), {n: p.grad.numpy() for n, p in network.named_parameters()}


@pytest.mark.parametrize("config", [CONFIG, TIED, LINEAR, LLAMA3], ids=["plain", "tied", "linear", "llama3"])
def test_transformers_agrees_with_all_gradients(config, rng):
    params, tokens = model(1, config), rng.integers(0, 29, (2, 40))
    dlogits = rng.standard_normal((2, 40, 29))
    expected, gradients = their_gradients(theirs(params, config), tokens, dlogits)
    logits, vjp = llama.forward(params, tokens, config)
    low, low_vjp = llama.forward(single(params), tokens, config)
    agree(logits, expected, allowed(logits, low), "logits")
    found, low_found = vjp(dlogits), low_vjp(dlogits.astype(np.float32))
    assert found.keys() == gradients.keys() == low_found.keys() == llama.shapes(config).keys()
    for name, gradient in found.items():
        assert low_found[name].dtype == np.float32
        agree(gradient, gradients[name], allowed(gradient, low_found[name]), name)
        assert np.abs(gradient).max() > 1e-3, f"{name} says nothing"


@pytest.mark.parametrize("config", [CONFIG, LINEAR, LLAMA3], ids=["plain", "linear", "llama3"])
def test_in_float32_we_are_no_further_from_the_truth_than_twice_transformers(config, rng):
    """Untouched transformers, its own angles included: FlashAttention's rule, on the error of all tensors together.

    A single tensor says little: its error is one draw of a random variable, and of the few numbers of a gain even the
    root mean square of two equally good computations often differs by more than two. So each tensor's error is divided
    by that tensor's size, and the root mean square is taken over all of them, which no single draw decides."""
    params, tokens = model(2, config), rng.integers(0, 29, (2, 40))
    dlogits = rng.standard_normal((2, 40, 29)).astype(np.float32)
    exact, exact_vjp = llama.forward(params_of_float32(params), tokens, config)
    exact_gradients = exact_vjp(dlogits.astype(float)) | {"logits": exact}
    logits, vjp = llama.forward(single(params), tokens, config)
    ours = vjp(dlogits) | {"logits": logits}
    network = theirs(single(params), config, torch.float32, in_double=False)
    their_logits, their = their_gradients(network, tokens, dlogits)
    their |= {"logits": their_logits}
    assert all(array.dtype == np.float32 for array in ours.values())

    def relative_error(found):
        return math.sqrt(np.mean([((found[n] - t) ** 2).sum() / (t**2).sum() for n, t in exact_gradients.items()]))

    assert relative_error(ours) <= 2 * relative_error(their)


def params_of_float32(params):
    return {n: w.astype(np.float32).astype(float) for n, w in params.items()}


def test_transformers_loss_and_ignored_labels(rng):
    params, tokens = model(3), rng.integers(0, 29, (3, 9))
    labels = np.where(rng.random((3, 9)) < 0.4, IGNORE_INDEX, tokens)
    labels[:, 0] = IGNORE_INDEX  # theirs shifts by one: the first label is never predicted
    network = theirs(params, CONFIG)
    output = network(torch.tensor(tokens), labels=torch.tensor(labels), use_cache=False)
    flat = output.logits[:, :-1].reshape(-1, 29), torch.tensor(labels[:, 1:].reshape(-1))
    loss = torch.nn.functional.cross_entropy(*flat)
    loss.backward()
    logits, vjp = llama.forward(params, tokens[:, :-1], CONFIG)
    found, loss_vjp = cross_entropy(logits, labels[:, 1:])
    low, low_vjp = llama.forward(single(params), tokens[:, :-1], CONFIG)
    low_loss, low_loss_vjp = cross_entropy(low, labels[:, 1:])
    agree(np.asarray(found), np.asarray(loss.item()), allowed(np.asarray(found), np.asarray(low_loss)), "loss")
    # their own loss rounds the logits to float32, and is computed in it
    largest = np.abs(logits).max()
    assert abs(output.loss.item() - found) <= bounds.gamma(2 * 29 + 24, np.float32) * 2 * largest
    low_gradients = low_vjp(low_loss_vjp(1.0))
    for name, gradient in vjp(loss_vjp(1.0)).items():
        expected = dict(network.named_parameters())[name].grad.numpy()
        agree(gradient, expected, allowed(gradient, low_gradients[name]), name)


def test_transformers_on_left_out_padding_and_greedy_text(rng):
    """Their attention mask for right padding changes nothing that is real, and both continue alike."""
    params, tokens, lengths = model(4), rng.integers(0, 29, (3, 6)), np.array([6, 2, 4])
    network = theirs(params, CONFIG)
    real = np.arange(6) < lengths[:, None]
    expected = (
        network(torch.tensor(tokens), attention_mask=torch.tensor(real * 1), use_cache=False).logits.detach().numpy()
    )
    logits, _ = llama.forward(params, tokens, CONFIG)
    low, _ = llama.forward(single(params), tokens, CONFIG)
    agree(logits[real], expected[real], allowed(logits, low))
    text = network.generate(torch.tensor(tokens), max_new_tokens=8, do_sample=False, pad_token_id=0).numpy()
    assert np.array_equal(llama.generate(params, tokens, CONFIG, 8), text)


def test_names_and_shapes_are_transformers():
    for config in (CONFIG, TIED):
        state = dict(theirs(model(0, config), config).named_parameters())
        assert {n: tuple(p.shape) for n, p in state.items()} == llama.shapes(config)
    assert llama.head_name(CONFIG) == "lm_head.weight"
    assert llama.head_name(TIED) == "model.embed_tokens.weight"


# --- the forward pass in float32 within a proved bound ----------------------------------------------------------------


def forward_in_balls(params, tokens, config, dtype):
    """The docstring's equations, one head at a time; value and bound."""
    w = {n: Ball(a.astype(float), dtype) for n, a in params.items()}

    def norm(h, name):
        return h * (1 / ((h * h).mean() + config.rms_norm_eps).sqrt()) * w[name + ".weight"]

    T, d, half = len(tokens), config.head_dim, config.head_dim // 2
    phi = np.arange(T)[:, None] * config.rope_theta ** (-2 * np.arange(half) / d)
    angle = np.array([[bounds.rope_angle(m, dtype) + ELEMENTARY * 2.0**-53 * m] * half for m in range(T)])
    cos, sin = Ball(np.cos(phi), dtype, angle), Ball(np.sin(phi), dtype, angle)

    def turn(x):
        a, b = x[:, :half], x[:, half:]
        first, second = a * cos - b * sin, b * cos + a * sin
        value, radius = (np.concatenate([getattr(y, n) for y in (first, second)], 1) for n in ("value", "radius"))
        return Ball(value, dtype, radius)

    visible = np.tri(T, dtype=bool)
    h = w[llama.EMBEDDING][tokens]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        x = norm(h, name + "input_layernorm")
        q, k, v = (x @ w[f"{name}self_attn.{p}_proj.weight"].T for p in "qkv")
        outs = []
        for head in range(config.num_attention_heads):
            g = head // (config.num_attention_heads // config.num_key_value_heads)
            own, shared = slice(head * d, head * d + d), slice(g * d, g * d + d)
            scores = turn(q[:, own]) @ turn(k[:, shared]).T * (1 / math.sqrt(d))
            top = np.where(visible, scores.value, -np.inf).max(1, keepdims=True)
            e = (scores - Ball(top, dtype, scores.radius.max(1, keepdims=True))).where(visible).exp().where(visible)
            outs.append(e / e.sum(-1) @ v[:, shared])
        context = Ball(
            *(np.concatenate([o.value for o in outs], 1), dtype, np.concatenate([o.radius for o in outs], 1))
        )
        h = h + context @ w[name + "self_attn.o_proj.weight"].T
        x = norm(h, name + "post_attention_layernorm")
        gate, up = (x @ w[f"{name}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        silu = gate * (0.5 * (0.5 * gate).tanh() + 0.5)
        h = h + silu * up @ w[name + "mlp.down_proj.weight"].T
    return norm(h, "model.norm") @ w[llama.head_name(config)].T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_the_forward_pass_is_within_the_bound(tied, dtype, rng):
    """One block: worst cases multiply, so a proved bound over many layers soon says nothing."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=tied)
    params, tokens = model(5, config, dtype), rng.integers(0, 29, (2, 7))
    params = {n: w / 2 if "_proj" in n else w for n, w in params.items()}
    logits, _ = llama.forward(params, tokens, config)
    for row, found in zip(tokens, logits, strict=True):
        ball = forward_in_balls(params, row, config, dtype)
        assert ball.radius.max() <= 0.01 * np.abs(ball.value).max(), "a bound this wide would say nothing"
        ball.check(found, "logits")


# --- one text in many forms: properties of the model under test -------------------------------------------------------


def forward(params, tokens, **options):
    return llama.forward(params, tokens, CONFIG, **options)


def both(run, *args, **kwargs):
    """The float64 result, and what float32 allows it."""
    params, *rest = args
    y = run(params, *rest, **kwargs)[0]
    return y, allowed(y, run(single(params), *rest, **kwargs)[0])


def case(seed, shape=(3, 7)):
    rng = np.random.default_rng([seed, 1])
    return model(seed), rng.integers(0, 29, shape), rng


def new_cache(batch, capacity, dtype=np.float64):
    return KVCache(CONFIG.num_hidden_layers, batch, CONFIG.num_key_value_heads, capacity, CONFIG.head_dim, dtype)


def random_prefix(rng, length=3):
    return 2 * rng.standard_normal((CONFIG.num_hidden_layers, 2, CONFIG.num_key_value_heads, length, CONFIG.head_dim))


def no_token_looks_ahead(seed):
    params, tokens, _ = case(seed)
    y, _ = forward(params, tokens)
    other = tokens.copy()
    other[:, 4:] = (other[:, 4:] + 11) % 29
    changed, _ = forward(params, other)
    checks.same_bits(changed[:, :4], y[:, :4], "what came before")
    assert (np.abs(changed[:, 4:] - y[:, 4:]).max(-1) > 1e-6).all()
    earlier = tokens.copy()
    earlier[:, 0] = (earlier[:, 0] + 5) % 29
    assert (np.abs(forward(params, earlier)[0] - y).max(-1) > 1e-9).all(), "every token sees the first"


def any_cut_of_the_text_through_the_cache(seed):
    params, tokens, _ = case(seed)
    whole, slack = both(forward, params, tokens)
    for cut in ([7], [1] * 7, [3, 4], [2, 1, 4]):
        cache, at = new_cache(3, 8), 0
        for n in cut:
            y, _ = forward(params, tokens[:, at : at + n], cache=cache)
            agree(y, whole[:, at : at + n], slack, f"cut {cut} at {at}")
            at += n
            assert (cache.lengths == at).all()


def rows_of_different_lengths_through_the_cache(seed):
    """Right-padded prompts, then tokens one by one: each row as if it were alone."""
    params, tokens, _ = case(seed)
    whole, slack = both(forward, params, tokens)
    lengths = np.array([4, 1, 3])
    cache = new_cache(3, 9)
    padded = np.where(np.arange(4) < lengths[:, None], tokens[:, :4], 28)
    y, _ = forward(params, padded, cache=cache, lengths=lengths)
    for b, n in enumerate(lengths):
        agree(y[b, :n], whole[b, :n], slack, f"row {b}")
    for step in range(3):
        y, _ = forward(params, tokens[np.arange(3), lengths + step][:, None], cache=cache)
        for b, n in enumerate(lengths):
            agree(y[b, 0], whole[b, n + step], slack, f"row {b}, step {step}")


def packed_texts_do_not_see_each_other(seed):
    """Texts of 3, 1 and 3 tokens in a row: values, and gradients that add up, of the texts alone."""
    params, tokens, rng = case(seed, (2, 7))
    segments = np.array([[0, 0, 0, 1, 2, 2, 2], [5, 5, 3, 3, 3, 3, 5]])  # any numbers; one comes back
    cuts = [[(0, 3), (3, 4), (4, 7)], [(0, 2), (2, 6)]]
    y, vjp = forward(params, tokens, segments=segments)
    low, low_vjp = forward(single(params), tokens, segments=segments)
    slack, dy = allowed(y, low), rng.standard_normal(y.shape)
    dy[1, 6] = 0  # what comes back sees its beginning, but at other positions than alone: not compared
    total = {}
    for b, row in enumerate(cuts):
        for start, stop in row:
            alone, alone_vjp = forward(params, tokens[b : b + 1, start:stop])
            agree(y[b, start:stop], alone[0], slack, f"row {b}, text {start}:{stop}")
            for name, g in alone_vjp(dy[b : b + 1, start:stop]).items():
                total[name] = total.get(name, 0) + g
    low_gradients = low_vjp(dy.astype(np.float32))
    for name, g in vjp(dy).items():
        agree(g, total[name], allowed(g, low_gradients[name]), name)


def a_prefix_comes_before_every_packed_text(seed):
    """Positions restart behind the prefix: invisible without one, as scores depend on distances only."""
    params, tokens, rng = case(seed, (1, 6))
    prefix = random_prefix(rng)
    y, slack = both(forward, params, tokens, segments=np.array([[0, 0, 1, 1, 1, 2]]), prefix=prefix)
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        alone, _ = forward(params, tokens[:, start:stop], prefix=prefix)
        agree(y[:, start:stop], alone, slack, f"text {start}:{stop}")


def a_prefix_copied_from_a_text_is_that_text(seed):
    """Keys and values of real tokens, as learned ones: the text behind them is the end of the concatenation."""
    params, tokens, _ = case(seed, (1, 7))
    whole, slack = both(forward, params, tokens)
    cache = new_cache(1, 7)
    forward(params, tokens[:, :3], cache=cache)
    prefix = np.stack([cache.keys[:, 0, :, :3], cache.values[:, 0, :, :3]], axis=1)
    agree(forward(params, tokens[:, 3:], prefix=prefix)[0], whole[:, 3:], slack)
    assert np.abs(forward(params, tokens[:, 3:])[0] - whole[:, 3:]).max() > 1e-3
    empty = forward(params, tokens, prefix=prefix[:, :, :, :0])[0]
    agree(empty, whole, slack, "a prefix of no length")


def a_prefix_in_the_cache_is_a_prefix(seed):
    params, tokens, rng = case(seed)
    prefix = random_prefix(rng)
    whole, slack = both(forward, params, tokens, prefix=prefix)
    cache = new_cache(3, 12)
    cache.put_prefix(prefix)
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        agree(forward(params, tokens[:, start:stop], cache=cache)[0], whole[:, start:stop], slack, f"{start}:{stop}")


def padding_to_the_right_changes_no_bit(seed):
    params, tokens, rng = case(seed)
    lengths = np.array([7, 3, 5])
    real = np.arange(7) < lengths[:, None]
    y, vjp = forward(params, tokens, lengths=lengths)
    other, other_vjp = forward(params, np.where(real, tokens, 0), lengths=lengths)
    checks.same_bits(other[real], y[real], "logits")
    dy = rng.standard_normal(y.shape) * real[..., None]
    gradients, other_gradients = vjp(dy), other_vjp(dy)
    low = forward(single(params), tokens)[1](dy.astype(np.float32))
    for name, g in gradients.items():
        agree(other_gradients[name], g, allowed(g, low[name]), name)
    slack = allowed(y, forward(single(params), tokens)[0])
    for b, n in enumerate(lengths):
        agree(forward(params, tokens[b : b + 1, :n])[0][0], y[b, :n], slack, f"row {b} alone")


def transformers_agrees(seed):
    params, tokens, rng = case(seed)
    dlogits = rng.standard_normal((3, 7, 29))
    expected, gradients = their_gradients(theirs(params, CONFIG), tokens, dlogits)
    logits, vjp = forward(params, tokens)
    low, low_vjp = forward(single(params), tokens)
    agree(logits, expected, allowed(logits, low), "logits")
    low_found = low_vjp(dlogits.astype(np.float32))
    for name, gradient in vjp(dlogits).items():
        agree(gradient, gradients[name], allowed(gradient, low_found[name]), name)


PROPERTIES = (
    no_token_looks_ahead,
    any_cut_of_the_text_through_the_cache,
    rows_of_different_lengths_through_the_cache,
    packed_texts_do_not_see_each_other,
    a_prefix_comes_before_every_packed_text,
    a_prefix_copied_from_a_text_is_that_text,
    a_prefix_in_the_cache_is_a_prefix,
    padding_to_the_right_changes_no_bit,
    transformers_agrees,
)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("holds", PROPERTIES)
def test_llama(holds, seed):
    holds(seed)


def wrong_models():
    """(name, what in `minift.models.llama` is replaced)."""
    found = []
    for module, versions in (
        ("attention", wrong_nn.ATTENTION),
        ("rms_norm", wrong_nn.RMS_NORM),
        ("swiglu", wrong_nn.SWIGLU),
    ):
        skipped = (
            "upcast",
            "in_place",
            "low",
            "shifted",
            "empty",
            "axis",
            "weight_axis",
            "naive",
            "half",
            "dweight=last axis",
            "first_mask",
            "eps_place=none",
            "dweight=first axis",
        )
        found += [(f"{module} {w.__name__}", module, w) for w in versions if not w.__name__.startswith(skipped)]
    found += [(f"_layout {w.__name__}", "_layout", w) for w in wrong_nn_layout.LAYOUT]
    return found + [(f"block {w.__name__}", "block", w) for w in wrong_nn_layout.BLOCK]


ONLY_KILLERS = {  # (property, what it rejects): each property is needed for something
    no_token_looks_ahead: "_layout sees=1",
    any_cut_of_the_text_through_the_cache: "_layout cache_counts=False",
    rows_of_different_lengths_through_the_cache: "_layout one_length=True",
    packed_texts_do_not_see_each_other: "_layout segments_seen=False",
    a_prefix_comes_before_every_packed_text: "_layout restart=False",
    a_prefix_copied_from_a_text_is_that_text: "_layout prefix_counts=False",
    a_prefix_in_the_cache_is_a_prefix: "block drop_prefix=True",
    padding_to_the_right_changes_no_bit: "_layout sees=1",
    transformers_agrees: "block exchanged=True",
}


def test_llama_kill_matrix(monkeypatch):
    """Up to the first property that rejects; and each property rejects the version that it is there for."""

    def kills(holds, attribute, wrong):
        with monkeypatch.context() as patch:
            patch.setattr(llama, attribute, wrong)
            return checks.rejected(lambda _, seed: holds(seed), None, [1])

    versions = {name: (attribute, wrong) for name, attribute, wrong in wrong_models()}
    cheapest = sorted(PROPERTIES, key=lambda p: p not in (transformers_agrees, no_token_looks_ahead))
    for name, version in versions.items():
        by = next((p.__name__ for p in cheapest if kills(p, *version)), None)
        print(f"{name:40s} {by}")
        assert by, f"no property rejects {name}"
    assert ONLY_KILLERS.keys() == set(PROPERTIES)
    for holds, name in ONLY_KILLERS.items():
        assert kills(holds, *versions[name]), f"{holds.__name__} accepts {name}"


@settings(max_examples=12)
@given(st.integers(0, 99), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 4))
def test_any_cuts_and_any_prefix_through_the_cache(seed, cut, length):
    params, tokens, rng = case(seed, (2, sum(cut)))
    prefix = random_prefix(rng, length)
    whole, slack = both(forward, params, tokens, prefix=prefix)
    cache, at = new_cache(2, sum(cut) + length), 0
    cache.put_prefix(prefix)
    for n in cut:
        agree(forward(params, tokens[:, at : at + n], cache=cache)[0], whole[:, at : at + n], slack, f"at {at}")
        at += n


# --- recomputation, dtypes, purity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "segments", "prefix", "dropout", "frozen below"])
def test_recomputation_changes_no_bit(options, rng):
    params, tokens, _ = case(1)
    kwargs = {}
    if options == "segments":
        kwargs["segments"] = np.array([[0, 0, 1, 1, 1, 2, 2]] * 3)
    if options == "prefix":
        kwargs["prefix"] = random_prefix(rng)
    if options == "dropout":
        params = lora.attach(params, r=2, lora_alpha=3, lora_dropout=0.3, rng=rng)
        kwargs["dropout_key"] = 5
    if options == "frozen below":
        params = freeze(params) | {n: w for n, w in params.items() if "layers.1" in n}
    (y, vjp), (again, again_vjp) = (
        llama.backbone(params, tokens, CONFIG, recompute=r, **kwargs) for r in (False, True)
    )
    checks.same_bits(again, y, "hidden")
    dy = rng.standard_normal(y.shape)
    for _ in range(2):  # a pullback may be called twice
        (dx, dprefix, gradients), (dx2, dprefix2, gradients2) = vjp(dy), again_vjp(dy)
        assert dx is dx2 is None
        assert gradients.keys() == gradients2.keys() == trainable(params).keys() - {llama.HEAD}
        for name, g in gradients.items():
            checks.same_bits(gradients2[name], g, name)
        if options == "prefix":
            checks.same_bits(dprefix2, dprefix, "dprefix")
        else:
            assert dprefix is dprefix2 is None


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_every_result_has_the_dtype_of_the_parameters(dtype, rng):
    params, tokens, _ = case(2)
    params = {n: w.astype(dtype) for n, w in params.items()}
    prefix, embedded = random_prefix(rng).astype(dtype), params[llama.EMBEDDING][tokens]
    hidden, vjp = llama.backbone(params, embedded, CONFIG, prefix=prefix)
    dx, dprefix, gradients = vjp(rng.standard_normal(hidden.shape).astype(dtype))
    assert {a.dtype for a in (hidden, dx, dprefix, *gradients.values())} == {np.dtype(dtype)}
    assert dx.shape == embedded.shape
    assert dprefix.shape == prefix.shape
    assert llama.EMBEDDING not in gradients  # embeddings came in, the table was not used
    cached, _ = llama.forward(params, tokens, CONFIG, cache=new_cache(3, 7, dtype))
    assert cached.dtype == dtype


def test_nothing_given_is_changed(rng):
    params, tokens, _ = case(3)
    prefix, segments, lengths = random_prefix(rng), np.array([[0, 0, 0, 1, 1, 1, 1]] * 3), np.array([7, 5, 6])
    given_ = [tokens, prefix, segments, lengths, *params.values()]
    before = [a.tobytes() for a in given_]
    y, vjp = llama.forward(params, tokens, CONFIG, prefix=prefix, segments=segments, lengths=lengths)
    dy = rng.standard_normal(y.shape)
    kept, cotangent = y.copy(), dy.tobytes()
    first, second = vjp(dy), vjp(dy)
    assert [a.tobytes() for a in given_] == before
    assert dy.tobytes() == cotangent
    checks.same_bits(y, kept, "logits")
    for name, g in first.items():
        checks.same_bits(second[name], g, name)


def test_a_strided_cotangent_and_strided_tokens(rng):
    params, tokens, _ = case(4)
    y, vjp = forward(params, tokens)
    strided, strided_vjp = forward(params, checks.strided(tokens))
    checks.same_bits(strided, y, "logits")
    dy = rng.standard_normal(y.shape)
    low = forward(single(params), tokens)[1](dy.astype(np.float32))
    found = strided_vjp(checks.strided(dy))
    for name, g in vjp(dy).items():
        agree(found[name], g, allowed(g, low[name]), name)


def test_each_parameter_reaches_the_output_and_its_own_gradient(rng):
    """One number of every parameter moved: the logits move, and only that parameter's gradient says so."""
    params, tokens, _ = case(5)
    y, vjp = forward(params, tokens)
    seen = set()
    for name, w in params.items():
        other = w.copy()
        index = (int(tokens[0, 0]), 3) if name == llama.EMBEDDING else (1,) * w.ndim
        other[index] += 0.5
        moved, _ = forward(params | {name: other}, tokens)
        assert np.abs(moved - y).max() > 1e-4, name
        seen.add(moved.tobytes())
    assert len(seen) == len(params), "two parameters do the same"
    assert vjp(np.zeros_like(y)).keys() == params.keys()


def test_layers_and_modules_drop_different_elements(rng):
    """The same input, adapter and key in two layers and two modules: other masks."""
    params, tokens, _ = case(6)
    attached = lora.attach(params, ["q_proj", "k_proj"], r=2, lora_alpha=3, lora_dropout=0.5, rng=rng)
    one = {n: w for n, w in attached.items() if not isinstance(w, lora.LoRA)}
    keys = []

    class Listening(Frozen):
        def linear(self, x, dropout_key=None):
            keys.append(dropout_key)
            return super().linear(x)

    listening = {n: Listening(w) if n.endswith("_proj.weight") else w for n, w in params.items()}
    assert one
    llama.forward(listening, tokens, CONFIG, dropout_key=3)
    assert len(keys) == len(set(keys)) == 2 * 7
    first = list(keys)
    keys.clear()
    llama.forward(listening, tokens, CONFIG, dropout_key=3)
    assert keys == first
    keys.clear()
    llama.forward(listening, tokens, CONFIG, dropout_key=4)
    assert not set(keys) & set(first)
    keys.clear()
    llama.forward(listening, tokens, CONFIG)
    assert keys == [None] * 14


# --- refusals and initial values --------------------------------------------------------------------------------------


def test_a_pass_into_a_cache_has_no_pullback(rng):
    params, tokens, _ = case(7)
    y, vjp = forward(params, tokens, cache=new_cache(3, 7))
    with pytest.raises(ValueError, match="a pass that writes into a cache has no pullback"):
        vjp(rng.standard_normal(y.shape))


def test_a_full_cache_is_refused():
    params, tokens, _ = case(8)
    with pytest.raises(ValueError, match="the cache has 6 slots, 7 are needed"):
        forward(params, tokens, cache=new_cache(3, 6))


def test_tokens_outside_the_vocabulary_are_refused():
    params, tokens, _ = case(9)
    for token in (-1, 29):
        tokens[1, 2] = token
        with pytest.raises(IndexError, match="token ids span"):
            forward(params, tokens)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match="num_attention_heads is 6, needed a multiple of num_key_value_heads, which is 4"
    ):
        dataclasses.replace(CONFIG, num_key_value_heads=4)


def test_initial_values():
    """N(0, std²) within six standard deviations of its moments; matrices that write into the sum are √(2L) smaller."""
    config = llama.Config(200, 64, 96, 3, 4, 2, 16)
    params = llama.initialize(config, np.random.default_rng(1), std=0.05)
    assert {n: w.shape for n, w in params.items()} == llama.shapes(config)
    assert list(params) == list(llama.shapes(config))
    assert all(w.dtype == np.float32 for w in params.values())
    for name, w in params.items():
        if w.ndim == 1:
            assert (w == 1).all()
            continue
        std = 0.05 / math.sqrt(6) if "o_proj" in name or "down_proj" in name else 0.05
        assert abs(w.mean()) <= 6 * std / math.sqrt(w.size), name
        assert abs(w.std() / std - 1) <= 6 / math.sqrt(2 * w.size), name
    again = llama.initialize(config, np.random.default_rng(1), std=0.05)
    assert all(np.array_equal(again[n], w) for n, w in params.items())
    default = llama.initialize(config, np.random.default_rng(1))[llama.EMBEDDING]
    np.testing.assert_allclose(default, params[llama.EMBEDDING] * 0.4, rtol=1e-6)
