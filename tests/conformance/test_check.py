"""check(): what a student sees of a function that is right, of one that is wrong, and of one that is no such thing."""

import time

import numpy as np
import pytest
import torch

from minift.conformance import Counterexample, check, run
from minift.conformance.operations.nf4 import TABLE, THRESHOLDS
from minift.conformance.strategies import Codes, Numbers
from minift.nn.losses import cross_entropy
from minift.quant import nf4
from quant.wrong_quant import NearestInFloat64, Simple, SwappedNibbles, TiesUp, ZeroBlockIsCodeZero

f32 = np.float32


def fails(function, operation="nf4.quantize", **options):
    """property -> the counterexample's text."""
    with pytest.raises(Counterexample) as found:
        check(operation, function, **{"examples": 3, **options})
    return {result.property: result.counterexample for result in found.value.report.failures}


def right(w, block_size):
    found = Simple().quantize(w, block_size)
    return found.codes, found.absmax


def test_a_right_function():
    report = check("nf4.quantize", right, examples=10)
    assert report.failures == [] and report.cases > 500
    assert {result.passed for result in report.results} == {True}
    text = str(report)
    assert text.splitlines()[0].split() == ["nf4.quantize", "right"]
    assert "ties go to the lower code" in text and "✗" not in text
    assert "<th>right</th>" in report._repr_html_()


def test_the_smallest_counterexample_in_few_numbers():
    found = fails(ZeroBlockIsCodeZero().quantize)
    assert set(found) == {"zero_is_exactly_zero"}
    assert found["zero_is_exactly_zero"] == "w = [0.0], block_size 64: code of element 0 is 0 (-1.0), needed 7 (0.0)"
    found = fails(TiesUp().quantize)
    assert set(found) == {"ties_go_to_the_lower_code"}
    case, _, message = found["ties_go_to_the_lower_code"].partition(": ")
    assert case.count(",") == 2 and "is the midpoint between codes" in message  # two numbers and the block size
    found = fails(NearestInFloat64().quantize)
    assert "ties_go_to_the_lower_code" in found and "codes_are_the_nearest" not in found


def test_swapped_nibbles():
    text = fails(SwappedNibbles().quantize)["the_first_of_two_codes_is_in_the_high_nibble"]
    assert text.endswith("of table[15], table[7] byte 0 is 0x7f, needed 0xf7")
    assert text.startswith("w = [0.0], block_size 64: ")  # one code, and the one that it is paired with


def test_an_argument_that_is_overwritten():
    def scales_in_place(w, block_size):
        found = right(w, block_size)
        w *= f32(0.5)
        return found

    assert fails(scales_in_place)["nothing_is_changed"] == (
        "w = [-1.0], block_size 64: the argument is changed: now [-0.5]"
    )


def test_results_of_another_type():
    found = fails(lambda w, block_size: [part.astype(np.float64) for part in right(w, block_size)])
    assert found == {"results_have_their_types_and_sizes": "w = [], block_size 64: codes: float64, needed uint8"}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda w, block_size: None, "it returned None (needed (codes, absmax)); needed f(w, block_size) -> "),
        (lambda w, block_size: [1, 2, 3], "it returned a list of 3: a int, a int, a int ("),
        (lambda w, block_size: right(w, block_size)[0], "it returned a uint8 array of shape ("),
        (lambda w: right(w, 64), "it raised TypeError: "),
        (lambda w, block_size: w.unsqueeze(0), "it raised AttributeError: 'numpy.ndarray' object has no attribute"),
        (
            lambda w, block_size: [torch.tensor(part) for part in right(w, block_size)],
            "it returned a list of 2: a Tensor, a Tensor (torch tensors: say torch=True",
        ),
        (lambda w, block_size: (w[:0], w), "codes, needed "),
        (lambda w, block_size: 1 / 0, "it raised ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_such_function(function, said):
    """One sentence, and no traceback."""
    with pytest.raises(Counterexample) as found:
        check("nf4.quantize", function, examples=1)
    for result in found.value.report.failures:
        assert said in result.counterexample or result.property.startswith(("refuses", "results_have"))
        assert "\n" not in result.counterexample
    shown = "\n".join(found.value._render_traceback_())
    assert "✗" in shown and "Traceback" not in shown and "run.py" not in shown


def test_a_pullback_is_asked_for():
    found = fails(lambda x, weight, eps: x * weight, "norms.rms_norm", examples=1)
    for text in found.values():
        assert "it returned a float32 array of shape" in text
        assert "needed f(x (..., d), weight (d,), eps) -> y (..., d), vjp" in text


def test_a_pullback_that_spends_what_it_kept():
    """It says something else when it is called again, and every fresh one says the same as this one did."""

    def spent(logits, labels, normalizer):
        loss, vjp = cross_entropy(logits, labels, normalizer)
        kept = vjp(1.0)

        def once(dloss):
            np.multiply(kept, kept.dtype.type(dloss), out=kept)
            return kept.copy()

        return loss, once

    assert "second pullback" in fails(spent, "losses.cross_entropy", examples=0)["changes_nothing"]


def test_torch_functions():
    def rms_norm(x, weight, eps):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    assert check("norms.rms_norm", rms_norm, torch=True, examples=5, dtypes=("float32", "float64")).failures == []
    found = fails(lambda *args: rms_norm(*args).detach() + 1e-3, "norms.rms_norm", torch=True, examples=3)
    assert "is_within_its_bound" in found
    assert "torch=True" in fails(rms_norm, "norms.rms_norm", examples=1)["changes_nothing"]

    def quantize(w, block_size):
        codes, absmax = right(w.numpy(), block_size)
        return torch.from_numpy(codes), torch.from_numpy(absmax)

    assert check("nf4.quantize", quantize, torch=True, examples=3).failures == []


def test_an_operation_that_there_is_none_of():
    with pytest.raises(ValueError, match=r"operation: 'nf4.quantise', did you mean 'nf4.quantize'\? There are"):
        check("nf4.quantise", right)


def test_not_promised_is_not_run():
    def only_whole_blocks(w, block_size):
        if w.size % block_size:
            raise NotImplementedError("whole blocks only")
        return right(w, block_size)

    report = check("nf4.quantize", only_whole_blocks, examples=3)
    assert report.failures == [] and {r.passed for r in report.results} == {True}
    assert report.cases < check("nf4.quantize", right, examples=3).cases
    nothing = run.Attempt(lambda *args: (_ for _ in ()).throw(NotImplementedError("never")), *_operation_and_property())
    assert nothing(Numbers((1.0,))) is None and (nothing.cases, nothing.refusal) == (0, "never")


def _operation_and_property():
    operation = run.find("nf4.quantize")
    return operation, operation.properties[0]


def test_time_is_bounded(monkeypatch):
    """One case of each property, and then what is left of the time; shrinking too."""
    monkeypatch.setattr(run, "SHRINKING", 0.1)

    def slow(function):
        def f(w, block_size):
            time.sleep(0.01)
            return function(w, block_size)

        return f

    start = time.monotonic()
    report = check("nf4.quantize", slow(right), examples=1000, seconds=1)
    assert time.monotonic() - start < 15 and all(0 < r.cases < 40 for r in report.results)
    start = time.monotonic()
    assert fails(slow(SwappedNibbles().quantize), examples=1000, seconds=1)
    assert time.monotonic() - start < 20


def test_it_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check("double_quant.decode", run.find("double_quant.decode").reference)
    assert list(tmp_path.iterdir()) == []


def test_the_same_twice():
    def offset_forgotten(codes, absmax, offset, block_size):
        return run.find("double_quant.decode").reference(codes, absmax, f32(0), block_size)

    first, second = (fails(offset_forgotten, "double_quant.decode", examples=30) for _ in range(2))
    assert first == second and "needed " in first["decodes_with_two_roundings"]


def test_cases_as_text():
    assert str(Numbers((1.0, 0.0, 0.0, 0.0, 0.1))) == "w = [1.0, 0.0 × 3, 0.1], block_size 64"
    assert str(Numbers((0.1, -0.0, 0.0), 32, (3, 1), "float64")) == (
        "w = [0.1, -0.0, 0.0], block_size 32, shape (3, 1), float64"
    )
    many = str(Numbers(tuple(map(float, range(99)))))
    assert many.startswith("w = [0.0, 1.0, 2.0, ") and many.endswith("…, 96.0, 97.0, 98.0] (99 numbers), block_size 64")
    assert str(Codes((15, 15), (1.0,), offset=0.5)) == "codes = [15 × 2], absmax = [1.0], offset 0.5, block_size 64"
    assert str(Numbers((1.0,), table="int8")) == "w = [1.0], block_size 64, code int8"


def test_the_bytes_of_the_table():
    """Copied from bitsandbytes, derived in minift: two sources."""
    assert nf4.CODE.tobytes() == TABLE.tobytes() and nf4.MIDPOINTS.tobytes() == THRESHOLDS.tobytes()


def test_what_says_the_same_is_said_once():
    """A function that cannot do short blocks fails nearly everything, for one reason."""

    def only_whole_blocks(w, block_size):
        w.reshape(-1, block_size)
        return right(w, block_size)

    with pytest.raises(Counterexample) as found:
        check("nf4.quantize", only_whole_blocks, examples=1)
    report = found.value.report
    assert len(report.failures) > 10
    lines = [line for line in str(report).splitlines() if line.startswith(("✗", "    w"))]
    assert len(lines) == 2 and lines[1].startswith("    w = [0.0], block_size 64: it raised ValueError: cannot reshape")
