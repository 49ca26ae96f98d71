"""The embedded set: made at run time, clean, the same every time, and nothing held out stands in training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data_properties import words

from minift.data.docstrings import first_sentence
from minift.data.stdlib_docs import embedded, instruction_pairs, plain_text


def test_size():
    """About 4,000 pairs and 465 kB on 3.11; other versions of Python differ a little, other builds lack a module."""
    assert 3500 <= len(instruction_pairs()) <= 5500
    assert 400_000 <= sum(len(e.text) for e in plain_text()) <= 800_000
    parts = embedded()
    assert 0.07 <= len(parts.held_out_pairs) / len(instruction_pairs()) <= 0.13
    assert len(parts.train_pairs) + len(parts.held_out_pairs) >= 0.98 * len(instruction_pairs())
    held_out, train = (sum(len(e.text) for e in t) for t in (parts.held_out_text, parts.train_text))
    assert 0.02 <= held_out / train <= 0.2


def test_no_held_out_answer_or_paragraph_stands_in_a_training_text():
    parts = embedded()
    training = "\n".join(f" {words(e.everything)} " for e in [*parts.train_pairs, *parts.train_text])
    assert [e.answer for e in parts.held_out_pairs if f" {words(e.answer)} " in training] == []
    paragraphs = [p for e in parts.held_out_text for p in re.split(r"\n\n+", e.text) if words(p)]
    assert len(paragraphs) > 50
    assert [p for p in paragraphs if f" {words(p)} " in training] == []


def test_pairs_are_well_formed():
    questions = [e.messages[0].content for e in instruction_pairs()]
    answers = [e.answer for e in instruction_pairs()]
    assert len(set(questions)) == len(questions) and len(set(map(words, answers))) == len(answers)
    for example, question in zip(instruction_pairs(), questions, strict=True):
        assert [m.role for m in example.messages] == ["user", "assistant"]
        assert re.fullmatch(r"What (does `[\w.]+` do|is `[\w.]+`|is the `[\w.]+` module for)\?", question)
        assert 15 <= len(example.answer) <= 200 and example.answer[-1] in ".!?" and "\n" not in example.answer
    shown = dict(zip(questions, answers, strict=True))
    assert shown["What does `math.isqrt` do?"] == "Return the integer part of the square root of the input."
    assert "What does `collections.OrderedDict.move_to_end` do?" in shown
    assert not any(".posixpath" in q or "`builtins." in q or "._" in q for q in questions)


def test_the_same_in_another_process_and_silent():
    """Hash seeds, locale and import order change nothing, and importing half the library prints nothing."""
    code = (
        "import hashlib, sys, threading; from minift.data.stdlib_docs import embedded; e = embedded();"
        "text = '\\0'.join(x.everything for part in vars(e).values() for x in part);"
        "sys.stderr.write(hashlib.sha256(text.encode()).hexdigest()) if threading.active_count() == 1 else None"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "DISPLAY": ":77", "PYTHONPATH": str(root)},
            capture_output=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout == b""
    assert runs[0].stderr == runs[1].stderr and re.fullmatch(rb"[0-9a-f]{64}", runs[0].stderr)


@pytest.mark.parametrize(
    ("name", "doc", "answer"),
    [
        ("math.isqrt", "Return the root.", "Return the root."),
        ("m.f", "f(x) -> int\n\nreturn the   root\nof x. And more.", "Return the root of x."),
        ("m.f", "f(x,\n  y)\n\nReturn the root (e.g. 2) of x.\n\n>>> f(4)", "Return the root (e.g. 2) of x."),
        ("str.f", "S.f(x) -> int -- return the root of x", "Return the root of x."),
        ("m.f", "Return a :class:`~m.Thing` made of ``x``, or *None*.", "Return a `m.Thing` made of `x`, or None."),
        ("m.f", "f - make the thing work", "Make the thing work."),
        ("m.f", "One of:\n  - this\n  - that", ""),
        ("m.f", "Same as `g`, but slower.", ""),
        ("m.f", "Return x == y for all z.", ""),
        ("m.f", "Return the thing (as", ""),
        ("m.f", "short", ""),
        ("m.f", "The words go on and on, " * 20, ""),
        ("m.f", None, ""),
        ("m.f", 3, ""),
    ],
)
def test_first_sentence(name, doc, answer):
    assert first_sentence(doc, name) == answer
