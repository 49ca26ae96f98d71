"""The pages of the API, one a module: its docstring, then its functions and classes, each with its source below it.

They are written as reStructuredText with Sphinx's own directives for Python, so that names are indexed and can be
linked to. What is in a docstring goes to the directive of `docstrings`. The page of `minift/nn/norms.py` is
`minift/nn/norms.html`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from textwrap import dedent, indent

from modules import Definition, Module, Names, dedented, docstring, is_public, methods

NUMERIC = "nn", "models", "quant", "peft", "optim", "rlhf"
LONGEST_VALUE = 60  # characters of a constant's value that are shown


def pages(names: Names) -> dict[str, str]:
    """{document name: reStructuredText} for every module."""
    return {module.page: "\n\n".join(_Page(module, names).blocks()) + "\n" for module in names.modules.values()}


class _Page:
    def __init__(self, module: Module, names: Names):
        self.module, self.names = module, names
        self.lines = module.source.split("\n")

    def blocks(self) -> Iterator[str]:
        title = f"``{self.module.name}``"
        yield f":hide-toc:\n\n{title}\n{'=' * len(title)}\n\n.. py:module:: {self.module.name}"
        yield self.doc(self.module.doc)
        yield self.related()
        if self.module.is_package:
            yield from self.contents()
        for name, node in self.module.constants:
            if is_public(name) and name != "__all__":
                yield self.constant(name, node)
        for node in self.module.definitions:
            if is_public(node.name):
                yield self.definition(node)
        helpers = [node for node in self.module.definitions if not is_public(node.name)]
        if helpers:
            yield self.source(helpers, "Helpers: " + ", ".join(node.name for node in helpers))

    @property
    def is_numeric(self) -> bool:
        """Where the code is the derivation, so that it is shown at once."""
        return not self.module.is_package and f"{self.module.name}..".split(".")[1] in NUMERIC

    def doc(self, text: str) -> str:
        return f".. docstring::\n\n{indent(text, '   ')}" if text else ""

    def related(self) -> str:
        """Where the same operation is to be found in another form."""
        _, _, below = self.module.name.partition(".")
        there = {
            "The reference": f"minift.{below}",
            "The twin": f"minift_kernels.{below}",
            "Its kernels": f"minift_kernels.{below}_kernels",
            "Its properties": f"minift.conformance.operations.{below.rpartition('.')[2]}",
        }
        links = [
            f"{what}: :py:mod:`{name}`"
            for what, name in there.items()
            if self.is_numeric and name in self.names.modules and name != self.module.name
        ]
        return f".. rst-class:: related\n\n{' · '.join([f'``{self.module.path}``', *links])}"

    def contents(self) -> Iterator[str]:
        """What is in a package."""
        inside = self.names.inside(self.module)
        if not inside:
            return
        entries = "\n\n".join(f":py:mod:`~{module.name}`\n{indent(self.about(module), '   ')}" for module in inside)
        yield f".. rst-class:: names\n\n{entries}"
        links = "\n".join(f"   {module.short} </{module.page}>" for module in inside)
        yield f".. toctree::\n   :hidden:\n\n{links}"

    def about(self, module: Module) -> str:
        """In a sentence; of a package that says nothing of itself, what is in it."""
        names = ", ".join(f"`{inner.name.partition('.')[2]}`" for inner in self.names.inside(module))
        return self.doc(module.summary or names or "…")

    def definition(self, node: Definition) -> str:
        parts = [self.doc(docstring(node))]
        if isinstance(node, ast.ClassDef):
            head = f".. py:class:: {node.name}{self.made_with(node)}"
            parts += [self.field(item) for item in _fields(node)]
            parts += [self.method(item) for item in methods(node)]
        else:
            head = f".. py:function:: {node.name}{self.signature(node.args, node.returns)}"
        title = f"{self.module.path}, lines {node.lineno}–{node.end_lineno}"
        parts.append(self.source([node], title, opened=self.is_numeric and isinstance(node, ast.FunctionDef)))
        return f"{head}\n\n{indent(_joined(parts), '   ')}"

    def method(self, node: ast.FunctionDef) -> str:
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        text = self.doc(docstring(node))
        if decorators & {"property", "cached_property"}:
            head = f".. py:property:: {node.name}"
            head += f"\n   :type: {self.annotation(node.returns)}" if node.returns else ""
        else:
            args = node.args
            if "staticmethod" not in decorators:
                args = ast.arguments(**{**vars(args), "args": args.args[1:]})
            head = f".. py:method:: {node.name}{self.signature(args, node.returns)}"
            head += "".join(f"\n   :{kind}:" for kind in ("classmethod", "staticmethod") if kind in decorators)
        return f"{head}\n\n{indent(text, '   ')}"

    def field(self, field: tuple[ast.AnnAssign, str]) -> str:
        node, text = field
        head = f".. py:attribute:: {ast.unparse(node.target)}\n   :type: {self.annotation(node.annotation)}"
        if node.value is not None:
            head += f"\n   :value: {_short(node.value)}"
        return f"{head}\n\n{indent(self.doc(text or self.comment(node)), '   ')}"

    def constant(self, name: str, node: ast.Assign | ast.AnnAssign) -> str:
        head = f".. py:data:: {name}\n   :value: {_short(node.value)}" if node.value else f".. py:data:: {name}"
        if node.value and name[0].isupper() and not name.isupper():  # CamelCase: a type
            head = f".. py:type:: {name}\n   :canonical: {self.annotation(node.value)}"
        return f"{head}\n\n{indent(self.doc(self.comment(node)), '   ')}"

    def comment(self, node: ast.stmt) -> str:
        """What stands behind a line."""
        line = self.lines[node.lineno - 1].encode()[node.end_col_offset :].decode()
        found = re.match(r"\s*#\s*(.*)", line) if node.lineno == node.end_lineno else None
        return found[1] if found else ""

    def source(self, definitions: list[Definition], title: str, opened: bool = False) -> str:
        """The code, less its docstrings, which are above it."""
        code = "\n\n".join(dedent("\n".join(self.code(node))) for node in definitions)
        option = "\n   :open:" if opened else ""
        return f".. source:: {title}{option}\n\n{indent(code, '   ')}"

    def code(self, node: Definition) -> Iterator[str]:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        left_out = {
            number
            for inner in ast.walk(node)
            if isinstance(inner, Definition) and docstring(inner) and len(inner.body) > 1 and is_public(inner.name)
            for number in range(inner.body[0].lineno, (inner.body[0].end_lineno or 0) + 1)
        }
        for number in range(first, (node.end_lineno or 0) + 1):
            if number not in left_out:
                yield self.lines[number - 1]

    def signature(self, args: ast.arguments, returns: ast.expr | None) -> str:
        shown = self.annotation(args)
        return f"({shown}) -> {self.annotation(returns)}" if returns else f"({shown})"

    def made_with(self, node: ast.ClassDef) -> str:
        """The arguments of a class with an __init__. A dataclass has its fields below."""
        made = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
        return self.signature(ast.arguments(**{**vars(made.args), "args": made.args.args[1:]}), None) if made else ""

    def annotation(self, node: ast.AST) -> str:
        """Its source, with our own names in full, which is how Sphinx finds them; it shows the last part."""
        copy = ast.parse(f"def f({ast.unparse(node)}): ...") if isinstance(node, ast.arguments) else None
        node = copy.body[0].args if copy else ast.parse(ast.unparse(node), mode="eval").body  # type: ignore[attr-defined]
        return ast.unparse(_InFull(self.module, self.names).visit(node))


class _InFull(ast.NodeTransformer):
    def __init__(self, module: Module, names: Names):
        self.module, self.names = module, names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        full = self.names.origin(f"{self.module.name}.{node.id}")
        return ast.parse(full, mode="eval").body if full and full not in self.names.modules else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        full = self.names.origin(f"{self.module.name}.{ast.unparse(node)}")
        return ast.parse(full, mode="eval").body if full else node


def _fields(node: ast.ClassDef) -> list[tuple[ast.AnnAssign, str]]:
    """The fields of a class, with the text that stands below one, if any."""
    found = []
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and is_public(ast.unparse(item.target)):
            below = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            found.append((item, dedented(below, after.col_offset) if isinstance(below, str) else ""))
    return found


def _short(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _joined(parts: list[str]) -> str:
    return "\n\n".join(filter(None, parts))
