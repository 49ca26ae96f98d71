"""The course: every notebook is built from its text, runs with its exercises solved, and prints what it says.

`make test` runs them in small mode (MINIFT_NOTEBOOKS=small: few steps) with the solutions in place of the attempts, and
compares the output of cells marked `stated`. `make test-all` runs them as they are committed, and compares the output
of every cell that is not marked `varies`.
"""

from __future__ import annotations

import importlib.util
import re
from itertools import zip_longest
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
_spec = importlib.util.spec_from_file_location("build_notebooks", NOTEBOOKS / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

NUMBER = re.compile(r"[-+−]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
every_notebook = pytest.mark.parametrize("source", build.sources(), ids=lambda source: source.stem)


def committed(source):
    return nbformat.read(NOTEBOOKS / f"{source.stem}.ipynb", as_version=4)


def printed(cell) -> str:
    """What a cell printed and returned, as text."""
    outputs = cell.get("outputs", [])
    streams = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    values = [o.data.get("text/plain", "") for o in outputs if o.output_type == "execute_result"]
    return "\n".join([streams, *values]).strip()


def value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))


def last_digit(number: str) -> float:
    decimals = number.partition("e")[0].partition(".")[2]
    return 10.0 ** -len(decimals)


def assert_same_text(found: str, expected: str, tolerance: float) -> None:
    """The same words; and numbers that differ by this part of themselves, or by one in the last digit printed."""
    for ours, theirs in zip_longest(found.splitlines(), expected.splitlines(), fillvalue=""):
        words = [NUMBER.sub("#", line).split() for line in (ours, theirs)]
        assert words[0] == words[1], f"it prints {ours!r}, and the notebook says {theirs!r}"
        for one, other in zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True):
            allowed = tolerance * abs(value(other)) + last_digit(other) * 1.01
            assert abs(value(one) - value(other)) <= allowed, f"it prints {ours!r}, and the notebook says {theirs!r}"


def assert_same_outputs(notebook, source, compared, tolerance) -> None:
    for cell, before in zip(notebook.cells, committed(source).cells, strict=True):
        if cell.cell_type == "code" and compared(cell):
            assert_same_text(printed(cell), printed(before), tolerance)


@every_notebook
def test_is_built_from_its_text(source):
    wanted, found = build.read(source), committed(source)
    for number, (cell, built) in enumerate(zip_longest(wanted.cells, found.cells)):
        kept = {name: built.metadata[name] for name in build.KEPT if name in built.metadata}
        again = f"cell {number} is not {source.name}'s: python notebooks/build.py {source.name[:2]}"
        assert (cell.cell_type, cell.source, dict(cell.metadata)) == (built.cell_type, built.source, kept), again
    assert not any(o.output_type == "error" for cell in found.cells for o in cell.get("outputs", []))


@every_notebook
def test_has_what_a_notebook_of_the_course_has(source):
    notebook = build.read(source)
    words = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    number = source.name[:2].lstrip("0")
    for part in (
        f"# {source.name[:2]} · ",
        "Afterwards you can",
        "## What to look at",
        "## Sources",
        rf"\tag{{{number}.",
    ):
        assert part in words, f"no {part!r}"
    exercises = [cell.metadata["exercise"] for cell in notebook.cells if "exercise" in cell.metadata]
    assert exercises == [f"{number}.{k}" for k in range(1, len(exercises) + 1)] and len(exercises) >= 3
    for exercise in exercises:
        assert f"### Exercise {exercise}" in words
        graded = [cell for cell in code if f'attempt("{exercise}")' in cell]
        assert len(graded) == 1 and "check(" in graded[0], f"exercise {exercise} is not graded by check"
    assert any("image/png" in o.get("data", {}) for cell in committed(source).cells for o in cell.get("outputs", []))


@every_notebook
def test_an_exercise_is_not_solved_before_it_is_begun(source):
    """What is committed is the reader's first attempt, with what `check` finds."""
    for cell in committed(source).cells:
        if cell.cell_type == "code" and "attempt(" in cell.source and "import" not in cell.source:
            assert "not yet" in printed(cell), cell.source


@every_notebook
def test_runs_with_the_solutions_and_prints_what_it_states(source, monkeypatch):
    monkeypatch.setenv("MINIFT_NOTEBOOKS", "small")
    monkeypatch.setenv("MINIFT_EXERCISES", "strict")
    notebook = build.execute(build.solved(source))
    assert_same_outputs(notebook, source, lambda cell: cell.metadata.get("stated"), tolerance=0.005)


@pytest.mark.slow
@every_notebook
def test_runs_as_it_is_committed(source, monkeypatch):
    """In full. Training on another machine ends a little elsewhere: five percent. What `check` finds of a mistake is
    whatever it has made small in its time."""
    monkeypatch.delenv("MINIFT_NOTEBOOKS", raising=False)
    monkeypatch.delenv("MINIFT_EXERCISES", raising=False)
    notebook = build.execute(build.read(source))

    def compared(cell):
        return not cell.metadata.get("varies") and "attempt(" not in cell.source

    assert_same_outputs(notebook, source, compared, tolerance=0.05)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("error 0.0728", "error 0.0740"),
        ("error 0.0728", "mistake 0.0728"),
        ("error 0.0728", ""),
        ("", "error 0.0728"),
        ("1,000,576 numbers", "1,100,576 numbers"),
        ("-0.5", "0.5"),
    ],
)
def test_the_comparison_sees_a_difference(found, expected):
    with pytest.raises(AssertionError):
        assert_same_text(found, expected, 0.005)


def test_the_comparison_allows_the_last_digit_and_other_spaces():
    assert_same_text("error  0.0728\n1,000,577", "error 0.0729\n1,000,576", 0)
