"""The lessons of `minift step` as pages, and the page that lists them and says what each asks."""

from __future__ import annotations

from html import escape
from textwrap import indent

from sphinx.util.rst import escape as plain

from minift.step import html
from minift.step.lessons import LESSONS, Lesson

# The book's choice of light or dark is kept by the browser, under the name that its theme has given it.
FOLLOW = """<script>
try {
  const chosen = localStorage.getItem("theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.style.colorScheme = chosen;
} catch { /* no storage: the system's choice */ }
</script>"""


def pages() -> dict[str, str]:
    """{file name: text}: `steps/NAME.html` for every lesson, and `steps.rst`, the list."""
    lessons = [build() for build in LESSONS.values()]
    found = {"steps.rst": _list(lessons)}
    for before, lesson, after in zip([None, *lessons], lessons, [*lessons[1:], None], strict=False):
        found[f"steps/{lesson.name}.html"] = html.page(lesson, above=_way_back(before, after))
    return found


def _way_back(before: Lesson | None, after: Lesson | None) -> str:
    links = ['<a target="_top" href="../steps.html">The book: all lessons</a>']
    links += [f'<a target="_top" rel="prev" href="{before.name}.html">← {escape(before.title)}</a>'] if before else []
    links += [f'<a target="_top" rel="next" href="{after.name}.html">{escape(after.title)} →</a>'] if after else []
    return f'<p class="around">{" ".join(links)}</p>\n{FOLLOW}'


def _list(lessons: list[Lesson]) -> str:
    head = """Step by step
============

.. docstring::

   Each lesson steps through functions of `minift` while they run, a line at a time, forward and backward, with numbers
   small enough to check by hand. It asks before it shows. In a terminal the same is `minift step lora`.
"""
    return "\n".join([head, *map(_entry, lessons)])


def _entry(lesson: Lesson) -> str:
    title = f"`{plain(lesson.title)} <steps/{lesson.name}.html>`__"
    steps = sum(len(scene.recording.steps) for scene in lesson.scenes)
    asked = [" ".join(question.text.split()) for scene in lesson.scenes for question in scene.questions]
    questions = "\n".join(f"- {question}" for question in asked)
    return f"""
{title}
{"-" * len(title)}

.. docstring::

{indent(lesson.text, "   ")}

   `minift step {lesson.name}`, {steps} steps. It asks:

{indent(questions, "   ")}
"""
