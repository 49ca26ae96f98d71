"""The recorder: it changes nothing, keeps copies, opens what it should, and leaves other tracers as they were."""

from __future__ import annotations

import functools
import sys
import threading

import numpy as np
import pytest
from replay import agree, replay, replayable

from minift.nn.norms import rms_norm
from minift.peft import lora
from minift.quant import nf4
from minift.rlhf import ppo
from minift.step import step
from minift.step.snapshot import WHOLE, Summary, copied, same

X, GAIN = np.array([[1.0, 7.0]]), np.array([1.0, 2.0])


def texts(recording, function=""):
    return [s.text.split("  #")[0] for s in recording.steps if s.kind != "call" and s.function.endswith(function)]


# --- what is stepped through, for these tests -------------------------------------------------------------------------


def in_place(x):
    """Writes through a view, and twice into one name."""
    y = x.copy()
    view = y[0]
    view += 1
    y *= 2
    np.negative(y, out=y)
    return y


def with_a_loop(n):
    total = 0
    for i in range(n):
        if i % 2:
            continue
        total += i
    while total > 4:
        total -= 3
    return total


def folded(x):
    squares = [
        value * value
        for value in x
        if value
    ]  # fmt: skip
    named = {str(i): (lambda a: a + 1)(v) for i, v in enumerate(squares)}
    return sum(v for v in named.values()), [*map(lambda v: 2 * v, squares)]  # noqa: C417


def factorial(n):
    """n! = n (n − 1)!                                                                                      (1)"""
    if n <= 1:
        return 1
    return n * factorial(n - 1)


def counting(n):
    for i in range(n):
        square = i * i
        yield square


def failing(x):
    y = x + 1
    raise KeyError(f"nothing for {y}")


def recovering(x):
    try:
        y = failing(x)
    except KeyError:
        y = -1
    return y


def with_a_context(x):
    with np.errstate(divide="ignore"):
        y = x / 0
    return y


def quiet_helper(x):
    z = x + 1
    return z


def with_helpers(x):
    """y = x + 2                                                                                            (1)"""
    y = quiet_helper(quiet_helper(x))
    return y


# --- nothing changes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_computed_is_the_same_to_the_bit(rng, dtype):
    x, W = rng.standard_normal((5, 7)).astype(dtype), rng.standard_normal((6, 7)).astype(dtype)
    A, B = rng.standard_normal((2, 7)).astype(dtype), rng.standard_normal((6, 2)).astype(dtype)
    dy = rng.standard_normal((5, 6)).astype(dtype)
    y, vjp = lora.forward(x, W, A, B, 0.3)
    recording = step(lora.forward, x, W, A, B, 0.3, cotangent=dy, depth=9)
    assert same(recording.value[0], y) and same(recording.gradients, vjp(dy))
    assert same(recording.last_value, vjp(dy))


def test_arguments_are_kept_as_they_were():
    def overwrite(x):
        x *= 0
        return x

    x = np.ones(3)
    recording = step(overwrite, x)
    assert recording.args[0].tolist() == [1, 1, 1] and x.tolist() == [0, 0, 0]


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_values_are_copies_and_writes_through_views_are_seen():
    recording = step(in_place, np.array([[1.0, 2.0], [3.0, 4.0]]))
    found = [(s.text, {name: value.tolist() for name, value in s.sets.items()}) for s in recording.steps[1:-1]]
    assert found == [
        ("y = x.copy()", {"y": [[1, 2], [3, 4]]}),
        ("view = y[0]", {"view": [1, 2]}),
        ("view += 1", {"y": [[2, 3], [3, 4]], "view": [2, 3]}),
        ("y *= 2", {"y": [[4, 6], [6, 8]], "view": [4, 6]}),
        ("np.negative(y, out=y)", {"y": [[-4, -6], [-6, -8]], "view": [-4, -6]}),
    ]


def test_every_step_of_views_follows_from_its_inputs():
    for recorded in step(in_place, np.array([[1.0, 2.0], [3.0, 4.0]])).steps:
        if replayable(recorded):
            names, _ = replay(recorded)
            assert all(agree(names[name], now) for name, now in recorded.sets.items()), recorded.text


def test_copies_of_views_share_memory_as_their_originals_do():
    base = np.arange(24.0).reshape(4, 6)
    kept = copied({"base": base, "row": base[1, ::2], "turned": base.T, "same": base})
    assert kept["same"] is kept["base"] and not np.shares_memory(kept["base"], base)
    kept["base"][1, 2] = -1
    assert kept["row"].tolist() == [6, -1, 10] and kept["turned"][2, 1] == -1
    assert kept["turned"].strides == base.T.strides


def test_forward_and_backward_under_the_same_names():
    recording = step(rms_norm, X, GAIN, cotangent=np.array([[1.0, 0.0]]))
    backward = [s for s in recording.steps if s.backward]
    assert {s.function for s in backward} == {"norms.rms_norm.vjp"} and recording.steps[-1] is backward[-1]
    assert not any(s.backward for s in recording.steps[: -len(backward)])
    line = next(s for s in backward if s.text.startswith("dx_hat ="))
    assert same(line.before["x_hat"], recording.value_of("x_hat", "rms_norm")) and "dy" in line.reads


def test_loops_conditions_and_their_ends():
    recording = step(with_a_loop, 5)
    seen = texts(recording)
    assert seen.count("for i in range(n):") == 5, "one for each item, none when nothing is left"
    assert seen.count("if i % 2:") == 5 and seen.count("continue") == 2 and seen.count("total += i") == 3
    assert [s.taken for s in recording.steps if s.text.startswith("while")] == [True, False]
    assert recording.last_value == 3


def test_comprehensions_lambdas_and_generator_expressions_are_part_of_their_statement():
    recording = step(folded, [0, 1, 3])
    assert [s.statement.first for s in recording.steps] == sorted({s.statement.first for s in recording.steps})
    assert len(recording.steps) == 4 and recording.value_of("squares") == [1, 9]
    assert recording.last_value == (12, [2, 18])


def test_a_recursion_is_opened_to_the_depth_that_was_asked_for():
    for depth in (0, 1, 3):
        recording = step(factorial, 4, depth=depth)
        assert max(s.depth for s in recording.steps) == min(depth, 3)
        assert recording.last_value == 24
        assert [s.depth for s in recording.steps if s.kind == "return"] == [*range(min(depth, 3), -1, -1)]


def test_a_generator_is_run_to_its_end():
    recording = step(counting, 3)
    assert recording.value == [0, 1, 4]
    assert [s.sets["square"] for s in recording.steps if s.text == "square = i * i"] == [0, 1, 4]
    assert [s.value for s in recording.steps if s.text == "yield square"] == [0, 1, 4]


def test_a_context_is_entered_once():
    recording = step(with_a_context, np.array([1.0]))
    assert [text.split("(")[0] for text in texts(recording)] == ["with np.errstate", "y = x / 0", "return y"]


def test_lambdas_methods_and_partials_can_be_stepped_through():
    assert step(lambda a: a + 1, 2).last_value == 3
    assert step(functools.partial(factorial, 3)).last_value == 6
    q = nf4.quantize(np.linspace(-1, 1, 8))
    assert same(step(q.dense).last_value, nf4.dequantize(q))


def test_large_arrays_are_summarized_and_their_changes_still_seen():
    def scale(x):
        y = x * 2
        y[7] = 5
        return y

    x = np.linspace(0, 1, WHOLE + 1)
    recording = step(scale, x)
    made, changed = (s.sets["y"] for s in recording.steps[1:3])
    assert isinstance(made, Summary) and made.high == 2 and changed.high == 5 and made.digest != changed.digest
    assert same(recording.value, scale(x))


# --- what is opened ---------------------------------------------------------------------------------------------------


def test_references_are_opened_to_a_depth_and_helpers_where_they_are_named():
    mask, logp = np.array([[True, True]]), np.array([[0.1, -0.2]])
    arguments = logp, 0 * logp, np.array([[1.0, -1.0]]), mask
    names = [{s.function for s in step(ppo.policy_loss, *arguments, depth=d).steps} for d in (0, 1, 2)]
    assert names[0] == {"ppo.policy_loss"}
    assert names[1] == names[0] | {"ppo.clipped_objective", "masked.masked_mean"}
    assert names[2] == names[1] | {"ppo.ratio"}
    assert {s.function for s in step(with_helpers, 1).steps} == {"test_recorder.with_helpers"}
    opened = step(with_helpers, 1, into=("quiet_helper",))
    assert texts(opened, "quiet_helper") == ["z = x + 1", "return z"] * 2


def test_closures_of_what_is_not_opened_are_not_opened():
    mask, logp = np.array([[True, True]]), np.array([[0.1, -0.2]])
    arguments = logp, 0 * logp, np.array([[1.0, -1.0]]), mask
    shallow = step(ppo.policy_loss, *arguments, depth=0, cotangent=1.0)
    deep = step(ppo.policy_loss, *arguments, depth=1, cotangent=1.0)
    assert {s.function for s in shallow.steps if s.backward} == {"ppo.policy_loss.vjp"}
    assert {s.function for s in deep.steps if s.backward} == {"ppo.policy_loss.vjp", "masked.masked_mean.vjp"}


def test_lines_carry_the_equation_that_they_compute():
    recording = step(rms_norm, X, GAIN, cotangent=np.array([[1.0, 0.0]]))
    found = {s.text.split(" ")[0]: (s.formula.equation.number, s.formula.term) for s in recording.steps if s.formula}
    assert found == {
        "inv_rms": ("1", "rms(x) = √(mean(x²) + ε)"),
        "x_hat": ("1", "x̂ = x / rms(x)"),
        "y": ("1", "y = x̂ γ"),
        "dx_hat": ("2", "dx̂ = dy γ"),
        "dweight": ("2", "dγ = Σ_rows dy x̂"),
        "dx": ("2", "dx = (dx̂ − x̂ mean(dx̂ x̂)) / rms(x)"),
    }


def test_errors_say_what_is_needed():
    with pytest.raises(TypeError, match="no Python source"):
        step(len, [1])
    with pytest.raises(ValueError, match="depth is -1"):
        step(factorial, 3, depth=-1)
    with pytest.raises(ValueError, match=r"returns no \(value, vjp\)"):
        step(factorial, 3, cotangent=1.0)
    with pytest.raises(ValueError, match=r"'pak' was not called; what was: .*nf4\.pack"):
        step(nf4.quantize, np.ones(4), into=("pak",))


# --- other tracers ----------------------------------------------------------------------------------------------------


class Lines:
    """What a coverage tool in Python does: it counts lines, of the functions that it is shown."""

    def __init__(self):
        self.seen = set()

    def __call__(self, frame, event, arg):
        if event == "line":
            self.seen.add((frame.f_code.co_name, frame.f_lineno))
        return self


@pytest.fixture
def no_tracer():
    """The tests themselves may run under a tracer: it is put back, and means nothing here."""
    before = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(before)


def traced(work):
    lines = Lines()
    sys.settrace(lines)
    try:
        work()
        assert sys.gettrace() is lines
    finally:
        sys.settrace(None)
    return {
        line for line in lines.seen if line[0] in ("in_place", "quiet_helper", "with_helpers", "recovering", "failing")
    }


@pytest.mark.usefixtures("no_tracer")
def test_a_tracer_that_was_there_sees_what_it_would_have_seen():
    x = np.ones((2, 2))
    for function, argument in ((in_place, x), (with_helpers, 1), (recovering, 1)):
        alone = traced(lambda f=function, a=argument: f(a))
        assert alone and traced(lambda f=function, a=argument: step(f, a)) == alone


@pytest.mark.usefixtures("no_tracer")
def test_the_tracer_is_put_back_also_after_an_error():
    assert step(recovering, 1).last_value == -1
    for function, arguments in ((failing, [1]), (factorial, [None]), (lora.forward, [])):
        with pytest.raises((KeyError, TypeError)):
            step(function, *arguments)
        assert sys.gettrace() is None
    lines = Lines()
    sys.settrace(lines)
    try:
        with pytest.raises(KeyError, match="nothing for 2"):
            step(failing, 1)
        assert sys.gettrace() is lines
    finally:
        sys.settrace(None)


class InC(Lines):
    """As coverage's tracer in C: when it is told of a call it installs itself, in the place of whoever told it."""

    def __call__(self, frame, event, arg):
        if event == "call":
            sys.settrace(self)
        return super().__call__(frame, event, arg)


@pytest.mark.usefixtures("no_tracer")
def test_a_tracer_that_puts_itself_back_does_not_end_the_recording():
    lines = InC()
    sys.settrace(lines)
    try:
        recording = step(with_helpers, 1, into=("quiet_helper",))
        assert sys.gettrace() is lines
    finally:
        sys.settrace(None)
    assert texts(recording, "quiet_helper") == ["z = x + 1", "return z"] * 2
    assert {name for name, _ in lines.seen} >= {"with_helpers", "quiet_helper"}


@pytest.mark.usefixtures("no_tracer")
def test_the_tracer_of_other_threads_is_not_touched():
    before = threading.gettrace()
    step(factorial, 3)
    assert threading.gettrace() is before
