"""The run-time checker of signatures: beartype, with `int` allowed where `float` is written, as PEP 484 says.

Only signatures of modules and classes are checked. A pullback has none, and to wrap it anew each time that it is made
takes longer than what small models compute in it."""

import ast

from beartype import BeartypeConf, beartype
from jaxtyping._import_hook import JaxtypingTransformer

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_visit = JaxtypingTransformer.visit_FunctionDef


def _visit_outermost(self, node):
    inside = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
    return node if inside else _visit(self, node)


JaxtypingTransformer.visit_FunctionDef = _visit_outermost
