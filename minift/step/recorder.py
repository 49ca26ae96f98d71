"""Run a function, the real one, and keep what each of its statements did.

    recording = step(lora.forward, x, W, A, B, 2.0, cotangent=dy)
    recording.steps[3].source, recording.steps[3].sets        "h *= scaling", {"h": array([2.0])}

A line tracer (`sys.settrace`) stops before every statement, and what has changed since the statement before is what
that one did. The values are copies, so later writes do not change them; the function computes what it always computes.
With a `cotangent` its pullback runs too, under the same names: forward, then backward.

*Which functions are opened.* The one that was asked for, with its closures; and the references that it calls, to
`depth` of them below each other. A reference is a function of minift whose docstring, or that of the function around
it, numbers an equation or cites one. Others are helpers: they run like any NumPy function, unless `into` names them.

A tracer that was there before (a debugger's, or that of a coverage tool) is asked about every event too, and is back in
its place at the end, also after an error. Work that a function hands to other threads, which it does for millions of
numbers only, is not followed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

from minift.step import source as sources
from minift.step.formulas import Formula, find
from minift.step.names import names_read, names_set, room_for
from minift.step.snapshot import copied, same
from minift.step.source import Source, Statement

PACKAGE = str(Path(__file__).parent.parent)
Kind = Literal["call", "statement", "return"]


@dataclass(frozen=True, eq=False)
class Step:
    """One statement that ran, or a call, whose arguments are what it sets."""

    kind: Kind
    source: Source  # the function that it is in
    statement: Statement
    depth: int  # 0: the function that was asked for
    backward: bool
    before: dict[str, Any] = field(repr=False)  # every local name before it ran
    sets: dict[str, Any]  # the names that it set, or whose contents it changed
    value: Any = None  # what it returned
    taken: bool | None = None  # of `if` and `while`: whether the condition was true
    raised: str = ""
    formula: Formula | None = None
    scope: dict[str, Any] = field(default_factory=dict, repr=False)  # the module's names

    @property
    def function(self) -> str:
        return self.source.name

    @property
    def line(self) -> int:
        return self.statement.first

    @property
    def text(self) -> str:
        return self.statement.text

    @functools.cached_property
    def reads(self) -> dict[str, Any]:
        """The local names that it uses, as they were before."""
        return (
            {} if self.kind == "call" else {name: self.before[name] for name in names_read(self.statement, self.before)}
        )

    @functools.cached_property
    def unwritten(self) -> frozenset[str]:
        """Arrays that it only made room for (np.empty): their numbers mean nothing yet."""
        return frozenset() if self.kind == "call" else room_for(self.statement.node, ("empty",))


@dataclass(frozen=True, eq=False)
class Recording:
    """What ran: every step, in order, and what came out."""

    name: str
    function: Callable = field(repr=False)
    args: tuple = field(repr=False)  # as they were before it ran
    kwargs: dict[str, Any] = field(repr=False)
    cotangent: Any = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)
    value: Any  # what the function returned
    gradients: Any = None  # what its pullback returned

    @property
    def last_value(self) -> Any:
        """What the last step returned: the gradients, or the value where there is no backward pass."""
        return next((step.value for step in reversed(self.steps) if step.kind == "return" and not step.depth), None)

    def value_of(self, name: str, function: str = "") -> Any:
        """What this name was set to last, in a function whose name ends like this. KeyError where it never was."""
        for step in reversed(self.steps):
            if name in step.sets and step.function.endswith(function):
                return step.sets[name]
        raise KeyError(f"{name!r} is set by no step of {self.name}")

    def _repr_html_(self) -> str:
        from minift.step.notebook import show  # the faces know the recorder, and it them only here

        return show(self)._repr_html_()


def step(
    function: Callable,
    *args: Any,
    cotangent: Any = None,
    depth: int = 1,
    into: Collection[str] = (),
    **kwargs: Any,
) -> Recording:
    """Run function(*args, **kwargs) and record it; then its pullback of `cotangent`, or of several in a tuple.

    `depth`: how many references below each other are opened beneath the function, 0 for none. `into`: functions to open
    besides, by the end of their name (`pack`, `nf4._encode`, `LoRA.delta`), wherever they are called. What the function
    raises is raised. TypeError for a function without Python source; ValueError for a depth below 0, for a cotangent
    where no pullback is returned, or where `into` names what did not run.
    """
    if depth < 0:
        raise ValueError(f"depth is {depth}, needed 0 or more")
    code = _code(function)
    if code is None or sources.of(code) is None:
        raise TypeError(f"{function!r} has no Python source that could be stepped through")
    kept_args, kept_kwargs, kept_cotangent = copied((args, kwargs, cotangent))
    tracer = _Tracer(code, depth, into)
    result = tracer.run(_drained(function), *args, **kwargs)
    gradients = None
    if cotangent is not None:
        if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
            raise ValueError(f"{_name(function)} returns no (value, vjp), so there is nothing to give a cotangent to")
        tracer.turn_back(result[1])
        gradients = tracer.run(result[1], *(cotangent if isinstance(cotangent, tuple) else (cotangent,)))
    if missing := [name for name in into if name not in tracer.entered]:
        raise ValueError(
            f"into: {missing[0]!r} was not called; what was: {', '.join(sorted(tracer.seen)) or 'nothing'}"
        )
    return Recording(
        _name(function), function, kept_args, kept_kwargs, kept_cotangent, tuple(tracer.steps), result, gradients
    )


@dataclass
class _Opened:
    """A frame that is being recorded."""

    source: Source
    depth: int
    statement: Statement | None = None  # that is running
    before: dict[str, Any] = field(default_factory=dict)
    raised: str = ""


class _Tracer:
    """What `sys.settrace` calls."""

    def __init__(self, root: CodeType, depth: int, into: Collection[str]):
        self.steps: list[Step] = []
        self.roots, self.depth, self.into = {root}, depth, into
        self.entered: set[str] = set()  # the names of `into` that were found
        self.seen: set[str] = set()  # helpers that were not opened
        self.backward = False
        self._opened_functions: set[str | None] = set()
        self._frames: dict[FrameType, _Opened] = {}
        self._stack: list[FrameType] = []
        self._files = {root.co_filename}
        self._previous: Any = None

    def turn_back(self, vjp: Callable) -> None:
        """From now on it is the backward pass."""
        self.backward = True
        if code := _code(vjp):
            self.roots.add(code)

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self._previous = sys.gettrace()
        sys.settrace(self)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(self._previous)
            self._frames.clear()
            self._stack.clear()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        """A function is entered: the tracer of its lines, or None."""
        beneath = self._previous(frame, event, arg) if self._previous else None
        if sys.gettrace() is not self:
            sys.settrace(self)  # coverage's tracer in C puts itself back when it is called
        opened = self._frames.get(frame)
        if opened is None:
            found = self._open(frame)
            if found is None:
                return beneath
            opened = self._frames[frame] = _Opened(found, len(self._stack), None, copied(_locals(frame)))
            self._opened_functions.add(found.name)
            self._add(opened, found.signature, "call", {}, opened.before)
        self._stack.append(frame)

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal beneath
            beneath = beneath(frame, event, arg) if beneath else None
            self._on_event(opened, frame, event, arg)
            return local

        return local

    def _open(self, frame: FrameType) -> Source | None:
        """The source of a function that is to be recorded."""
        code = frame.f_code
        found = sources.of(code) if code.co_filename in self._files or code.co_filename.startswith(PACKAGE) else None
        if found is None:
            return None
        within = found.nested_in in self._opened_functions and not found.name.endswith("lambda")
        if within or (code in self.roots and len(self._stack) <= self.depth):
            return found
        asked = [name for name in self.into if f".{found.name}".endswith(f".{name}")]
        self.entered.update(asked)
        if asked or (found.is_reference and found.nested_in is None and len(self._stack) <= self.depth):
            return found
        if found.nested_in is None:
            self.seen.add(found.name)
        return None

    def _on_event(self, opened: _Opened, frame: FrameType, event: str, arg: Any) -> None:
        if event == "exception":
            opened.raised = f"{arg[0].__name__}: {arg[1]}"
        elif event == "line":
            statement = opened.source.at(frame.f_lineno)
            if statement is not None and statement is not opened.statement:
                now = copied(_locals(frame))
                self._finish(opened, now, frame, statement.first)
                opened.statement, opened.before, opened.raised = statement, now, ""
        elif event == "return":
            self._finish(opened, copied(_locals(frame)), frame, None, arg)
            opened.statement = None
            self._stack.pop()

    def _finish(self, opened: _Opened, now: dict[str, Any], frame: FrameType, following: int | None, arg: Any = None):
        """The statement that was running has ended."""
        statement = opened.statement
        if statement is None:
            return
        node = statement.node
        if isinstance(node, ast.With) and following is not None and not statement.contains(following):
            return  # left, not entered
        if isinstance(node, ast.For | ast.AsyncFor) and not statement.runs(following):
            return  # nothing was left to go through
        targets = set(names_set(node))
        before = opened.before
        sets = {
            name: value
            for name, value in now.items()
            if name in targets or name not in before or not same(value, before[name])
        }
        ended = following is None and not opened.raised
        returns = ended and (isinstance(node, ast.Return | ast.Lambda) or _yields(frame))
        taken = statement.runs(following) if isinstance(node, ast.If | ast.While) else None
        raised = opened.raised if following is None else ""
        kind: Kind = "return" if returns else "statement"
        self._add(opened, statement, kind, before, sets, copied(arg) if returns else None, taken, raised, frame)

    def _add(self, opened, statement, kind, before, sets, value=None, taken=None, raised="", frame=None) -> None:
        formula = None if kind == "call" else _formula(opened.source, statement)
        scope = frame.f_globals if frame else {}
        self.steps.append(
            Step(
                kind,
                opened.source,
                statement,
                opened.depth,
                self.backward,
                before,
                sets,
                value,
                taken,
                raised,
                formula,
                scope,
            )
        )


def _locals(frame: FrameType) -> dict[str, Any]:
    return {name: value for name, value in frame.f_locals.items() if not name.startswith("@")}


def _yields(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


def _drained(function: Callable) -> Callable:
    """The function; or one that runs a generator to its end, as it does nothing until it is asked for items."""
    if not inspect.isgeneratorfunction(inspect.unwrap(function)):
        return function
    return lambda *args, **kwargs: list(function(*args, **kwargs))


def _code(function: Any) -> CodeType | None:
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(inspect.unwrap(function), "__code__") and not isinstance(function, type):
        function = type(function).__call__ if callable(function) else function
    return getattr(inspect.unwrap(function), "__code__", None)


def _name(function: Callable) -> str:
    found = sources.of(_code(function)) if _code(function) else None  # type: ignore[arg-type]
    return found.name if found else repr(function)


def _formula(source: Source, statement: Statement) -> Formula | None:
    comment = " ".join(line.partition("  # ")[2] for line in statement.text.splitlines())
    room = room_for(statement.node, ("empty", "zeros", "ones", "full"))
    names = [name for name in names_set(statement.node) if name not in room]
    return find(source.equations, names, comment, source.elsewhere)
