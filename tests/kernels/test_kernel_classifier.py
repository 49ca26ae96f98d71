"""A head over classes in torch, on Llama and on BERT: the reference's draws, logits, features and gradients."""

import functools

import numpy as np
import pytest
import torch
from twin_models import Expected, agree, cast, kinds, survivors, tensor

from minift.models import bert, llama
from minift.models import classifier as reference
from minift.nn.weight import freeze
from minift_kernels.models import classifier
from minift_kernels.params import from_numpy, to_numpy
from wrong_kernels import wrong_models

CONFIGS = {
    "llama": llama.Config(31, 12, 20, 2, 4, 2, 4, rms_norm_eps=3e-3),
    "bert": bert.Config(31, 12, 20, 2, 3, 18, 3, layer_norm_eps=3e-3),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"]}
TOKENS = np.arange(27).reshape(3, 9) * 11 % 31
LENGTHS = np.array([9, 5, 1])


def trunk(name):
    rng = np.random.default_rng(3)
    shapes = (llama if name == "llama" else bert).shapes(CONFIGS[name])
    return {n: 0.5 * rng.standard_normal(s) for n, s in shapes.items()}


def model(name, kind):
    config = CONFIGS[name]
    headed = reference.with_head(trunk(name), config, 4, np.random.default_rng(2))
    if name == "bert":
        headed |= {reference.BIAS: np.array([0.3, -0.2, 0.1, 0.4])}
    learning = ("model.layers.1.", "bert.pooler", "score", "classifier")
    return kinds(TARGETS[name], reference.head_module(config), learning)[kind](headed)


@functools.cache
def logits(name, kind):
    config = CONFIGS[name]
    return Expected(lambda p: reference.logits(p, TOKENS, LENGTHS, config, dropout_key=3), model(name, kind))


def logits_are_the_references(name, kind, **options):
    config, options = CONFIGS[name], {"dropout_key": 3} | options
    logits(name, kind)(lambda p: classifier.logits(p, tensor(TOKENS), tensor(LENGTHS), config, **options))


@pytest.mark.parametrize("kind", ["full", "partly", "lora", "qlora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_the_references(name, kind):
    logits_are_the_references(name, kind)


def test_recomputing_changes_nothing():
    for name in CONFIGS:
        logits_are_the_references(name, "lora", recompute=True)


def test_wrong_versions_are_rejected(monkeypatch):
    properties = [functools.partial(logits_are_the_references, name, k) for name in CONFIGS for k in ("full", "lora")]
    assert not survivors(classifier, wrong_models.CLASSIFIER, properties, monkeypatch)


@pytest.mark.parametrize("name", CONFIGS)
def test_features(name):
    params, config = trunk(name), CONFIGS[name]
    value, low = (reference.features(cast(params, t), TOKENS, LENGTHS, config) for t in (np.float64, np.float32))
    found = classifier.features(from_numpy(params), tensor(TOKENS), tensor(LENGTHS), config)
    agree(found, value, low, "features")
    assert not found.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_head_has_the_references_numbers_and_learns(name):
    params, config = cast(trunk(name), np.float32), CONFIGS[name]
    expected = reference.with_head(params, config, 4, np.random.default_rng(5))
    given = from_numpy(params)
    found = classifier.with_head(given, config, 4, np.random.default_rng(5))
    assert {n: w.tobytes() for n, w in to_numpy(found).items()} == {n: w.tobytes() for n, w in expected.items()}
    assert all(w.requires_grad and w.dtype == torch.float32 for n, w in found.items() if n not in params)
    with pytest.raises(ValueError, match="classes is 0, needed at least 1"):
        classifier.with_head(given, config, 0, np.random.default_rng(5))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_trunk_in_16_bits_are_not_rounded_to_them(name):
    config, there = CONFIGS[name], from_numpy(freeze(trunk(name)), dtype=torch.bfloat16)
    headed = classifier.with_head(there, config, 4, np.random.default_rng(0))
    found = classifier.logits(headed, tensor(TOKENS), tensor(LENGTHS), config)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


def test_a_row_without_a_token_has_no_last_one():
    params, config = from_numpy(model("llama", "full")), CONFIGS["llama"]
    with pytest.raises(ValueError, match="row 1 has 0 tokens, needed 1 to 9"):
        classifier.logits(params, tensor(TOKENS), torch.tensor([9, 0, 1]), config)
