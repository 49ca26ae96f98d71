"""`minift step`: through a reference function, a line at a time."""

from __future__ import annotations

import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minift.cli.common import console, emit
from minift.io.atomic import atomic_write
from minift.step import html, terminal
from minift.step.call import find, read_arguments
from minift.step.lessons import LESSONS, Lesson
from minift.step.notebook import as_lesson
from minift.step.recorder import step


@dataclass
class Step:
    """Step through the mathematics: the reference itself, a line at a time, with its numbers.

    minift step lora

    Enter goes on, b goes back, q ends. A lesson asks before it shows: type an answer, or Enter. Without a name the
    lessons are listed.

    minift step lora --html lora.html

    makes the same a page for the browser, in one file.

    minift step minift.nn.mlp:swiglu --args arguments.json

    goes through any other function. Its arguments are a JSON file: a list of them, lists of numbers being arrays, or
    {"args": [...], "kwargs": {...}, "cotangent": [...], "dtype": "float32"}; with a cotangent the pullback runs too.
    """

    name: Annotated[str, tyro.conf.Positional] = ""
    """A lesson, or module:function."""
    all: bool = False
    """Print everything, with the answers; so it is also where the output is no terminal."""
    html: Path | None = None
    """Write a page to this file instead. It needs no network, and is readable without scripts."""
    open: bool = False
    """Open that page in the browser."""
    args: Path | None = None
    """A JSON file with the arguments of module:function."""
    depth: int = 1
    """Of module:function: how many references below each other are opened beneath it."""
    into: tuple[str, ...] = ()
    """Of module:function: helpers to open besides, e.g. pack."""
    json: bool = False
    """Print what was stepped through as one JSON object on the last line."""

    def run(self) -> int:
        if not self.name:
            for name, build in LESSONS.items():
                console.print(f"{name:<15} {build().title}")
            emit({"lessons": [*LESSONS]}, self.json)
            return 0
        lesson = self._lesson()
        if self.html is not None:
            atomic_write(self.html, html.page(lesson).encode())
            console.print(f"{self.html}: {sum(len(scene.recording.steps) for scene in lesson.scenes)} steps")
            if self.open:
                webbrowser.open(self.html.resolve().as_uri())
        elif self.all or self.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            terminal.print_all(lesson, console)
        else:
            terminal.walk(lesson, console)
        emit(_facts(lesson), self.json)
        return 0

    def _lesson(self) -> Lesson:
        if self.name in LESSONS:
            if self.args is not None or self.into or self.depth != 1:
                raise ValueError(f"{self.name} is a lesson, with arguments of its own: --args is for module:function")
            return LESSONS[self.name]()
        if ":" not in self.name:
            raise ValueError(f"{self.name!r} is no lesson; needed one of {', '.join(LESSONS)}, or module:function")
        function = find(self.name)
        args, kwargs, cotangent = read_arguments(self.args) if self.args else ([], {}, None)
        try:
            recording = step(function, *args, cotangent=cotangent, depth=self.depth, into=self.into, **kwargs)
        except TypeError as error:
            raise ValueError(f"{self.name}: {error}; arguments come from --args FILE.json") from error
        return as_lesson(recording)


def _facts(lesson: Lesson) -> dict:
    scenes = [
        {
            "title": scene.title,
            "function": scene.recording.name,
            "steps": len(scene.recording.steps),
            "questions": [
                {"question": question.text, "answer": question.answer_text(scene.recording)}
                for question in scene.questions
            ],
        }
        for scene in lesson.scenes
    ]
    return {"lesson": lesson.name, "title": lesson.title, "scenes": scenes}
