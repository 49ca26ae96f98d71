"""Every property of every operation rejects something, and what is right is rejected by none."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from minift.conformance import operations
from minift.conformance.operations import every
from minift.conformance.run import Attempt
from quant import wrong_quant

TESTS = Path(__file__).parents[1]
DTYPES = ("float32", "float64", "float16")


def rejects(operation, prop, function):
    """Does the property fail on any of the fixed cases?"""
    attempt = Attempt(function, operation, prop)
    return any(attempt(case) is not None for case in operation.fixed if case.dtype in DTYPES)


@pytest.mark.parametrize("family", ["nf4", "blockwise", "double_quant"])
def test_kill_matrix(family):
    """Every wrong version is rejected in one of the family's operations; every property rejects a wrong version."""
    survivors, idle = None, []
    for name in [name for name in wrong_quant.FAMILIES if name.startswith(f"{family}.")]:
        operation, versions, right = every()[name], wrong_quant.wrong(name), wrong_quant.right(name)
        assert [p.__name__ for p in operation.properties if rejects(operation, p, right)] == [], "rejects what is right"
        killed_by = {
            p.__name__: [v for v, f in versions.items() if rejects(operation, p, f)] for p in operation.properties
        }
        print(*(f"{name} {prop}: {', '.join(killed)}" for prop, killed in killed_by.items()), sep="\n")
        idle += [prop for prop, killed in killed_by.items() if not killed]
        alive = set(versions) - {v for killed in killed_by.values() for v in killed}
        survivors = alive if survivors is None else survivors & alive
    assert idle == [], "these properties reject nothing"
    assert survivors == set(), "no property rejects these versions"


@pytest.mark.parametrize("file", sorted(found.name for found in pkgutil.iter_modules(operations.__path__)))
def test_every_operation_has_wrong_versions(file):
    """Here, or in the kill matrix beside its kernels."""
    names = [operation.name for operation in importlib.import_module(f"{operations.__name__}.{file}").OPERATIONS]
    if not set(names) <= set(wrong_quant.FAMILIES):
        imported = re.compile(rf"from minift\.conformance\.operations(\.{file} import| import .*\b{file}\b)")
        texts = [path.read_text() for path in TESTS.rglob("test_*.py")]
        assert any(imported.search(text) and "kill_matrix" in text for text in texts), f"{names}: no kill matrix"


@pytest.mark.parametrize("name", sorted(every()))
def test_the_reference_satisfies_its_fixed_cases(name):
    """Every property is checked by at least one of them."""
    operation = every()[name]
    for prop in operation.properties:
        attempt = Attempt(operation.reference, operation, prop)
        found = [attempt(case) for case in operation.fixed if case.dtype in DTYPES[:2]]
        assert [f"{case}: {message}" for case, message in filter(None, found)] == []
        assert attempt.cases > 0, f"{prop.__name__}: no fixed case is about it"
