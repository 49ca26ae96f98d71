"""The model that PPO trains: its outputs, the first minibatch, and all of RLHF in the loop that trains everything."""

import dataclasses
import math

import numpy as np
import pytest
import small_policy
import wrong_actor_critic
from small_policy import CONFIG

from minift.conformance.gradients import check_gradients
from minift.models import llama
from minift.nn.weight import trainable
from minift.peft import lora
from minift.rlhf import actor_critic, dpo, ppo, reward_model
from minift.rlhf.actor_critic import VALUE, Rollouts, assess, forward, with_value_head
from minift.rlhf.logprobs import counts, sequence_log_probs
from minift.rlhf.pairs import Pairs
from minift.train.loop import Settings, fit
from minift.train.parallel import side_by_side
from nn import checks

SETTINGS = ppo.Settings(kl_coef=0.3, gamma=0.9, lam=0.8, temperature=0.7, entropy_coef=0.05, whiten_advantages=False)


def model(kind="lora", seed=1, **options):
    """A policy whose value head is not 0."""
    rng = np.random.default_rng(seed)
    return small_policy.params(kind, seed, **options) | {VALUE: rng.standard_normal((1, CONFIG.hidden_size))}


def value_is_read_in_front_of_its_token(op, case):
    params, batch = model("full", case), small_policy.batch(seed=case)
    (logp, entropy, values), _ = op(params, batch, CONFIG, temperature=0.7)
    expected, _ = sequence_log_probs({n: w for n, w in params.items() if n != VALUE}, batch, CONFIG, temperature=0.7)
    checks.same_bits(np.stack([logp, entropy]), np.stack(expected), "log-probabilities and entropies")
    hidden, _ = llama.backbone(params, batch.tokens, CONFIG)
    for b, t in np.ndindex(batch.tokens.shape):
        exact = math.fsum((hidden[b, t - 1] * params[VALUE][0]).tolist()) if batch.labels[b, t] != -100 else 0.0
        assert abs(values[b, t] - exact) <= 1e-12, f"row {b}, token {t}: {values[b, t]}, needed {exact}"


def right_gradients(op, case):
    batch = small_policy.batch(seed=case)

    def run(p):
        outputs, vjp = op(p, batch, CONFIG, temperature=0.7)
        return np.stack(outputs), lambda dy: vjp(*dy)

    check_gradients(run, model("full", case), rng=np.random.default_rng(case))


def padding_does_not_matter(op, case):
    params, batch = model("full", case), small_policy.batch(seed=case)
    outputs, vjp = op(params, batch, CONFIG)
    others, other_vjp = op(params, small_policy.other_padding(batch), CONFIG)
    checks.same_bits(np.stack(others), np.stack(outputs), "other padding")
    dy = np.random.default_rng(case).standard_normal((3, *batch.tokens.shape))
    poisoned = np.where(counts(batch), dy, np.nan)
    for name, gradient in vjp(*dy).items():
        checks.same_bits(other_vjp(*poisoned)[name], gradient, name)


def embeddings_of_padding_do_not_matter(op, case):
    """The token that fills rows up has an embedding of 1e6, and the output matrix is another one."""
    config, unused = dataclasses.replace(CONFIG, tie_word_embeddings=False), CONFIG.vocab_size - 1
    params, rng = model("full", case), np.random.default_rng(case)
    params |= {llama.HEAD: rng.standard_normal(params[llama.EMBEDDING].shape)}
    batch = small_policy.batch(seed=case)
    batch = dataclasses.replace(
        batch, tokens=batch.tokens % unused, labels=np.where(batch.labels < 0, -100, batch.labels % unused)
    )
    batch = small_policy.other_padding(batch, unused)
    embeddings = params[llama.EMBEDDING].copy()
    embeddings[unused] = 1e6
    dy = rng.standard_normal((3, *batch.tokens.shape))
    (outputs, vjp), (others, other_vjp) = (
        op(p, batch, config) for p in (params, params | {llama.EMBEDDING: embeddings})
    )
    checks.same_bits(np.stack(others), np.stack(outputs), "padding of 1e6")
    found, expected = other_vjp(*dy), vjp(*dy)
    for name in expected:
        checks.same_bits(found[name], expected[name], name)


FORWARD = (
    value_is_read_in_front_of_its_token,
    right_gradients,
    padding_does_not_matter,
    embeddings_of_padding_do_not_matter,
)


@pytest.mark.parametrize("holds", FORWARD)
def test_forward(holds):
    for case in (3, 4):
        holds(forward, case)


def test_forward_kill_matrix():
    def needs_nan_free_cotangents(params, batch, config, **options):
        outputs, vjp = forward(params, batch, config, **options)
        return outputs, lambda dlogp, dentropy, dvalues: vjp(dlogp, dentropy, dvalues * (dvalues.sum() * 0 + 1))

    checks.kill_matrix(FORWARD, (*wrong_actor_critic.FORWARD, needs_nan_free_cotangents), [3])


def test_a_fresh_value_head_is_zero_and_learns():
    params = with_value_head(small_policy.params("lora"))
    assert VALUE == "value.weight" and VALUE in trainable(params)  # its name in checkpoints
    (_, _, values), vjp = forward(params, small_policy.batch(), CONFIG)
    assert not values.any()
    zero = np.zeros_like(values)
    assert vjp(zero, None, np.ones_like(values))[VALUE].any()


# --- the loss ---------------------------------------------------------------------------------------------------------


def a_round(params):
    batch = small_policy.batch(rows=5)
    return assess(params, batch, np.random.default_rng(4).standard_normal(5), CONFIG, SETTINGS)[0]


def test_the_first_ratio_is_one_to_the_bit():
    """And the gradient of the first minibatch is that of −mean(Â log π) + c_v ½ mean(V − R)² − c_H mean H."""
    for kind in small_policy.KINDS:
        params = model(kind)
        rollouts = a_round(params)
        outputs, vjp = forward(params, rollouts.batch, CONFIG, temperature=0.7)
        mask = rollouts.mask
        checks.same_bits(ppo.ratio(outputs[0], rollouts.old_logp, mask), np.ones(mask.shape), "ρ")
        assert ppo.statistics(outputs[0], rollouts.old_logp, rollouts.advantages, mask)["approx_kl"] == 0
        _, loss_vjp = actor_critic.loss(params, rollouts, CONFIG, SETTINGS)
        n = float(mask.sum())
        expected = vjp(-rollouts.advantages / n, -0.05 * mask / n, 0.1 * (outputs[2] - rollouts.returns) / n)
        for name, gradient in loss_vjp(1.0).items():
            assert np.abs(gradient - expected[name]).max() <= (1e-5 if kind == "qlora" else 1e-13), name


def moved_on(rollouts):
    """The same answers as if an older policy had written them: ratios on all sides of the clip, values as well."""
    rng = np.random.default_rng(7)
    shift = rng.choice([-0.5, -0.1, 0.1, 0.5], rollouts.old_logp.shape)
    return dataclasses.replace(
        rollouts, old_logp=rollouts.old_logp + shift, old_values=rollouts.old_values + rng.permutation(shift, axis=1)
    )


def test_the_loss_of_a_model():
    params = model()
    rollouts = moved_on(a_round(params))
    value, _ = actor_critic.loss(params, rollouts, CONFIG, SETTINGS, 9.0)
    outputs, _ = forward(params, rollouts.batch, CONFIG, temperature=0.7)
    fixed = rollouts.old_logp, rollouts.old_values, rollouts.advantages, rollouts.returns, rollouts.mask
    checks.same_bits(value, ppo.minibatch_loss(*outputs, *fixed, SETTINGS, 9.0)[0], "loss")
    check_gradients(
        lambda p: actor_critic.loss(p, rollouts, CONFIG, SETTINGS, 9.0), params, rng=np.random.default_rng(0)
    )


def test_rollouts_come_apart_and_add_up():
    params = model()
    rollouts = moved_on(a_round(params))
    assert (len(rollouts), rollouts.count) == (5, int(counts(rollouts.batch).sum()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollouts.advantages = rollouts.returns
    whole, vjp = actor_critic.loss(params, rollouts, CONFIG, SETTINGS)
    parts = [rollouts.take(np.array(rows)) for rows in ([4, 1], [0, 3], [2])]
    parts = [part.cut(int(part.lengths.max())) for part in parts]
    assert sum(part.count for part in parts) == rollouts.count
    results = [actor_critic.loss(params, part, CONFIG, SETTINGS, float(rollouts.count)) for part in parts]
    assert abs(sum(value for value, _ in results) - whole) <= 1e-13 * (1 + abs(whole))
    gradients = [part_vjp(1.0) for _, part_vjp in results]
    for name, gradient in vjp(1.0).items():
        assert np.abs(sum(part[name] for part in gradients) - gradient).max() <= 1e-12, name


# --- the loop that trains everything ----------------------------------------------------------------------------------


def run(params, loss, batch, steps=12):
    """`fit`, two micro-batches a step and both cores: the same losses as from one batch on one."""
    rows = [np.arange(first, len(batch), 2) for first in (0, 1)]
    settings = Settings(steps=steps, learning_rate=0.03, warmup_steps=2, weight_decay=0.0, seed=3)
    result = fit(params, side_by_side(loss, 2), lambda step: [batch.take(part) for part in rows], settings)
    alone = fit(params, loss, lambda step: [batch], dataclasses.replace(settings, steps=2))
    for (_, a), (_, b) in zip(result.losses("loss"), alone.losses("loss"), strict=False):
        assert abs(a - b) <= 1e-4 * (1 + abs(a))
    return result


def test_the_loop_trains_a_reward_model():
    rng = np.random.default_rng(0)
    params = reward_model.with_head(small_policy.params("full"), rng)
    params = lora.attach(params, r=2, lora_alpha=4, rng=rng, modules_to_save=["score"])
    pairs = Pairs(small_policy.batch(rows=8))
    result = run(params, lambda p, batch, n, key: reward_model.loss(p, batch, CONFIG, n, key), pairs)
    rewards, _ = reward_model.score(result.params, pairs.batch, CONFIG)
    assert reward_model.accuracy(rewards[::2], rewards[1::2]) == 1.0
    assert result.losses("loss")[-1][1] < math.log(2) / 2


def test_the_loop_trains_with_dpo():
    params = small_policy.params("lora", moved=False)
    batch = small_policy.batch(rows=8)
    (reference,) = dpo.reference_log_probs(params, [batch], CONFIG)
    pairs = Pairs(batch, reference=reference.reshape(-1, 2))
    result = run(params, lambda p, part, n, key: dpo.loss(p, part, CONFIG, n, key, beta=0.5), pairs)
    logps, _ = dpo.answer_log_probs(result.params, batch, CONFIG)
    assert abs(result.losses("loss")[0][1] - math.log(2)) <= 1e-12
    assert dpo.statistics(logps.reshape(-1, 2), pairs.reference)["rewards/accuracies"] == 1.0


def test_the_loop_trains_with_ppo():
    """Answers with a good score become likelier than those with a bad one."""
    params = with_value_head(small_policy.params("lora", moved=False))
    batch, scores = small_policy.batch(rows=6), np.array([1.0, -1, 1, -1, 1, -1])
    settings = ppo.Settings(whiten_advantages=False)
    rollouts, _ = assess(params, batch, scores, CONFIG, settings)
    assert isinstance(rollouts, Rollouts)
    result = run(params, lambda p, part, n, key: actor_critic.loss(p, part, CONFIG, settings, n), rollouts)
    (logp, _, _), _ = forward(result.params, batch, CONFIG)
    gained = (logp - rollouts.old_logp).sum(axis=1)
    assert gained[scores > 0].min() > gained[scores < 0].max()
    assert np.array_equal(lora.bare(result.params)[llama.EMBEDDING].array, lora.bare(params)[llama.EMBEDDING].array)
