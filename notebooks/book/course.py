"""What the front page says of the notebooks that there are, and of the lessons: lists with a line each, and links."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from minift.step.lessons import LESSONS


class Notebooks(SphinxDirective):
    """Every notebook: its title, and what it says it is about."""

    def run(self) -> list[nodes.Node]:
        entries = []
        for name in notebooks(self.env.found_docs):
            title, text = first_words(Path(self.env.doc2path(name)))
            link = _link(self.env.docname, name, title)
            definition = nodes.definition("", nodes.paragraph("", "", *_with_equations(text)))
            entries.append(nodes.definition_list_item("", nodes.term("", "", link), definition))
        return [nodes.definition_list("", *entries, classes=["names", "notebooks"])] if entries else []


class NotebookLink(SphinxRole):
    """{notebook}`3` is a link to the notebook whose name begins with 03, or its number alone where there is none."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        start = f"notebooks/{int(self.text):02}_"
        found = [name for name in notebooks(self.env.found_docs) if name.startswith(start)]
        return [_link(self.env.docname, found[0], self.text) if found else nodes.Text(self.text)], []


class Lessons(SphinxDirective):
    """Every lesson, its name a link to its page."""

    def run(self) -> list[nodes.Node]:
        items = [
            nodes.list_item("", nodes.paragraph("", "", _lesson(name), nodes.Text(f" {LESSONS[name]().title}")))
            for name in LESSONS
        ]
        return [nodes.bullet_list("", *items, classes=["lessons"])]


class LessonLink(SphinxRole):
    """{lesson}`lora` is a link to the page of that lesson."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        if self.text not in LESSONS:
            raise ValueError(f"{self.env.docname}: {self.text!r} is no lesson; needed one of {', '.join(LESSONS)}")
        return [_lesson(self.text)], []


def _lesson(name: str) -> nodes.Node:
    """Pages of lessons are no documents of Sphinx's; the tests see to it that they are there."""
    return nodes.reference("", "", nodes.literal(name, name), internal=True, refuri=f"steps/{name}.html")


def notebooks(names: set[str]) -> Iterator[str]:
    return (name for name in sorted(names) if re.match(r"notebooks/\d", name))


def first_words(path: Path) -> tuple[str, str]:
    """The title of a notebook, and the paragraph that introduces it, up to what one can do afterwards."""
    cells = json.loads(path.read_text())["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    title, _, rest = text.partition("\n")
    paragraph = next((part for part in rest.split("\n\n") if part.strip() and part.lstrip()[0].isalpha()), "")
    paragraph = " ".join(paragraph.partition("Afterwards you can")[0].split())
    return title.lstrip("# "), re.sub(r"[*`]|\]\([^)]*\)|\[", "", paragraph)


def _with_equations(text: str) -> Iterator[nodes.Node]:
    """What stands between dollars is TeX."""
    for number, part in enumerate(text.split("$")):
        yield nodes.math("", part) if number % 2 else nodes.Text(part)


def _link(here: str, name: str, text: str) -> nodes.Node:
    where = {"refdoc": here, "refdomain": "std", "reftype": "doc", "reftarget": f"/{name}", "refexplicit": True}
    return addnodes.pending_xref("", nodes.inline("", text), **where)


def setup(app: Sphinx) -> dict:
    app.add_directive("notebooks", Notebooks)
    app.add_directive("lessons", Lessons)
    app.add_role("notebook", NotebookLink())
    app.add_role("lesson", LessonLink())
    return {"parallel_read_safe": True}
