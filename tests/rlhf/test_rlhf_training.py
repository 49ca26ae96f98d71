"""The trainings: pairs that do not leak, rounds whose first ratio is 1, padding that says nothing, and resuming."""

import dataclasses
import os
import signal

import numpy as np
import pytest

from minift.data.comparisons import Comparison
from minift.data.example import Message
from minift.io import load_model, load_tokenizer
from minift.models import llama
from minift.nn.weight import replace, trainable
from minift.peft import lora
from minift.rlhf import actor_critic, ppo, training
from minift.rlhf.measure import best_of, measure, standard_error
from minift.rlhf.rollouts import sample, scored_by_function
from minift.train import checkpoint
from minift.train.loop import Settings

PROMPTS = [
    (Message("user", f"What does `{name}` do?"),) for name in ("os.remove", "re.compile", "json.load", "math.sqrt")
]
SHORT = scored_by_function(lambda prompt, answer: -float(len(answer)))
SETTINGS = Settings(steps=3, learning_rate=0.02, schedule="constant", warmup_steps=0, save_every=1, eval_every=2)
OF_PPO = ppo.Settings(num_ppo_epochs=2, vf_coef=0.3, entropy_coef=0.01, kl_coef=0.1, kl_target=1.0, kl_horizon=20)


@pytest.fixture(scope="module")
def model():
    config, params = load_model("tiny")
    return config, params, load_tokenizer("tiny")


def policy(model, seed=0):
    """An adapter and a value head that have learned something already."""
    rng = np.random.default_rng(seed)
    attached = lora.attach(model[1], ["q_proj", "down_proj"], r=2, lora_alpha=4, rng=rng)
    carried = actor_critic.with_value_head(attached)
    moved = {n: a + 0.02 * rng.standard_normal(a.shape).astype(a.dtype) for n, a in trainable(carried).items()}
    return replace(carried, moved)


def optimize(model, settings=SETTINGS, of_ppo=OF_PPO, **options):
    config, _, tokenizer = model
    rewards = {"reward": -20.0, "reward_std": 5.0}
    chosen = {"evaluate": lambda step, params: rewards, "batch_size": 6, "max_new_tokens": 7} | options
    return training.train_ppo(policy(model), PROMPTS, SHORT, config, tokenizer, settings, of_ppo, **chosen)


def same_bits(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


# --- a round of PPO ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(model):
    config, _, tokenizer = model
    carried = policy(model)
    said = sample(
        {n: w for n, w in carried.items() if n != actor_critic.VALUE}, PROMPTS, config, tokenizer, max_new_tokens=9
    )
    scores = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    return carried, said, actor_critic.assess(carried, said.batch, scores, config, OF_PPO)[0]


def gradients_of(fresh_rollouts, carried, config, of_ppo=OF_PPO):
    """What `updates` asks the optimizer for at its first call, without a step, and what it saw."""
    asked = []

    def update(loss, micro_batches, key):
        value, vjp = loss(carried, micro_batches[0], float(micro_batches[0].count), key)
        asked.append((float(value), vjp(1.0)))
        return {}

    seen = training.updates(fresh_rollouts, config, of_ppo, update, (0, 1))
    return asked, seen


def test_the_first_ratio_is_exactly_one(fresh, model):
    carried, _, rollouts = fresh
    asked, seen = gradients_of(rollouts, carried, model[0])
    assert len(asked) == OF_PPO.num_ppo_epochs
    assert seen[0]["ratio"] == 1.0 and seen[0]["approx_kl"] == 0.0 and seen[0]["clipfrac"] == 0.0
    (logp, _, _), _ = actor_critic.forward(carried, rollouts.batch, model[0])
    assert np.array_equal(logp, rollouts.old_logp)
    moved = replace(carried, {n: a * 1.01 for n, a in trainable(carried).items()})
    assert gradients_of(rollouts, moved, model[0])[1][0]["ratio"] != 1.0  # or it would be no test


def test_poison_where_nothing_counts_changes_nothing(fresh, model):
    carried, _, rollouts = fresh
    outside = ~rollouts.mask
    padding = np.arange(outside.shape[1]) >= rollouts.lengths[:, None]
    assert padding.any() and (outside & ~padding).any()

    def poisoned(array):
        return np.where(outside, np.where(np.arange(array.shape[1]) % 2, 1e6, np.nan), array).astype(array.dtype)

    batch = dataclasses.replace(rollouts.batch, tokens=np.where(padding, 777, rollouts.batch.tokens))
    names = ("old_logp", "old_values", "advantages", "returns")
    other = dataclasses.replace(rollouts, batch=batch, **{n: poisoned(getattr(rollouts, n)) for n in names})
    ((value, gradients), *_), _ = gradients_of(rollouts, carried, model[0])
    ((value_too, gradients_too), *_), _ = gradients_of(other, carried, model[0])
    assert value == value_too and same_bits(gradients, gradients_too)
    assert max(np.abs(g).max() for g in gradients.values()) > 0


def test_minibatches_hold_each_answer_once_an_epoch(fresh, model):
    carried, said, rollouts = fresh
    counted = []

    def update(loss, micro_batches, key):
        (part,) = micro_batches
        loss(carried, part, 1.0, key)
        counted.append(sorted(tuple(row) for row in part.batch.tokens.tolist()))
        return {}

    of_ppo = dataclasses.replace(OF_PPO, num_mini_batches=2, num_ppo_epochs=3)
    training.updates(rollouts, model[0], of_ppo, update, (0, 1))
    whole = sorted(tuple(row) for row in said.batch.tokens.tolist())
    assert [len(rows) for rows in counted] == [2] * 6
    assert all(sorted(counted[i] + counted[i + 1]) == whole for i in (0, 2, 4))


def test_a_round_ends_when_the_policy_has_gone_too_far(model):
    whole = optimize(model).records
    early = optimize(model, of_ppo=dataclasses.replace(OF_PPO, num_ppo_epochs=6, target_kl=1e-4)).records
    assert [r["updates"] for r in whole if "updates" in r] == [2, 2, 2]
    assert all(2 <= r["updates"] < 6 for r in early if "updates" in r)


def test_the_leash_is_steered_by_what_was_recorded(model):
    rounds = [r for r in optimize(model).records if "kl_coef" in r]
    expected = OF_PPO.kl_coef
    for record in rounds:
        assert record["kl_coef"] == expected
        expected = ppo.next_kl_coef(expected, record["kl"], 6, OF_PPO.kl_target, OF_PPO.kl_horizon)
    assert len({r["kl_coef"] for r in rounds}) == 3


def test_stopped_and_resumed_is_uninterrupted(model, tmp_path):
    """With rounds that end early, so that the optimizer's steps are no multiple of the rounds."""
    of_ppo = dataclasses.replace(OF_PPO, num_ppo_epochs=4, target_kl=3e-3)

    def interrupt(record):
        if record["step"] == 2 and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    whole = optimize(model, of_ppo=of_ppo)
    cut = optimize(model, of_ppo=of_ppo, folder=tmp_path, report=interrupt)
    assert cut.interrupted and [r["step"] for r in cut.records if "kl" in r] == [1, 2]
    resumed = optimize(model, of_ppo=of_ppo, folder=tmp_path, resume=True)
    assert same_bits(trainable(whole.params), trainable(resumed.params))
    assert whole.records == resumed.records
    saved = checkpoint.SafetensorsFile(tmp_path / checkpoint.NAME).metadata["minift"]
    assert f'"updates": {sum(r.get("updates", 0) for r in whole.records)}' in saved


def test_ppo_learns_to_be_short(model):
    """The reward falls with each character; nothing else is asked for."""
    settings = dataclasses.replace(SETTINGS, steps=9, learning_rate=0.01)
    free = ppo.Settings(num_ppo_epochs=2, kl_coef=0.0)
    rounds = [r for r in optimize(model, settings, free, batch_size=16, max_new_tokens=10).records if "kl" in r]
    first, last = (np.mean([r["reward"] for r in part]) for part in (rounds[:3], rounds[-3:]))
    assert last > first + 5, (first, last)  # characters


# --- comparisons ------------------------------------------------------------------------------------------------------


def comparisons(n=24):
    """The chosen answer is about peace, the rejected one about war; some are ties."""
    prompts = [(Message("user", f"Question {i // 2}?"),) for i in range(n)]
    chosen, rejected = "A quiet day.", "War and noise!"
    return [Comparison(p, f"{chosen} {i}", f"{rejected} {i}", tie=i % 8 == 7) for i, p in enumerate(prompts)]


def test_questions_are_on_one_side_and_ties_on_none():
    learned, held_out = training.split(comparisons(), 0.25, seed=3)
    assert not {c.question for c in learned} & {c.question for c in held_out}
    assert len(learned) + len(held_out) == 21 and len({c.question for c in held_out}) == 3
    assert not any(c.tie for c in learned + held_out)
    assert training.split(comparisons(), 0.25, seed=3) == (learned, held_out)
    with pytest.raises(ValueError, match="2 comparisons that are no ties, of 1 questions"):
        training.split(comparisons()[:2])


def test_pairs_keep_their_sides_through_every_batch(model):
    _, _, tokenizer = model
    pairs = training.as_pairs(comparisons()[:7], tokenizer)
    (batch,) = training.pair_batches(pairs, 5, seed=2)(3)
    texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(batch.batch.tokens, batch.batch.lengths, strict=True)]
    assert len(texts) == 10 and all("quiet" in t for t in texts[0::2]) and all("War" in t for t in texts[1::2])
    assert batch.batch.tokens.shape[1] == batch.lengths.max()
    assert sum(map(len, training.in_parts(pairs, 3))) == 7


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_comparisons_are_learned(model, kind):
    config, params, tokenizer = model
    rng = np.random.default_rng(0)
    learned, held_out = (training.as_pairs(part, tokenizer) for part in training.split(comparisons(), 0.25))
    settings = Settings(steps=12, learning_rate=3e-3, warmup_steps=2, eval_every=12)
    if kind == "reward":
        start = training.with_score_head(params, None, rng, r=4)
        result = training.train_reward_model(start, learned, held_out, config, settings, batch_size=8)
        chosen, rejected = training.scores_of(result.params, held_out, config)
        assert (chosen > rejected).mean() > 0.9
    else:
        start = lora.attach(params, r=4, rng=rng)
        result = training.train_dpo(start, learned, held_out, config, settings, batch_size=8)
        assert abs(result.losses()[0][1] - np.log(2)) < 1e-4
    assert result.losses()[-1][1] < 0.5


def test_a_reward_model_goes_on_learning_the_adapter_of_the_policy(model):
    _, params, _ = model
    adapter = lora.detach({n: w for n, w in policy(model).items() if n != actor_critic.VALUE})[1]
    headed = training.with_score_head(params, adapter, np.random.default_rng(0), r=3)
    learned = trainable(headed)
    assert learned.keys() == {*adapter.arrays, "score.weight"}
    assert all(np.array_equal(learned[name], array) for name, array in adapter.arrays.items())


# --- what is measured -------------------------------------------------------------------------------------------------


def test_of_equal_policies_the_kl_is_zero_and_the_rest_is_counted(model):
    config, params, tokenizer = model
    found = measure(params, params, PROMPTS * 2, SHORT, config, tokenizer, max_new_tokens=5, seed=(4,))
    record = found.record()
    assert record["kl"] == 0 and 0 < record["distinct"] <= 1 and record["length"] <= 5
    assert record["reward"] == pytest.approx(-np.mean([len(t) for t in found.texts]))
    other = (Message("user", "Which rubric judges this?"),)
    assert np.isnan(measure(params, params, [other], SHORT, config, tokenizer, max_new_tokens=2).gold).all()


def test_kl_is_that_of_the_distribution_that_was_sampled(model):
    """Against log-probabilities from logits, one answer after the other, in float64."""
    config, _, tokenizer = model
    carried = {n: w for n, w in policy(model).items() if n != actor_critic.VALUE}
    tau, options = 0.5, {"max_new_tokens": 8, "seed": (4,)}
    found = measure(carried, lora.bare(carried), PROMPTS, SHORT, config, tokenizer, temperature=tau, **options)
    said = sample(llama.fuse(carried), PROMPTS, config, tokenizer, temperature=tau, **options)
    assert said.texts == found.texts
    for row, n in enumerate(said.batch.lengths):
        answer = np.nonzero(said.batch.labels[row] >= 0)[0]
        tokens, logp = said.batch.tokens[row : row + 1, :n], []
        for params in (carried, lora.bare(carried)):
            z = llama.forward(params, tokens, config)[0][0].astype(np.float64) / tau
            z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
            logp.append(z[answer - 1, tokens[0, answer]].sum())
        assert abs(found.kl[row] - (logp[0] - logp[1])) < 1e-4 and abs(found.kl[row]) > 1e-3


def test_best_of_n_chooses_the_highest_and_says_how_far_that_is():
    best, kl = best_of(np.array([[1.0, 5.0], [3.0, 2.0], [2.0, 4.0]]))
    assert best.tolist() == [1, 0] and kl == pytest.approx(np.log(3) - 2 / 3)
    assert best_of(np.ones((1, 4)))[1] == 0
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
