"""What a lesson is: scenes, each of which is one recorded call, and questions that come before their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minift.step.describe import said
from minift.step.recorder import Recording


@dataclass(frozen=True, eq=False)
class Question:
    """Asked before the first step whose source begins with `at` (in `function`, if that is named).

    An answer that can be computed is, from the recording, so it cannot differ from what is shown."""

    at: str
    text: str
    answer: Callable[[Recording], Any] | str  # a text where it is not a number, and is not judged
    because: str = ""
    function: str = ""

    def answer_text(self, recording: Recording) -> str:
        found = self.found(recording)
        if isinstance(found, np.ndarray):
            found = found.item() if found.size == 1 else found.squeeze().tolist()
        return found if isinstance(found, str) else said(found)

    def found(self, recording: Recording) -> Any:
        return self.answer if isinstance(self.answer, str) else self.answer(recording)

    def accepts(self, typed: str, recording: Recording) -> bool | None:
        """Whether what somebody typed is right: the same numbers, or the answer's first word among those typed; None
        where that is not for a program to judge."""
        if isinstance(self.answer, str):
            return None
        found = self.found(recording)
        if isinstance(found, str):
            return found.split()[0].strip(",.:;").lower() in typed.lower().replace(",", " ").split()
        try:
            numbers = [float(part) for part in typed.replace("−", "-").strip("[]() ").replace(",", " ").split()]
        except ValueError:
            return False
        expected = np.asarray(found, float).ravel()
        return len(numbers) == expected.size and np.allclose(numbers, expected, rtol=5e-3, atol=1e-9)


@dataclass(frozen=True, eq=False)
class Scene:
    """One recorded call, a few sentences before it, and its questions."""

    title: str
    text: str
    recording: Recording
    questions: tuple[Question, ...] = ()
    hexadecimal: tuple[str, ...] = ()  # bytes that are shown as such: ends of names, as in "pack.returned"

    def in_hexadecimal(self, function: str, name: str) -> bool:
        return any(f".{function}.{name}".endswith(f".{end}") for end in self.hexadecimal)

    def questions_before(self, number: int) -> Iterable[Question]:
        """What is asked before this step. ValueError for a question that no step answers is `check`'s to raise."""
        return [question for question in self.questions if self.place(question) == number]

    def place(self, question: Question) -> int | None:
        """The number of the step that a question comes before."""
        for number, step in enumerate(self.recording.steps):
            if step.text.startswith(question.at) and step.function.endswith(question.function):
                return number
        return None


@dataclass(frozen=True, eq=False)
class Lesson:
    """A title, what it is about, and scenes in order."""

    name: str
    title: str
    text: str
    scenes: tuple[Scene, ...]
