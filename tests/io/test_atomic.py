"""A file or folder is there whole or not at all: after an exception, and after kill −9."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from minift.io import FormatError, atomic_folder, atomic_write


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_writes_bytes_and_callbacks(tmp_path):
    atomic_write(tmp_path / "a", b"one")
    atomic_write(tmp_path / "a", b"two")
    atomic_write(tmp_path / "b", lambda path: path.write_text("three"))
    assert (tmp_path / "a").read_bytes() == b"two" and (tmp_path / "b").read_text() == "three"
    assert names(tmp_path) == ["a", "b"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failing_callback_leaves_the_old_file(tmp_path):
    atomic_write(tmp_path / "a", b"old")

    def fail(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", b"old")

    def fail(*paths):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "nowhere" / "a", b"")


def test_data_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """The order: file synced, renamed, directory synced."""
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle):
        events.append("directory" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        return fsync(handle)

    def spy_replace(a, b):
        events.append("rename")
        return replace(a, b)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    atomic_write(tmp_path / "a", b"x")
    assert events == ["file", "rename", "directory"]


def test_folders(tmp_path):
    with atomic_folder(tmp_path / "deep" / "m") as new:
        (new / "a").write_text("1")
        assert not (tmp_path / "deep" / "m").exists()
    assert names(tmp_path / "deep") == ["m"] and names(tmp_path / "deep" / "m") == ["SHA256SUMS", "a"]
    with (
        pytest.raises(FormatError, match="m: found a folder that is not empty"),
        atomic_folder(tmp_path / "deep" / "m"),
    ):
        pass
    with atomic_folder(tmp_path / "deep" / "m", overwrite=True) as new:
        (new / "a").write_text("2")
        (new / "b").write_text("2")
    assert names(tmp_path / "deep") == ["m"] and names(tmp_path / "deep" / "m") == ["SHA256SUMS", "a", "b"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as new:
        (new / "c").write_text("3")
    assert names(tmp_path / "empty") == ["SHA256SUMS", "c"] and names(tmp_path) == ["deep", "empty"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="file: found a file"), atomic_folder(tmp_path / "file", overwrite=True):
        pass


def test_overwriting_replaces_an_earlier_result_only(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    for path, message in [(tmp_path, "the folder 'photos' inside"), (tmp_path / "photos", r"other things \(cat.jpg\)")]:
        with pytest.raises(FormatError, match=message), atomic_folder(path, overwrite=True) as new:
            (new / "config.json").write_text("{}")
    assert names(tmp_path) == ["photos"] and names(tmp_path / "photos") == ["cat.jpg"]


def test_a_failing_block_leaves_the_old_folder(tmp_path):
    with atomic_folder(tmp_path / "m") as new:
        (new / "a").write_text("old")
    for path in ("m", "n"):
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / path, overwrite=True) as new:
            (new / "a").write_text("half")
            raise ZeroDivisionError
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "a").read_text() == "old"


WRITER = """
    import sys
    from minift.io import atomic_write
    n = 0
    while True:
        n = (n + 1) % 256
        {write}
        print(n, flush=True)
"""
ATOMIC = "atomic_write(sys.argv[1], bytes([n]) * 3_000_000)"
NAIVE = "open(sys.argv[1], 'wb', buffering=0).write(bytes([n])); open(sys.argv[1], 'ab').write(bytes([n]) * 2_999_999)"


def killed(tmp_path, write, times):
    """How many of these kills left something other than 3,000,000 equal bytes."""
    broken = 0
    for i in range(times):
        target = tmp_path / f"file{i}"
        code = textwrap.dedent(WRITER).format(write=write)
        with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()  # it has written once
            time.sleep(0.001 * i)
            process.send_signal(signal.SIGKILL)
        data = target.read_bytes()
        broken += len(data) != 3_000_000 or len(set(data[::4096])) != 1
    return broken


def test_survives_kill_9(tmp_path):
    assert killed(tmp_path, ATOMIC, 6) == 0


def test_a_plain_write_does_not(tmp_path):
    """The test above can fail: the same kills find half-written files of a program that just writes."""
    assert killed(tmp_path, NAIVE, 8) > 0
