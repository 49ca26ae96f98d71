"""The source of a function, statement by statement, and the equations that its docstring numbers.

A line of the tracer belongs to the innermost statement around it. Of a statement with a body (`for`, `if`, `def`) only
the head counts, so one event is one statement however many lines it takes. A comprehension is part of its statement.
"""

from __future__ import annotations

import ast
import linecache
import re
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType

from minift.step.formulas import Equation, equations

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
BODIES = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.FunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Statement:
    """One statement, or the head of one that has a body."""

    node: ast.AST
    first: int  # lines, counted from 1 as editors do
    last: int
    end: int  # of the body, for one that has a body
    text: str  # as it stands in the file, less its indentation

    def contains(self, line: int | None) -> bool:
        """Whether this line is in the body."""
        return line is not None and self.last < line <= self.end

    def runs(self, line: int | None) -> bool:
        """Whether this line is in the part that a true condition, or one more item, leads to."""
        body = getattr(self.node, "body", None)
        return line is not None and body is not None and body[0].lineno <= line <= body[-1].end_lineno


@dataclass(frozen=True, eq=False)
class Source:
    """One function: its lines and statements, and the equations of its docstring and of those around it."""

    name: str  # "lora.forward.vjp"
    file: str
    lines: tuple[str, ...]  # of the outermost function, from `first` on
    first: int
    statements: dict[int, Statement]  # by line
    signature: Statement
    arguments: tuple[str, ...]
    equations: tuple[Equation, ...]  # the nearest first: its own, of functions around it and named by it, the module's
    elsewhere: tuple[Equation, ...]  # of the file's other functions: for comments that cite them
    is_reference: bool  # it, or a function around it, numbers an equation or cites one
    nested_in: str | None = None

    def at(self, line: int) -> Statement | None:
        return self.statements.get(line)


@dataclass(frozen=True)
class _File:
    lines: list[str]
    functions: list[tuple[Function, tuple[ast.AST, ...]]]  # and what is around each, outermost first
    docstring: str


def of(code: CodeType) -> Source | None:
    """The source of what this code was compiled from; None where there is no Python file, or for a comprehension."""
    if code.co_name.startswith("<") and code.co_name != "<lambda>":
        return None
    return _of(code.co_filename, code.co_name, code.co_firstlineno)


@lru_cache(maxsize=1024)
def _of(filename: str, name: str, first: int) -> Source | None:
    file = _read(filename)
    for node, around in file.functions if file else ():
        if _starts_at(node) == first and getattr(node, "name", "<lambda>") == name:
            assert file is not None
            return _source(filename, file, node, around)
    return None


@lru_cache(maxsize=128)
def _read(filename: str) -> _File | None:
    lines = linecache.getlines(filename)
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        return None
    found: list[tuple[Function, tuple[ast.AST, ...]]] = []

    def visit(node: ast.AST, around: tuple[ast.AST, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                found.append((child, around))
            visit(child, (*around, child) if isinstance(child, Function | ast.ClassDef) else around)

    visit(tree, ())
    return _File(lines, found, ast.get_docstring(tree) or "") if lines else None


def _source(filename: str, file: _File, node: Function, around: tuple[ast.AST, ...]) -> Source:
    functions = [part for part in around if isinstance(part, Function)]
    outermost = functions[0] if functions else node
    docs = [_docstring(part) for part in (node, *reversed(functions))]
    own = [equation for doc in docs for equation in equations(doc)]
    named = [equation for doc in _named_by(docs, file) for equation in equations(doc)]
    others = [equation for part, _ in file.functions for equation in equations(_docstring(part))]
    names = [getattr(part, "name", "lambda") for part in (*around, node)]
    module = filename.replace("\\", "/").rpartition("/")[2].removesuffix(".py")
    first = _starts_at(outermost)
    statements: dict[int, Statement] = {}
    body = [node] if isinstance(node, ast.Lambda) else node.body[bool(_docstring(node)) :]
    _add(statements, file.lines, body)
    return Source(
        name=".".join([module, *names]),
        file=filename,
        lines=tuple(line.rstrip("\n") for line in file.lines[first - 1 : outermost.end_lineno]),
        first=first,
        statements=statements,
        signature=_head(file.lines, node),
        arguments=tuple(argument.arg for argument in _arguments(node.args)),
        equations=(*own, *named, *equations(file.docstring)),
        elsewhere=tuple(others),
        is_reference=any(equation.number for equation in own) or any(map(_cites, docs)),
        nested_in=".".join([module, *names[:-1]]) if functions else None,
    )


def _add(statements: dict[int, Statement], lines: list[str], nodes: list) -> None:
    for node in nodes:
        head = _head(lines, node)
        for line in range(head.first, head.last + 1):
            statements[line] = head
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue  # what is in there runs some other time
        for part in ("body", "orelse", "finalbody"):
            _add(statements, lines, getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            _add(statements, lines, [handler])
        for case in getattr(node, "cases", []):
            _add(statements, lines, case.body)


def _head(lines: list[str], node) -> Statement:
    body = getattr(node, "body", None)
    first, end = _starts_at(node), node.end_lineno
    last = max(first, body[0].lineno - 1) if isinstance(body, list) and body else end
    while last > first and not lines[last - 1].split("#")[0].strip():
        last -= 1  # comments before the body are the body's
    text = textwrap.dedent("".join(lines[first - 1 : last])).rstrip()
    return Statement(node, first, last, end, text)


def _arguments(args: ast.arguments) -> list[ast.arg]:
    found = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [argument for argument in found if argument is not None]


def _starts_at(node) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _docstring(node: ast.AST) -> str:
    return "" if isinstance(node, ast.Lambda) else ast.get_docstring(node) or ""  # type: ignore[arg-type]


def _named_by(docs: list[str], file: _File) -> list[str]:
    """The docstrings of functions of this file that these docstrings name (`adamw_1`), and of those that they name."""
    known = {getattr(node, "name", ""): _docstring(node) for node, around in file.functions if not around}
    found, todo = dict.fromkeys(docs), [*docs]
    while todo:
        for name in re.findall(r"`(\w+)`", todo.pop(0)):
            if known.get(name) and known[name] not in found:
                found[known[name]] = None
                todo.append(known[name])
    return [*found][len(docs) :]


def _cites(docstring: str) -> bool:
    return bool(Equation.CITED.search(docstring))
