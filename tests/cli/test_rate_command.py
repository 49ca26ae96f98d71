"""minift rate: answers of a person by lines and by keys, going on, the rubric, a model that answers now."""

import io
import json
import os
import pty
import sys
import termios
import threading

import pytest

from minift.data import candidates, comparisons
from minift.rlhf.raters import visible

QUESTIONS = ["`re.compile`", "`os.remove`", "`math.isfinite`", "`json.load`"]


@pytest.fixture
def rate(call, tmp_path, monkeypatch):
    """rate(lines typed, *arguments) -> status, summary, what was printed; an exception among the lines is raised."""
    path = tmp_path / "answers.jsonl"
    lines = [
        {"prompt": f"What does {q} do?", "answers": [f"Take {q[1:-1].split('.')[1]} to another place.", "a story"]}
        for q in QUESTIONS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    class Typed(io.StringIO):
        def __init__(self, lines):
            super().__init__()
            self.lines = iter(lines)

        def readline(self, *_):
            line = next(self.lines, "")
            if isinstance(line, type):
                raise line
            return line and line + "\n"

    def rate(typed, *arguments, file=path):
        monkeypatch.setattr(sys, "stdin", Typed(typed))
        source = [] if file is None else [file]
        return call("rate", *source, "--out", tmp_path / "out", "--json", *arguments)

    rate.call, rate.path, rate.saved = call, path, tmp_path / "out" / "comparisons.jsonl"
    return rate


def test_choices_are_saved_and_gone_on_with(rate):
    status, summary, captured = rate(["1", "what", "2", "s", "q"])
    assert status == 0 and "needed one of 1, 2, t, s, q" in captured.out
    assert (summary["pairs"], summary["rated"], summary["skipped"], summary["left_share"]) == (4, 2, 1, 0.5)
    first, second = comparisons.read(rate.saved)
    assert (first.side, second.side, first.rater) == ("left", "right", "person")
    assert [c.question for c in (first, second)] == [f"What does {q} do?" for q in QUESTIONS[:2]]
    shown = captured.out
    assert shown.index(first.chosen[:12]) < shown.index(first.rejected[:7])  # on the left

    status, summary, captured = rate(["T "])  # then the input ends
    assert QUESTIONS[0] not in captured.out and QUESTIONS[2] in captured.out  # what was skipped comes again
    assert (summary["rated"], summary["rated_now"], summary["ties"]) == (3, 1, 1)
    status, summary, captured = rate(["1", "1"])
    assert (status, summary["rated"], summary["rated_now"]) == (0, 4, 1)
    assert len(comparisons.read(rate.saved)) == 4
    status, summary, _ = rate([], "--name", "somebody")
    assert (summary["rated"], summary["rater"], summary["left_share"]) == (0, "somebody", None)
    assert json.loads((rate.saved.parent / "summary.json").read_text()) == summary


def test_ctrl_c_loses_nothing(rate):
    status, _, captured = rate(["1", "2", KeyboardInterrupt])
    assert status == 130 and json.loads(captured.out.splitlines()[-1])["rated"] == 2
    assert len(comparisons.read(rate.saved)) == 2
    assert rate(["t", "t"])[1]["rated"] == 4


def test_agreement_with_the_rubric(rate):
    """All four have one answer about the thing; a person who always says "left" is right where it stands there."""
    _, summary, captured = rate(["1"] * 4, "--agreement")
    good = [c.chosen.startswith("Take") for c in comparisons.read(rate.saved)]
    assert summary["rubric_agreement"] == sum(good) / 4 and summary["left_share"] == 1
    assert f"same answer in {sum(good)} of 4" in captured.out


def test_the_rubric_rates_without_asking(rate):
    status, summary, _ = rate([], "--rater", "rubric", "--disagreement", "0")
    assert status == 0 and (summary["rated"], summary["ties"]) == (4, 0)
    assert all(c.chosen.startswith("Take") for c in comparisons.read(rate.saved))
    assert rate([], "--rater", "rubric", "--disagreement", "0")[1]["rated_now"] == 0
    assert rate([], "--rater", "rubric", "--disagreement", "1")[1]["rated_now"] == 4  # another rater
    assert all(c.chosen == "a story" for c in comparisons.read(rate.saved)[4:])


def test_refused_before_anything_is_asked(rate, tmp_path):
    for content, arguments, message in [
        ('{"prompt": "2 + 2?", "answers": ["4", "5"]}', ("--agreement",), "got '2 + 2?'; use another rater"),
        ('{"prompt": "2 + 2?", "answers": ["4", " 4"]}', (), "nothing to compare"),
        ('{"prompt": "2 + 2?", "answers": ["4"]}', (), "line 1: 'answers' holds 1"),
        (
            '{"prompt": "2 + 2?", "answers": ["4", "5"]}',
            ("--rater", "rubric", "--disagreement", "2"),
            "disagreement is 2",
        ),
        ('{"prompt": "2 + 2?", "answers": ["4", "5"]}', ("--answers-each", "1"), "answers_each is 1"),
    ]:
        rate.path.write_text(content)
        status, _, captured = rate(["1"], *arguments)
        assert status == 2 and message in captured.err
        assert not rate.saved.parent.exists()
    status, _, captured = rate(["1"], "--temperature", "0", file=None)
    assert status == 2 and "temperature is 0" in captured.err
    status, _, captured = rate(["1"], file=tmp_path / "none.jsonl")
    assert status == 2 and "none.jsonl: No such file" in captured.err


def test_a_model_answers_now_and_not_again(rate):
    few = ("--questions", "3", "--max-new-tokens", "4", "--answers-each", "3", "--temperature", "2")
    status, summary, _ = rate(["1"] * 4 + ["q"], *few, file=None)
    assert status == 0 and summary["rated"] == 4 and 4 < summary["pairs"] <= 9
    sampled = rate.saved.with_name("answers.jsonl")
    before = candidates.read(sampled)
    assert len(before) == 3 and all(len(c.answers) == 3 for c in before)
    assert rate([], *few, file=None)[1]["rated"] == 4  # the same answers, so the same pairs
    assert candidates.read(sampled) == before
    more = ("--questions", "4", *few[2:])
    assert rate([], *more, file=None)[1]["pairs"] > summary["pairs"]
    assert candidates.read(sampled)[:3] == before and len(candidates.read(sampled)) == 4
    whole = sampled.read_bytes()
    sampled.write_bytes(whole[:-30])  # killed while it sampled
    rate([], *more, file=None)
    assert sampled.read_bytes() == whole
    status, _, captured = rate([], *more, "--seed", "1", file=None)
    assert status == 2 and "'seed': 0" in captured.err and "give another --out" in captured.err


def test_one_key_is_enough_at_a_terminal(rate, monkeypatch):
    keyboard, theirs = pty.openpty()
    ended = threading.Event()

    def type_keys():
        """As soon as keys are waited for, all at once."""
        while termios.tcgetattr(theirs)[3] & termios.ICANON and not ended.wait(0.01):
            pass
        os.write(keyboard, b"1T?s\x04")

    typist = threading.Thread(target=type_keys)
    typist.start()
    try:
        with open(theirs, closefd=False) as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
            status, summary, _ = rate.call("rate", rate.path, "--out", rate.saved.parent, "--json")
    finally:
        ended.set()
        typist.join()
        os.close(keyboard)
        os.close(theirs)
    assert status == 0 and (summary["rated"], summary["ties"], summary["skipped"]) == (2, 1, 1)


def test_what_is_shown_cannot_move_the_cursor():
    assert visible("\x1b[2J\r\x07a\nb\tc\u202e🎉é") == "\\x1b[2J\\r\\x07a\nb\\tc\\u202e🎉é"
    assert visible(" \n") == "(nothing)"


def test_long_and_odd_answers_are_shown_and_saved(rate):
    odd = ["🎉" * 500 + "\n\n[bold]x[/bold] \ud83c".replace("\ud83c", "é"), "word " * 3000]
    rate.path.write_text(json.dumps({"prompt": "q [/]", "answers": odd}) + "\n")
    status, summary, captured = rate(["2"])
    assert status == 0 and summary["rated"] == 1 and "[bold]x[/bold]" in captured.out and "q [/]" in captured.out
    assert sorted([(c := comparisons.read(rate.saved)[0]).chosen, c.rejected]) == sorted(odd)
    assert os.path.getsize(rate.saved) > 15_000
