"""What the README says: its links lead somewhere, its commands and settings exist, its code runs."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minift.cli import COMMANDS
from minift.nn.linear import sum_to

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
SHELL = [block for language, block in BLOCKS if not language]
PYTHON = [block for language, block in BLOCKS if language == "python"]
MINIFT = f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; from minift.cli import main; sys.exit(main())" "$@"\n'


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 50
    missing = [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
    assert not missing


def mentioned():
    """Every `minift command …` of the README, in blocks and in the text, cut into words."""
    inline = re.findall(r"`(?:\.venv/bin/)?(minift [^`]+)`", README)
    lines = [line for block in SHELL for line in re.findall(r"(?:^|/)(minift .*)$", block, re.MULTILINE)]
    return [shlex.split(text.replace("\n", " "), comments=True) for text in [*inline, *lines]]


def test_commands_and_settings_exist():
    found = [words for words in mentioned() if words[1] in COMMANDS]
    assert len(found) > 20
    strange = [words for words in mentioned() if words[1] not in COMMANDS and not words[1].startswith("-")]
    assert not strange
    for _, command, *rest in found:
        settings = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(COMMANDS[command])}
        unknown = {word for word in rest if word.startswith("--")} - settings - {"--help"}
        assert not unknown, f"minift {command}: {unknown}"


def test_targets_of_make_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE):
        assert target in targets, f"make {target}"


def test_a_quantizer_is_broken_and_mended(tmp_path):
    """The block, as it is printed: the mistake is found, and after `sed` there is none."""
    block = next(block for block in SHELL if "mine.py" in block)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    command = tmp_path / ".venv" / "bin" / "minift"
    command.write_text(MINIFT)
    command.chmod(0o755)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    marked = block.replace("--op nf4.quantize", "--op nf4.quantize; echo exit $?")
    done = subprocess.run(["sh", "-c", marked], cwd=tmp_path, env=environment, capture_output=True, text=True)
    broken, mended = done.stdout.split("exit ")[:2]
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == ["exit 1", "exit 0"], done.stderr
    assert "w = [0.0], block_size 64" in broken and "✗" in broken
    assert "✗" not in mended


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_runs(number):
    """Every block by itself, with what the text around it has made."""
    from minift.io import load_model
    from minift.quant import nf4

    def my_quantize(w, block_size):
        q = nf4.quantize(w, block_size)
        return q.codes, q.absmax

    config, params = load_model("tiny")
    exec(PYTHON[number], {"np": np, "sum_to": sum_to, "config": config, "params": params, "my_quantize": my_quantize})
