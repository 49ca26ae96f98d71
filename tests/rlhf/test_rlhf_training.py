"""The trainings: pairs that do not leak, rounds whose first ratio is 1, padding that says nothing, and resuming."""

import dataclasses
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
import wrong_training

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
from nn import checks
from rounding import rounding_bound

PROMPTS = [
    (Message("user", f"What does `{name}` do?"),) for name in ("os.remove", "re.compile", "json.load", "math.sqrt")
]
SHORT = scored_by_function(lambda prompt, answer: -float(len(answer)))
SETTINGS = Settings(steps=3, learning_rate=0.02, schedule="constant", warmup_steps=0, save_every=1, eval_every=2)
OF_PPO = ppo.Settings(
    temperature=0.8, num_ppo_epochs=2, vf_coef=0.3, entropy_coef=0.01, kl_coef=0.1, kl_target=1.0, kl_horizon=20
)


@pytest.fixture(scope="module")
def model():
    config, params = load_model("tiny")
    return config, params, load_tokenizer("tiny")


@pytest.fixture(scope="module")
def small(model):
    """One narrow block with the built-in model's tokenizer: what is learned is nonsense, in a hundredth of the time."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = dataclasses.replace(model[0], **sizes, num_key_value_heads=1, head_dim=8)
    rng = np.random.default_rng(2)
    params = {n: (0.3 * rng.standard_normal(s)).astype(np.float32) for n, s in llama.shapes(config).items()}
    return config, params, model[2]


def policy(model, seed=0):
    """An adapter and a value head that have learned something already."""
    rng = np.random.default_rng(seed)
    attached = lora.attach(model[1], ["q_proj", "down_proj"], r=2, lora_alpha=4, rng=rng)
    carried = actor_critic.with_value_head(attached)
    size = 2.56 / model[0].hidden_size
    moved = {n: a + size * rng.standard_normal(a.shape).astype(a.dtype) for n, a in trainable(carried).items()}
    return replace(carried, moved)


def optimize(model, settings=SETTINGS, of_ppo=OF_PPO, prompts=PROMPTS, score=SHORT, **options):
    config, _, tokenizer = model
    rewards = {"reward": -20.0, "reward_std": 5.0}
    chosen = {"evaluate": lambda step, params: rewards, "batch_size": 6, "max_new_tokens": 7} | options
    return training.train_ppo(policy(model), prompts, score, config, tokenizer, settings, of_ppo, **chosen)


def same_bits(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


# --- a round of PPO ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(small):
    config, _, tokenizer = small
    carried = policy(small)
    said = sample(
        {n: w for n, w in carried.items() if n != actor_critic.VALUE}, PROMPTS, config, tokenizer, max_new_tokens=9
    )
    scores = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    return carried, said, actor_critic.assess(carried, said.batch, scores, config, OF_PPO)[0]


def gradients_of(fresh_rollouts, carried, config, of_ppo=OF_PPO, op=training.updates):
    """What `updates` asks the optimizer for at each call, without a step, and what it saw; the first gradient only."""
    asked = []

    def update(loss, micro_batches, key):
        value, vjp = loss(carried, micro_batches[0], float(micro_batches[0].count), key)
        asked.append((float(value), None if asked else vjp(1.0)))
        return {}

    seen = op(fresh_rollouts, config, of_ppo, update, (0, 1))
    return asked, seen


def the_first_ratio_is_exactly_one(op, case):
    (config, _, _), (carried, _, rollouts) = case
    asked, seen = gradients_of(rollouts, carried, config, op=op)
    assert len(asked) == len(seen) == OF_PPO.num_ppo_epochs
    assert seen[0]["ratio"] == 1.0 and seen[0]["approx_kl"] == 0.0 and seen[0]["clipfrac"] == 0.0
    (logp, _, _), _ = actor_critic.forward(carried, rollouts.batch, config, temperature=OF_PPO.temperature)
    assert np.array_equal(logp, rollouts.old_logp)
    moved = replace(carried, {n: a * 1.01 for n, a in trainable(carried).items()})
    assert gradients_of(rollouts, moved, config, op=op)[1][0]["ratio"] != 1.0, "the ratio is 1 whatever was learned"


def with_several_minibatches_it_is_one_within_rounding(op, case):
    """Of the first one of the first epoch, before anything is learned. The same rows in another rectangle are other
    sums: a log-probability is within twice the bound of the logits of its exact value, at each of the two times."""
    (config, _, _), (carried, _, rollouts) = case
    params = lora.merge({n: w for n, w in carried.items() if n != actor_critic.VALUE})
    bound, _ = rounding_bound(params, config, rollouts.batch.tokens)
    of_ppo = dataclasses.replace(OF_PPO, num_mini_batches=3)
    first = gradients_of(rollouts, carried, config, of_ppo, op)[1][0]
    slack = np.expm1(4 * bound / OF_PPO.temperature)
    assert slack < 1e-2 and abs(first["ratio"] - 1) <= slack and first["clipfrac"] == 0


def poison_where_nothing_counts_changes_nothing(op, case):
    (config, _, _), (carried, _, rollouts) = case
    outside = ~rollouts.mask
    padding = np.arange(outside.shape[1]) >= rollouts.lengths[:, None]
    assert padding.any() and (outside & ~padding).any()

    def poisoned(array):
        return np.where(outside, np.where(np.arange(array.shape[1]) % 2, 1e6, np.nan), array).astype(array.dtype)

    batch = dataclasses.replace(rollouts.batch, tokens=np.where(padding, 777, rollouts.batch.tokens))
    names = ("old_logp", "old_values", "advantages", "returns")
    other = dataclasses.replace(rollouts, batch=batch, **{n: poisoned(getattr(rollouts, n)) for n in names})
    ((value, gradients), *_), _ = gradients_of(rollouts, carried, config, op=op)
    ((value_too, gradients_too), *_), _ = gradients_of(other, carried, config, op=op)
    assert value == value_too and same_bits(gradients, gradients_too)
    assert max(np.abs(g).max() for g in gradients.values()) > 0


def the_first_gradient_is_that_of_the_loss(op, case):
    (config, _, _), (carried, _, rollouts) = case
    ((value, gradients), *_), _ = gradients_of(rollouts, carried, config, op=op)
    expected, vjp = actor_critic.loss(carried, rollouts, config, OF_PPO)
    assert value == float(expected) and same_bits(gradients, vjp(1.0))


def minibatches_hold_each_answer_once_an_epoch(op, case):
    """In another order every time."""
    (config, _, _), (carried, said, rollouts) = case
    counted = []

    def update(loss, micro_batches, key):
        (part,) = micro_batches
        loss(carried, part, 1.0, key)
        counted.append([tuple(row) for row in part.batch.tokens.tolist()])
        return {}

    of_ppo = dataclasses.replace(OF_PPO, num_mini_batches=2, num_ppo_epochs=3)
    op(rollouts, config, of_ppo, update, (0, 1))
    whole = sorted(tuple(row) for row in said.batch.tokens.tolist())
    assert [len(rows) for rows in counted] == [2] * 6
    assert all(sorted(counted[i] + counted[i + 1]) == whole for i in (0, 2, 4))
    assert len({str(counted[i]) for i in (0, 2, 4)}) > 1


def a_round_ends_when_the_policy_has_gone_too_far(op, case):
    """After the update that began above the target; the parameters move by a little at each."""
    (config, _, _), (carried, _, rollouts) = case

    def updates(target):
        current, seen_so_far = [carried], []

        def update(loss, micro_batches, key):
            loss(current[0], micro_batches[0], 1.0, key)
            current[0] = replace(current[0], {n: a * 1.05 for n, a in trainable(current[0]).items()})
            return {}

        of_ppo = dataclasses.replace(OF_PPO, num_ppo_epochs=5, target_kl=target)
        seen_so_far += op(rollouts, config, of_ppo, update, (0, 1))
        return [seen["approx_kl"] for seen in seen_so_far]

    far = updates(None)
    assert len(far) == 5 and far == sorted(far) and far[0] == 0 < far[1]
    between = (far[1] + far[2]) / 2
    assert updates(between) == far[:3]


UPDATES = (
    the_first_ratio_is_exactly_one,
    with_several_minibatches_it_is_one_within_rounding,
    poison_where_nothing_counts_changes_nothing,
    the_first_gradient_is_that_of_the_loss,
    minibatches_hold_each_answer_once_an_epoch,
    a_round_ends_when_the_policy_has_gone_too_far,
)


@pytest.mark.parametrize("holds", UPDATES)
def test_updates(holds, fresh, small):
    holds(training.updates, (small, fresh))


def nothing_is_left_out(fresh, config, of_ppo, update, seed):
    """Padding counts where it says it does not."""
    everything = dataclasses.replace(fresh.batch, labels=fresh.batch.tokens)
    return training.updates(dataclasses.replace(fresh, batch=everything), config, of_ppo, update, seed)


def test_updates_kill_matrix(fresh, small):
    checks.kill_matrix(UPDATES, (*wrong_training.UPDATES, nothing_is_left_out), [(small, fresh)])


# --- rounds -----------------------------------------------------------------------------------------------------------


def the_leash_is_steered_by_what_was_recorded(model):
    with patch.object(actor_critic, "token_rewards", wraps=actor_critic.token_rewards) as used:
        rounds = [r for r in optimize(model).records if "kl_coef" in r]
    expected = OF_PPO.kl_coef
    for record, call in zip(rounds, used.call_args_list, strict=True):
        assert record["kl_coef"] == call.args[3] == expected
        expected = ppo.next_kl_coef(expected, record["kl"], 6, OF_PPO.kl_target, OF_PPO.kl_horizon)
    assert len({r["kl_coef"] for r in rounds}) == 3


def stopped_and_resumed_is_uninterrupted(model):
    """With rounds that end early, so that the optimizer's steps are no multiple of the rounds."""
    of_ppo = dataclasses.replace(OF_PPO, num_ppo_epochs=4, target_kl=3e-3)

    def interrupt(record):
        if record["step"] == 2 and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    whole = optimize(model, of_ppo=of_ppo)
    with TemporaryDirectory() as name:
        folder = Path(name)
        cut = optimize(model, of_ppo=of_ppo, folder=folder, report=interrupt)
        assert cut.interrupted and [r["step"] for r in cut.records if "kl" in r] == [1, 2]
        resumed = optimize(model, of_ppo=of_ppo, folder=folder, resume=True)
        saved = checkpoint.SafetensorsFile(folder / checkpoint.NAME).metadata["minift"]
    assert same_bits(trainable(whole.params), trainable(resumed.params))
    assert whole.records == resumed.records
    assert f'"updates": {sum(r.get("updates", 0) for r in whole.records)}' in saved


def each_round_is_new_and_judged_on_the_scale_of_the_first(model):
    """A policy that learns nothing, asked one question: other answers each round, at the temperature that was asked
    for; scores (r + 20) / 5, as the record of step 0 says, unless that is switched off; and who was cut
    off."""
    said, of_ppo = [], dataclasses.replace(OF_PPO, temperature=0.6, missing_eos_penalty=0.5)

    def score(prompts, texts):
        said.append(texts)
        return SHORT(prompts, texts)

    frozen = dataclasses.replace(SETTINGS, learning_rate=0.0)
    with (
        patch.object(actor_critic, "token_rewards", wraps=actor_critic.token_rewards) as used,
        patch.object(llama, "stream", wraps=llama.stream) as streamed,
    ):
        optimize(model, frozen, of_ppo, prompts=PROMPTS[:1], score=score)
        optimize(model, dataclasses.replace(frozen, steps=1), of_ppo, score=score, normalize_rewards=False)
    assert len(said) == 4 == len(set(said))
    for i, (texts, call, sampled) in enumerate(zip(said, used.call_args_list, streamed.call_args_list, strict=True)):
        expected = np.array([(20 - len(text)) / 5 if i < 3 else -len(text) for text in texts], np.float32)
        assert np.abs(call.args[0] - expected).max() <= 1e-6
        assert call.kwargs["missing_eos_penalty"] == 0.5 and not call.kwargs["ended"].all()
        assert sampled.args[4] == 0.6


def the_reference_is_the_policy_at_its_beginning(model):
    """Without learning the KL of each answer is that between the adapter's model and the bare one."""
    frozen = dataclasses.replace(SETTINGS, learning_rate=0.0)
    rounds = [r for r in optimize(model, frozen).records if "kl" in r]
    assert all(abs(r["kl"]) > 1e-3 for r in rounds)


ROUNDS = (
    the_leash_is_steered_by_what_was_recorded,
    stopped_and_resumed_is_uninterrupted,
    each_round_is_new_and_judged_on_the_scale_of_the_first,
    the_reference_is_the_policy_at_its_beginning,
)


@pytest.mark.parametrize("holds", ROUNDS)
def test_rounds(holds, small):
    holds(small)


def test_rounds_kill_matrix(small):
    def under(wrong):
        def run(holds, _):
            with wrong():
                holds(small)

        return run

    wrong = [under(w) for w in wrong_training.ROUNDS.values()]
    for made, name in zip(wrong, wrong_training.ROUNDS, strict=True):
        made.__name__ = name
    properties = [lambda op, case, holds=holds: op(holds, case) for holds in ROUNDS]
    for made, holds in zip(properties, ROUNDS, strict=True):
        made.__name__ = holds.__name__
    checks.kill_matrix(properties, wrong, [None])


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
