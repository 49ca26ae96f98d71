"""How a matrix product came to a number: the sum behind each cell, written out.

    h = x_tilde @ A.T        h[0, 0] = 1·1 + 2·0 + 0·(−1) = 1

The operands are read from the recording, by evaluating their part of the statement on its recorded inputs. That is done
only for what has no effect: names, parts of them, and calls of minift's own functions.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import numpy as np

from minift.step.describe import cell, number
from minift.step.recorder import Step
from minift.step.snapshot import copied

TERMS = 8  # of a sum; longer ones are not written out
HARMLESS = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Slice, ast.Tuple, ast.UnaryOp, ast.USub, ast.Load)


@dataclass(frozen=True)
class Product:
    """left @ right, the only matrix product of a statement."""

    text: str  # as it is written
    left: np.ndarray  # (rows, terms)
    right: np.ndarray  # (terms, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def sum_at(self, row: int, column: int) -> str:
        """1·1 + 2·0 + 0·(−1) = 1"""
        a, b = self.left[row], self.right[:, column]
        terms = " + ".join(f"{cell(a, (i,))}·{_in_brackets(cell(b, (i,)))}" for i in range(len(a)))
        return f"{terms} = {number(a @ b)}"


def of(step: Step) -> Product | None:
    """The product of a statement that has one, with few enough terms to write out."""
    node = step.statement.node
    if step.kind != "statement" or not isinstance(node, ast.Assign | ast.AugAssign):
        return None
    found = [part for part in ast.walk(node) if isinstance(part, ast.BinOp) and isinstance(part.op, ast.MatMult)]
    if len(found) != 1:
        return None
    left, right = (_value(side, step) for side in (found[0].left, found[0].right))
    if not (isinstance(left, np.ndarray) and isinstance(right, np.ndarray)):
        return None
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or not 0 < left.shape[1] <= TERMS:
        return None
    return Product(ast.unparse(found[0]), left, right)


def _value(node: ast.expr, step: Step) -> Any:
    if not all(_harmless(part, step) for part in ast.walk(node)):
        return None
    code = compile(ast.fix_missing_locations(ast.Expression(node)), "<step>", "eval")
    return eval(code, dict(step.scope), copied(step.before))


def _harmless(node: ast.AST, step: Step) -> bool:
    if isinstance(node, ast.Call):
        called = step.scope.get(node.func.id) if isinstance(node.func, ast.Name) else None
        return getattr(called, "__module__", "").startswith("minift.")
    return isinstance(node, HARMLESS)


def _in_brackets(text: str) -> str:
    return f"({text})" if text.startswith("−") else text
