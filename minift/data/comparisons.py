"""Comparisons of two answers to one question, in JSONL files in TRL's preference format.

    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}                         strings
    {"prompt": [{"role", "content"}, …], "chosen": [{…}], "rejected": [{…}]}     message lists, the prompt explicit
    {"chosen": [{…}, {…}], "rejected": [{…}, {…}]}                               or implicit: what both begin with

All become a `Comparison`, whose answers go through the chat template as other examples do. TRL joins strings as they
are, without a template, so what is written here are message lists, which both read alike. Of strings with an implicit
prompt the shared beginning is the prompt, up to a white space, so that no word is cut in two. Where "prompt" is a
string beside message lists, TRL leaves it out and takes the beginning that the lists share, and so does `read`.

These fields may be there too; TRL reads the first and passes over the others:

    margin    by how much the chosen answer is better, for the loss -log σ(r_chosen - r_rejected - margin); 0 or more
    rater     who compared
    tie       true where neither is better. TRL would take it for a preference: dataset.filter(lambda c: not c["tie"])
    side      where the chosen answer stood, "left" or "right"; of a tie, what stood left is under "chosen"

Answers may be empty (a model may say nothing), but not equal: there would be nothing to learn from the pair.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from minift.data.example import DataError, Message
from minift.data.journal import Journal, encoded
from minift.data.json_lines import keys, kind, messages, read_lines, string
from minift.io.atomic import atomic_write
from minift.io.errors import shown

_NEEDED = '{"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} that begin alike'

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Comparison:
    """Two answers to a conversation that ends with a question; `chosen` is the better one, unless it is a tie.

    Raises DataError for a prompt that does not end with the user, equal answers, or a margin that is negative or not
    finite."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    rater: str | None = None
    tie: bool = False
    side: Side | None = None

    def __post_init__(self):
        if not self.prompt or self.prompt[-1].role != "user":
            last = f"with the {self.prompt[-1].role}" if self.prompt else "before it began"
            raise DataError(f"the prompt ends {last}, needed a question of the user at its end")
        if self.chosen.strip() == self.rejected.strip():
            raise DataError("'chosen' and 'rejected' are equal; leave the line out")
        if self.margin is not None and not (math.isfinite(self.margin) and self.margin >= 0):
            raise DataError(f"'margin' is {self.margin}, needed a finite number of 0 or more")

    @property
    def question(self) -> str:
        """All that was said before the answers, a line break between messages."""
        return as_text(self.prompt)


def as_text(prompt: Iterable[Message]) -> str:
    """What raters get to read of a prompt: its messages, a line break between them."""
    return "\n".join(message.content for message in prompt)


def read(path: str | os.PathLike[str]) -> list[Comparison]:
    """All comparisons of a JSONL file, in order, ties among them.

    Raises DataError, with file and line, for what is in none of the forms above; see also `json_lines.read_lines`."""
    return read_lines(path, from_record, _NEEDED)


def write(path: str | os.PathLike[str], comparisons: Iterable[Comparison]) -> None:
    """A file that `read` turns into the same comparisons; it appears whole or not at all."""
    atomic_write(path, b"".join(encoded(to_record(c)) for c in comparisons))


def journal(path: str | os.PathLike[str]) -> Journal[Comparison]:
    """A file of comparisons to append to while rating goes on, see `Journal`."""
    return Journal(path, from_record, to_record)


# --- records ----------------------------------------------------------------------------------------------------------


def from_record(fields: dict[str, Any]) -> Comparison:
    """The comparison in one line's object. Raises DataError."""
    for key in ("chosen", "rejected"):
        if key not in fields:
            raise DataError(f"{key!r} is missing; found {keys(fields)}; needed {_NEEDED}")
    prompt, chosen, rejected = _answers(fields)
    margin, tie, side, rater = (fields.get(key) for key in ("margin", "tie", "side", "rater"))
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float))):
        raise DataError(f"'margin' is {kind(margin)}, needed a number")
    if tie is not None and not isinstance(tie, bool):
        raise DataError(f"'tie' is {kind(tie)}, needed true or false")
    if side not in (None, "left", "right"):
        raise DataError(f"'side' is {shown(side)}, needed 'left' or 'right'")
    if rater is not None:
        string(fields, "rater")
    try:
        margin = None if margin is None else float(margin)
    except OverflowError:
        raise DataError("'margin' is too large a number") from None
    return Comparison(prompt, chosen, rejected, margin, rater, bool(tie), side)


def to_record(comparison: Comparison) -> dict[str, Any]:
    """The object for one line: message lists, "tie" always, of the other fields what is known."""
    optional = {"margin": comparison.margin, "rater": comparison.rater, "side": comparison.side}
    return {
        "prompt": [{"role": m.role, "content": m.content} for m in comparison.prompt],
        "chosen": [{"role": "assistant", "content": comparison.chosen}],
        "rejected": [{"role": "assistant", "content": comparison.rejected}],
        "tie": comparison.tie,
    } | {name: value for name, value in optional.items() if value is not None}


def _answers(fields: dict[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    """Prompt, chosen and rejected, of whichever form."""
    if isinstance(fields["chosen"], str) or isinstance(fields["rejected"], str):
        chosen, rejected = (string(fields, key, blank=True) for key in ("chosen", "rejected"))
        if "prompt" in fields:
            return (Message("user", string(fields, "prompt")),), chosen, rejected
        shared = _shared(chosen, rejected)
        if not chosen[:shared].strip():
            raise DataError("'chosen' and 'rejected' begin differently, so there is no prompt; add 'prompt'")
        return (Message("user", chosen[:shared]),), chosen[shared:], rejected[shared:]
    chosen_turns, rejected_turns = (messages(fields[key], key, blank=True) for key in ("chosen", "rejected"))
    if "prompt" in fields and not isinstance(fields["prompt"], str):
        prompt = messages(fields["prompt"], "prompt", blank=True)
    else:
        longest = min(len(chosen_turns), len(rejected_turns)) - 1  # something must remain
        pairs = zip(chosen_turns[:longest], rejected_turns, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), longest)
        prompt, chosen_turns, rejected_turns = chosen_turns[:shared], chosen_turns[shared:], rejected_turns[shared:]
    return prompt, _answer(chosen_turns, "chosen"), _answer(rejected_turns, "rejected")


def _answer(turns: tuple[Message, ...], key: str) -> str:
    if [turn.role for turn in turns] != ["assistant"]:
        found = ", ".join(turn.role for turn in turns[:10])
        raise DataError(f"{key!r} has, after the prompt, messages of {found}; needed one of the assistant")
    return turns[0].content


def _shared(a: str, b: str) -> int:
    """How many characters two texts share from the beginning, back to before the last white space."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    while shared and not a[shared : shared + 1].isspace():
        shared -= 1
    return shared
