"""`minift step`: every lesson to its end, pages, and functions of one's own."""

import json

import numpy as np
import pytest

from minift.peft import lora
from minift.step.lessons import LESSONS


@pytest.mark.parametrize("name", LESSONS)
def test_every_lesson_runs_with_all(call, name):
    status, result, captured = call("step", name, "--all", "--json")
    assert status == 0 and result["lesson"] == name
    lesson = LESSONS[name]()
    assert [scene["steps"] for scene in result["scenes"]] == [len(scene.recording.steps) for scene in lesson.scenes]
    for scene in lesson.scenes:
        assert scene.title in captured.out
        assert scene.recording.steps[-1].text.splitlines()[0] in captured.out


def test_without_a_name_the_lessons_are_listed(call):
    status, result, captured = call("step", "--json")
    assert status == 0 and result["lessons"] == [*LESSONS]
    assert all(name in captured.out for name in LESSONS)


def test_where_there_is_no_terminal_everything_is_printed(call):
    assert call("step", "adamw")[2].out == call("step", "adamw", "--all")[2].out


def test_a_page_is_written_whole(call, tmp_path):
    status, result, captured = call("step", "lora", "--html", tmp_path / "lora.html", "--json")
    text = (tmp_path / "lora.html").read_text()
    assert status == 0 and "46 steps" in captured.out and sum(s["steps"] for s in result["scenes"]) == 46
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.html"]


def test_any_function_with_arguments_from_a_file(call, tmp_path):
    x, W, A, B = [[1, 2, 0]], [[1, 0, 2], [0, 1, 0]], [[1, 0, -1]], [[3], [0]]
    arguments = tmp_path / "arguments.json"
    floats = [[[float(v) for v in row] for row in m] for m in (x, W, A, B)]
    arguments.write_text(json.dumps({"args": floats, "kwargs": {"scaling": 2.0}, "cotangent": [[1, 0]]}))
    status, result, captured = call("step", "minift.peft.lora:forward", "--args", arguments, "--all", "--json")
    assert status == 0 and result["scenes"][0]["function"] == "lora.forward"
    y, _ = lora.forward(*map(np.array, floats), 2.0)
    assert y.tolist() == [[7, 2]] and "7  2" in captured.out
    assert "backward" in captured.out and "dB  float64 (2, 1), 16 bytes" in captured.out


def test_helpers_and_depth(call, tmp_path):
    arguments = tmp_path / "arguments.json"
    arguments.write_text(json.dumps({"args": [[0.5, -1.0, 0.25]], "dtype": "float32"}))
    plain = call("step", "minift.quant.nf4:quantize", "--args", arguments)[2].out
    opened = call("step", "minift.quant.nf4:quantize", "--args", arguments, "--into", "pack", "--depth", "0")[2].out
    assert "def pack(codes)" not in plain and "def pack(codes)" in opened and "float32 (3,)" in opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lore"], "'lore' is no lesson; needed one of lora, merge"),
        (["minift.nothing:here"], "minift.nothing cannot be imported"),
        (["minift.peft.lora:forwards"], "minift.peft.lora has no 'forwards'"),
        (["minift.peft.lora:A_NAME"], "is str, needed a function"),
        (["minift.peft.lora:forward"], "arguments come from --args FILE.json"),
        (["lora", "--depth", "2"], "lora is a lesson, with arguments of its own"),
        (["lora", "--args", "{file}"], "lora is a lesson, with arguments of its own"),
        (["minift.peft.lora:forward", "--args", "{file}"], "file.json: Expecting value"),
        (["minift.peft.lora:forward", "--args", "nowhere.json"], "nowhere.json"),
        (["builtins:len", "--args", "{ok}"], "has no Python source"),
    ],
)
def test_bad_input_is_refused_with_what_is_needed(call, tmp_path, arguments, message):
    files = {"file": tmp_path / "file.json", "ok": tmp_path / "ok.json"}
    files["file"].write_text("[1, 2")
    files["file"].write_text("")
    files["ok"].write_text("[[1, 2]]")
    status, _, captured = call("step", *(argument.format(**files) for argument in arguments))
    assert status == 2 and message in captured.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("7", "needed a list of arguments"),
        ('{"arg": []}', "needed a list of arguments, or an object of args, kwargs, cotangent and dtype"),
        ('{"args": 3}', "needed args as a list"),
        ('{"args": [[[1], [2, 3]]]}', "inhomogeneous|no rectangle"),
        ('{"args": [["a"]]}', "is no rectangle of numbers"),
        ('{"dtype": "float23"}', "float23"),
    ],
)
def test_arguments_that_cannot_be_read(call, tmp_path, content, message):
    file = tmp_path / "arguments.json"
    file.write_text(content)
    status, _, captured = call("step", "minift.nn.losses:log_softmax", "--args", file)
    assert status == 2 and "arguments.json" in captured.err
    assert any(part in captured.err for part in message.split("|"))
