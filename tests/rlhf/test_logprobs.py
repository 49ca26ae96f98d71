"""Log-probabilities of tokens: torch, bounds, chunks, and texts whose padding must not matter."""

import math
import tracemalloc
from unittest.mock import patch

import numpy as np
import pytest
import small_policy
import torch
import wrong_logprobs
from small_policy import CONFIG

from minift.conformance.ball import Ball
from minift.conformance.gradients import check_gradients, check_vjp
from minift.models import llama
from minift.nn import losses
from minift.nn.linear import linear
from minift.nn.weight import Frozen
from minift.peft.lora import A_NAME, B_NAME, LoRA
from minift.rlhf import logprobs
from minift.rlhf.logprobs import (
    answer_mask,
    at_answers,
    linear_token_log_probs,
    sequence_log_probs,
    token_log_probs,
)
from nn import checks

# seed, rows, vocab, kind, temperature
CASES = [
    (1, (2, 5), 7, "normal", 1.0),
    (2, (6,), 5, "shifted", 0.7),
    (3, (2, 3), 3, "large", 2.0),
    (4, (1,), 6, "normal", 0.5),
    (5, (0, 4), 3, "normal", 1.0),
    (6, (3,), 1, "normal", 1.3),
]


def make(case):
    seed, shape, vocab, kind, _ = case
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((*shape, vocab)) * {"large": 200}.get(kind, 1) + {"shifted": 1000}.get(kind, 0)
    return logits, rng.integers(0, vocab, shape), rng.standard_normal((2, *shape)), rng


def both(op, tokens, temperature):
    """(log-probabilities, entropies) as one array."""

    def run(logits):
        pair, vjp = op(logits, tokens, temperature)
        return np.stack(pair), lambda dy: vjp(dy[0], dy[1])

    return run


def oracle_for(tokens, temperature):
    def oracle(dtype, dy, logits):
        onehot = (np.arange(logits.shape[-1]) == tokens[..., None]) * 1.0
        z = Ball(logits, dtype) / temperature
        shifted = z - z.max()
        log_p = shifted - shifted.exp().sum(-1).log()
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1)
        logp = (log_p * onehot).sum(-1)
        dlogp, dentropy = (Ball(d[..., None], dtype) for d in dy)
        dz = dlogp * onehot - dlogp * p - dentropy * p * (log_p + entropy)
        pair = Ball(
            np.stack([logp.value[..., 0], entropy.value[..., 0]]),
            dtype,
            np.stack([logp.radius[..., 0], entropy.radius[..., 0]]),
        )
        return pair, dz / temperature

    return oracle


def within_the_bound(op, case):
    logits, tokens, dy, _ = make(case)
    for dtype in checks.DTYPES:
        checks.inside(both(op, tokens, case[4]), oracle_for(tokens, case[4]), [logits], dy, dtype)
    for layout in checks.LAYOUTS:
        placed = layout(tokens) if tokens.ndim else tokens
        checks.inside(both(op, placed, case[4]), oracle_for(tokens, case[4]), [logits], dy, np.float32, layout)


def gradients(op, case):
    logits, tokens, _, rng = make(case)
    if case[3] == "normal" and logits.size:
        check_vjp(both(op, tokens, case[4]), logits, rng=rng)


def torch_agrees(op, case):
    logits, tokens, dy, _ = make(case)
    if not logits.size:
        return
    leaf = torch.tensor(logits, requires_grad=True)
    distribution = torch.distributions.Categorical(logits=leaf / case[4])
    expected = torch.stack([distribution.log_prob(torch.tensor(tokens)), distribution.entropy()])
    expected.backward(torch.tensor(dy))
    pair, vjp = op(logits, tokens, case[4])
    value, slope = oracle_for(tokens, case[4])(np.float64, dy, logits)
    assert (np.abs(np.stack(pair) - expected.detach().numpy()) <= 2 * value.radius).all()
    assert (np.abs(vjp(*dy) - leaf.grad.numpy()) <= 4 * slope.radius).all()


def the_entropy_may_be_left_out(op, case):
    logits, tokens, dy, _ = make(case)
    _, vjp = op(logits, tokens, case[4])
    checks.same_bits(vjp(dy[0]) + 0.0, vjp(dy[0], 0 * dy[1]) + 0.0, "dlogits")


def uniform_is_the_most_undecided(op, case):
    """log V, and −log V for every token; probabilities add up to 1; entropies between 0 and log V."""
    logits, tokens, _, _ = make(case)
    vocab = logits.shape[-1]
    (logp, entropy), _ = op(0 * logits + 3, tokens, case[4])
    assert (np.abs(logp + math.log(vocab)) <= 1e-14 * (1 + math.log(vocab))).all()
    assert (np.abs(entropy - math.log(vocab)) <= 1e-14 * (1 + vocab)).all()
    total = sum(np.exp(op(logits, np.full_like(tokens, v), case[4])[0][0]) for v in range(vocab))
    assert (np.abs(total - 1) <= 1e-12).all()
    (_, entropy), _ = op(logits, tokens, case[4])
    assert ((entropy >= -1e-15) & (entropy <= math.log(vocab) + 1e-14 * (1 + vocab))).all()


def changes_nothing(op, case):
    logits, tokens, dy, _ = make(case)
    kept = dy.copy()
    checks.pure(both(op, tokens, case[4]), [logits], dy)
    op(logits, tokens, case[4])[1](*dy)
    checks.same_bits(dy, kept, "the cotangent")


def refuses_tokens_outside(op, case):
    logits, tokens, _, _ = make(case)
    for token in (-1, -100, logits.shape[-1]) if tokens.size else ():
        wrong = tokens.copy()
        wrong.reshape(-1)[-1] = token
        try:
            op(logits, wrong if tokens.ndim else np.array(token), case[4])
        except ValueError:
            continue
        raise AssertionError(f"token {token} was accepted")


TOKEN_PROPERTIES = (
    within_the_bound,
    gradients,
    torch_agrees,
    the_entropy_may_be_left_out,
    uniform_is_the_most_undecided,
    changes_nothing,
    refuses_tokens_outside,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", TOKEN_PROPERTIES)
def test_token_log_probs(holds, case):
    holds(token_log_probs, case)


def entropy_cotangent_needed(logits, tokens, temperature=1.0):
    pair, vjp = token_log_probs(logits, tokens, temperature)
    return pair, lambda dlogp, dentropy=None: vjp(dlogp, dlogp if dentropy is None else dentropy)


def test_token_log_probs_kill_matrix():
    checks.kill_matrix(TOKEN_PROPERTIES, (*wrong_logprobs.TOKEN, entropy_cotangent_needed), CASES)


def test_a_token_outside_is_named():
    with pytest.raises(ValueError, match=r"^tokens span -1\.\.3, needed 0\.\.2$"):
        token_log_probs(np.zeros((2, 3)), np.array([3, -1]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match=r"^temperature is .*, needed a positive number$"):
        token_log_probs(np.zeros((1, 3)), np.zeros(1, int), temperature)


# --- through the output matrix ----------------------------------------------------------------------------------------

VOCAB, D = 7, 5
LINEAR_CASES = [
    (1, 5, "array", 1.0),
    (2, 6, "lora", 0.7),
    (3, 4, "frozen", 1.0),
    (4, 0, "array", 1.0),
    (5, 1, "lora", 2.0),
]


def linear_case(case):
    seed, rows, _, _ = case
    rng = np.random.default_rng(seed)
    x, W, A, B = (rng.standard_normal(shape) for shape in ((rows, D), (VOCAB, D), (2, D), (VOCAB, 2)))
    return x, (W, A, B), rng.integers(0, VOCAB, rows), rng


def on_arrays(op, case, parts, tokens):
    """(x, *arrays that learn) -> both outputs as one array, vjp -> dx, *their cotangents; two rows at a time."""
    kind, temperature = case[2:]

    def run(x, *arrays):
        W, A, B = {"array": (*arrays, *parts[1:]), "frozen": parts, "lora": (parts[0], *arrays)}[kind]
        weight = {"array": W, "frozen": Frozen(W), "lora": LoRA(Frozen(W), A, B, 3)}[kind]
        with patch.object(losses, "ROWS", 2):
            pair, vjp = op(x, weight, tokens, temperature)

        def flat(dy):
            with patch.object(losses, "ROWS", 2):
                dx, dweight = vjp(dy[0], dy[1])
            if kind == "frozen":
                assert dweight is None
                return dx
            return (dx, dweight) if kind == "array" else (dx, dweight[A_NAME], dweight[B_NAME])

        return np.stack(pair), flat

    return run


def learned(case, parts):
    return {"array": parts[:1], "frozen": (), "lora": parts[1:]}[case[2]]


def all_at_once(x, weight, tokens, temperature=1.0):
    logits, linear_vjp = linear(x, weight)
    pair, vjp = token_log_probs(logits, tokens, temperature)
    return pair, lambda dlogp, dentropy=None: linear_vjp(vjp(dlogp, dentropy))[:2]


def the_same_as_from_all_logits(op, case):
    x, parts, tokens, rng = linear_case(case)
    found, vjp = on_arrays(op, case, parts, tokens)(x, *learned(case, parts))
    expected, expected_vjp = on_arrays(all_at_once, case, parts, tokens)(x, *learned(case, parts))
    dy = rng.standard_normal(found.shape)
    pairs = zip((found, *checks.tuple_of(vjp(dy))), (expected, *checks.tuple_of(expected_vjp(dy))), strict=True)
    for a, b in pairs:
        assert (np.abs(a - b) <= 1e-13 * (1 + np.abs(b).max(initial=0))).all()


def linear_gradients(op, case):
    x, parts, tokens, rng = linear_case(case)
    if len(x):
        check_vjp(on_arrays(op, case, parts, tokens), x, *learned(case, parts), rng=rng, directions=1)


LINEAR_PROPERTIES = (the_same_as_from_all_logits, linear_gradients)


@pytest.mark.parametrize("case", LINEAR_CASES)
@pytest.mark.parametrize("holds", LINEAR_PROPERTIES)
def test_linear_token_log_probs(holds, case):
    holds(linear_token_log_probs, case)


def test_linear_token_log_probs_kill_matrix():
    checks.kill_matrix(LINEAR_PROPERTIES, wrong_logprobs.LINEAR, LINEAR_CASES)


def test_the_logits_never_exist_all_at_once(rng):
    """300 rows, ten at a time: a handful of arrays of ten rows in each pass, and nothing of that size in between."""
    x, tokens = rng.standard_normal((300, 4), np.float32), rng.integers(0, 8000, 300)
    weight = Frozen(rng.standard_normal((8000, 4), np.float32))
    chunk, cotangent = 10 * 8000 * 4, rng.standard_normal(300, np.float32)
    with patch.object(losses, "ROWS", 10):
        linear_token_log_probs(x[:20], weight, tokens[:20])[1](cotangent[:20], cotangent[:20])
        tracemalloc.start()
        (logp, _), vjp = linear_token_log_probs(x, weight, tokens)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        vjp(cotangent, cotangent)
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert logp.dtype == np.float32
    assert kept < chunk / 2
    assert peak < 10 * chunk  # 300 rows of one array alone would be 30


# --- text -------------------------------------------------------------------------------------------------------------

HIDDEN = np.random.default_rng(8).standard_normal((4, 9, CONFIG.hidden_size))
OUTPUT = np.random.default_rng(9).standard_normal((CONFIG.vocab_size, CONFIG.hidden_size))


def stands_at_its_token(op, case):
    """Token by token from softmax in Python: logp[b, t] is read off hidden state t − 1; 0 where nothing counts."""
    batch = small_policy.batch(seed=case)
    (logp, entropy), _ = op(HIDDEN, OUTPUT, batch, 0.7)
    for b, t in np.ndindex(batch.tokens.shape):
        if batch.labels[b, t] == -100:
            assert logp[b, t] == entropy[b, t] == 0, f"row {b}, token {t} does not count"
            continue
        z = (OUTPUT @ HIDDEN[b, t - 1] / 0.7).tolist()
        log_total = math.log(math.fsum(math.exp(v) for v in z))
        assert abs(logp[b, t] - (z[batch.tokens[b, t]] - log_total)) <= 1e-12
        assert abs(entropy[b, t] - math.fsum(math.exp(v - log_total) * (log_total - v) for v in z)) <= 1e-12


def answer_gradients(op, case):
    batch, rng = small_policy.batch(seed=case), np.random.default_rng(case)

    def run(hidden, weight):
        pair, vjp = op(hidden, weight, batch, 0.7)
        return np.stack(pair), lambda dy: vjp(dy[0], dy[1])

    check_vjp(run, HIDDEN, OUTPUT, rng=rng, directions=1)


def cotangents_outside_do_not_matter(op, case):
    batch, rng = small_policy.batch(seed=case), np.random.default_rng(case)
    _, vjp = op(HIDDEN, OUTPUT, batch)
    dlogp, dentropy = rng.standard_normal((2, *batch.tokens.shape))
    outside = batch.labels == -100
    for a, b in zip(vjp(dlogp, dentropy), vjp(*(np.where(outside, np.nan, d) for d in (dlogp, dentropy))), strict=True):
        checks.same_bits(b, a, "cotangent")


ANSWER_PROPERTIES = (stands_at_its_token, answer_gradients, cotangents_outside_do_not_matter)


@pytest.mark.parametrize("holds", ANSWER_PROPERTIES)
def test_at_answers(holds):
    for case in (3, 4):
        holds(at_answers, case)


def wrong_slope(hidden, weight, batch, temperature=1.0):
    pair, vjp = at_answers(hidden, weight, batch, temperature)
    return pair, lambda dlogp, dentropy: vjp(-dlogp, dentropy)


def test_at_answers_kill_matrix():
    checks.kill_matrix(ANSWER_PROPERTIES, (*wrong_logprobs.ANSWERS, wrong_slope), [3, 4])


@pytest.mark.parametrize("kind", small_policy.KINDS)
def test_sequence_log_probs_of_a_model(kind):
    """Against `llama.forward` and all logits; gradients of everything that learns, and of nothing else."""
    params, batch = small_policy.params(kind), small_policy.batch()
    (logp, entropy), _ = sequence_log_probs(params, batch, CONFIG, temperature=0.7)
    logits, _ = llama.forward(params, batch.tokens, CONFIG)
    (expected, undecided), _ = token_log_probs(logits[:, :-1], batch.tokens[:, 1:], 0.7)
    mask = batch.labels[:, 1:] != -100
    slack = 1e-5 if kind == "qlora" else 1e-12  # its base is float32
    assert np.abs(logp[:, 1:] - np.where(mask, expected, 0)).max() <= slack
    assert np.abs(entropy[:, 1:] - np.where(mask, undecided, 0)).max() <= slack
    assert not logp[:, 0].any()

    def run(p):
        pair, vjp = sequence_log_probs(p, batch, CONFIG, temperature=0.7)
        return np.stack(pair), lambda dy: vjp(dy[0], dy[1])

    if kind != "qlora":
        check_gradients(run, params, rng=np.random.default_rng(0))


def test_what_fills_a_row_up_does_not_matter():
    params, batch = small_policy.params(), small_policy.batch()
    expected, vjp = sequence_log_probs(params, batch, CONFIG)
    found, other_vjp = sequence_log_probs(params, small_policy.other_padding(batch), CONFIG)
    checks.same_bits(np.stack(found), np.stack(expected), "other padding")
    dy = np.random.default_rng(0).standard_normal((2, *batch.tokens.shape))
    gradients, others = vjp(*dy), other_vjp(*dy)
    for name, gradient in gradients.items():
        checks.same_bits(others[name], gradient, name)
    found, _ = sequence_log_probs(params, small_policy.wider(batch), CONFIG)
    assert np.abs(np.stack(found)[:, :, : batch.tokens.shape[1]] - np.stack(expected)).max() <= 1e-13
    for row in range(len(batch)):
        alone = batch.take(np.array([row])).cut(int(batch.lengths[row]))
        (logp, _), _ = sequence_log_probs(params, alone, CONFIG)
        assert np.abs(logp[0] - expected[0][row, : batch.lengths[row]]).max() <= 1e-13


def test_recomputation_changes_no_bit():
    params, batch = small_policy.params(), small_policy.batch()
    (a, _), a_vjp = sequence_log_probs(params, batch, CONFIG)
    (b, _), b_vjp = sequence_log_probs(params, batch, CONFIG, recompute=True)
    checks.same_bits(b, a, "logp")
    for name, gradient in a_vjp(a, None).items():
        checks.same_bits(b_vjp(a, None)[name], gradient, name)


def test_answer_mask():
    found = answer_mask(np.array([1, 2]), np.array([3, 4]), 5)
    assert found.astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    for prompt, end in ((0, 2), (2, 2), (3, 2), (1, 6)):
        with pytest.raises(
            ValueError,
            match=f"^row 1 of 5 tokens has a prompt of {prompt} and ends at {end}: needed 1 ≤ prompt < end ≤ width$",
        ):
            answer_mask(np.array([1, prompt]), np.array([5, end]), 5)


def test_the_first_token_never_counts():
    batch = small_policy.batch()
    labels = batch.tokens.copy()
    assert not logprobs.counts(type(batch)(batch.tokens, labels, batch.lengths))[:, 0].any()
