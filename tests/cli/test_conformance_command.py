"""minift conformance: its table, its counterexamples, its JSON and its exit status."""

import json

import pytest

from minift.cli import main
from minift.conformance.operations import every

RIGHT = """
from minift.quant import nf4
def nf4_quantize(w, block_size):
    return nf4.quantize(w, block_size)
"""
WRONG = """
import numpy as np
from minift.quant import nf4
def nf4_quantize(w, block_size):  # the nibbles the other way round
    q = nf4.quantize(w, block_size)
    return (q.codes << np.uint8(4)) | (q.codes >> np.uint8(4)), q.absmax
"""
KEYS = {"implementation", "operation", "property", "passed", "counterexample", "cases", "reason"}


@pytest.fixture
def hold(tmp_path, capsys, monkeypatch):
    """hold(text of a file, *arguments) -> exit status, results, what was printed."""
    monkeypatch.chdir(tmp_path)

    def hold(text, *arguments):
        (tmp_path / "mine.py").write_text(text)
        options = ["--op", "nf4.quantize", "--examples", "2", "--json", *arguments]
        status = main(["conformance", "--impl", "mine.py", "reference", *options])
        out = capsys.readouterr().out
        return status, json.loads(out.splitlines()[-1]), out

    return hold


def test_a_right_file(hold):
    status, results, out = hold(RIGHT)
    assert status == 0
    assert {r["implementation"] for r in results} == {"mine", "reference"}
    assert len(results) == 2 * len(every()["nf4.quantize"].properties)
    assert all(set(r) == KEYS for r in results)
    assert all((r["passed"], r["counterexample"]) == (True, None) and r["cases"] > 0 for r in results)
    assert "mine             nf4.quantize             20 properties hold: " in out


def test_a_wrong_file(hold):
    status, results, out = hold(WRONG)
    assert status == 1
    failed = {r["property"]: r["counterexample"] for r in results if not r["passed"]}
    assert {r["implementation"] for r in results if not r["passed"]} == {"mine"}
    text = failed["the_first_of_two_codes_is_in_the_high_nibble"]
    assert text in out and "✗ mine nf4.quantize: the first of two codes is in the high nibble" in out
    assert len(text) < 200


def test_others_failures_are_findings(call, tmp_path):
    status, results, captured = call(
        "conformance", "--impl", "bitsandbytes", "--op", "nf4.quantize", "--examples", "0", "--out", tmp_path, "--json"
    )
    assert status == 0
    assert any(r["passed"] is False for r in results)
    assert json.loads((tmp_path / "summary.json").read_text()) == results
    assert "✗ bitsandbytes nf4.quantize: refuses what is not finite" in captured.out


def test_what_is_not_run_says_why(call):
    status, results, captured = call("conformance", "--impl", "peft", "triton", "--op", "nf4.dequantize", "--json")
    assert status == 0
    assert all((r["passed"], r["cases"]) == (None, 0) and r["reason"] for r in results if r["implementation"] == "peft")
    assert "– peft: not there" in captured.out


def test_the_list_explains(call):
    status, operations, captured = call("conformance", "--list", "--op", "nf4.quantize", "norms.rms_norm", "--json")
    assert status == 0
    assert [o["operation"] for o in operations] == ["nf4.quantize", "norms.rms_norm"]
    assert operations[0]["takes"].startswith("f(w, block_size) -> (codes, absmax)")
    assert "· ties go to the lower code: A number halfway between two entries gets the lower code" in captured.out


@pytest.mark.parametrize("name", ["nf4.quantize", "nf4.dequantize", "blockwise.quantize", "double_quant.compress"])
def test_every_property_is_explained(name):
    assert all(prop.__doc__ for prop in every()[name].properties)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nf4.quantise"], "operation: 'nf4.quantise', did you mean 'nf4.quantize'?"),
        (["--impl", "no_such.py"], "impl: found no file no_such.py"),
        (["--impl", "tritn"], "impl: 'tritn', did you mean 'triton'?"),
        (["--examples", "-1"], "examples is -1, needed 0 or more"),
        (["--seconds", "0"], "seconds is 0.0, needed more than 0"),
    ],
)
def test_bad_input(call, arguments, message):
    status, _, captured = call("conformance", *arguments)
    assert status == 2
    assert message in captured.err and captured.err.startswith("minift: ")
