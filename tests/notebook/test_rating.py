"""Rating in a notebook, without a browser: what the buttons call is called, and what they show is read."""

import sys

import pytest

from minift.data import comparisons
from minift.data.example import DataError, Message
from minift.notebook import RatingPanel, rate_in_notebook
from minift.rlhf import raters

PROMPT = (Message("user", "What does `re.compile` <do>?"),)
PAIRS = raters.pairs(PROMPT, ["Compile <b>a</b> pattern.", "no\u202eidea", "\n"])


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("ipywidgets", reason="buttons need ipywidgets: pip install 'minift[notebook]'")
    return tmp_path / "mine.jsonl"


def shown(panel):
    question, answers, _, progress = panel.widget.children
    return question.value, [box.value for box in answers.children], progress.value


def test_each_button_saves_its_choice_at_once(path):
    panel = RatingPanel(PAIRS, path, "me")
    for button, pair in zip(("first", "second", "tie"), PAIRS, strict=True):
        assert panel.pair == pair
        panel.buttons[button].click()
        found = comparisons.read(path)[-1]
        assert found == raters.comparison(pair, button, "me")
    assert panel.pair is None and len(comparisons.read(path)) == 3
    assert all(button.disabled for button in panel.buttons.values())
    panel.choose("first")  # nothing is asked any more
    assert len(comparisons.read(path)) == 3 and "3 saved" in shown(panel)[2]
    assert [b.description for b in panel.buttons.values()] == ["1", "2", "tie", "skip"]


def test_it_goes_on_where_anybody_stopped(path):
    panel = RatingPanel(PAIRS, path, "me")
    panel.buttons["skip"].click()
    panel.buttons["second"].click()
    again = RatingPanel(PAIRS, path, "me")
    assert again.pair == PAIRS[0]  # what was skipped comes again, what was said does not
    assert RatingPanel(PAIRS, path, "somebody").pair == PAIRS[0]
    with comparisons.journal(path) as journal:  # the terminal goes on meanwhile
        said = list(raters.rate(PAIRS, lambda *_: "tie", "me", journal))
        assert [pair for pair, _ in said] == [PAIRS[0], PAIRS[2]]
        with pytest.raises(DataError, match="another process is writing it"):
            again.choose("first")
    assert again.pair == PAIRS[0]
    again.choose("first")
    assert len(comparisons.read(path)) == 3 and again.saved == 0, "it was rated already"


def test_answers_are_shown_as_text(path):
    panel = RatingPanel(PAIRS, path)
    seen = []
    while panel.pair:
        question, answers, _ = shown(panel)
        assert "&lt;do&gt;" in question
        seen += answers
        panel.choose("skip")
    text = " ".join(seen)
    assert "&lt;b&gt;a&lt;/b&gt;" in text and "<b>a" not in text
    assert "no\\u202eidea" in text and "(nothing)" in text
    assert "last pair" in shown(panel)[0] and not path.read_bytes()


def test_it_is_displayed(path, monkeypatch):
    displayed = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    panel = rate_in_notebook(PAIRS, path, "me")
    assert displayed == [panel.widget]


def test_without_ipywidgets_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"pip install 'minift\[notebook\]', or rate in a terminal, `minift rate`"):
        rate_in_notebook(PAIRS, tmp_path / "mine.jsonl")
