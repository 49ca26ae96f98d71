"""The tests of the recorder reject each of the mistakes in `wrong_step`: a test that cannot fail proves nothing."""

from __future__ import annotations

import sys

import pytest
import test_recorder
from wrong_step import WRONG

PROPERTIES = [
    test_recorder.test_arguments_are_kept_as_they_were,
    test_recorder.test_values_are_copies_and_writes_through_views_are_seen,
    test_recorder.test_copies_of_views_share_memory_as_their_originals_do,
    test_recorder.test_loops_conditions_and_their_ends,
    test_recorder.test_comprehensions_lambdas_and_generator_expressions_are_part_of_their_statement,
    test_recorder.test_references_are_opened_to_a_depth_and_helpers_where_they_are_named,
    test_recorder.test_lines_carry_the_equation_that_they_compute,
    test_recorder.test_a_tracer_that_was_there_sees_what_it_would_have_seen,
    test_recorder.test_the_tracer_is_put_back_also_after_an_error,
    test_recorder.test_a_tracer_that_puts_itself_back_does_not_end_the_recording,
    test_recorder.test_every_step_of_views_follows_from_its_inputs,
]


def rejects(prop):
    before = sys.gettrace()
    sys.settrace(None)
    try:
        prop()
    except Exception:
        return True
    finally:
        sys.settrace(before)
    return False


def test_what_is_right_passes():
    assert not any(map(rejects, PROPERTIES))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_rejected(name, monkeypatch):
    module, attribute, wrong = WRONG[name]
    monkeypatch.setattr(module, attribute, wrong)
    killed = [prop.__name__ for prop in PROPERTIES if rejects(prop)]
    print(f"{name:<32} {len(killed):>2} of {len(PROPERTIES)}: {', '.join(killed)}")
    assert killed
