"""What was found: one result for each implementation and property, as text, in a notebook, and as JSON."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

MARKS = {True: "✓", False: "✗", None: "–"}
STYLES = {True: "green", False: "bold red", None: "dim"}


@dataclass(frozen=True)
class Result:
    """`passed` is None where nothing was run, and `reason` says why."""

    implementation: str
    operation: str
    property: str
    passed: bool | None = None
    cases: int = 0  # in which the function was called
    counterexample: str | None = None
    reason: str = ""
    ours: bool = False
    mistake: str | None = None  # what the report says once, of however many properties

    def ran(self, cases: int, failing: tuple[Any, str] | None) -> Result:
        if failing is None:
            return replace(self, passed=True, cases=cases)
        case, message = failing
        words = message.split()
        no_such_function = words[:2] in (["it", "raised"], ["it", "returned"])
        mistake = " ".join(words[: 3 if words[1] == "raised" else 2]) if no_such_function else f"{case}: {message}"
        return replace(self, passed=False, cases=cases, counterexample=f"{case}: {message}", mistake=mistake)

    def not_run(self, reason: str) -> Result:
        return replace(self, reason=reason)

    def as_json(self) -> dict[str, Any]:
        names = ("implementation", "operation", "property", "passed", "counterexample", "cases", "reason")
        return {name: getattr(self, name) for name in names}


class Report:
    """Results, one after the other. Its text is a table for each operation, and below it what failed."""

    def __init__(self, results: Iterable[Result]):
        self.results = list(results)

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.passed is False]

    @property
    def cases(self) -> int:
        return sum(result.cases for result in self.results)

    def as_json(self) -> list[dict[str, Any]]:
        return [result.as_json() for result in self.results]

    def __rich__(self) -> RenderableType:
        """Tables side by side would not fit a terminal: one below the other."""
        parts: list[RenderableType] = []
        for operation, found in _grouped(self.results, lambda r: r.operation).items():
            if any(result.passed is not None for result in found):
                parts += [_table(operation, found), Text()]
        return Group(*parts, *map(Text, self._lines()))

    def _lines(self) -> list[str]:
        """What the tables have no room for: why something was not run, and what fails."""
        lines = []
        for (name, reason), found in _grouped(self.results, lambda r: (r.implementation, r.reason)).items():
            if reason:
                operations = _grouped(found, lambda r: r.operation)
                whole = len(operations) == len({r.operation for r in self.results if r.implementation == name})
                lines.append(f"– {name}: {reason}" + ("" if whole else f": {', '.join(operations)}"))
        for (name, operation, _), found in _grouped(
            self.failures, lambda r: (r.implementation, r.operation, r.mistake)
        ).items():
            properties = ", ".join(_plain(r.property) for r in found)
            smallest = min((r.counterexample or "" for r in found), key=len)
            lines += [f"✗ {name} {operation}: {properties}", f"    {smallest}"]
        return lines

    def __str__(self) -> str:
        plain = {"color_system": None, "emoji": False, "highlight": False, "force_jupyter": False}
        console = Console(width=120, soft_wrap=True, **plain)  # type: ignore[arg-type]
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For a notebook: a row for each property, and under it the counterexample."""
        names = list(dict.fromkeys(result.implementation for result in self.results))
        rows = ["<tr><th></th>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"]
        for (operation, prop), found in _rows(self.results).items():
            cells = (f"<td>{_cell(found.get(name))}</td>" for name in names)
            rows.append(f"<tr><td><code>{operation}</code> {_plain(prop)}</td>{''.join(cells)}</tr>")
        lines = "".join(f"<p><code>{html.escape(line)}</code></p>" for line in self._lines())
        return f"<table>{''.join(rows)}</table>{lines}"


class Counterexample(AssertionError):
    """What fails and the smallest input for it; `.report` has all results."""

    def __init__(self, report: Report):
        super().__init__(str(report))
        self.report = report

    def _render_traceback_(self) -> list[str]:
        """In a notebook: what was found, and not where in minift it was raised."""
        return str(self.report).splitlines()


def _table(operation: str, results: Sequence[Result]) -> Table:
    """A row for each property, a column for each implementation that ran; after the mark the number of cases."""
    names = list(dict.fromkeys(r.implementation for r in results if r.passed is not None))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(operation, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for (_, prop), found in _rows(results).items():
        cells = (found.get(name) for name in names)
        table.add_row(_plain(prop), *(Text(_cell(r), STYLES[r.passed if r else None]) for r in cells))
    return table


def _rows(results: Iterable[Result]) -> dict[tuple[str, str], dict[str, Result]]:
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        rows.setdefault((result.operation, result.property), {})[result.implementation] = result
    return rows


def _cell(result: Result | None) -> str:
    if result is None or result.passed is None:
        return MARKS[None]
    return f"{MARKS[result.passed]} {result.cases:,}"


def _plain(prop: str) -> str:
    return prop.replace("_", " ")


def _grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups
