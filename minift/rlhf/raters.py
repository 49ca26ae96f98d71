"""Who compares two answers: a rubric, a file, any function; and a person, see `minift rate`.

A rater is a function of a question and two answers:

    rater(prompt, a, b) -> "first" | "second" | "tie" | "skip"

People disagree, also with themselves, so a rubric that never errs would teach a reward model from labels that nobody
has. `RubricRater` therefore prefers the worse answer with a chosen probability p. A reward model that has learned the
rubric perfectly agrees with such comparisons in a share 1 - p of them; that is the ceiling of its held-out accuracy.
The noise is no random stream but a function of the seed, the question and the pair,

    u = sha256(seed, prompt, {a, b}) as a fraction,     flipped if u < p                                           (1)

so the same rater says the same thing of a pair at any time, in any order, and with its answers exchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from minift.data import comparisons
from minift.data.comparisons import Comparison, as_text
from minift.data.example import Message
from minift.data.journal import Journal
from minift.rlhf.rubric import gold

Choice = Literal["first", "second", "tie", "skip"]
Rater = Callable[[str, str, str], Choice]

_EXCHANGED: dict[Choice, Choice] = {"first": "second", "second": "first", "tie": "tie", "skip": "skip"}


class FunctionRater:
    """Prefers the answer to which `score(prompt, answer) -> float` gives more; equal scores are a tie.

    A score that is no number, such as NaN, raises ValueError."""

    def __init__(self, score: Callable[[str, str], float]):
        self.score = score

    def __call__(self, prompt: str, a: str, b: str) -> Choice:
        first, second = self.score(prompt, a), self.score(prompt, b)
        for value, answer in ((first, a), (second, b)):
            if math.isnan(value):
                raise ValueError(f"the score of {answer[:100]!r} is {value}, needed a number")
        return "tie" if first == second else "first" if first > second else "second"


class RubricRater:
    """The rubric (`rubric.gold`), disagreeing with itself on a share of all pairs, by equation (1); ties stay ties.

    ValueError for a disagreement outside [0, 1], and for a question that the rubric is not for."""

    def __init__(self, disagreement: float = 0.1, seed: int = 0):
        if not 0 <= disagreement <= 1:
            raise ValueError(f"disagreement is {disagreement}, needed a probability, such as 0.1")
        self.disagreement, self.seed = disagreement, seed
        self._judge = FunctionRater(gold)

    def __call__(self, prompt: str, a: str, b: str) -> Choice:
        choice = self._judge(prompt, a, b)
        return _EXCHANGED[choice] if coin(self.seed, prompt, a, b) < self.disagreement else choice


class FileRater:
    """What the comparisons of a file say, whichever answer they name first; of several on a pair, the majority.

    A pair that is not in the file raises ValueError; `read` raises for the file."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        self._votes: dict[tuple[str, frozenset[str]], Counter[str | None]] = {}
        for c in comparisons.read(path):
            votes = self._votes.setdefault((c.question, frozenset((c.chosen, c.rejected))), Counter())
            votes[None if c.tie else c.chosen] += 1

    def __call__(self, prompt: str, a: str, b: str) -> Choice:
        votes = self._votes.get((prompt, frozenset((a, b))))
        if votes is None:
            raise ValueError(
                f"{os.fspath(self.path)}: no comparison of {a[:100]!r} and {b[:100]!r} for {prompt[:100]!r}"
            )
        return "tie" if votes[a] == votes[b] else "first" if votes[a] > votes[b] else "second"


def coin(seed: int, prompt: str, a: str, b: str) -> float:
    """u of equation (1): uniform in [0, 1), independent for every seed, prompt and unordered pair."""
    text = json.dumps([seed, prompt, *sorted((a, b))])  # escaped, so that no two lists are one text
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


# --- rating -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two different answers to one prompt, in the order in which they are shown."""

    prompt: tuple[Message, ...]
    left: str
    right: str


def pairs(prompt: tuple[Message, ...], answers: Iterable[str], seed: int = 0) -> list[Pair]:
    """All pairs of the answers that differ (K answers: up to K (K - 1) / 2), left and right by the toss of a coin.

    The coin is that of equation (1), so a pair is shown the same way around whenever it is shown."""
    different = list({answer.strip(): answer for answer in answers}.values())
    shown = []
    for a, b in combinations(different, 2):
        left, right = sorted((a, b)) if coin(seed, "left?" + as_text(prompt), a, b) < 0.5 else sorted((a, b))[::-1]
        shown.append(Pair(prompt, left, right))
    return shown


def rate(pairs: Iterable[Pair], rater: Rater, name: str, journal: Journal[Comparison]) -> Iterator[tuple[Pair, Choice]]:
    """Ask the rater for every pair that `name` has not rated in this file, and save each comparison as one goes.

    Yields what was said. A pair that is skipped is not saved, and comes again next time. For a person at a terminal see
    `cli.rate`, in a notebook `minift.notebook.rate_in_notebook`."""
    for pair in unrated(pairs, name, journal):
        choice = rater(as_text(pair.prompt), pair.left, pair.right)
        if choice != "skip":
            journal.append(comparison(pair, choice, name))
        yield pair, choice


def unrated(pairs: Iterable[Pair], name: str, journal: Journal[Comparison]) -> Iterator[Pair]:
    """The pairs that `name` has not rated in this file when they come up."""
    rated, read = set(), 0
    for pair in pairs:
        rated |= {_key(c.prompt, c.chosen, c.rejected) for c in journal.entries[read:] if c.rater == name}
        read = len(journal.entries)
        if _key(pair.prompt, pair.left, pair.right) not in rated:
            yield pair


def comparison(pair: Pair, choice: Choice, rater: str) -> Comparison:
    """What was said of a pair, as it is saved. No margin: it would tell more than a person's choice does."""
    chosen, rejected = (pair.right, pair.left) if choice == "second" else (pair.left, pair.right)
    side: comparisons.Side = "right" if choice == "second" else "left"
    return Comparison(pair.prompt, chosen, rejected, rater=rater, tie=choice == "tie", side=side)


def agreement(found: Iterable[Comparison], rater: Rater) -> tuple[int, int]:
    """In how many comparisons the rater prefers the chosen answer, and of how many: those in which nobody saw a tie."""
    says = [rater(c.question, c.chosen, c.rejected) for c in found if not c.tie]
    return says.count("first"), len(says) - says.count("tie")


def visible(text: str) -> str:
    """The text with what would move the cursor, change colors or not be seen at all written out."""
    if not text.strip():
        return "(nothing)"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _key(prompt: tuple[Message, ...], a: str, b: str) -> tuple[tuple[Message, ...], frozenset[str]]:
    return prompt, frozenset((a, b))
