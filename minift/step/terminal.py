"""A recording in the terminal: a step at a time, or all of it."""

from __future__ import annotations

import ast
import math
import textwrap
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.text import Text

from minift.step import products
from minift.step.describe import NOTHING, Leaf, Unwritten, cell, facts, grids, leaves
from minift.step.lessons.lesson import Lesson, Question, Scene
from minift.step.recorder import Step

WIDTH = 100
CONTEXT = 3  # lines of source above and below, while one steps
KEYS = "Enter: next   b: back   q: quit"


def print_all(lesson: Lesson, console: Console) -> None:
    """Everything, one below the other, with the answers: for a pipe, a pager or a test."""
    _title(lesson, console)
    for scene in lesson.scenes:
        _scene_title(scene, console)
        for number, step in enumerate(scene.recording.steps):
            for question in scene.questions_before(number):
                console.print(_question(question))
                console.print(_answer(question, scene))
            _step(scene, number, step, console, context=0)
        console.print()


def walk(lesson: Lesson, console: Console, ask: Callable[[str], str] = input) -> None:
    """A step at each Enter; `b` goes back, `q` ends. A question comes before the step that answers it."""
    _title(lesson, console)
    places = [(scene, number) for scene in lesson.scenes for number in range(len(scene.recording.steps))]
    at, asked = 0, set()
    while at < len(places):
        scene, number = places[at]
        if number == 0:
            _scene_title(scene, console)
        for question in scene.questions_before(number):
            if question in asked:
                continue
            asked.add(question)
            console.print(_question(question))
            if not _respond(question, scene, ask, console):
                return
        _step(scene, number, scene.recording.steps[number], console, context=CONTEXT)
        answer = _input(f"  {at + 1}/{len(places)}   {KEYS}  ", ask)
        if answer is None or answer.strip().lower() == "q":
            return
        console.print()
        at = max(at - 1, 0) if answer.strip().lower() == "b" else at + 1
    console.print("  That was all of it.")


def _respond(question: Question, scene: Scene, ask: Callable[[str], str], console: Console) -> bool:
    """False to end."""
    said = _input("  Your answer (or Enter): ", ask)
    if said is None or said.strip().lower() == "q":
        return False
    if said.strip():
        right = question.accepts(said, scene.recording)
        if right is not None:
            console.print(Text("  Yes." if right else "  Not quite.", "green" if right else "yellow"))
    console.print(_answer(question, scene))
    return True


def _input(prompt: str, ask: Callable[[str], str]) -> str | None:
    try:
        return ask(prompt)
    except EOFError:
        return None


def _title(lesson: Lesson, console: Console) -> None:
    console.print(Text(lesson.title, "bold"))
    _paragraph(lesson.text, console)
    console.print()


def _scene_title(scene: Scene, console: Console) -> None:
    console.print(Text(f"── {scene.title} ".ljust(WIDTH, "─"), "bold"))
    if scene.text:
        _paragraph(scene.text, console)
    console.print()


def _paragraph(text: str, console: Console) -> None:
    console.print(textwrap.fill(text, WIDTH))


def _question(question: Question) -> Text:
    return Text.assemble(("  ? ", "bold magenta"), question.text)


def _answer(question: Question, scene: Scene) -> Text:
    because = textwrap.indent(textwrap.fill(question.because, WIDTH - 4), "    ")
    answer = Text.assemble(("  → ", "bold magenta"), (question.answer_text(scene.recording), "bold"), "\n")
    return answer.append(f"{because}\n") if because else answer


def _step(scene: Scene, number: int, step: Step, console: Console, *, context: int) -> None:
    where = f"{step.function}  line {step.line}"
    direction = "  backward" if step.backward else ""
    count = f"{number + 1}/{len(scene.recording.steps)}"
    console.print(Text(f"  {count:>7}  {'  ' * step.depth}{where}{direction}", "dim"))
    console.print(_source(step, context))
    if step.formula:
        console.print(_formula(step))
    for name, value, before in results(step):
        for leaf in leaves(name, value, before):
            console.print(leaf_text(leaf, scene.in_hexadecimal(step.function, leaf.name)))
    product = products.of(step)
    if product and step.sets and all(np.shape(value) == product.shape for value in step.sets.values()):
        console.print(Text(f"              {product.text} at [0, 0]: {product.sum_at(0, 0)}", "dim"))
    if note := note_of(step):
        console.print(Text(f"            {note}", "italic"))
    console.print()


def results(step: Step) -> list[tuple[str, object, object]]:
    """(name, value, what it was before) of everything that this step shows."""
    if step.kind == "call":
        own = step.source.arguments
        return [(name, value, NOTHING) for name, value in step.sets.items() if name in own]
    shown: list[tuple[str, object, object]] = [
        (name, Unwritten(facts(value)) if name in step.unwritten else value, step.before.get(name, NOTHING))
        for name, value in step.sets.items()
        if name != "_"
    ]
    return [*shown, *_returned(step)] if step.kind == "return" else shown


def _returned(step: Step) -> list[tuple[str, object, object]]:
    """What was returned; of several values each under the name that it has in the source."""
    expression = getattr(step.statement.node, "value", None)
    if isinstance(expression, ast.Tuple) and isinstance(step.value, tuple) and len(expression.elts) == len(step.value):
        simple = (ast.Name, ast.Attribute)
        names = [ast.unparse(e) if isinstance(e, simple) else f"returned[{i}]" for i, e in enumerate(expression.elts)]
        return [(name, part, NOTHING) for name, part in zip(names, step.value, strict=True) if part is not None]
    return [("returned", step.value, NOTHING)]


def called(step: Step) -> str:
    """A call in one line, however many its signature takes."""
    name = step.function.rpartition(".")[2]
    arguments = ", ".join(step.source.arguments)
    return f"lambda {arguments}: …" if name == "lambda" else f"def {name}({arguments})"


def note_of(step: Step) -> str:
    """What happened where no name was set."""
    if step.kind == "call":
        kept = [name for name in step.sets if name not in step.source.arguments]
        return f"kept from the forward pass: {', '.join(kept)}" if kept and step.backward else ""
    if step.raised:
        return f"raised {step.raised}"
    if step.taken is not None:
        return "true" if step.taken else "false: not entered"
    return ""


def _source(step: Step, context: int) -> Text:
    """The statement, in the interactive face with a few lines around it."""
    lines, first = step.source.lines, step.source.first
    if step.kind == "call":
        return Text(f"  → {step.line:>5}  {called(step)}", "bold cyan")
    start = max(step.statement.first - context, min(step.source.statements))
    stop = min(step.statement.last + context, max(step.source.statements))
    shown = Text()
    for line in range(start, stop + 1):
        now = step.statement.first <= line <= step.statement.last
        shown.append(f"  {'→' if now else ' '} {line:>5}  {lines[line - first]}\n", "bold cyan" if now else "dim")
    shown.rstrip()
    return shown


def _formula(step: Step) -> Text:
    """The equation, with the term that this line computes in color."""
    assert step.formula is not None
    equation, term = step.formula.equation, step.formula.term
    number = f"({equation.number})" if equation.number else "   "
    if not term:
        return Text.assemble("     ", (number, "bold green"), f"  {equation.body}")
    return Text.assemble("     ", (number, "bold green"), "  ", (term, "green"))


def leaf_text(leaf: Leaf, hexadecimal: bool = False) -> Text:
    """What it is, and its numbers below."""
    shown = Text.assemble("            ", (leaf.name, "bold"), f"  {leaf.text}")
    if leaf.array is None:
        return shown
    some = leaf.changed is not None and bool(leaf.changed.any()) and not leaf.changed.all()
    if leaf.changed is not None and not leaf.changed.any():
        shown.append("  (as before)", "dim")
    for grid in grids(leaf.array):
        if grid.label:
            shown.append(f"\n            {grid.label}")
        texts = [[_cell(leaf, at, hexadecimal, some) for at in row] for row in grid.rows]
        width = max((len(text) for row in texts for text, _ in row), default=1)
        fits = max(1, (WIDTH - 16) // (width + 2))
        for row in texts:
            for part in range(math.ceil(len(row) / fits)):
                shown.append("\n              ")
                for text, style in row[part * fits : (part + 1) * fits]:
                    shown.append(text.rjust(width + 2), style)
    return shown


def _cell(leaf: Leaf, at: tuple[int, ...] | None, hexadecimal: bool, some: bool) -> tuple[str, str]:
    """A changed cell among others carries a star, which is seen without color too."""
    if at is None:
        return "…", "dim"
    assert leaf.array is not None
    text = cell(leaf.array, at, hexadecimal=hexadecimal)
    if some and leaf.changed is not None:
        return (f"{text}*", "bold yellow") if leaf.changed[at] else (f"{text} ", "")
    return text, ""
