"""Text files as training data: every paragraph once, nothing lost in long ones, held out by the same rule as JSONL."""

import numpy as np
import pytest
from small_tokenizer import SmallTokenizer, backend

from minift.data import jsonl, plain_text, split
from minift.data.batches import IGNORE_INDEX
from minift.data.example import DataError, Example
from minift.data.templates import encode_all

TOKENIZER = SmallTokenizer(backend())


def put(folder, content: bytes, name="book.txt"):
    (folder / name).write_bytes(content)
    return folder / name


def test_paragraphs_are_separated_by_blank_lines(tmp_path):
    expected = [Example(text="One\ntwo."), Example(text="  Three, with blanks before it."), Example(text="Four.")]
    text = "\n\nOne\ntwo.\n\n \t\n  Three, with blanks before it.\n\n\nFour.\n"
    for content in (text.encode(), text.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + text.encode()):
        assert plain_text.read(put(tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"book.txt: the file is empty"),
        (b" \n\n\t\n", r"book.txt: the file is empty"),
        (b"good\nb\xe4d\n", r"book.txt, line 2: byte 0xe4 is not valid UTF-8"),
    ],
)
def test_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        plain_text.read(put(tmp_path, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none.txt: No such file or directory, needed a text file"):
        jsonl.read_split(tmp_path / "none.txt")


def test_split_like_any_file(tmp_path):
    paragraphs = [f"Paragraph number {i} says {i * i}." for i in range(200)]
    train, held_out = jsonl.read_split(put(tmp_path, "\n\n".join([*paragraphs, paragraphs[3]]).encode()))
    assert len(train) + len(held_out) == 201 and 5 < len(held_out) < 40
    assert all(split.is_held_out(e.text) for e in held_out) and not any(split.is_held_out(e.text) for e in train)


@pytest.mark.parametrize("length", [2, 7, 8, 51, 52])
def test_a_long_text_becomes_rows_that_predict_every_token_once(length):
    text = "abcdefg " * 6 + "ab"
    tokens = np.array([*TOKENIZER.encode(text), TOKENIZER.eos_token_id])
    found = encode_all([Example(text=text)], TOKENIZER, max_length=length)
    assert (found.truncated, found.dropped) == (0, 0)
    assert all(len(row) <= length for row, _ in found.examples)
    predicted = [int(label) for _, labels in found.examples for label in labels[1:]]
    assert predicted == tokens[1:].tolist() and IGNORE_INDEX not in predicted
