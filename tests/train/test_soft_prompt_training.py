"""Soft prompts in the loop: what learns is arrays like any other, in checkpoints, threads and the optimizer."""

import numpy as np
import pytest
from small_run import CONFIG, batches, examples

from minift.data.batches import pad
from minift.models import llama
from minift.nn.weight import Frozen, trainable
from minift.peft import p_tuning, prefix_tuning, prompt_tuning, soft_prompt
from minift.train import sft
from minift.train.loop import Settings, fit
from minift.train.parallel import side_by_side

KINDS = {
    "prompt": lambda base, rng: prompt_tuning.attach(base, 4, rng=rng),
    "prefix": lambda base, rng: prefix_tuning.attach(base, 4, rng=rng),
    "prefix, network": lambda base, rng: prefix_tuning.attach(base, 4, rng=rng, encoder_hidden_size=8),
    "p, MLP": lambda base, rng: p_tuning.attach(base, 4, rng=rng),
    "p, LSTM": lambda base, rng: p_tuning.attach(base, 4, rng=rng, encoder="LSTM"),
}


def start(kind):
    rng = np.random.default_rng(1)
    base = llama.initialize(CONFIG, rng, std=0.3)
    return base, KINDS[kind](base, rng)


def loss(params, batch, normalizer, key):
    return sft.loss(params, batch, CONFIG, normalizer, key)


def run(kind, steps, **options):
    settings = Settings(steps=30, learning_rate=0.02, warmup_steps=3, schedule="constant", save_every=5, seed=3)
    held = pad(examples())
    _, params = start(kind)
    if steps < settings.steps:
        options["report"] = _stop_at(steps)
    return fit(params, loss, batches, settings, evaluate=lambda p: float(sft.loss(p, held, CONFIG)[0]), **options)


class _Stopped(Exception):
    pass


def _stop_at(step):
    def report(record):
        if record["step"] == step + 1:
            raise _Stopped

    return report


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_nothing_else_does(kind):
    """The loss on what it is trained on falls, the base keeps its bytes, and folding changes nothing."""
    base, params = start(kind)
    result = run(kind, 30)
    before, after = result.losses()[0][1], result.losses()[-1][1]
    assert after < before - 0.1
    for name, array in base.items():
        assert np.array_equal(result.params[name].array, array), name
    for name, array in trainable(params).items():
        assert not np.array_equal(result.params[name], array), f"{name} has not moved"
    held = pad(examples())
    assert sft.loss(soft_prompt.fold(result.params), held, CONFIG)[0] == sft.loss(result.params, held, CONFIG)[0]


@pytest.mark.parametrize("kind", ["prefix", "p, LSTM"])
def test_resumed_it_ends_in_the_same_bits(tmp_path, kind):
    whole = run(kind, 30)
    with pytest.raises(_Stopped):
        run(kind, 10, folder=tmp_path)
    resumed = run(kind, 30, folder=tmp_path, resume=True)
    assert resumed.records[-1]["step"] == 30
    for name, array in trainable(whole.params).items():
        assert trainable(resumed.params)[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_shared_out_among_threads_give_the_same_gradient(kind):
    """Each thread runs the encoder for its rows; the sums differ in their order only."""
    _, params = start(kind)
    params = {n: w.astype(float) if isinstance(w, np.ndarray) else Frozen(w.dense(float)) for n, w in params.items()}
    batch = pad(examples())
    alone, alone_vjp = loss(params, batch, None, None)
    shared, shared_vjp = side_by_side(loss, threads=2)(params, batch, None, None)
    assert abs(shared - alone) <= 1e-12 * abs(alone)
    expected = alone_vjp(1.0)
    for name, gradient in shared_vjp(1.0).items():
        assert np.abs(gradient - expected[name]).max() <= 1e-10 * np.abs(expected[name]).max(), name
