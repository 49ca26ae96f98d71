"""Unsupervised: `minift finetune` on plain text, of which every token is learned."""

import numpy as np
import pytest

from minift.cli.common import read_data
from minift.data import stdlib_docs
from minift.io import load_tokenizer

QUICK = ["--steps", "3", "--eval-examples", "12", "--batch-size", "4", "--seq-len", "32", "--json"]


@pytest.fixture
def book(tmp_path):
    texts = [e.text for e in stdlib_docs.plain_text()[:60]]
    (tmp_path / "book.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return tmp_path / "book.txt"


def test_a_text_file_and_the_language_reference(call, book, tmp_path):
    for data in (book, "stdlib-text"):
        status, result, captured = call("finetune", "--method", "full", "--data", data, *QUICK, "--out", tmp_path / "r")
        assert status == 0, captured.err
        assert result["eval_loss_before"] != result["eval_loss_after"]
        assert "left out" not in captured.out and "cut to" not in captured.out


def test_no_token_of_the_language_reference_is_lost():
    tokenizer, found = load_tokenizer("tiny"), stdlib_docs.embedded()
    data = read_data("stdlib-text", tokenizer, 64, 10**6)
    assert data.conversations == []
    for rows, texts in ((data.train, found.train_text), (data.held_out, found.held_out_text)):
        counted = sum(int(np.count_nonzero(labels[1:] != -100)) for _, labels in rows)
        assert counted == sum(len(tokenizer.encode(e.text)) for e in texts)  # with the end, without the first
        assert max(len(tokens) for tokens, _ in rows) == 64
