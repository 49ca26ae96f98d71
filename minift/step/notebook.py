"""A recording in a notebook: the page in a frame, and below it a table that is there where frames are not.

GitHub and nbviewer show neither frames nor scripts, but tables; a notebook that is not trusted shows them too.
"""

from __future__ import annotations

import io
import textwrap
from html import escape

from rich.console import Console

from minift.step import html, terminal
from minift.step.describe import leaves
from minift.step.lessons.lesson import Lesson, Question, Scene
from minift.step.recorder import Recording, Step

HEIGHT = 640  # pixels


class Shown:
    """What a notebook displays: text/html, or text/plain where that is all there is."""

    def __init__(self, lesson: Lesson, height: int = HEIGHT):
        self.lesson, self.height = lesson, height

    def _repr_html_(self) -> str:
        frame = f'<iframe srcdoc="{escape(html.page(self.lesson))}" style="width:100%;height:{self.height}px;border:0" '
        steps = "".join(_row(scene, number) for scene in self.lesson.scenes for number in range(_count(scene)))
        return (
            f'{frame}title="{escape(self.lesson.title)}"></iframe>\n'
            f"<details><summary>{escape(self.lesson.title)}: every step as a table</summary>\n<table>\n"
            "<thead><tr><th>line</th><th>statement and equation</th><th>what it set</th></tr></thead>\n"
            f"<tbody>{steps}</tbody>\n</table></details>\n"
        )

    def __repr__(self) -> str:
        """As `minift step --all` prints it."""
        text = io.StringIO()
        terminal.print_all(
            self.lesson, Console(file=text, width=terminal.WIDTH, markup=False, highlight=False, force_jupyter=False)
        )
        return text.getvalue()


def show(steps: Recording | Lesson, height: int = HEIGHT) -> Shown:
    """Display a recording or a lesson in a notebook, as the last expression of a cell."""
    return Shown(as_lesson(steps) if isinstance(steps, Recording) else steps, height)


def as_lesson(recording: Recording) -> Lesson:
    """A lesson of one scene, without words."""
    return Lesson(recording.name, recording.name, "", (Scene(recording.name, "", recording),))


def _count(scene: Scene) -> int:
    return len(scene.recording.steps)


def _row(scene: Scene, number: int) -> str:
    step = scene.recording.steps[number]
    code = terminal.called(step) if step.kind == "call" else step.text
    equation = ""
    if step.formula:
        equation = step.formula.term or step.formula.equation.text
        if step.formula.equation.number and step.formula.term:
            equation += f"  ({step.formula.equation.number})"
    return (
        "".join(_question(question, scene) for question in scene.questions_before(number))
        + f"<tr><td>{escape(step.function)}<br>line {step.line}</td><td><code>{escape(code)}</code>"
        + (f"<br><i>{escape(equation)}</i>" if equation else "")
        + f"</td><td><pre>{escape(_values(step))}</pre></td></tr>\n"
    )


def _question(question: Question, scene: Scene) -> str:
    answer = f"{question.answer_text(scene.recording)}  {question.because}"
    return (
        f"<tr><td></td><td><b>{escape(question.text)}</b></td>"
        f"<td><details><summary>answer</summary>{escape(answer)}</details></td></tr>\n"
    )


def _values(step: Step) -> str:
    found = [leaf for name, value, before in terminal.results(step) for leaf in leaves(name, value, before)]
    lines = [terminal.leaf_text(leaf).plain for leaf in found]
    return textwrap.dedent("\n".join([*lines, f"            {terminal.note_of(step)}"])).strip()
