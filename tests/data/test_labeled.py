"""Labeled texts: no leak between the sides, strict files, and docstrings without their names."""

import json
import re

import numpy as np
import pytest

from minift.data import labeled, module_docs
from minift.data.example import DataError
from minift.data.labeled import LabeledText, pad_labeled
from minift.data.split import is_held_out, normalize, searchable, stands_in


def texts(n=200):
    return [LabeledText(f"text number {i} of {n}", "odd" if i % 2 else "even") for i in range(n)]


def test_the_hash_of_the_text_decides():
    sides = labeled.split(texts())
    assert all(is_held_out(e.text, 0.2) for e in sides.held_out) and not any(
        is_held_out(e.text, 0.2) for e in sides.train
    )
    assert len(sides.train) + len(sides.held_out) == 200 and 20 < len(sides.held_out) < 60
    again = labeled.split(texts()[::-1])
    assert {e.text for e in again.held_out} == {e.text for e in sides.held_out}
    assert sides.labels == ["even", "odd"]


def test_nothing_stands_twice_and_nothing_is_ambiguous():
    sides = labeled.split(texts())
    kept, asked = sides.train[0], sides.held_out[0]
    twice = [kept, LabeledText(f" {kept.text.upper()}!", kept.label)]
    assert labeled.split(twice).train == [kept]
    both = labeled.split([*twice, LabeledText(kept.text, "another"), sides.train[1]])
    assert both.train == [sides.train[1]]
    within = LabeledText(f"so: {asked.text}, they say", asked.label)
    while is_held_out(within.text, 0.2):
        within = LabeledText(within.text + " again", asked.label)
    assert labeled.split([asked, within, kept]).held_out == []
    assert labeled.split([LabeledText(asked.text, "unheard of"), kept]).held_out == []


def test_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in texts()))
    assert labeled.read(path) == labeled.split(texts())
    path.write_text('{"text": "a b", "label": "x"}\n{"text": "c d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*label"):
        labeled.read(path)
    path.write_text('{"text": "a b", "label": "x"}\n{"text": "c d", "label": "x"}\n')
    with pytest.raises(ValueError, match="1 labels and 0 held-out texts, needed at least 2 labels and 1 text"):
        labeled.read(path)


def test_a_batch_of_texts():
    found = pad_labeled([np.array([1, 2, 3], np.int32), np.array([4], np.int32)], [5, 6], pad_id=9)
    assert found.batch.tokens.tolist() == [[1, 2, 3], [4, 9, 9]] and found.count == len(found) == 2
    part = found.take(np.array([1])).cut(1)
    assert part.batch.tokens.tolist() == [[4]] and part.labels.tolist() == [6] and part.lengths.tolist() == [1]


# --- docstrings -------------------------------------------------------------------------------------------------------


def test_no_docstring_names_a_module_or_itself():
    sides = module_docs.embedded()
    everything = [*sides.train, *sides.held_out]
    names = re.compile(rf"\b({'|'.join(module_docs.MODULES)})\b", re.IGNORECASE)
    assert not [e for e in everything if names.search(e.text)]
    assert max(len(e.text) for e in everything) <= 300 + 20
    assert set(sides.labels) == set(module_docs.MODULES) == {e.label for e in sides.held_out}
    assert len(sides.train) > 1000 and len(sides.held_out) > 200


def test_what_is_held_out_stands_in_no_training_text():
    sides = module_docs.embedded()
    corpus = searchable(e.text for e in sides.train)
    assert not [e for e in sides.held_out if stands_in(e.text, corpus)]
    keys = [normalize(e.text) for e in (*sides.train, *sides.held_out)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("doc", "name", "expected"),
    [
        ("join(a, *p)\n\nJoin two or more\n  pathname parts.", "os.path.join", "_ two or more pathname parts."),
        ("Send an EMAIL over http, or sockets.", "http.client.HTTPConnection", "Send an _ over _, or sockets."),
        ("Parse it, then decode what is left.", "json.decoder.decode", "Parse it, then _ what is left."),
        ("Close it.", "socket.close", ""),
    ],
)
def test_names_are_masked(doc, name, expected):
    assert module_docs.masked(doc, name) == expected


def test_a_long_docstring_ends_with_a_word():
    found = module_docs.masked("word " * 100, "os.x")
    assert found == ("word " * 60).strip()
