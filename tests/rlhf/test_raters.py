"""Raters: the share of disagreement, order and repetition; files; what is shown, saved and asked again."""

import math

import pytest
import rater_properties as properties
from rater_properties import FINITE
from wrong_raters import Raters

from minift.data import comparisons
from minift.data.comparisons import Comparison
from minift.data.example import DataError, Message
from minift.rlhf.raters import FileRater, FunctionRater, Pair, RubricRater, agreement, coin, pairs, rate
from minift.rlhf.rubric import gold

PROPERTIES = [
    properties.ties_stay_ties,
    properties.says_the_same_again,
    properties.seeds_disagree_independently,
    properties.disagrees_on_the_chosen_share,
]
QUESTION = (Message("user", FINITE),)
GOOD, BAD = "Tell whether a number is finite.", "Tells a story."


@pytest.mark.parametrize("property", PROPERTIES, ids=lambda p: p.__name__)
def test_rubric_rater(property):
    property(RubricRater)


@pytest.mark.parametrize("name", [name for name in vars(Raters) if not name.startswith("_")])
def test_a_wrong_rater_is_rejected(name):
    for property in PROPERTIES:
        try:
            property(getattr(Raters, name))
        except AssertionError:
            print(f"{name:<28}{property.__name__}")
            return
    pytest.fail(f"{name} passed everything")


def test_the_coin_is_the_same_everywhere():
    """These may never change, or a seed would mean something else tomorrow."""
    assert [coin(0, "p", "a", "b"), coin(0, "p", "b", "a")] == [coin(0, "p", "a", "b")] * 2
    assert coin(0, "p", "a", "b") == pytest.approx(0.9372277970342964) and coin(1, "p", "a", "b") == pytest.approx(
        0.7240607838827628
    )
    assert coin(0, 'p", "a', "", "b") != coin(0, "p", "a", "b")  # nothing runs together
    assert 0 <= coin(0, "\ud800", "🎉", "") < 1


def test_the_agreement_of_gold_with_the_rater_is_the_ceiling():
    rated = [
        Comparison((Message("user", prompt),), *((a, b) if RubricRater(0.2)(prompt, a, b) == "first" else (b, a)))
        for prompt, a, b in properties.clear_pairs()
    ]
    same, of = agreement(rated, FunctionRater(gold))
    assert of == len(rated) and abs(same / of - 0.8) < math.sqrt(math.log(2e9) / (2 * of))


@pytest.mark.parametrize("disagreement", [-0.1, 1.1, math.nan])
def test_disagreement_is_a_probability(disagreement):
    with pytest.raises(ValueError, match="disagreement is"):
        RubricRater(disagreement)


def test_function_rater():
    shorter = FunctionRater(lambda prompt, answer: -len(answer))
    assert (shorter("", "a", "bb"), shorter("", "bb", "a"), shorter("", "a", "b")) == ("first", "second", "tie")
    assert FunctionRater(lambda p, a: -math.inf if a else 0)("", "", "x") == "first"
    with pytest.raises(ValueError, match="the score of 'b' is nan, needed a number"):
        FunctionRater(lambda p, a: math.nan if a == "b" else 0)("", "a", "b")


def test_file_rater(tmp_path):
    path = tmp_path / "c.jsonl"
    said = [Comparison(QUESTION, "a", "b"), Comparison(QUESTION, "c", "a", tie=True), Comparison(QUESTION, "b", "c")]
    comparisons.write(path, [*said, Comparison(QUESTION, "b", "a"), Comparison(QUESTION, "a", "b")])
    rater = FileRater(path)
    assert (rater(FINITE, "a", "b"), rater(FINITE, "b", "a")) == ("first", "second")  # two against one
    assert (rater(FINITE, "a", "c"), rater(FINITE, "c", "b")) == ("tie", "second")
    with pytest.raises(ValueError, match=r"c\.jsonl: no comparison of 'a' and 'd'"):
        rater(FINITE, "a", "d")
    with pytest.raises(DataError, match="No such file"):
        FileRater(tmp_path / "none.jsonl")


# --- pairs, and rating them ---------------------------------------------------------------------------------------


def test_all_pairs_of_different_answers():
    found = pairs(QUESTION, ["a", "b", "a ", "c", ""])
    assert {frozenset((p.left, p.right)) for p in found} == {frozenset(x) for x in
        (("a ", "b"), ("a ", "c"), ("b", "c"), ("a ", ""), ("b", ""), ("c", ""))}  # fmt: skip
    assert pairs(QUESTION, ["a", "a"]) == []


def test_left_and_right_are_shuffled_and_stay():
    many = [pairs(QUESTION, (f"a{i}", f"b{i}"))[0] for i in range(2000)]
    left = sum(p.left.startswith("a") for p in many)
    assert abs(left / 2000 - 0.5) < math.sqrt(math.log(2e9) / 4000)
    assert many == [pairs(QUESTION, (f"b{i}", f"a{i}"))[0] for i in range(2000)]
    assert many != [pairs(QUESTION, (f"a{i}", f"b{i}"), seed=1)[0] for i in range(2000)]
    rater = RubricRater(0.5)  # where it errs has nothing to do with where an answer stands
    errs = [coin(rater.seed, FINITE, p.left, p.right) < 0.5 for p in many]
    both = sum(e and p.left.startswith("a") for e, p in zip(errs, many, strict=True))
    assert abs(both / 2000 - 0.25) < math.sqrt(math.log(2e9) / 4000)


def test_rating_saves_as_it_goes_and_goes_on(tmp_path):
    shown, asked = [Pair(QUESTION, f"a{i}", f"b{i}") for i in range(6)], []

    def rater(prompt, a, b):
        assert prompt == FINITE
        asked.append(a)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return ("first", "second", "tie", "skip")[int(a[1])]

    with pytest.raises(KeyboardInterrupt), comparisons.journal(tmp_path / "c.jsonl") as journal:
        list(rate(shown, rater, "me", journal))
    expected = [
        Comparison(QUESTION, "a0", "b0", rater="me", side="left"),
        Comparison(QUESTION, "b1", "a1", rater="me", side="right"),
        Comparison(QUESTION, "a2", "b2", rater="me", side="left", tie=True),
    ]
    assert comparisons.read(tmp_path / "c.jsonl") == expected
    with comparisons.journal(tmp_path / "c.jsonl") as journal:
        exchanged = [Pair(p.prompt, p.right, p.left) for p in shown]
        assert [(p.left, c) for p, c in rate(exchanged, lambda *_: "first", "me", journal)] == [
            (f"b{i}", "first") for i in (3, 4, 5)
        ]
        assert len(list(rate(shown, lambda *_: "tie", "you", journal))) == 6  # somebody else
        assert list(rate(shown, rater, "me", journal)) == []
    assert len(comparisons.read(tmp_path / "c.jsonl")) == 12
