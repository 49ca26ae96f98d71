"""Who claims to compute minift's operations: minift itself, other libraries, and files of users. A few lines each."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from minift.conformance.implementations import bitsandbytes, peft, reference, torchao, twins, user
from minift.conformance.operation import Implementation

BUILT_IN: dict[str, Callable[[], list[Implementation]]] = {
    "reference": reference.implementations,
    "torch": partial(twins.implementations, "torch"),
    "triton": partial(twins.implementations, "triton"),
    "bitsandbytes": bitsandbytes.implementations,
    "torchao": torchao.implementations,
    "peft": peft.implementations,
    "interpreter": partial(
        twins.implementations, "interpreter"
    ),  # the slow one comes last, and takes what time is left
}


def find(name: str) -> list[Implementation]:
    """A built-in one by its name, otherwise the functions of a Python file or module.

    ValueError where there is no such thing."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    near = get_close_matches(name, BUILT_IN, 1)
    try:
        return user.implementations(name)
    except ModuleNotFoundError:
        meant = f"did you mean {near[0]!r}? " if near else ""
        known = f"one of {', '.join(BUILT_IN)}, a Python file or a module"
        raise ValueError(f"impl: {name!r}, {meant}needed {known}") from None
