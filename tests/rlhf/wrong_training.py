"""The trainings, wrong in the ways they have been wrong: a round's updates, and the rounds themselves.

A wrong round is the right one with one of its parts exchanged, so what is here is what differs.
"""

import itertools
from unittest.mock import patch

import numpy as np

from minift.peft import lora
from minift.rlhf import actor_critic, ppo, training
from minift.rlhf.advantages import whiten
from nn.wrong_nn import variants


def _updates(
    fresh,
    config,
    of_ppo,
    update,
    seed,
    *,
    old="of the writing",
    order="of the epoch",
    takes="each once",
    stops="above the target",
    temperature="of the sampling",
    whitens=False,
    epochs=0,
):
    seen = []

    def loss(params, part, normalizer, key):
        tau = of_ppo.temperature if temperature == "of the sampling" else 1.0
        outputs, forward_vjp = actor_critic.forward(params, part.batch, config, temperature=tau)
        old_logp = {"of the writing": part.old_logp, "of now": outputs[0], "none": 0 * part.old_logp}[old]
        advantages = whiten(part.advantages, part.mask) if whitens else part.advantages
        seen.append(ppo.statistics(outputs[0], old_logp, advantages, part.mask, of_ppo.cliprange) | {"entropy": 0.0})
        given = old_logp, part.old_values, advantages, part.returns, part.mask
        value, ppo_vjp = ppo.minibatch_loss(*outputs, *given, of_ppo, normalizer)
        return value, lambda dloss: forward_vjp(*ppo_vjp(dloss))

    for epoch in range(of_ppo.num_ppo_epochs + epochs):
        rng = np.random.default_rng([*seed, epoch] if order == "of the epoch" else seed)
        rows = rng.permutation(len(fresh)) if of_ppo.num_mini_batches > 1 else np.arange(len(fresh))
        if takes == "with replacement":
            rows = rng.integers(0, len(fresh), len(fresh))
        parts = np.array_split(rows, of_ppo.num_mini_batches)
        for part in parts[1:] if takes == "not the first" and len(parts) > 1 else parts:
            record = update(loss, [fresh.take(part)], 0)
            seen[-1] |= record
            far = ppo.too_far(seen[-1]["approx_kl"], of_ppo.target_kl)
            if far if stops == "above the target" else stops == "below it" and not far:
                return seen
    return seen


UPDATES = variants(
    _updates,
    old=("of now", "none"),
    order="always the same",
    takes=("with replacement", "not the first"),
    stops=("below it", "never"),
    temperature="1",
    whitens=True,
    epochs=(1, -1),
)


# --- rounds -----------------------------------------------------------------------------------------------------------


def _sample(change):
    right = training.sample
    return patch.object(training, "sample", lambda *a, **options: right(*a, **options | change(options)))


def _assess(change):
    right = actor_critic.assess

    def wrong(params, batch, scores, config, settings, **options):
        scores, options = change(scores, options)
        return right(params, batch, scores, config, settings, **options)

    return patch.object(actor_critic, "assess", wrong)


def _begins_a_round_early():
    right = training.run

    def wrong(params, advance, settings, **options):
        late = 1 if options.get("resume") else 0
        return right(params, lambda step, *rest: advance(step - late, *rest), settings, **options)

    return patch.object(training, "run", wrong)


def _follows():
    """The reference is the policy as it is now: what was learned in a round costs nothing in the next one."""
    return patch.object(actor_critic.lora, "bare", lora.merge)


def _standardized(scores):
    return ((scores - scores.mean()) / (scores.std() or 1)).astype(scores.dtype)


_calls = itertools.count()

ROUNDS = {
    "the same answers every round": lambda: _sample(lambda o: {"seed": (0,)}),
    "answers that nobody can have again": lambda: _sample(lambda o: {"seed": (next(_calls),)}),
    "answers at temperature 1": lambda: _sample(lambda o: {"temperature": 1.0}),
    "a resumed run repeats a round": _begins_a_round_early,
    "the leash is never steered": lambda: patch.object(training, "_kl_coef", lambda records, s, n: s.kl_coef),
    "the leash is steered and not used": lambda: _assess(lambda s, o: (s, o | {"kl_coef": None})),
    "the reference follows the policy": _follows,
    "each round is its own scale": lambda: _assess(lambda s, o: (_standardized(s), o)),
    "who came to an end is forgotten": lambda: _assess(lambda s, o: (s, o | {"ended": np.ones_like(o["ended"])})),
    "the fine for not ending is forgotten": lambda: _assess(lambda s, o: (s, o | {"ended": None})),
}
