"""minift's NumPy reference, which the properties were written for."""

from __future__ import annotations

from minift.conformance.operation import Implementation
from minift.conformance.operations import every


def implementations() -> list[Implementation]:
    functions = {name: operation.reference for name, operation in every().items()}
    return [Implementation("reference", functions, ("float32", "float64"), ours=True)]
