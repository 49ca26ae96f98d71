"""Implementations: what is found in other libraries, and what users' files may look like."""

import sys

import numpy as np
import pytest
import torch

from minift.conformance import implementations
from minift.conformance.implementations import bitsandbytes, peft, reference, torchao, twins
from minift.conformance.operations import every
from minift.conformance.run import hold_all

MODULE = """
import numpy as np
from helper_beside import TABLE

def nf4_quantize(w, block_size):
    raise NotImplementedError("not yet")

CONFORMANCE = {"nf4.dequantize": lambda codes, absmax, shape, block_size: np.zeros(shape, np.float32)}
"""


def held(implementation, *names, seconds=60.0):
    """(operation, property) -> counterexample."""
    results = hold_all([implementation], [every()[name] for name in names], 0, seconds)
    return {(r.operation, r.property): r.counterexample for r in results if r.passed is False}


def test_defects_of_bitsandbytes_are_found():
    """On the CPU, by the fixed cases alone: 0.0 in 8 bits, vectors that come back as rows, NaN, and negative scales."""
    (theirs,) = bitsandbytes.implementations()
    found = held(theirs, *theirs.functions)
    zero = found["blockwise.quantize", "zero_is_exactly_zero"]
    assert zero.startswith("w = [0.0") and "code of element 0 is" in zero and zero.endswith("needed 127 (0.0)")
    assert "needed (2,)" in found["nf4.dequantize", "shape_and_type_come_back"]
    assert "is not refused" in found["nf4.quantize", "refuses_what_is_not_finite"]
    assert "decodes to -" in found["double_quant.compress", "no_scale_decodes_to_less_than_zero"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # a row of 96 numbers in blocks of 64
        assert "shape (2, 96)" in found["nf4.dequantize", "decodes_to_entry_times_absmax"]
    assert ("nf4.quantize", "codes_are_the_nearest") not in found
    assert ("nf4.quantize", "error_of_normal_numbers") not in found


def test_defects_of_torchao_are_found():
    (theirs,) = torchao.implementations()
    if theirs.missing:
        assert "not installed" in theirs.missing or "no NF4" in theirs.missing
        return
    found = held(theirs, "nf4.quantize")
    assert "w = [0.0 × " in found["nf4.quantize", "zero_is_exactly_zero"]
    assert ("nf4.quantize", "ties_go_to_the_lower_code") in found


def test_peft_computes_lora():
    (theirs,) = peft.implementations()
    rng = np.random.default_rng(0)
    x, W, A, B, dy = (rng.standard_normal(shape) for shape in ((2, 7), (5, 7), (3, 7), (5, 3), (2, 5)))
    y, vjp = theirs.functions["lora.forward"](x, W, A, B, 0.7)
    assert np.allclose(y, x @ (W + 0.7 * B @ A).T)
    dx, dW, dA, dB = vjp(dy)
    assert dW is None and np.allclose(dx, dy @ (W + 0.7 * B @ A))
    assert np.allclose(dA, 0.7 * B.T @ dy.T @ x) and np.allclose(dB, 0.7 * dy.T @ x @ A.T)
    with pytest.raises(NotImplementedError, match="dropout"):
        theirs.functions["lora.forward"](x, W, A, B, 0.7, 0.5, 3)


def test_the_twins_are_found_by_name():
    (plain,) = twins.implementations("torch")
    (interpreted,) = twins.implementations("interpreter")
    assert {"norms.rms_norm", "nf4.quantize", "nf4.dequantize", "double_quant.decode"} <= set(plain.functions)
    assert "norms.layer_norm" in interpreted.functions and "double_quant.decode" not in interpreted.functions
    assert plain.ours and interpreted.ours
    for one in twins.implementations("triton"):
        assert one.missing == ("" if torch.cuda.is_available() else "no GPU that PyTorch can use")
    assert set(twins.ADAPTED) <= set(every()), "adapters of operations that there are none of"
    assert held(plain, "nf4.quantize", *twins.ADAPTED, seconds=10) == {}
    assert held(interpreted, "nf4.quantize", "nf4.dequantize", seconds=5) == {}


def test_the_reference_has_every_operation():
    (ours,) = reference.implementations()
    assert set(ours.functions) == set(every()) and ours.ours


@pytest.mark.parametrize("without", ["torch", "bitsandbytes", "torchao", "peft", "minift_kernels"])
def test_what_is_not_installed_is_said(without, monkeypatch):
    """Every built-in implementation can be asked for on a machine without the package."""
    for name in [name for name in sys.modules if name == without or name.startswith(f"{without}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, without, None)
    missing = {name: find()[0].missing for name, find in implementations.BUILT_IN.items() if name != "reference"}
    mine = {"torch": missing, "minift_kernels": ("torch", "interpreter", "triton")}.get(without, (without,))
    for name in mine:
        assert f"{without} is not installed" in missing[name] or name == "torchao", (name, missing[name])


def test_a_users_file(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "helper_beside.py").write_text("TABLE = 1")
    (found,) = implementations.find(str(tmp_path / "mine.py"))
    assert (found.name, found.ours, set(found.functions)) == ("mine", True, {"nf4.quantize", "nf4.dequantize"})
    results = list(hold_all([found], [every()["nf4.quantize"]], 1, 5))
    assert {(r.passed, r.reason) for r in results} == {(None, "not yet")}
    assert str(tmp_path) not in sys.path


def test_a_users_module(tmp_path, monkeypatch):
    (tmp_path / "my_quantizers.py").write_text("def nf4_quantize(w, block_size): ...")
    monkeypatch.chdir(tmp_path)
    (found,) = implementations.find("my_quantizers")
    assert (found.name, list(found.functions)) == ("my_quantizers", ["nf4.quantize"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("there_is_none.py", None, "impl: found no file .*there_is_none.py, needed a Python file"),
        ("bitsandbyte", None, "impl: 'bitsandbyte', did you mean 'bitsandbytes'"),
        ("quite.another.thing", None, "impl: 'quite.another.thing', needed one of reference, torch, "),
        (
            "empty.py",
            "x = 1",
            r"empty.py: it has no function named as an operation, needed one or more such as ",
        ),
        ("broken.py", "\n\n1 / 0", "broken.py: line 3 raised ZeroDivisionError: division by zero"),
        ("wrong.py", "def f(:", "wrong.py: line .* raised SyntaxError"),
        (
            "imports.py",
            "import no_such_thing_here",
            "imports.py: it cannot be imported: No module named 'no_such_thing",
        ),
        ("named.py", "CONFORMANCE = {'nf4.quantise': 1}", "operation: 'nf4.quantise', did you mean 'nf4.quantize'"),
    ],
)
def test_what_cannot_be_found(name, text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        implementations.find(name)
