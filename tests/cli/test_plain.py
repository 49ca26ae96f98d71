"""Where the terminal's encoding is small, commands still speak; and what they say can be read."""

import io
import os
import subprocess
import sys

import pytest

from minift.cli.plain import plain, speak_plainly
from minift.step.lessons import LESSONS


@pytest.mark.parametrize(
    ("text", "ascii_text"),
    [
        ("W' = W + (α / r) B A", "W' = W + (alpha / r) B A"),
        ("ΔW, Σ, Ω", "DeltaW, sum, Omega"),
        ("x̂ = x × σ⁻¹", "x = x x sigma^-^1"),
        ("ŵ − w ≤ ½ γ_n, a², a₁", "w - w <= 1/2 gamma_n, a^2, a1"),
        ("│ 5.03 → 3.48 │…", "| 5.03 -> 3.48 |..."),
        ("plain \\u00d7", "plain \\u00d7"),
        ("一", "\\u4e00"),
    ],
)
def test_signs_become_letters(text, ascii_text):
    assert plain(text) == ascii_text


def test_only_what_the_encoding_lacks_is_changed(monkeypatch):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    speak_plainly()
    stream.write("2 × ½ é α")
    stream.flush()
    assert buffer.getvalue() == "2 × ½ é alpha".encode("latin-1")


def test_a_stream_without_an_encoding_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    speak_plainly()
    print("α")
    assert sys.stdout.getvalue() == "α\n"


def test_help_and_every_lesson_in_ascii():
    """In a process of its own, as PYTHONIOENCODING is read at its start."""
    runs = [["step", "--help"], ["memory", "--help"], *(["step", lesson, "--all"] for lesson in LESSONS)]
    code = f"from minift.cli import main\nfor run in {runs!r}:\n    try: main(run)\n    except SystemExit: pass"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.isascii() and b"\\u" not in done.stdout
    assert not done.stderr
