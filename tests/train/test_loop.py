"""The training loop: it learns, stops, goes on, and ends in the same bits."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from small_run import CONFIG, SETTINGS, batches, examples, loss, params, run

from minift.data.batches import pad
from minift.io import FormatError
from minift.io.safetensors_file import SafetensorsFile
from minift.nn.weight import Frozen, freeze, replace, trainable
from minift.optim.adamw import AdamW, adamw_1, clip_by_global_norm
from minift.optim.schedules import learning_rate
from minift.train import checkpoint, sft
from minift.train.loop import Settings, _accumulate, fit


def same_bits(one, other):
    assert one.keys() == other.keys()
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


def without_clock(records):
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def kill_after(step):
    def report(record):
        if record["step"] == step and "loss" in record:
            raise Killed

    return report


def test_the_loss_falls():
    result = run(dataclasses.replace(SETTINGS, steps=40, learning_rate=0.05, keep_best=False))
    losses = [record["loss"] for record in result.records if "loss" in record]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_a_step_is_clip_schedule_and_adamw_on_the_accumulated_gradient():
    """The loop's first two steps, written out."""
    start = trainable(params())
    theta = {n: a.copy() for n, a in start.items()}
    m, v = ({n: np.zeros_like(a) for n, a in start.items()} for _ in range(2))
    result = fit(
        params(), lambda p, b, n, key: sft.loss(p, b, CONFIG, n), batches, dataclasses.replace(SETTINGS, steps=2)
    )
    for step in (1, 2):
        parts = batches(step)
        total = sum(int((b.labels[:, 1:] != -100).sum()) for b in parts)
        gradients = {}
        for part in parts:
            for n, g in sft.loss(replace(params(), theta), part, CONFIG, total)[1](1.0).items():
                gradients[n] = gradients.get(n, 0) + g
        gradients, _ = clip_by_global_norm(gradients, SETTINGS.max_grad_norm)
        eta = learning_rate(step, 0.02, 2, 3, "cosine")
        assert next(r for r in result.records if r["step"] == step and "loss" in r)["learning_rate"] == eta
        for n in theta:
            theta[n], m[n], v[n] = adamw_1(theta[n], gradients[n], m[n], v[n], step, eta, weight_decay=0.1)
    found = trainable(result.params)
    for n in theta:
        np.testing.assert_array_equal(found[n], theta[n])


def test_accumulation_is_one_large_batch():
    """Different numbers of labels in each piece; in float64, so that only the order of sums differs."""
    p = {n: (Frozen(w.array.astype(float)) if isinstance(w, Frozen) else w) for n, w in params().items()}
    data = examples(6)
    pieces = [pad(data[:1]), pad(data[1:4]), pad(data[4:])]

    def plain(p, batch, normalizer, key):
        return sft.loss(p, batch, CONFIG, normalizer)

    value, gradients = _accumulate(p, plain, pieces, 0)
    whole, expected = _accumulate(p, plain, [pad(data)], 0)
    assert np.isclose(value, whole, rtol=1e-12)
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-9, atol=1e-13)


def test_arguments_are_not_changed():
    before = params()
    bits = {n: a.tobytes() for n, a in trainable(before).items()}
    fit(before, loss, batches, dataclasses.replace(SETTINGS, steps=2))
    assert {n: a.tobytes() for n, a in trainable(before).items()} == bits


@pytest.mark.parametrize("killed_at", [1, 3, 4, 8])
def test_resumed_training_ends_in_the_same_bits(tmp_path, killed_at):
    """Killed anywhere, with dropout, accumulation, weight decay, a schedule and the best checkpoint to remember."""
    whole = run(folder=tmp_path / "whole")
    with pytest.raises(Killed):
        run(folder=tmp_path / "cut", report=kill_after(killed_at))
    if killed_at <= SETTINGS.save_every:  # step 3 is reported before it is saved
        with pytest.raises(FormatError, match="no checkpoint"):
            run(folder=tmp_path / "cut", resume=True)
        return
    resumed = run(folder=tmp_path / "cut", resume=True)
    assert same_bits(trainable(whole.params), trainable(resumed.params))
    assert without_clock(whole.records) == without_clock(resumed.records)
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert lines == resumed.records
    one, other = (
        checkpoint.load(tmp_path / name, _identity(tmp_path / name), trainable(params())) for name in ("whole", "cut")
    )
    for group in ("parameters", "m", "v", "best"):
        assert same_bits(getattr(one, group), getattr(other, group)), group


def _identity(folder):
    return json.loads(SafetensorsFile(folder / checkpoint.NAME).metadata["minift"])["identity"]


def test_a_polite_kill_finishes_the_step_and_leaves_a_checkpoint(tmp_path):
    def interrupt(record):
        if record["step"] == 4 and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = run(folder=tmp_path / "cut", report=interrupt)
    assert stopped.interrupted
    assert checkpoint.load(tmp_path / "cut", _identity(tmp_path / "cut"), trainable(params())).step == 4
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = run(folder=tmp_path / "cut", resume=True)
    assert not resumed.interrupted
    assert same_bits(trainable(run().params), trainable(resumed.params))


def test_stopped_before_the_first_step_it_still_goes_on(tmp_path):
    """While the first evaluation ran: there are no moments yet, and what was measured is not measured again."""
    stopped = run(folder=tmp_path / "cut", report=lambda record: os.kill(os.getpid(), signal.SIGINT))
    assert (stopped.interrupted, [r["step"] for r in stopped.records]) == (True, [0])
    whole, resumed = run(), run(folder=tmp_path / "cut", resume=True)
    assert same_bits(trainable(whole.params), trainable(resumed.params))
    assert without_clock(whole.records) == without_clock(resumed.records)


def test_records_that_do_not_reach_the_checkpoint_are_refused(tmp_path):
    run(folder=tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    first = metrics.read_text().splitlines(keepends=True)[:3]
    metrics.write_text("".join(first))  # a second run began in the same folder, and was killed before it saved
    with pytest.raises(FormatError, match=r"metrics\.jsonl: found nothing after step 2, needed those up to step 9"):
        run(folder=tmp_path, resume=True)
    assert metrics.read_text() == "".join(first)
    metrics.unlink()
    with pytest.raises(FormatError, match=r"metrics\.jsonl: found no records"):
        run(folder=tmp_path, resume=True)


def test_a_second_ctrl_c_stops_at_once():
    def interrupt_twice(record):
        if "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(report=interrupt_twice)


def test_keep_best_ends_with_the_lowest_held_out_loss():
    settings = dataclasses.replace(SETTINGS, steps=30, learning_rate=0.3, max_grad_norm=100.0, schedule="constant")
    result = run(settings)
    held_out = pad(examples(5, seed=9))
    losses = dict(result.losses())
    assert min(losses.values()) < losses[30]  # the last is not the best, or this shows nothing
    assert float(sft.loss(result.params, held_out, CONFIG)[0]) == min(losses.values())
    last = run(dataclasses.replace(settings, keep_best=False))
    assert float(sft.loss(last.params, held_out, CONFIG)[0]) == losses[30]


def test_evaluation_before_every_so_often_and_after():
    assert [step for step, _ in run().losses()] == [0, 2, 4, 6, 8, 9]


def test_a_fresh_start_leaves_no_checkpoint_of_the_run_before(tmp_path):
    run(folder=tmp_path)
    with pytest.raises(Killed):
        run(dataclasses.replace(SETTINGS, learning_rate=0.5), folder=tmp_path, report=kill_after(2))
    with pytest.raises(FormatError, match="no checkpoint"):
        run(folder=tmp_path, resume=True)


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    run(folder=tmp_path, identity={"data": "one"})
    with pytest.raises(FormatError, match=r"checkpoint\.safetensors: learning_rate: found 0\.5, needed 0\.02"):
        run(dataclasses.replace(SETTINGS, learning_rate=0.5), folder=tmp_path, identity={"data": "one"}, resume=True)
    with pytest.raises(FormatError, match=r"data: found 'other', needed 'one'"):
        run(folder=tmp_path, identity={"data": "other"}, resume=True)
    run(dataclasses.replace(SETTINGS, save_every=4), folder=tmp_path, identity={"data": "one"}, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(folder=tmp_path)
    identity = _identity(tmp_path)
    like = trainable(params())
    name = next(iter(like))
    with pytest.raises(FormatError, match="an array that this run does not train"):
        checkpoint.load(tmp_path, identity, {n: a for n, a in like.items() if n != name})
    with pytest.raises(FormatError, match=r"found nothing, needed an array for everything that learns"):
        checkpoint.load(tmp_path, identity, like | {"more.weight": np.zeros(3)})
    with pytest.raises(FormatError, match=r"float32 \(3, 16\), needed float32 \(4, 16\)"):
        checkpoint.load(tmp_path, identity, like | {name: np.zeros((4, 16), np.float32)})
    (tmp_path / checkpoint.NAME).write_bytes(b"half of it")
    with pytest.raises(FormatError, match="a complete safetensors file"):
        checkpoint.load(tmp_path, identity, like)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="nothing learns"):
        fit(freeze({"w": np.ones(3)}), loss, batches, Settings())

    def not_finite(p, batch, normalizer, key):
        return np.float32("nan"), lambda d: {}

    with pytest.raises(ValueError, match=r"step 1: the loss is nan: lower the learning rate"):
        fit(params(), not_finite, batches, SETTINGS)


def test_the_key_of_dropout_differs_by_step_and_micro_batch():
    keys = []

    def watched(p, batch, normalizer, key):
        keys.append(key)
        return loss(p, batch, normalizer, key)

    fit(params(), watched, batches, dataclasses.replace(SETTINGS, steps=3))
    assert len(keys) == len(set(keys)) == 9


def test_bytes_of_the_optimizer():
    assert run().optimizer_bytes == 2 * sum(a.nbytes for a in trainable(params()).values())
    assert AdamW().nbytes == 0
