"""What a kill leaves behind is removed if nobody works on it, and a folder that lost its name gets it back."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from minift.io import FormatError, atomic, atomic_folder, atomic_write, leftovers, load_adapter, load_model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def kill_itself(folder, code):
    """Run a writer that is killed in the middle of its work; its leftovers' names."""
    head = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom minift.io import atomic, atomic_write, atomic_folder\n"
    )
    head += "def die(*_, **__):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", head + textwrap.dedent(code)], cwd=folder)
    assert done.returncode == -signal.SIGKILL
    return [name for name in names(folder) if name.startswith(".")]


def save(path, text):
    with atomic_folder(path, overwrite=True) as new:
        (new / "config.json").write_text(text)


def test_the_next_write_cleans_up(tmp_path):
    atomic_write(tmp_path / "a", b"old")
    left = kill_itself(tmp_path, "atomic_write('a', die)")
    left += kill_itself(tmp_path, "with atomic_folder('m') as new:\n    (new / 'x').write_text('half')\n    die()")
    assert sorted(name[:7] for name in set(left)) == [".a.tmp-", ".m.tmp-"]
    assert (tmp_path / "a").read_bytes() == b"old"
    atomic_write(tmp_path / "a", b"new")
    assert [name[:7] for name in names(tmp_path)] == [".m.tmp-", "a"]  # of its own name only
    save(tmp_path / "m", "1")
    assert names(tmp_path) == ["a", "m"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_living_process_writes_stays(tmp_path, folder):
    """Also one that has stopped for a while; another process, since locks are a process's own."""
    body = "atomic_folder('a') as new" if folder else "leftovers.temporary(Path('a')) as new"
    code = f"import sys\nfrom pathlib import Path\nfrom minift.io import atomic_folder, leftovers\nwith {body}:\n"
    code += "    print(flush=True)\n    sys.stdin.read()\n    print(new.exists())\n"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        other.send_signal(signal.SIGSTOP)
        atomic_write(tmp_path / "a", b"mine")
        assert len(names(tmp_path)) == 2
        if folder:
            (tmp_path / "a").unlink()
        other.send_signal(signal.SIGCONT)
        assert other.communicate("")[0] == "True\n"


def test_only_what_is_called_as_ours_is_removed(tmp_path):
    others = [".a.tmp-notes", ".a.tmp-ABCDEFGH", ".a.tmp-123456789", ".ab.tmp-12345678", "a.tmp-12345678"]
    others += [".a.old-1234567", ".xa.tmp-12345678"]
    for name in [*others, ".a.tmp-1234567_"]:
        (tmp_path / name).write_text("")
    atomic_write(tmp_path / "a", b"")
    assert names(tmp_path) == sorted([*others, "a"])
    (tmp_path / ".[a].tmp-12345678").write_text("")  # no pattern, a name
    atomic_write(tmp_path / "[a]", b"")
    assert names(tmp_path) == sorted([*others, "a", "[a]"])


def test_where_there_are_no_locks_nothing_is_removed(tmp_path, monkeypatch):
    def no_locks(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(leftovers.fcntl, "flock", no_locks)
    (tmp_path / ".a.tmp-12345678").write_text("")
    atomic_write(tmp_path / "a", b"new")
    save(tmp_path / "m", "1")
    assert names(tmp_path) == [".a.tmp-12345678", "a", "m"]


def test_one_that_is_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Between its making and its lock another process may look at it, and find that nobody holds it."""
    flock, made = leftovers.fcntl.flock, []

    def first_removed(handle, how):
        made.append(names(tmp_path))
        if len(made) == 1:
            (tmp_path / made[0][0]).unlink()
        return flock(handle, how)

    monkeypatch.setattr(leftovers.fcntl, "flock", first_removed)
    atomic_write(tmp_path / "a", b"whole")
    assert len(made) == 2 and (tmp_path / "a").read_bytes() == b"whole"


BETWEEN = """
rename = os.rename
def second(a, b):
    rename(a, b) if ".old-" in str(b) else die()
os.rename = second
atomic._exchange = lambda a, b: False
with atomic_folder("m", overwrite=True) as new:
    (new / "config.json").write_text("2")
"""
AFTER = """
atomic.shutil.rmtree = die
with atomic_folder("m", overwrite=True) as new:
    (new / "config.json").write_text("2")
"""


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    """The only moment in which there is no folder of that name, where two names cannot be exchanged."""
    save(tmp_path / "m", "1")
    left = kill_itself(tmp_path, BETWEEN)
    assert [name[:7] for name in left] == [".m.old-", ".m.tmp-"] and not (tmp_path / "m").exists()
    for load in (load_model, load_adapter):
        with pytest.raises(FormatError, match=r"the process that was replacing it was killed.*: mv ") as refused:
            load(tmp_path / "m")
    with pytest.raises(FormatError, match="a folder that is not empty"), atomic_folder(tmp_path / "m"):
        pass  # it has its name back, and is not to be replaced
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "config.json").read_text() == "1"

    kill_itself(tmp_path, BETWEEN)
    command = str(refused.value).split("under its name: ")[1].replace(left[0], kill_itself_left(tmp_path))
    subprocess.run(command, shell=True, check=True)  # what the reader said
    assert (tmp_path / "m" / "config.json").read_text() == "1"
    save(tmp_path / "m", "3")
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "config.json").read_text() == "3"


def kill_itself_left(folder):
    (old,) = (name for name in names(folder) if ".old-" in name)
    return old


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_before_the_old_folder_is_removed(tmp_path, exchange):
    save(tmp_path / "m", "1")
    left = kill_itself(tmp_path, AFTER if exchange else "atomic._exchange = lambda a, b: False\n" + AFTER)
    assert [name[:7] for name in left] == [".m.tmp-" if exchange else ".m.old-"]
    assert (tmp_path / "m" / "config.json").read_text() == "2"
    save(tmp_path / "m", "3")
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "config.json").read_text() == "3"


def test_a_folder_that_is_being_replaced_is_left_to_its_writer(tmp_path):
    """Another process that stands between its two renames, alive: its old folder is not put back."""
    save(tmp_path / "m", "1")
    code = f"import os, signal\nfrom minift.io import atomic, atomic_folder\n{BETWEEN}".replace("die()", "wait(a, b)")
    code = code.replace(
        "rename = os.rename", "rename = os.rename\ndef wait(a, b):\n    print(flush=True); input(); rename(a, b)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        before = names(tmp_path)
        leftovers._clean(tmp_path / "m")
        assert names(tmp_path) == before and "m" not in before
        other.communicate("\n")
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "config.json").read_text() == "2"


def test_names_are_exchanged_in_one_step(tmp_path):
    save(tmp_path / "a", "1")
    save(tmp_path / "b", "2")
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or this disk cannot exchange two names")
    assert [(tmp_path / name / "config.json").read_text() for name in "ab"] == ["2", "1"]
    assert not atomic._exchange(tmp_path / "a", tmp_path / "nowhere")
    assert names(tmp_path) == ["a", "b"]


def test_locks_are_let_go(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for i in range(5):
        atomic_write(tmp_path / "a", b"")
        save(tmp_path / "m", str(i))
        with pytest.raises(ZeroDivisionError):
            atomic_write(tmp_path / "a", lambda path: 1 / 0)
    assert len(os.listdir("/proc/self/fd")) == before
