"""The twins have the reference's names, parameters and fields; what has no twin is listed here with the reason."""

import dataclasses
import importlib
import inspect
import types

import pytest

MIRRORED = ("quant.nf4", "quant.double_quant")

WITHOUT_TWIN = {
    "quant.nf4.normal_quantiles": "derives the table, once, in NumPy; the twin imports the table",
    "quant.nf4.NF4Tensor.arrays": "what learns is a torch parameter, and autograd knows",
    "quant.nf4.NF4Tensor.with_arrays": "the same",
}
WITHOUT_PARAMETER = {
    "quant.nf4.NF4Tensor.linear.dropout_key": "belongs to the protocol of a weight; LoRA's twin will have it",
}


def functions(module):
    """Public functions defined in the module, and the public methods of its dataclasses."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            found[name] = value
        elif dataclasses.is_dataclass(value):
            methods = {n: f for n, f in vars(value).items() if isinstance(f, types.FunctionType | property)}
            found |= {f"{name}.{n}": f for n, f in methods.items() if not n.startswith("_")}
    return found


def twins_of(name):
    return [importlib.import_module(f"{package}.{name}") for package in ("minift", "minift_kernels")]


def lookup(module, dotted):
    value = module
    for part in dotted.split("."):
        value = inspect.getattr_static(value, part, None)
    return value


@pytest.mark.parametrize("name", MIRRORED)
def test_every_function_has_its_twin(name):
    reference, twin = twins_of(name)
    for function, ours in functions(reference).items():
        theirs = lookup(twin, function)
        if f"{name}.{function}" in WITHOUT_TWIN:
            assert theirs is None, f"{name}.{function} has a twin: take it off the list"
            continue
        assert theirs is not None, f"{name}.{function} has no twin"
        if isinstance(ours, property):
            assert isinstance(theirs, property)
            continue
        expected = [
            (p.name, p.kind, p.default)
            for p in inspect.signature(ours).parameters.values()
            if f"{name}.{function}.{p.name}" not in WITHOUT_PARAMETER
        ]
        found = [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()]
        if found[-1:] == [("backend", inspect.Parameter.KEYWORD_ONLY, None)]:
            found.pop()
        assert found == expected, f"{name}.{function}"


@pytest.mark.parametrize("name", MIRRORED)
def test_dataclasses_have_the_same_fields(name):
    reference, twin = twins_of(name)
    classes = [c for c in vars(reference).values() if inspect.isclass(c) and c.__module__ == reference.__name__]
    compared = [c for c in classes if dataclasses.is_dataclass(c)]
    assert compared
    for ours in compared:
        fields = [[(f.name, f.default) for f in dataclasses.fields(c)] for c in (ours, getattr(twin, ours.__name__))]
        assert fields[0] == fields[1], ours.__name__


def test_the_lists_name_what_exists():
    for dotted in [*WITHOUT_TWIN, *(name.rpartition(".")[0] for name in WITHOUT_PARAMETER)]:
        package, module, *rest = dotted.split(".")
        assert lookup(importlib.import_module(f"minift.{package}.{module}"), ".".join(rest)) is not None, dotted
