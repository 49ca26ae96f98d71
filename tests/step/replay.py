"""A recorded statement, run once more from what it was recorded to start from."""

from __future__ import annotations

import ast
import dataclasses
from types import FunctionType
from typing import Any

from minift.step.recorder import Step
from minift.step.snapshot import copied, same

WITH_A_BODY = (ast.For, ast.If, ast.While, ast.With, ast.FunctionDef, ast.Try)


def replay(step: Step) -> tuple[dict[str, Any], Any]:
    """What the names are afterwards, and what was returned; of `if` and `while`, what the condition was."""
    node = step.statement.node
    names = {**step.scope, **copied(step.before)}
    if isinstance(node, ast.If | ast.While):
        return names, bool(_evaluated(node.test, names))
    if isinstance(node, ast.Return):
        value = None if node.value is None else _evaluated(node.value, names)
        return names, value
    exec(compile(ast.fix_missing_locations(ast.Module([node], [])), "<replay>", "exec"), names)
    return names, None


def agree(a: Any, b: Any) -> bool:
    """Equal to the bit; of functions that were made anew, the code."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        return a.__code__.co_code == b.__code__.co_code and a.__code__.co_names == b.__code__.co_names
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(agree, a, b))
    without_equality = type(a).__eq__ is object.__eq__ and not dataclasses.is_dataclass(a)
    return (without_equality and type(a) is type(b)) or same(a, b)


def replayable(step: Step) -> bool:
    """Not a call; and of what has a body only a condition, as the other heads do nothing alone."""
    node = step.statement.node
    return step.kind != "call" and (not isinstance(node, WITH_A_BODY) or isinstance(node, ast.If | ast.While))


def _evaluated(node: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.fix_missing_locations(ast.Expression(node)), "<replay>", "eval"), names)
