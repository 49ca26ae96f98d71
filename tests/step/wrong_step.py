"""Recorders and faces that are wrong in the ways they could be: each must be rejected by a test of `test_recorder`.

A wrong version is a patch: (module, name, what stands there instead)."""

from __future__ import annotations

import sys

import numpy as np

from minift.step import formulas, recorder, snapshot, source
from minift.step.recorder import _Tracer


def _kept_alive(value, memo=None):
    """No copies: the past is rewritten by whatever comes later."""
    return value


def _views_apart(value, memo=None):
    """Copies that no longer share what their originals share."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {name: _views_apart(part) for name, part in value.items()}
    return tuple(map(_views_apart, value)) if type(value) is tuple else value


def _close(a, b):
    """Values that differ in their last digits are the same."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool(np.allclose(a, b, atol=10))
    return _same(a, b)


_same = snapshot.same


def _run(self, function, *args, **kwargs):
    """The tracer is not put back after an error."""
    self._previous = sys.gettrace()
    sys.settrace(self)
    result = function(*args, **kwargs)
    sys.settrace(self._previous)
    return result


def _run_to_none(self, function, *args, **kwargs):
    """Afterwards there is no tracer, whatever was there before."""
    self._previous = sys.gettrace()
    sys.settrace(self)
    try:
        return function(*args, **kwargs)
    finally:
        sys.settrace(None)


def _run_alone(self, function, *args, **kwargs):
    """The tracer that was there sees nothing while one steps."""
    before = sys.gettrace()
    sys.settrace(self)
    try:
        return function(*args, **kwargs)
    finally:
        sys.settrace(before)


_call = _Tracer.__call__


def _call_once(self, frame, event, arg):
    """A tracer that puts itself back is left in charge."""
    previous, self._previous = self._previous, None
    local = _call(self, frame, event, arg)
    self._previous = previous
    if previous is not None:
        previous(frame, event, arg)
    return local


_open = _Tracer._open


def _open_everything(self, frame):
    """Helpers are opened too."""
    found = source.of(frame.f_code)
    return found if found and found.file == frame.f_code.co_filename and "minift" in found.file else _open(self, frame)


def _every_line(self, opened, frame, event, arg):
    """One event a line, not a statement."""
    if event == "line":
        opened.statement = None if opened.statement is None else source.Statement(**vars(opened.statement))
    return _on_event(self, opened, frame, event, arg)


_on_event = _Tracer._on_event


def _any_number(known, names, comment, elsewhere=()):
    """The first equation there is."""
    return formulas.Formula(known[0], "") if known else None


def _no_case(known, names, comment, elsewhere=()):
    """Comments that cite an equation are not read."""
    return formulas.find(known, names, "", elsewhere)


def _loops(self, line):
    """A loop that is over goes round once more."""
    return True


WRONG = {
    "no copies": (recorder, "copied", _kept_alive),
    "views come apart": (recorder, "copied", _views_apart),
    "nearly equal is equal": (recorder, "same", _close),
    "tracer left after an error": (_Tracer, "run", _run),
    "no tracer afterwards": (_Tracer, "run", _run_to_none),
    "the tracer before sees nothing": (_Tracer, "run", _run_alone),
    "the tracer before takes over": (_Tracer, "__call__", _call_once),
    "helpers are opened": (_Tracer, "_open", _open_everything),
    "one event a line": (_Tracer, "_on_event", _every_line),
    "any equation will do": (recorder, "find", _any_number),
    "comments are not read": (recorder, "find", _no_case),
    "a loop too many": (source.Statement, "runs", _loops),
}
