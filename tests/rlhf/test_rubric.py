"""The rubric: what it says of answers written by hand, that nothing cheap is worth much, and what it rejects."""

import pytest
import rater_properties as properties
from hypothesis import given
from hypothesis import strategies as st
from rater_properties import FINITE
from wrong_raters import Scores

from minift.rlhf import rubric
from minift.rlhf.rubric import Items, gold, items

PROPERTIES = [
    properties.is_monotone_in_each_item,
    properties.hacks_are_worth_little,
    properties.tells_real_from_shuffled,
    properties.collapse_is_worth_less_than_mediocrity,
]


@pytest.mark.parametrize("property", [*PROPERTIES, properties.collapse_is_bounded], ids=lambda p: p.__name__)
def test_gold(property):
    property(gold)


def failing(score):
    """The first property that rejects a score, and what it said."""
    for property in PROPERTIES:
        try:
            property(score)
        except AssertionError as error:
            return property.__name__, str(error).splitlines()[0]
    return None


WRONG = [name for name in vars(Scores) if not name.startswith("_")]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_score_is_rejected(name):
    found = failing(getattr(Scores, name))
    print(f"{name:<28}{found}")
    assert found is not None


def test_where_items_are_added_up_one_sentence_for_all_is_enough():
    """What a policy trained on such a score finds; this is why being about the thing is a factor."""
    with pytest.raises(AssertionError, match=r"gets 0\.\d+, mediocrity"):
        properties.collapse_is_worth_less_than_mediocrity(Scores.items_added_up)


# about, says, imperative, sentence, line
BY_HAND = [
    ("`math.isfinite`", "Tell whether a number is finite.", 6 / 8, 1, 1, 1, 1),
    ("`a.set_childWatcher`", "Stop the watcher for a child process.", 1, 1, 1, 1, 1),
    ("`a.set_childWatcher`", "Stop the child.", 1 / 2, 0.5, 1, 1, 1),
    ("`os.listdir`", "Return the directory's entries.", 0, 1, 1, 1, 1),  # it cannot see everything
    ("`json.dir`", "Return the directory's entries.", 1, 0.5, 1, 1, 1),
    ("`io.StringIO.getvalue`", "Return a string.", 0.5 * 1 / 2, 0, 1, 1, 1),  # what is before the last part, half
    ("`re.compile`", "Compiles patterns eagerly", 1, 1, 0, 0, 1),
    ("`re.compile`", "Quickly compile patterns.", 1, 1, 1, 1, 1),
    ("`re.compile`", "Compile patterns. Cache them.", 1, 1, 1, 0, 1),
    ("`re.compile`", "Compile patterns, e.g. long ones.", 1, 1, 1, 1, 1),
    ("`re.compile`", "Compile long patterns" + " again" * 9 + ".", 1, 1, 1, 1, 0),
    ("`re.compile`", "Compile\nlong patterns.", 1, 1, 1, 1, 0),
    ("`re.compile`", "  Compile long patterns.\n", 1, 1, 1, 1, 1),
    ("`re.compile`", "", 0, 0, 0, 0, 0),
    ("`re.compile`", "编译模式。", 0, 0, 0, 0, 1),
]


@pytest.mark.parametrize(("name", "answer", "about", "says", "imperative", "sentence", "line"), BY_HAND)
def test_by_hand(name, answer, about, says, imperative, sentence, line):
    found = items(f"What does {name} do?", answer)
    expected = Items(about, found.specific, says, imperative, sentence, line)
    assert found.about == pytest.approx(about, abs=1e-12)
    assert (found.says, found.imperative, found.sentence, found.line) == (says, imperative, sentence, line)
    assert gold(f"What does {name} do?", answer) == pytest.approx(expected.gold, abs=1e-12)


# about, says, imperative
ABOUT_TOPICS = [
    ("Return the paths of all files in a folder.", 1, 0.5, 1),  # "return" says nothing
    ("Open the file with a given mode.", 1 / 2, 1, 1),
    ("Path to open.", 1 / 2, 0.5, 0),
    ("Stop the thread now.", 0, 1, 1),
    ("File path.", 1, 0, 0),
]


@pytest.mark.parametrize(("answer", "about", "says", "imperative"), ABOUT_TOPICS)
def test_topics_by_hand(answer, about, says, imperative):
    found = items("Write a docstring about file and path.", answer)
    assert (found.about, found.says, found.imperative) == (about, says, imperative)
    assert found.names_it == (about >= 0.5)


def test_only_what_does_something_needs_an_imperative():
    assert items("What is `re.Match`?", "The result of a match.").imperative == 1
    assert items("What does `re.match` do?", "The result of a match.").imperative == 0


def test_commonness_is_the_mean_over_all_questions():
    """Equation (2) by its definition, without the index; and what gives the same answer pays for each of its words."""
    for of_topics in (False, True):
        questions, _ = rubric._pool(of_topics)
        for word in ("file", "error", "isfinite", "handlers", "zzz", "x", "nan"):
            mean = sum(rubric._about(asked, [word]) for asked in questions) / len(questions)
            assert rubric._commonness(word, of_topics) == pytest.approx(mean, rel=1e-12)
    paid = rubric._commonness("file", False) + rubric._commonness("story", False)
    assert items(FINITE, "File a story, a story of a file.").specific == pytest.approx(1 - paid / rubric.BUDGET)


PIECES = ["finite", "a", "Return", "...", "🎉", ".", "\n", "\x00", "é"]


@given(st.text(max_size=300) | st.lists(st.sampled_from(PIECES)).map(" ".join))
def test_any_answer_has_a_score(answer):
    found = items(FINITE, answer)
    assert all(0 <= value <= 1 for value in vars(found).values()) and 0 <= found.gold <= 1
    assert items(FINITE, answer) == found
    assert found.gold <= found.about


SOME = st.sets(
    st.sampled_from(["string", "strings", "io", "isfinite", "finite", "fin", "ring", "number", "set", "math"])
)


@given(SOME, SOME)
def test_about_is_subadditive(one, other):
    """Which is what equation (3) needs."""
    for name in ("`io.StringIO`", "`io.StringIO.isfinite`", "`a.b`", "`set`", "`number.ring_finite`"):
        asked = rubric._asked(f"What is {name}?")
        both, each = rubric._about(asked, one | other), [rubric._about(asked, words) for words in (one, other)]
        assert max(each) - 1e-12 <= both <= sum(each) + 1e-12


@given(st.text(max_size=60))
def test_any_name_can_be_asked_for(name):
    prompt = f"What does `{name}` do?"
    try:
        assert 0 <= gold(prompt, f"Return {name} of a number.") <= 1
    except ValueError as error:
        assert "in backticks" in str(error) and len(str(error)) < 400


def test_a_very_long_answer_is_judged_quickly_and_is_worth_nothing():
    words = " ".join(f"{word} of" for e in properties.held_out() for word in e[1].split())
    assert gold(FINITE, words) == 0
    assert gold(FINITE, "finite " * 100_000) == 0


def test_no_name_no_judgment():
    with pytest.raises(ValueError, match=r"a `name` in backticks, or .* got 'What is two and two"):
        gold("What is two and two?", "Four.")


def test_the_table_in_the_docstring_is_what_is_measured():
    """To two hundredths: the standard library is a little different in each version of Python."""
    measured = [line.split() for line in rubric.real_docstrings().splitlines()[1:]]
    written = [line.split() for line in rubric.__doc__.splitlines() if line.startswith("    ")][-len(measured) :]
    for row, expected in zip(measured, written, strict=True):
        assert [float(x) for x in row[-8:]] == pytest.approx([float(x) for x in expected[-8:]], abs=0.02)
