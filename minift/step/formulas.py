"""Which equation a line computes: read off the docstring and the line themselves, so there is no table to go stale.

A docstring sets equations apart by indentation, gives them numbers at the end of the line, and separates those on one
line by three spaces or more:

        y = x Wᵀ + h Bᵀ        h = s x̃ Aᵀ        x̃ = dropout(x, p), on the detour only            (2)

A line of code belongs to one of them if

    its comment cites the number:                     inv_rms = …  # (..., 1), from rms(x) of (1)
    or it sets the name that the equation defines:    x_tilde = …  is  x̃ = …

where names are compared as they are written in code: x̃ is x_tilde, θ′ and θ are theta, δ_t is delta.
The function's own docstring comes first, then those of the functions around it (a pullback has its equations in the
operation's docstring), of the functions that it names ("the same as `adamw_1`"), and the module's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

MARKS = {"\N{COMBINING CIRCUMFLEX ACCENT}": "_hat", "\N{COMBINING TILDE}": "_tilde", "\N{COMBINING MACRON}": "_bar"}
PRIMES = "′'"


@dataclass(frozen=True)
class Equation:
    """One line of a docstring, as it stands there."""

    text: str
    number: str  # "2", or "" where the line has none
    terms: tuple[str, ...]  # the equations on it

    CITED: ClassVar[re.Pattern] = re.compile(r"\((\d{1,2})\)")

    @property
    def body(self) -> str:
        """Without its number, and with no more than three spaces between its terms."""
        return re.sub(r"\s{3,}", "   ", self.text.removesuffix(f"({self.number})").strip())

    def defines(self, name: str, fold: Callable[[str], str] = str) -> str | None:
        """The term whose left side is this name; `fold` says which names are the same."""
        return next((term for term in self.terms if fold(name) in map(fold, _defined(term))), None) if name else None


@dataclass(frozen=True)
class Formula:
    """The equation that a line computes, and which of the terms on it."""

    equation: Equation
    term: str  # "" where only the number is known


def equations(docstring: str) -> list[Equation]:
    """Everything that this docstring sets apart and numbers, and unnumbered lines that define something."""
    found = []
    for line in docstring.splitlines():
        if not (line.startswith("    ") or re.search(r"\s{3,}\(\d{1,2}\)$", line)):
            continue
        text = line.strip()
        number = re.search(r"\((\d{1,2})\)$", text)
        body = text[: number.start()] if number else text
        terms = tuple(part.strip() for part in re.split(r"\s{3,}", body) if _defined(part))
        if number or terms:
            found.append(Equation(text, number[1] if number else "", terms))
    return found


def find(
    known: Sequence[Equation], names: Iterable[str], comment: str, elsewhere: Sequence[Equation] = ()
) -> Formula | None:
    """The equation of a line that sets these names and carries this comment; a cited one may stand elsewhere."""
    names = list(names)
    for symbol, number in re.findall(r"(?:(\S+) of )?\((\d{1,2})\)", comment):
        cited = [equation for equation in (*known, *elsewhere) if equation.number == number]
        if cited:
            return _of_names(cited, [in_code(symbol), *names]) or Formula(cited[0], "")
    return _of_names(known, names)


def _of_names(equations: Sequence[Equation], names: list[str]) -> Formula | None:
    """The first equation that defines one of these names; where there is none, in whatever case it is written."""
    for fold in (str, str.lower):
        for equation in equations:
            for name in names:
                term = equation.defines(name, fold)
                if term:
                    return Formula(equation, term)
    return None


def _defined(term: str) -> tuple[str, ...]:
    """The names on the left side, with and without what is written below the line."""
    left, equals, _ = term.partition(" = ")
    if not equals or " " in left.strip():
        return ()
    name = in_code(left.strip())
    return (name, re.sub(r"_(\{.*\}|[a-z0-9])$", "", name))


def in_code(symbol: str) -> str:
    """How a symbol is written in code: θ̂′ -> theta_hat."""
    written = ""
    for char in unicodedata.normalize("NFKD", symbol):
        name = unicodedata.name(char, "")
        if char in MARKS:
            written += MARKS[char]
        elif name.startswith("GREEK") and "LETTER" in name:
            letter = name.split("LETTER ")[1].split(" ")[0].lower()
            written += letter if "SMALL" in name else letter.capitalize()
        elif char not in PRIMES:
            written += char
    return written
