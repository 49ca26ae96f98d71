"""The studies of a shift, at a tiny size: what is measured, and that a seed decides all of it."""

import dataclasses
import math

import numpy as np
import pytest

from minift.data import stdlib_docs
from minift.models import llama
from minift.nn.weight import trainable
from minift.peft import lora
from minift.studies import forgetting, shift, two_texts
from minift.studies.two_texts import BATCH, LENGTH, NANO
from minift.train.evaluate import held_out_loss

TINY = dataclasses.replace(NANO, vocab_size=300, hidden_size=16, intermediate_size=24, head_dim=8, num_hidden_layers=1)
SIZES = (8, 40)


@pytest.fixture(scope="module")
def texts():
    return two_texts.two_texts(TINY)


@pytest.fixture(scope="module")
def curve():
    return learning_curve()


def learning_curve():
    return shift.run("tiny", 0, lambda line: None, config=TINY, sizes=SIZES, seeds=2, steps=6, pretraining_steps=8)


@pytest.fixture(scope="module")
def paths():
    return forgetting.run("tiny", 0, lambda line: None, config=TINY, seeds=2, steps=7, pretraining_steps=8)


# --- the texts --------------------------------------------------------------------------------------------------------


def test_both_texts_are_there_once(texts):
    found = stdlib_docs.embedded()
    assert len(texts.new) == len(found.train_pairs)
    halves = len(texts.validation), len(texts.test)
    assert sum(halves) == len(found.held_out_pairs) and abs(halves[0] - halves[1]) <= 1
    assert {t.tobytes() for t, _ in texts.validation}.isdisjoint(t.tobytes() for t, _ in texts.test)
    assert max(len(tokens) for part in (texts.old, texts.new, texts.test) for tokens, _ in part) == LENGTH


def test_the_seed_decides_the_order(texts):
    again, other = two_texts.two_texts(TINY), two_texts.two_texts(TINY, seed=1)
    for name in ("old", "new", "test"):
        first, same, different = ([t.tobytes() for t, _ in getattr(x, name)] for x in (texts, again, other))
        assert first == same != different


def test_replay_puts_old_rows_beside_the_new(texts):
    alone, mixed = two_texts.mixed(texts.new, 0), two_texts.mixed(texts.new, 0, texts.old, 4)
    for step in (1, 7):
        (few,), (many,) = alone(step), mixed(step)
        assert len(few) == BATCH and len(many) == BATCH + 4
        width = few.tokens.shape[1]
        assert np.array_equal(few.tokens, many.tokens[:BATCH, :width])
        old = {t.tobytes() for t, _ in texts.old}
        assert all(row[:n].tobytes() in old for row, n in zip(many.tokens[BATCH:], many.lengths[BATCH:], strict=True))


# --- a shift ----------------------------------------------------------------------------------------------------------


def test_the_curve_is_of_both_starts_and_all_seeds(curve):
    assert [(r["start"], r["examples"], r["seed"]) for r in curve] == [
        ("pretrained", 0, 0),
        *((start, n, seed) for n in SIZES for seed in (0, 1) for start in ("pretrained", "from scratch")),
    ]
    assert all(0 <= r["best_step"] <= r["steps"] <= 6 for r in curve)
    assert len({r["new_loss"] for r in curve}) == len(curve)  # no two runs are one


def test_the_first_record_is_the_pretrained_model(curve, texts):
    params = two_texts.pretrained(texts, TINY, 8, 0)
    assert curve[0]["new_loss"] == held_out_loss(params, texts.test, TINY, 64)
    assert curve[0]["old_loss"] == held_out_loss(params, texts.old_held_out, TINY, 64)
    start = llama.initialize(TINY, np.random.default_rng([0, 2]))
    assert curve[0]["old_loss"] < held_out_loss(start, texts.old_held_out, TINY, 64) - 0.1  # it has learned


def test_a_seed_decides_all_of_it(curve):
    assert learning_curve() == curve


def test_rows_are_means_and_spreads(curve):
    rows = shift.rows(curve)
    assert [row["examples"] for row in rows] == [0, *SIZES] and rows[0]["from_scratch"] is None
    for row in rows[1:]:
        for start, mean, spread in (
            ("pretrained", "fine_tuned", "tuned_spread"),
            ("from scratch", "from_scratch", "scratch_spread"),
        ):
            a, b = (r["new_loss"] for r in curve if r["start"] == start and r["examples"] == row["examples"])
            assert math.isclose(row[mean], (a + b) / 2) and math.isclose(row[spread], abs(a - b) / math.sqrt(2))


def test_what_a_loss_is_worth():
    """On a curve that is straight in log n, exactly; never beyond what was measured."""
    sizes = (10, 100, 1000)
    losses = [5 - math.log10(n) for n in sizes]
    for n in (10, 30, 100, 345, 1000):
        assert shift.worth(5 - math.log10(n), sizes, losses) == n
    assert shift.worth(1.9, sizes, losses) is None and shift.worth(9.0, sizes, losses) == 10
    assert shift.worth(2.5, sizes, [4, 2, 3]) == round(math.exp(np.interp(2.5, [2, 4], [math.log(100), math.log(10)])))


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_each_way_begins_at_the_same_model(paths, texts):
    before = two_texts.pretrained(texts, TINY, 8, 0)
    for way in forgetting.WAYS:
        for seed in (0, 1):
            path = [r for r in paths if r["way"] == way.name and r["seed"] == seed]
            assert [r["step"] for r in path] == [*range(8)]
            assert path[0]["old_loss"] == pytest.approx(held_out_loss(before, texts.old_held_out, TINY, 64), rel=1e-6)
            assert path[-1]["new_loss"] < path[0]["new_loss"]
            start = before if way.r is None else lora.attach(before, r=way.r, rng=np.random.default_rng(0))
            assert path[0]["trainable"] == sum(array.size for array in trainable(start).values())


def test_rows_compare_the_ends_with_the_beginning(paths):
    before, *rows = forgetting.rows(paths)
    assert [row["way"] for row in rows] == [way.name for way in forgetting.WAYS]
    assert before["new_loss"] == paths[0]["new_loss"] and before["forgotten"] == 0
    for row in rows:
        a, b = (r for r in paths if r["way"] == row["way"] and r["step"] == 7)
        for kind in ("new", "old"):
            assert math.isclose(row[f"{kind}_loss"], (a[f"{kind}_loss"] + b[f"{kind}_loss"]) / 2)
            assert math.isclose(row[f"{kind}_spread"], abs(a[f"{kind}_loss"] - b[f"{kind}_loss"]) / math.sqrt(2))
        assert math.isclose(row["forgotten"], row["old_loss"] - before["old_loss"], abs_tol=1e-12)
        assert math.isclose(row["learned"], before["new_loss"] - row["new_loss"], abs_tol=1e-12)


def test_pictures(curve, paths, tmp_path):
    for study, records in ((shift, curve), (forgetting, paths)):
        study.draw(records, tmp_path / "study.png")
        assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
