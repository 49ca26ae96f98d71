"""One example of training data: a conversation, or plain text.

A conversation teaches its answers (what the assistant says); plain text teaches every token. All the forms that
files come in (`jsonl`) and the embedded set (`stdlib_docs`) become this one, and `templates` turns it into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


class DataError(ValueError):
    """Training data that cannot be used as it is: says where, what was found, and what was needed."""


@dataclass(frozen=True)
class Message:
    """One turn: who speaks (`system`, `user` or `assistant`) and what is said."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation (`messages`) or plain text (`text`), never both: `DataError` otherwise."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    def __post_init__(self):
        if bool(self.messages) == bool(self.text):
            found = "both" if self.text else "neither"
            raise DataError(f"an Example has either messages or text, got {found}")

    @property
    def answer(self) -> str:
        """What is learned: everything the assistant says, a line break between turns, or all of a plain text."""
        return self.text or "\n".join(m.content for m in self.messages if m.role == "assistant")

    @property
    def everything(self) -> str:
        """All that the model reads: every message, a line break between them, or the plain text."""
        return self.text or "\n".join(m.content for m in self.messages)


def pair(question: str, answer: str) -> Example:
    """A conversation of one question and its answer."""
    return Example((Message("user", question), Message("assistant", answer)))
