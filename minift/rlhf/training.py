"""The three trainings of RLHF, on the loop that all methods share.

    reward model    comparisons          pairs, one update a step
    DPO             comparisons          the same pairs, another loss
    PPO             prompts and a score  a step is a round: answer, judge, then several updates on what was said

A round of PPO follows from (seed, round) and the parameters that it begins with, so a run that is killed between two
rounds and resumed ends in the same bits as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minift.data.batches import batch_indices
from minift.data.comparisons import Comparison
from minift.io import Tokenizer
from minift.models import llama
from minift.models.classifier import SCORE
from minift.nn.weight import Params, dense
from minift.peft import lora
from minift.peft.tuned import Tuned
from minift.rlhf import actor_critic, dpo, ppo, reward_model
from minift.rlhf.actor_critic import VALUE, Rollouts
from minift.rlhf.pairs import Pairs, pad_pairs
from minift.rlhf.rollouts import Prompt, Score, encoded, sample
from minift.train.loop import Record, Result, Settings, Update, at_least, fit, run
from minift.train.parallel import side_by_side

# --- comparisons ------------------------------------------------------------------------------------------------------


def split(
    comparisons: Sequence[Comparison], share: float = 0.1, seed: int = 0
) -> tuple[list[Comparison], list[Comparison]]:
    """(to learn from, held out), without ties, which say nothing; all comparisons of a question are on one side.

    ValueError where one of the two is empty."""
    said = [c for c in comparisons if not c.tie]
    questions = sorted({c.question for c in said})
    order = np.random.default_rng([seed, len(questions)]).permutation(len(questions))
    held_out = {questions[i] for i in order[: max(1, round(share * len(questions)))]}
    parts = [c for c in said if c.question not in held_out], [c for c in said if c.question in held_out]
    if not all(parts):
        raise ValueError(
            f"{len(said)} comparisons that are no ties, of {len(questions)} questions: "
            "needed two questions, one to learn from and one to measure on"
        )
    return parts


def as_pairs(comparisons: Sequence[Comparison], tokenizer: Tokenizer) -> Pairs:
    """All comparisons in one rectangle, to take batches from."""
    chosen, rejected = (
        [encoded(c.prompt, text(c), tokenizer) for c in comparisons]
        for text in (lambda c: c.chosen, lambda c: c.rejected)
    )
    margin = np.array([c.margin or 0.0 for c in comparisons], np.float32)
    return pad_pairs(chosen, rejected, margin=margin if margin.any() else None)


def pair_batches(pairs: Pairs, batch_size: int, seed: int) -> Callable[[int], list[Pairs]]:
    """The batch of each step, cut to its own longest row: a pure function of the step."""
    at_least(1, batch_size=batch_size)

    def batches(step: int) -> list[Pairs]:
        return [_cut(pairs.take(batch_indices(len(pairs), batch_size, seed, step - 1)))]

    return batches


def in_parts(pairs: Pairs, size: int = 64) -> list[Pairs]:
    """All of them, some at a time."""
    return [_cut(pairs.take(np.arange(i, min(i + size, len(pairs))))) for i in range(0, len(pairs), size)]


def _cut(pairs: Pairs) -> Pairs:
    return pairs.cut(int(pairs.lengths.max()))


# --- the reward model -------------------------------------------------------------------------------------------------


def with_score_head(params: Params, adapter: lora.Adapter | None, rng: np.random.Generator, r: int) -> dict[str, Any]:
    """A model that scores, ready to be trained: the adapter of the policy goes on learning, or a fresh one of rank r;
    and a score head, which learns in full."""
    headed = reward_model.with_head(params, rng)
    if adapter is None:
        return lora.attach(headed, r=r, lora_alpha=2 * r, rng=rng, modules_to_save=["score"])
    carried = lora.insert(headed, adapter)
    head = carried[SCORE]
    return carried | {SCORE: Tuned(head, dense(head).copy())}


def scores_of(params: Params, pairs: Pairs, config: llama.Config) -> tuple[np.ndarray, np.ndarray]:
    """(rewards of the chosen answers, of the rejected ones)."""
    rewards = [reward_model.score(params, part.batch, config, recompute=True)[0] for part in in_parts(pairs)]
    both = np.concatenate(rewards)
    return both[0::2], both[1::2]


def train_reward_model(
    params: Params,
    learned: Pairs,
    held_out: Pairs,
    config: llama.Config,
    settings: Settings,
    *,
    batch_size: int = 32,
    center: float = 0.0,
    **options: Any,
) -> Result:
    """`fit` with the pairwise loss. `options` are those of `fit`: folder, identity, resume, report."""

    def loss(params, pairs, normalizer, key):
        return reward_model.loss(params, pairs, config, normalizer, key, center=center)

    def evaluate(params):
        return float(reward_model.pairwise_loss(*scores_of(params, held_out, config), held_out.margin)[0])

    batches = pair_batches(learned, batch_size, settings.seed)
    return fit(params, side_by_side(loss), batches, settings, evaluate=evaluate, **options)


# --- DPO --------------------------------------------------------------------------------------------------------------


def with_reference(params: Params, pairs: Pairs, config: llama.Config, *, average: bool = False) -> Pairs:
    """The same pairs with the log-probabilities of the model without its adapter."""
    parts = [part.batch for part in in_parts(pairs)]
    reference = np.concatenate(dpo.reference_log_probs(params, parts, config, average=average))
    return Pairs(pairs.batch, pairs.margin, reference.reshape(-1, 2))


def train_dpo(
    params: Params,
    learned: Pairs,
    held_out: Pairs,
    config: llama.Config,
    settings: Settings,
    *,
    batch_size: int = 32,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: dpo.LossType = "sigmoid",
    **options: Any,
) -> Result:
    """`fit` with the loss of DPO; the reference is the policy with its adapter off, evaluated once beforehand."""
    chosen: dict[str, Any] = {"beta": beta, "label_smoothing": label_smoothing, "loss_type": loss_type}
    learned, held_out = (with_reference(params, p, config, average=loss_type == "ipo") for p in (learned, held_out))

    def loss(params, pairs, normalizer, key):
        return dpo.loss(params, pairs, config, normalizer, key, **chosen)

    def evaluate(params):
        frozen = lora.merge(params)
        parts = in_parts(held_out)
        return sum(float(dpo.loss(frozen, part, config, float(len(held_out)), **chosen)[0]) for part in parts)

    batches = pair_batches(learned, batch_size, settings.seed)
    return fit(params, side_by_side(loss), batches, settings, evaluate=evaluate, **options)


# --- PPO --------------------------------------------------------------------------------------------------------------


def train_ppo(
    params: Params,
    prompts: Sequence[Prompt],
    score: Score,
    config: llama.Config,
    tokenizer: Tokenizer,
    settings: Settings,
    of_ppo: ppo.Settings,
    *,
    evaluate: Callable[[int, Params], Record],
    batch_size: int = 128,
    max_new_tokens: int = 48,
    normalize_rewards: bool = True,
    **options: Any,
) -> Result:
    """`run` with a round of PPO a step: `batch_size` answers, then the updates that `of_ppo` asks for.

    `params` carry an adapter, which is off in the reference, and a value head. `evaluate` records at least "reward" and
    "reward_std" at step 0: scores are shifted and scaled so that the first policy's have mean 0 and variance 1, and a
    nat of KL costs the same whatever the reward's units are, unless `normalize_rewards` is off. An answer that was cut
    off is over, like any other: its length is part of the task. `options` are those of `run`. ValueError for rounds
    that `ppo.next_kl_coef` could not steer by."""
    ppo.next_kl_coef(of_ppo.kl_coef, 0.0, batch_size, of_ppo.kl_target, of_ppo.kl_horizon)  # complains now, if it will

    def advance(step: int, current: Params, records: Sequence[Record], update: Update) -> Record:
        asked = [prompts[i] for i in batch_indices(len(prompts), batch_size, settings.seed, step - 1)]
        policy = llama.fuse({name: weight for name, weight in current.items() if name != VALUE})
        chosen: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": of_ppo.temperature}
        said = sample(policy, asked, config, tokenizer, seed=(settings.seed, step), **chosen)
        rewards = score(asked, said.texts)
        shift, scale = (records[0]["reward"], records[0]["reward_std"] or 1.0) if normalize_rewards else (0.0, 1.0)
        scores = ((rewards - shift) / scale).astype(np.float32)
        kl_coef = _kl_coef(records, of_ppo, batch_size)
        fresh, kl = actor_critic.assess(current, said.batch, scores, config, of_ppo, kl_coef=kl_coef, ended=said.ended)
        seen = updates(fresh, config, of_ppo, update, (settings.seed, step))
        return seen[-1] | {
            "reward": float(rewards.mean()),
            "kl": float(kl.mean()),
            "kl_coef": kl_coef,
            "entropy": seen[0]["entropy"],
            "first_ratio": seen[0]["ratio"],
            "clipfrac": float(np.mean([s["clipfrac"] for s in seen])),
            "updates": len(seen),
            "length": float((said.batch.labels >= 0).sum(axis=1).mean()),
            "ended": float(said.ended.mean()),
            "distinct": len(set(said.texts)) / len(said),
        }

    return run(params, advance, settings, evaluate=evaluate, **options)


def updates(
    fresh: Rollouts, config: llama.Config, of_ppo: ppo.Settings, update: Update, seed: tuple[int, int]
) -> list[Record]:
    """The epochs of one round over its minibatches; what was seen at each update, before it. One that begins above
    target_kl is the last.

    With one minibatch its rows stay as they are, and the ratios of the first update are 1 to the bit. With several, the
    first one of the first epoch holds the same rows in another rectangle, so they are 1 within rounding."""
    seen: list[Record] = []

    def loss(params, part, normalizer, key):
        outputs, forward_vjp = actor_critic.forward(params, part.batch, config, temperature=of_ppo.temperature)
        logp, entropy, _ = outputs
        at = ppo.statistics(logp, part.old_logp, part.advantages, part.mask, of_ppo.cliprange)
        seen.append(at | {"entropy": float(entropy.sum() / part.count)})
        given = part.old_logp, part.old_values, part.advantages, part.returns, part.mask
        value, ppo_vjp = ppo.minibatch_loss(*outputs, *given, of_ppo, normalizer)
        return value, lambda dloss: forward_vjp(*ppo_vjp(dloss))

    for epoch in range(of_ppo.num_ppo_epochs):
        rows = np.arange(len(fresh))
        if of_ppo.num_mini_batches > 1:
            rows = np.random.default_rng([*seed, epoch]).permutation(rows)
        for part in np.array_split(rows, of_ppo.num_mini_batches):
            record = update(loss, [fresh.take(part)], 0)
            seen[-1] |= record
            if ppo.too_far(seen[-1]["approx_kl"], of_ppo.target_kl):
                return seen
    return seen


def _kl_coef(records: Sequence[Record], of_ppo: ppo.Settings, answers: int) -> float:
    """β of the next round: as it is set, or as the controller has moved it since the last one."""
    last = next((record for record in reversed(records) if "kl_coef" in record), None)
    if last is None:
        return of_ppo.kl_coef
    return ppo.next_kl_coef(last["kl_coef"], last["kl"], answers, of_ppo.kl_target, of_ppo.kl_horizon)
