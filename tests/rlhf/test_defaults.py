"""What one gets without asking: the defaults of the papers and of TRL, in one table."""

import inspect

import pytest

from minift.rlhf import actor_critic, advantages, dpo, grpo, logprobs, ppo, reward_model

DEFAULTS = {
    advantages.kl_penalty: {"estimator": "k1"},
    advantages.token_rewards: {"ended": None, "missing_eos_penalty": 0.0},
    advantages.gae_1: {"gamma": 1.0, "lam": 0.95, "bootstrap": None},
    advantages.gae_2: {"gamma": 1.0, "lam": 0.95, "bootstrap": None},
    advantages.whiten: {"shift_mean": True},
    logprobs.token_log_probs: {"temperature": 1.0},
    logprobs.linear_token_log_probs: {"temperature": 1.0},
    logprobs.at_answers: {"temperature": 1.0},
    logprobs.sequence_log_probs: {"temperature": 1.0, "dropout_key": None, "recompute": False},
    reward_model.score: {"dropout_key": None, "recompute": False},
    reward_model.loss: {"normalizer": None, "dropout_key": None, "center": 0.0},
    reward_model.normalization: {"scale": True},
    reward_model.calibration: {"bins": 5},
    ppo.policy_loss: {"cliprange": 0.2, "normalizer": None},
    ppo.value_loss: {"cliprange_value": 0.2, "normalizer": None},
    ppo.statistics: {"cliprange": 0.2},
    ppo.Settings: {
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "kl_target": None,
        "kl_horizon": 10_000,
        "cliprange": 0.2,
        "vf_coef": 0.1,
        "cliprange_value": 0.2,
        "entropy_coef": 0.0,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "whiten_advantages": True,
        "missing_eos_penalty": 0.0,
        "target_kl": None,
        "temperature": 1.0,
    },
    actor_critic.forward: {"temperature": 1.0, "dropout_key": None, "recompute": False},
    actor_critic.assess: {"kl_coef": None, "ended": None},
    actor_critic.loss: {"normalizer": None, "dropout_key": None},
    grpo.group_advantages: {"scale": True},
    grpo.loss: {"cliprange": 0.2, "beta": 0.04, "aggregation": "sequence", "normalizer": None},
    dpo.preference_loss: {"beta": 0.1, "label_smoothing": 0.0, "loss_type": "sigmoid", "normalizer": None},
    dpo.implicit_rewards: {"beta": 0.1},
    dpo.statistics: {"beta": 0.1},
    dpo.answer_log_probs: {"average": False, "dropout_key": None, "recompute": False},
    dpo.reference_log_probs: {"average": False},
    dpo.loss: {
        "normalizer": None,
        "dropout_key": None,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_type": "sigmoid",
    },
}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}")
def test_defaults(function):
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert found == DEFAULTS[function]
