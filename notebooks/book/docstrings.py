"""Docstrings as they are written here, shown as they are meant: prose flows, equations keep their lines.

A docstring is plain text. Its prose may be set again to any width, so that it can be read on a phone. What is indented,
an equation or a table, is aligned by hand and keeps its lines and spaces. This is what is recognized:

    `names`, *stress*, **bold** beginnings          a name is a link where it is one of ours
    indented lines, lines that end in a number      kept as they are, the numbers in a column of their own
    (Author 2023, …) behind a gap                   a source
    a name, a gap, what it is, on several lines     a list of names
    a dash, and what hangs below it                 a list

A number in prose, such as (2), leads to the equation that has it in the same module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from textwrap import dedent

from docutils import nodes
from docutils.parsers.rst import directives
from modules import NUMBER, read
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.nodes import find_pending_xref_condition

YEAR = r"(?=.*\b(?:1[89]|20)\d\d\b)"
SOURCE = re.compile(rf"\s{{2,}}(\({YEAR}(?:[^()]|\([^()]*\))*\))", re.DOTALL)  # a parenthesis, with those in it
ENTRY = re.compile(r"(?P<name>\S+(?: \S+)*) {2,}(?P<text>\S.*)")
INLINE = re.compile(
    r"`(?P<code>[^`]+)`|\*\*(?P<bold>[^*]+)\*\*|(?<![\w*])\*(?P<stress>\w[^*]*)\*(?!\w)|(?<![\w)\]])\((?P<number>\d+[a-z]?)\)"
)
ELSEWHERE = re.compile(r"(?:,? (?:and|to|or) \(\d+[a-z]?\))* of `")  # "(1) of `lora`" stands in another file


def parts(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(kind, lines): what is shown alike. The blank lines between two blocks that are kept are kept too."""
    paragraphs = [[*group] for blank, group in groupby(lines, lambda line: not line.strip()) if not blank]
    kept: list[str] = []
    for kind, part in (part for paragraph in paragraphs for part in _divided(paragraph)):
        if kind == "kept":
            kept += ["", *part] if kept else part
            continue
        if kept:
            yield "kept", kept
            kept = []
        yield kind, part
    if kept:
        yield "kept", kept


def _divided(paragraph: list[str]) -> Iterator[tuple[str, list[str]]]:
    if paragraph[0].startswith("- "):
        yield "list", paragraph
    elif all(line.startswith("minift ") for line in paragraph):
        yield "kept", paragraph
    elif len(paragraph) > 1 and not any(map(NUMBER.search, paragraph)) and _entries(paragraph):
        yield "names", paragraph
    else:
        yield from ((kind, [line for _, line in group]) for kind, group in groupby(_lines(paragraph), lambda x: x[0]))


def _lines(paragraph: list[str]) -> Iterator[tuple[str, str]]:
    """Each line with its kind. A source that stands at the right may go on in the next line."""
    open_parentheses = 0
    for number, line in enumerate(paragraph):
        if open_parentheses or SOURCE.match("\n".join(paragraph[number:])):
            open_parentheses += line.count("(") - line.count(")")
            yield "source", line
        else:
            yield "kept" if line.startswith("  ") or NUMBER.search(line) else "prose", line


def _entries(lines: list[str]) -> list[tuple[str, str]]:
    """(name, what it is); none if some line is neither such an entry nor a continuation."""
    entries: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("  ") and entries:
            entries[-1] = entries[-1][0], f"{entries[-1][1]} {line.strip()}"
        elif found := ENTRY.fullmatch(line):
            entries.append((found["name"], found["text"]))
        else:
            return []
    return entries


class Source(SphinxDirective):
    """Code below a line that opens it."""

    has_content = True
    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"open": directives.flag}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        code = "\n".join(self.content)
        opened = " open" if "open" in self.options else ""
        before = f'<details class="code"{opened}><summary>{escape(self.arguments[0])}</summary>'
        return [
            nodes.raw("", before, format="html"),
            nodes.literal_block(code, code, language="python"),
            nodes.raw("", "</details>", format="html"),
        ]


class Docstring(SphinxDirective):
    """Its content is a docstring of the module that the page is about."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        self.names = read(self.config.book_only)
        self.module = self.env.ref_context.get("py:module", "")
        self.numbers = self.names.modules[self.module].numbers if self.module else set()
        return [self.shown(kind, lines) for kind, lines in parts([*self.content])]

    def shown(self, kind: str, lines: list[str]) -> nodes.Node:
        text = "\n".join(lines)
        if kind == "kept":
            return self.kept(dedent(text).split("\n"))
        if kind == "source":
            return nodes.paragraph("", " ".join(text.split()), classes=["source"])
        if kind == "names":
            return nodes.definition_list("", *(self.entry(*entry) for entry in _entries(lines)), classes=["names"])
        if kind == "list":
            items = (self.paragraph(item) for item in re.split(r"^- ", text, flags=re.MULTILINE)[1:])
            return nodes.bullet_list("", *(nodes.list_item("", item) for item in items))
        return self.paragraph(text)

    def kept(self, lines: list[str]) -> nodes.Node:
        """Where the screen is narrow the lines scroll, and their numbers stay beside them."""
        column = []
        for line in lines:
            found = NUMBER.search(line)
            column.append(f"<span{self.anchor(found[1])}>({found[1]})</span>" if found else "")
        shown = "\n".join(escape(NUMBER.sub("", line)) for line in lines)
        beside = "<pre class=numbers>" + "\n".join(column) + "</pre>" if any(column) else ""
        return nodes.raw("", f'<div class="kept"><pre tabindex="0">{shown}\n</pre>{beside}</div>', format="html")

    def anchor(self, number: str) -> str:
        """For the first equation of the page that has this number."""
        seen = self.env.temp_data.setdefault("equations", set())
        first = number not in seen
        seen.add(number)
        return f' id="equation-{number}"' if first else ""

    def entry(self, name: str, text: str) -> nodes.Node:
        term = nodes.term("", "", nodes.literal(name, name))
        return nodes.definition_list_item("", term, nodes.definition("", self.paragraph(text)))

    def paragraph(self, text: str) -> nodes.Node:
        before, *source = SOURCE.split(text, maxsplit=1)
        found = [*self.words(before)]
        if source:
            found += [nodes.Text(" "), nodes.inline("", " ".join(source[0].split()), classes=["source"])]
            found += self.words(source[1])
        return nodes.paragraph("", "", *found)

    def words(self, text: str) -> Iterator[nodes.Node]:
        text, end = re.sub(r"\s+", " ", text), 0
        for found in INLINE.finditer(text):
            yield nodes.Text(text[end : found.start()])
            end = found.end()
            if found["code"]:
                yield self.code(found["code"])
            elif found["bold"]:
                yield nodes.strong("", "", *self.words(found["bold"]))
            elif found["stress"]:
                yield nodes.emphasis("", "", *self.words(found["stress"]))
            elif found["number"] in self.numbers and not ELSEWHERE.match(text, end):
                yield nodes.reference("", found[0], internal=True, refuri=f"#equation-{found['number']}")
            else:
                yield nodes.Text(found[0])
        yield nodes.Text(text[end:])

    def code(self, code: str) -> nodes.Node:
        return _link(self.env.docname, code, self.names.find(code, self.module))


class ModuleLink(SphinxRole):
    """{module}`minift.nn.norms` in a page that is not a module's; its last part is shown."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        found = self.text if self.text in read(self.config.book_only).all else None
        return [_link(self.env.docname, self.text.rpartition(".")[2], found)], []


def _link(here: str, code: str, target: str | None) -> nodes.Node:
    """In code font; a link if there is something to link to."""
    literal = nodes.literal(code, code)
    if target is None:
        return literal
    return addnodes.pending_xref(
        code, literal, refdoc=here, refdomain="py", reftype="obj", reftarget=target, refexplicit=True
    )


def only_ours(app: Sphinx, doctree: nodes.document) -> None:
    """Names of types in signatures are links where they are ours. Sphinx would guess at others: `list` is a setting of
    some command too."""
    names = read(app.config.book_only)
    for node in [*doctree.findall(addnodes.pending_xref)]:
        if (node.get("refdomain"), node.get("reftype")) != ("py", "class"):
            continue
        target = node["reftarget"]
        full = target if target in names.all else f"{node.get('py:module')}.{target}"
        if full in names.all:
            node.attributes |= {"reftype": "obj", "reftarget": full, "refspecific": False}
        else:
            shown = find_pending_xref_condition(node, "*")
            node.replace_self((shown or node).children)


def setup(app: Sphinx) -> dict:
    app.add_config_value("book_only", "", "env")
    app.connect("doctree-read", only_ours)
    app.add_role("module", ModuleLink())
    app.add_directive("docstring", Docstring)
    app.add_directive("source", Source)
    return {"parallel_read_safe": True}
