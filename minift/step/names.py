"""Which names a statement reads and sets, as its syntax tree tells."""

from __future__ import annotations

import ast
from typing import Any

from minift.step.source import Statement


def names_set(node: ast.AST) -> list[str]:
    """The names that a statement assigns to, or writes into with an index; those of `out=` too."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        found: list[ast.AST] = [*node.targets]
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.AsyncFor):
        found = [node.target]
    elif isinstance(node, ast.With):
        found = [item.optional_vars for item in node.items if item.optional_vars]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        found = [keyword.value for keyword in node.value.keywords if keyword.arg == "out"]
    else:
        found = []
    return [name for target in found for name in _written(target)]


def room_for(node: ast.AST, makers: tuple[str, ...]) -> frozenset[str]:
    """The names that a statement sets to np.empty(…), np.zeros_like(…) or the like: room for what is to come."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return frozenset()
    pairs = [(node.targets[0], node.value)]
    if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
        pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
    made = [
        target
        for target, value in pairs
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr.startswith(makers)
    ]
    return frozenset(name for target in made for name in _written(target))


def _written(target: ast.AST) -> list[str]:
    if isinstance(target, ast.Name):
        return [target.id]
    if isinstance(target, ast.Tuple | ast.List):
        return [name for part in target.elts for name in _written(part)]
    if isinstance(target, ast.Subscript | ast.Starred | ast.Attribute):
        return _written(target.value)
    return []


def names_read(statement: Statement, known: dict[str, Any]) -> list[str]:
    """The names that a statement reads, in the order of its text; of one with a body, those of its head."""
    node = statement.node
    heads = {"For": ["iter"], "If": ["test"], "While": ["test"], "With": ["items"], "FunctionDef": [], "Try": []}
    parts: list[Any] = [node]
    if type(node).__name__ in heads:
        parts = [getattr(node, name) for name in heads[type(node).__name__]]
    found = [
        (child.lineno, child.col_offset, child.id)
        for part in parts
        for each in (part if isinstance(part, list) else [part])
        for child in ast.walk(each)
        if isinstance(child, ast.Name) and (isinstance(child.ctx, ast.Load) or isinstance(node, ast.AugAssign))
    ]
    return [name for name in dict.fromkeys(name for _, _, name in sorted(found)) if name in known]
