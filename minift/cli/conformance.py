"""`minift conformance`: implementations of the same operations, held against the same properties."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from minift.cli.common import console, emit
from minift.conformance import implementations, operations
from minift.conformance.operation import Operation, Property
from minift.conformance.report import Report, Result
from minift.conformance.run import hold_all
from minift.train.loop import at_least


@dataclass
class Conformance:
    """Hold minift, other libraries or your own code against the properties of each operation.

    minift conformance --impl my_module.py --op nf4.quantize

    holds the function nf4_quantize(w, block_size) of your file; `--list` says what each operation takes, and explains
    its properties. Without --impl everything is held that is installed here.

    A table says what holds (✓, and in how many cases), what does not (✗) and what was not run (–); below it is the
    smallest input that fails. The exit status is 1 if minift or your file fails; what fails elsewhere is a finding.
    """

    impl: tuple[str, ...] = tuple(implementations.BUILT_IN)
    """reference, torch, triton, interpreter (minift_kernels), bitsandbytes, torchao, peft; a Python file or module with
    functions such as nf4_quantize, or with CONFORMANCE = {"nf4.quantize": my_function}."""
    op: tuple[str, ...] = ()
    """Operations such as nf4.quantize; all of them if none is named."""
    examples: int = 20
    """How many cases to draw for each property, beside its fixed ones."""
    seconds: float = 120.0
    """About how long all of it may take. The properties share it; each sees one case at least, and what fails has two
    seconds more to become small. The number of cases says how far each came."""
    list: bool = False
    """Only print the operations: what each takes and returns, and its properties."""
    out: Path | None = None
    """A folder for summary.json, which holds the same as --json."""
    json: bool = False
    """Print the results as one JSON list on the last line."""

    def run(self) -> int:
        at_least(0, examples=self.examples)
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, needed more than 0")
        wanted = [operations.find(name) for name in self.op] or [*operations.every().values()]
        if self.list:
            for operation in wanted:
                _explain(operation)
            emit([_facts(operation) for operation in wanted], self.json, self.out)
            return 0
        held = [implementation for name in self.impl for implementation in implementations.find(name)]
        report = Report(self._told(hold_all(held, wanted, self.examples, self.seconds)))
        console.print()
        console.print(report)
        emit(report.as_json(), self.json, self.out)
        return int(any(result.ours for result in report.failures))

    def _told(self, results: Iterable[Result]) -> Iterator[Result]:
        """The results, with a line of progress for each implementation of an operation."""
        start = time.monotonic()
        for (name, operation), group in groupby(results, lambda r: (r.implementation, r.operation)):
            found = [*group]
            yield from found
            cases, failed = sum(r.cases for r in found), sum(r.passed is False for r in found)
            if cases:
                verdict = f"{failed} of {len(found)} properties fail" if failed else f"{len(found)} properties hold"
                took = f"{cases:,} cases, {time.monotonic() - start:.1f} s"
                console.print(f"{name:<16} {operation:<24} {verdict}: {took}")
            start = time.monotonic()


def _explain(operation: Operation) -> None:
    console.print(f"{operation.name}\n    {operation.takes}")
    for prop in operation.properties:
        console.print(f"    · {prop.__name__.replace('_', ' ')}" + f": {_said(prop)}" * bool(_said(prop)))
    console.print()


def _facts(operation: Operation) -> dict[str, Any]:
    properties = {prop.__name__: _said(prop) for prop in operation.properties}
    return {"operation": operation.name, "takes": operation.takes, "properties": properties}


def _said(prop: Property) -> str:
    """The first paragraph of what it says of itself."""
    return " ".join((inspect.getdoc(prop) or "").partition("\n\n")[0].split())
