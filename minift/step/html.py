"""A lesson as one page: it needs no network and no other file, and without scripts it is a long page to read.

Everything is written into the page: questions, steps, numbers. The script only shows one of them at a time, beside the
source with its line marked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np

from minift.step import products
from minift.step.describe import Leaf, cell, grids, leaves
from minift.step.formulas import Equation
from minift.step.lessons.lesson import Lesson, Question, Scene
from minift.step.products import Product
from minift.step.recorder import Step
from minift.step.source import Source
from minift.step.terminal import called, note_of, results

QUOTES = '"""'
PACKAGE = Path(__file__).parent.parent.parent


def page(lesson: Lesson, above: str = "") -> str:
    """The whole page; `above` is HTML that comes first, such as a way back to what it is a part of."""
    scenes = "\n".join(_scene(scene, index) for index, scene in enumerate(lesson.scenes))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(lesson.title)} · minift</title>
<style>
{_asset("page.css")}
</style>
</head>
<body>
{above}<header>
<h1>{escape(lesson.title)}</h1>
<p>{_prose(lesson.text)}</p>
</header>
<nav aria-label="Steps" hidden>
<button type="button" id="back" aria-label="Back">← Back</button>
<input type="range" id="slider" min="0" value="0" step="1" aria-label="Step">
<output id="count" for="slider"></output>
<button type="button" id="next" aria-label="Next">Next →</button>
<button type="button" id="everything" aria-pressed="false">All</button>
</nav>
<main>
{scenes}
</main>
<footer>The lines are those of minift, recorded while they ran.
<span class="keys">Keys: → or space, ←, Home, End.</span>
</footer>
<script>
{_asset("page.js")}
</script>
</body>
</html>
"""


def _scene(scene: Scene, index: int) -> str:
    steps = scene.recording.steps
    listed = _outermost(scene)
    stops = [stop for number, step in enumerate(steps) for stop in _stops(scene, number, step, listed)]
    return f"""<section class="scene" id="scene-{index + 1}">
<h2>{escape(scene.title)}</h2>
{f"<p>{_prose(scene.text)}</p>" if scene.text else ""}
<div class="stage">
<div class="sources">
{_equations(scene)}{"".join(_listing(source, key) for key, source in listed.items())}</div>
<div class="stops">
{"".join(stops)}</div>
</div>
</section>"""


def _stops(scene: Scene, number: int, step: Step, listed: dict[str, Source]) -> Iterator[str]:
    """The questions before a step, then the step: where Next stops."""
    for question in scene.questions_before(number):
        yield _question(question, scene, _place(step, listed))
    yield _step(scene, number, step, _place(step, listed))


def _place(step: Step, listed: dict[str, Source]) -> str:
    """Where in the listings a step is, for the script."""
    key = _key(step.source)
    last = step.line if step.kind == "call" else step.statement.last
    assert key in listed
    formula = ""
    if step.formula:
        formula = f' data-equation="{escape(step.formula.equation.text)}" data-term="{escape(step.formula.term)}"'
    return f'data-source="{escape(key)}" data-first="{step.line}" data-last="{last}"{formula}'


def _question(question: Question, scene: Scene, place: str) -> str:
    because = f" {escape(' '.join(question.because.split()))}" if question.because else ""
    return f"""<article class="stop question" {place}>
<p class="where">Before the next line</p>
<details><summary>{escape(question.text)}</summary>
<p><strong>{escape(question.answer_text(scene.recording))}</strong>{because}</p></details>
</article>
"""


def _step(scene: Scene, number: int, step: Step, place: str) -> str:
    kinds = {"call": "enter", "return": "return", "statement": ""}
    classes = f"stop step {kinds[step.kind]} {'backward' if step.backward else ''}".strip()
    code = called(step) if step.kind == "call" else step.text
    note = note_of(step)
    product = products.of(step)
    shown = [
        _leaf(leaf, scene, step, product) for name, value, old in results(step) for leaf in leaves(name, value, old)
    ]
    read = (
        []
        if step.kind == "return"
        else [
            _leaf(leaf, scene, step, None, read=True)
            for name, value in step.reads.items()
            if not callable(value) and name not in ("self", "_")
            for leaf in leaves(name, value)
            if leaf.array is not None or not step.statement.text.startswith("def ")
        ]
    )
    direction = "backward" if step.backward else "forward"
    return f"""<article class="{classes}" {place}>
<p class="where">{number + 1}/{len(scene.recording.steps)} · {escape(step.function)} · line {step.line}
<span class="direction">{direction}</span></p>
<pre class="code"><code>{escape(code)}</code></pre>
{_formula(step)}{f'<p class="note">{escape(note)}</p>' if note else ""}
<div class="values">{"".join(shown)}</div>
{f'<div class="reads"><p class="label">from</p>{"".join(read)}</div>' if read else ""}
</article>
"""


def _formula(step: Step) -> str:
    if step.formula is None:
        return ""
    equation, term = step.formula.equation, step.formula.term
    number = f'<b class="number">({equation.number})</b> ' if equation.number else ""
    text = term or equation.body
    return f'<p class="formula">{number}{escape(text)}</p>\n'


def _leaf(leaf: Leaf, scene: Scene, step: Step, product: Product | None, *, read: bool = False) -> str:
    name = f"<b>{escape(leaf.name)}</b>"
    if leaf.array is None:
        return f'<div class="value scalar">{name} <span>{escape(leaf.text)}</span></div>\n'
    some = leaf.changed is not None and bool(leaf.changed.any())
    as_before = '<span class="before">as before</span>' if leaf.changed is not None and not some and not read else ""
    fits = product if product and leaf.array.shape == product.shape else None
    hexadecimal = scene.in_hexadecimal(step.function, leaf.name)
    tables = "".join(_table(leaf, grid, hexadecimal, fits) for grid in grids(leaf.array))
    zero = (0, 0)
    written = (
        f'<p class="sum">{escape(product.text)} at [0, 0]: {product.sum_at(*zero)}</p>' if fits and product else ""
    )
    return f"""<div class="value"><p class="label">{name} <span>{escape(leaf.text)}</span>{as_before}</p>
<div class="tables">{tables}</div>{written}</div>
"""


def _table(leaf: Leaf, grid, hexadecimal: bool, product: Product | None) -> str:
    assert leaf.array is not None
    if not grid.rows:
        return '<p class="label">…</p>'
    largest = _largest(leaf.array)
    rows = "".join(
        f"<tr>{''.join(_cell(leaf, at, largest, hexadecimal, product) for at in row)}</tr>" for row in grid.rows
    )
    label = f"<caption>{escape(grid.label)}</caption>" if grid.label else ""
    return f"<table>{label}{rows}</table>"


def _cell(leaf: Leaf, at: tuple[int, ...] | None, largest: float, hexadecimal: bool, product: Product | None) -> str:
    if at is None:
        return "<td class=gap>…</td>"
    assert leaf.array is not None
    value = leaf.array[at]
    size = min(abs(float(value)) / largest, 1.0) if largest and np.isfinite(float(value)) else 0.0
    sign = "neg" if float(value) < 0 else "pos"
    new = " new" if leaf.changed is not None and leaf.changed[at] and not leaf.changed.all() else ""
    where = f"[{', '.join(map(str, at))}] = {value!s}"
    if product is not None:
        where += f"   {product.text}: {product.sum_at(*at)}"
    text = cell(leaf.array, at, hexadecimal=hexadecimal)
    return f'<td class="{sign}{new}" style="--h:{size:.2f}" title="{escape(where)}">{escape(text)}</td>'


def _largest(array: np.ndarray) -> float:
    finite = np.abs(array[np.isfinite(array)].astype(np.float64)) if array.dtype.kind != "b" else array.astype(float)
    return float(finite.max()) if finite.size else 0.0


def _outermost(scene: Scene) -> dict[str, Source]:
    """The functions whose source is listed, in the order in which they were entered; closures are in theirs."""
    return {_key(step.source): step.source for step in scene.recording.steps}


def _key(source: Source) -> str:
    return f"{_short(source.file)}:{source.first}"


def _short(file: str) -> str:
    path = Path(file)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


def _listing(source: Source, key: str) -> str:
    """The function as it stands in the file, less its docstrings, which have their equations beside it."""
    shown, skipping = [], False
    for number, line in enumerate(source.lines, source.first):
        quotes = line.count('"""')
        if skipping or (quotes and line.strip().startswith(('"""', 'r"""'))):
            if not skipping:
                shown.append(
                    f'<span class="line docstring"><i></i>{escape(line.partition(QUOTES)[0])}{QUOTES}…{QUOTES}</span>'
                )
            skipping = skipping != (quotes % 2 == 1)
            continue
        shown.append(f'<span class="line" data-line="{number}"><i>{number}</i>{escape(line) or " "}</span>')
    while shown and shown[-1].endswith("</i> </span>"):
        shown.pop()
    return f"""<figure class="listing" data-source="{escape(key)}"><figcaption>{escape(key)}</figcaption>
<pre>{"".join(shown)}</pre></figure>
"""


def _equations(scene: Scene) -> str:
    """Those that some line of the scene computes, as the docstrings have them."""
    used: dict[str, Equation] = {}
    for step in scene.recording.steps:
        if step.formula:
            used.setdefault(step.formula.equation.text, step.formula.equation)
    lines = [
        f'<li data-equation="{escape(text)}"><b class="number">{f"({e.number})" if e.number else ""}</b> '
        f"<span>{escape(e.body)}</span></li>"
        for text, e in used.items()
    ]
    return f'<ul class="equations" aria-label="Equations">{"".join(lines)}</ul>' if lines else ""


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


@lru_cache(maxsize=2)
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text().rstrip()
