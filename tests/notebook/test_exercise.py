"""An attempt shows what its check finds and lets the notebook go on; in strict mode it does not."""

import pytest

from minift.conformance import check
from minift.notebook import attempt
from minift.quant import nf4


def test_what_passes_is_solved(capsys):
    with attempt("5.2"):
        check("nf4.quantize", nf4.quantize, examples=5)
    assert capsys.readouterr().out == "Exercise 5.2: solved.\n"


def test_a_counterexample_is_shown(capsys):
    with attempt("5.2"):
        check("nf4.quantize", lambda w, block_size: nf4.quantize(-w, block_size), examples=5)
    shown = capsys.readouterr().out
    assert shown.startswith("Exercise 5.2: not yet.\n") and "✗" in shown and "w = [" in shown


@pytest.mark.parametrize(
    ("mistake", "shown"),
    [
        (ZeroDivisionError("division by zero"), "It raised ZeroDivisionError: division by zero"),
        (AssertionError(), "An assertion does not hold."),
        (AssertionError("3 is not 4"), "3 is not 4"),
    ],
)
def test_a_mistake_is_shown_in_a_sentence(mistake, shown, capsys):
    with attempt("1.1"):
        raise mistake
    assert capsys.readouterr().out == f"Exercise 1.1: not yet.\n{shown}\n"


def test_a_function_that_is_not_begun_is_not_solved(capsys):
    def mine(w, block_size):
        raise NotImplementedError("begin here")

    with attempt("5.2"):
        check("nf4.quantize", mine, examples=2)
    assert "not yet" in capsys.readouterr().out


def test_strict_raises(monkeypatch):
    monkeypatch.setenv("MINIFT_EXERCISES", "strict")
    with pytest.raises(AssertionError), attempt("1.1"):
        raise AssertionError


def test_an_interrupt_is_no_mistake():
    with pytest.raises(KeyboardInterrupt), attempt("1.1"):
        raise KeyboardInterrupt
