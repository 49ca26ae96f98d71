"""Every lesson is what the reference does: its last value is the function's, and each step follows from its inputs."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import pytest
from replay import agree, replay, replayable
from rich.console import Console

from minift.step.lessons import LESSONS
from minift.step.snapshot import copied, same
from minift.step.terminal import print_all


@lru_cache(maxsize=32)
def built(name):
    return LESSONS[name]()


lessons = pytest.mark.parametrize("name", LESSONS)


@lessons
def test_the_last_value_of_every_scene_is_what_the_function_returns(name):
    for scene in built(name).scenes:
        recorded = scene.recording
        args, kwargs, cotangent = copied((recorded.args, recorded.kwargs, recorded.cotangent))
        expected = recorded.function(*args, **kwargs)
        assert agree(recorded.value, expected), scene.title
        if cotangent is not None:
            expected = expected[1](*(cotangent if isinstance(cotangent, tuple) else (cotangent,)))
            assert same(recorded.gradients, expected), scene.title
        assert agree(recorded.last_value, expected), scene.title


@lessons
def test_every_step_follows_from_its_inputs(name):
    replayed = 0
    for scene in built(name).scenes:
        for step in filter(replayable, scene.recording.steps):
            names, value = replay(step)
            for changed, now in step.sets.items():
                if changed in step.unwritten:
                    assert (names[changed].shape, names[changed].dtype) == (now.shape, now.dtype)
                else:
                    assert agree(names[changed], now), (scene.title, step.text, changed)
            if step.kind == "return" or step.taken is not None:
                assert agree(value, step.value if step.kind == "return" else step.taken), (scene.title, step.text)
            replayed += 1
    assert replayed >= len(built(name).scenes)


@lessons
def test_every_question_stands_before_the_step_that_answers_it_and_its_answer_is_accepted(name):
    questions = [(scene, question) for scene in built(name).scenes for question in scene.questions]
    assert questions
    for scene, question in questions:
        assert scene.place(question) is not None, question.text
        answer = question.answer_text(scene.recording)
        expected = None if isinstance(question.answer, str) else True
        assert question.accepts(answer.replace("[", " ").replace("]", " "), scene.recording) is expected, question.text
        assert question.accepts("77777", scene.recording) in (False, None)


@lessons
def test_everything_is_printed_and_fits(name):
    text = printed(name)
    for scene in built(name).scenes:
        assert scene.title in text
        for question in scene.questions:
            assert question.text in text and question.answer_text(scene.recording) in text
    assert "\x1b" not in text
    numbers = [line for line in text.splitlines() if line.strip() and not set(line) - set(" 0123456789.−*·●…e+inf")]
    assert numbers and max(map(len, numbers)) <= 100


def printed(name):
    text = io.StringIO()
    print_all(built(name), Console(file=text, highlight=False, markup=False, emoji=False, soft_wrap=True))
    return text.getvalue()


def test_the_numbers_of_the_first_lesson_are_those_one_finds_by_hand():
    first, second, merged, product = (scene.recording for scene in built("lora").scenes)
    assert first.value[0].tolist() == [[1, 2, 3, 2]]
    assert first.gradients[2].tolist() == [[0, 0, 0]]
    assert first.gradients[3].ravel().tolist() == [2, 0, -2, 4]
    assert second.args[3].ravel().tolist() == [-1, 0, 1, -2]
    assert second.value[0].tolist() == [[-1, 2, 5, -2]] == product.value[0].tolist()
    assert second.gradients[2].tolist() == [[-12, -24, 0]]
    assert (merged.value - first.args[1]).tolist() == [[-2, 0, 2], [0, 0, 0], [2, 0, -2], [-4, 0, 4]]
    answers = [q.answer_text(first) for q in built("lora").scenes[0].questions]
    assert answers[0] == "7"


def test_the_numbers_of_nf4_are_those_one_finds_by_hand():
    values, quantized, back, _ = (scene.recording for scene in built("nf4").scenes)
    assert values.value.size == 16 and (values.value < 0).sum() == 7
    assert quantized.value.codes.tobytes().hex() == "84c0e77a"
    assert quantized.value_of("codes", "pack").tolist() == [8, 4, 12, 0, 14, 7, 7, 10]
    assert np.abs(back.value - quantized.args[0]).max() <= np.float32(0.05) < 0.1823
    assert "84" in printed("nf4") and "e7" in printed("nf4")


def test_in_double_quantization_the_trap_is_met():
    compressed, back, saved = (scene.recording for scene in built("double_quant").scenes)
    lowest, nearest = compressed.value_of("lowest"), compressed.value_of("nearest")
    assert (nearest.codes < np.repeat(lowest, 4)).any(), "this lesson is about a scale that would turn negative"
    assert (back.value >= 0).all()
    assert saved.value == 0.126953125


def test_the_lessons_of_the_course_are_all_there():
    named = "lora merge rms_norm attention cross_entropy nf4 double_quant dequantize qlora adamw adamw8bit prefix"
    assert {*named.split(), "reward", "gae", "ppo", "dpo"} == LESSONS.keys()
