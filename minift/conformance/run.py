"""Hold a function against the properties of an operation, and make what fails as small as it gets.

Fixed cases first, then those that hypothesis draws, the same ones in every run. Of a fixed case that fails everything
is left out that can be (`simpler`), of a drawn one hypothesis does so. Both stop after a few seconds.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy

from minift.conformance import torch_functions
from minift.conformance.agreement import agreement
from minift.conformance.operation import Implementation, Operation, Property
from minift.conformance.operations import find
from minift.conformance.report import Counterexample, Report, Result

SHRINKING = 2.0  # seconds, for one property


def check(
    operation: str | Callable,
    function: Callable,
    *,
    inputs: Mapping[str, SearchStrategy] | None = None,
    examples: int = 100,
    seconds: float = 60.0,
    dtypes: tuple[str, ...] = ("float32",),
    torch: bool = False,
) -> Report:
    """Hold your function against every property of an operation of minift.

        check("nf4.quantize", my_quantize)

    The function gets NumPy arrays and returns them; gradients are a pullback, `y, vjp = f(...)`. What it is given and
    what it must return: `minift conformance --list --op nf4.quantize`.

    In place of a name, a function that yours must agree with on whatever is drawn from `inputs`, hypothesis' strategies
    by the names of the arguments (`agreement`):

        check(np.hypot, my_hypot, inputs={"x": st.floats(0, 9), "y": st.floats(0, 9)})

    `examples` are drawn for each property beside its fixed cases, in about `seconds` for all of them. `dtypes`: what
    your function can compute in. `torch`: it takes and returns torch tensors, and autograd is its pullback.
    Returns a report that prints as a table. Raises Counterexample, an AssertionError, with the smallest inputs that
    fail, and ValueError for an operation that there is none of.
    """
    wanted = _operation(operation, inputs)
    name = getattr(function, "__name__", type(function).__name__)
    if torch:
        function = (torch_functions.differentiable if wanted.has_pullback else torch_functions.plain)(function)
    implementation = Implementation(name, {wanted.name: function}, dtypes)
    report = Report(hold_all([implementation], [wanted], examples, seconds))
    if report.failures or not report.cases:  # what refused every case has not passed
        raise Counterexample(report)
    return report


def _operation(operation: str | Callable, inputs: Mapping[str, SearchStrategy] | None) -> Operation:
    if isinstance(operation, str):
        if inputs is not None:
            raise ValueError(f"inputs: {operation!r} draws its own; they are for a function to agree with")
        return find(operation)
    if not inputs:
        raise ValueError("inputs: none, needed a hypothesis strategy for each argument of the function to agree with")
    return agreement(operation, inputs)


def hold_all(
    implementations: Iterable[Implementation], operations: Iterable[Operation], examples: int, seconds: float
) -> Iterator[Result]:
    """One property after the other. What is left of the time is shared by those that are still to come."""
    pairs = [(implementation, operation) for implementation in implementations for operation in operations]
    left = sum(len(operation.properties) for one, operation in pairs if operation.name in one.functions)
    end = time.monotonic() + seconds
    for implementation, operation in pairs:
        for prop in operation.properties:
            yield hold(implementation, operation, prop, examples, (end - time.monotonic()) / max(left, 1))
            left -= operation.name in implementation.functions


def hold(implementation: Implementation, operation: Operation, prop: Property, examples: int, seconds: float) -> Result:
    """One property: on the fixed cases, then on drawn ones until there are enough or the time is up."""
    start, dtypes = time.monotonic(), implementation.dtypes
    result = Result(implementation.name, operation.name, prop.__name__, ours=implementation.ours)
    if implementation.missing or operation.name not in implementation.functions:
        return result.not_run(implementation.missing or "not there")
    attempt = Attempt(implementation.functions[operation.name], operation, prop)
    failing = None
    for case in operation.fixed:
        if case.dtype in dtypes and (failing := attempt(case)) is not None:
            break
        if attempt.cases and time.monotonic() > start + seconds:
            break
    if failing is not None and hasattr(failing[0], "simpler"):
        failing = _smaller(attempt, failing)
    elif failing is not None or examples:
        left = start + seconds - time.monotonic() if failing is None else SHRINKING
        failing = _drawn(attempt, operation.cases(dtypes), examples, left) or failing
    if failing is None and not attempt.cases:
        return result.not_run(attempt.refusal or f"nothing to check in {', '.join(dtypes)}")
    return result.ran(attempt.cases, failing)


class Attempt:
    """One case after the other: None if the property holds, else the case and what is wrong.

    Counts the cases in which the function was called at all. A function may raise NotImplementedError for what it does
    not promise, such as a block size; that case does not count."""

    def __init__(self, function: Callable, operation: Operation, prop: Property):
        self.function, self.operation, self.property = function, operation, prop
        self.cases, self.refusal = 0, ""
        self.called, self.returned = False, None
        self.raised: Exception | None = None

    def __call__(self, case: Any) -> tuple[Any, str] | None:
        self.called, self.raised, self.returned = False, None, None
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                self.property(self.watched, case)
        except NotImplementedError as error:
            self.refusal = str(error)
            return None
        except Exception as error:
            self.cases += 1
            return case, self.explained(error)
        self.cases += self.called
        return None

    def watched(self, *args: Any) -> Any:
        self.called = True
        try:
            self.returned = self.function(*args)
        except Exception as error:
            self.raised = error
            raise
        if any(type(part).__module__.partition(".")[0] == "torch" for part in _parts(self.returned)):
            raise TypeError("torch tensors: say torch=True, or wrap it with torch_functions.differentiable")
        if self.operation.has_pullback and not _is_pair(self.returned):
            raise TypeError("y without a pullback")
        return self.returned

    def explained(self, error: Exception) -> str:
        """One sentence."""
        needed = f"needed {self.operation.takes}"
        if error is self.raised:
            hint = f"; {needed}" if isinstance(error, TypeError | AttributeError) else ""
            tensors = "" if not hint else "; a function of torch tensors needs torch=True"
            return f"it raised {type(error).__name__}: {_first_line(error)}{hint}{tensors}"
        if isinstance(error, AssertionError):
            return str(error)
        if not self.called:
            return f"the property itself raised {type(error).__name__}: {_first_line(error)}"
        return f"it returned {described(self.returned)} ({_first_line(error)}); {needed}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _parts(returned: Any) -> Iterator[Any]:
    yield from returned if isinstance(returned, tuple | list) else (returned, getattr(returned, "codes", None))


def _is_pair(returned: Any) -> bool:
    return isinstance(returned, tuple | list) and len(returned) == 2 and callable(returned[1])


def described(x: Any) -> str:
    """What something is, for a person who expected something else."""
    if isinstance(x, np.ndarray):
        return f"a {x.dtype} array of shape {x.shape}"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}: {', '.join(map(described, x[:4]))}" + ", …" * (len(x) > 4)
    return "None" if x is None else f"a {type(x).__name__}"


def _smaller(attempt: Attempt, failing: tuple[Any, str]) -> tuple[Any, str]:
    """Try what is simpler than the case, and again from what still fails, until nothing does or the time is up."""
    end = time.monotonic() + SHRINKING
    progress = True
    while progress:
        progress = False
        for case in failing[0].simpler():
            if time.monotonic() > end:
                return failing
            if (found := attempt(case)) is not None:
                failing, progress = found, True
                break
    return failing


class _TimeIsUp(BaseException):
    """Ends hypothesis, which takes an Exception for a failure of the property."""


def _drawn(attempt: Attempt, strategy: Any, examples: int, seconds: float) -> tuple[Any, str] | None:
    """The smallest of the drawn cases that fail."""
    failing: list[tuple[Any, str]] = []
    end = time.monotonic() + seconds

    @settings(
        max_examples=max(examples, 1),
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(strategy)
    def holds(case):
        if time.monotonic() > end + SHRINKING * bool(failing):
            raise _TimeIsUp
        if (found := attempt(case)) is not None:
            failing.append(found)
            raise AssertionError

    try:
        with _no_files():
            holds()
    except _TimeIsUp:
        return min(failing, key=lambda found: len(str(found[0])), default=None)
    except AssertionError:
        return failing[-1]  # hypothesis ends with the smallest
    return None


@contextmanager
def _no_files() -> Iterator[None]:
    """Hypothesis keeps what it has seen in a folder beside the user's files."""
    with tempfile.TemporaryDirectory() as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)
