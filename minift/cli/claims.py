"""`minift claims`: the printed numbers, computed again."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from minift.claims import language_models, lora, nf4, optimizers, qlora, rlhf, soft_prompts
from minift.claims.claim import APPROXIMATELY, FALSE, TRUE, Claim
from minift.cli.common import console, emit

CLAIMS: dict[str, Callable[[], Claim]] = {
    name: function
    for module in (language_models, lora, qlora, nf4, optimizers, soft_prompts, rlhf)
    for name, function in module.CLAIMS.items()
}
STYLES = {TRUE: "green", FALSE: "red", APPROXIMATELY: "green", "depends": "yellow"}


@dataclass
class Claims:
    """Compute the numbers again that papers and textbooks print about fine-tuning, and say which of them are true.

    Everything in the column "found" is computed or measured while the command runs, from the code of this package:
    counts on real adapters, bytes of real tensors, errors of real quantizers. The verdicts: true (to the printed
    digits), approximately (within a tenth), false, or depends, with what it depends on.

    minift claims --only rank-of-the-update kl-of-best-of-n      explains these: what is said, where, how it is computed
    """

    only: tuple[str, ...] = ()
    """Names of claims (--list shows them): these alone, in full."""
    list: bool = False
    """Print the names instead."""
    out: Path | None = None
    """A folder for summary.json, which holds the same as --json."""
    json: bool = False
    """Print the rows as one JSON list on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        if unknown := [name for name in self.only if name not in CLAIMS]:
            raise ValueError(f"--only {unknown[0]}: no such claim, needed one of {', '.join(CLAIMS)}")
        names = self.only or tuple(CLAIMS)
        if self.list:
            console.print("\n".join(names))
            return 0
        found = {name: CLAIMS[name]() for name in names}
        for source in dict.fromkeys(claim.source for claim in found.values()):
            console.print(f"\n{source}", style="bold")
            group = {name: claim for name, claim in found.items() if claim.source == source}
            for name, claim in group.items() if self.only else ():
                explain(name, claim)
            if not self.only:
                console.print(table(list(group.values())))
        verdicts = Counter(claim.verdict.partition(":")[0] for claim in found.values())
        said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        console.print(f"\n{len(found)} claims, {time.perf_counter() - started:.0f} s: {said}")
        if not self.only:
            console.print("minift claims --only NAME … explains; --list prints the names")
        emit([as_row(name, claim) for name, claim in found.items()], self.json, self.out)
        return 0


def as_row(name: str, claim: Claim) -> dict[str, Any]:
    """What --json gives: the place is a part of the source, and there is always a command."""
    row = asdict(claim) | {"name": name, "command": _command(name, claim)}
    place = row.pop("place")
    return row | {"source": f"{claim.source}, {place}" if place else claim.source}


def table(claims: Sequence[Claim]) -> Table:
    """Claimed, found and verdict, within 80 columns; below a claim that is not simply true, why."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    made.add_column("claim", width=42)
    for heading, width in (("claimed", 8), ("found", 9)):
        made.add_column(heading, justify="right", no_wrap=True, width=width)
    made.add_column("verdict", no_wrap=True, width=13)
    for claim in claims:
        verdict, _, on = claim.verdict.partition(": ")
        made.add_row(claim.claim, number(claim.claimed), number(claim.found), Text(verdict, STYLES[verdict]))
        if verdict != TRUE:
            made.add_row(Padding(Text(on or claim.how, "dim"), (0, 0, 0, 2)))
    return made


def explain(name: str, claim: Claim) -> None:
    """One claim as a paragraph: what is said and where, how it is computed, and what came out."""
    function = CLAIMS[name]
    function = function.func if isinstance(function, partial) else function
    console.print(f"\n{name}" + (f", {claim.place}" if claim.place else ""))
    for line in inspect.getdoc(function).splitlines():  # type: ignore[union-attr]
        console.print(f"    {line}")
    console.print(f"  claimed   {number(claim.claimed)}")
    console.print(f"  found     {number(claim.found)}   ({claim.how})")
    console.print(f"  verdict   {claim.verdict}", style="bold")
    if claim.command:
        console.print(f"  see also  {claim.command}")


def number(value: float | str) -> str:
    """Whole numbers with commas, others to four digits."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _command(name: str, claim: Claim) -> str:
    return claim.command or f"minift claims --only {name}"
