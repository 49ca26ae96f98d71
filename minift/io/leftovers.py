"""What killed processes leave behind: whose it is, and what becomes of it.

Whoever writes NAME works on `.NAME.tmp-XXXXXXXX` beside it, and holds a lock on that (flock) until it has got its name.
The system takes the lock away when the process ends, however it ends, and gives it to nobody else, as it does with
process numbers. So whoever writes NAME next removes what nobody holds, and nothing that a living process works on.
Linux carries these locks over NFS to other machines; where a file system has no locks, everything is left alone.

A folder that cannot be replaced in one step is called `.NAME.old-XXXXXXXX` for an instant, with the letters of the
temporary folder that is to take its place. A kill in this instant leaves no NAME. Then the next writer gives the old
folder its name back, and a reader says where it is and how to get it back.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minift.io.errors import FormatError


@contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[Path]:
    """A new file or folder `.NAME.tmp-…` beside `path`, held while the block runs, and removed if the block fails.

    What others left there is cleaned up first. Raises OSError."""
    _clean(path)
    lock = None
    while lock is None:  # none: it was taken for a leftover before it was locked
        if folder:
            made = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
        else:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
            os.close(handle)
            made = Path(name)
        lock = _lock(made, new=True)
    try:
        yield made
    except BaseException:
        _remove(made)
        raise
    finally:
        os.close(lock)


def aside(path: Path, temporary: Path) -> Path:
    """What the folder `path` is called while `temporary` takes its place: `.NAME.old-XXXXXXXX`."""
    return path.with_name(f".{path.name}.old-{temporary.name[-8:]}")


def require_not_aside(path: Path) -> None:
    """FormatError, with the command that helps, if `path` is missing because a kill came while it was replaced."""
    if not path.exists() and (left := _left(path.absolute(), "old")):
        command = f"mv {shlex.quote(str(left[0]))} {shlex.quote(str(path.absolute()))}"
        found = f"only {left[0].name} beside it, because the process that was replacing it was killed"
        raise FormatError(path, "", found, f"the folder under its name: {command}")


def _clean(path: Path) -> None:
    for old in _left(path, "old"):
        new = path.with_name(f".{path.name}.tmp-{old.name[-8:]}")
        lock = _lock(new)
        if lock is None and new.exists():  # its owner lives
            continue
        with suppress(OSError):
            os.replace(old, path)  # onto nothing, or an empty folder
        if path.exists():
            _remove(old)
        if lock is not None:
            os.close(lock)
    for new in _left(path, "tmp"):
        if (lock := _lock(new)) is not None:
            _remove(new)
            os.close(lock)


def _left(path: Path, kind: str) -> list[Path]:
    """Everything beside `path` that is called `.NAME.kind-XXXXXXXX`, the latest first."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{kind}-[a-z0-9_]{{8}}")
    with suppress(OSError):
        found = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
        return sorted(found, key=lambda entry: entry.stat().st_mtime, reverse=True)
    return []


def _lock(path: Path, new: bool = False) -> int | None:
    """A handle that holds the lock of a file or folder; None where that is not to be had, or `path` has gone.

    One that is `new` is waited for, and its handle comes back also where there are no locks."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError as error:
        if new and not isinstance(error, FileNotFoundError):
            raise
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if new else fcntl.LOCK_NB))
    except OSError:
        if new:
            return handle
        os.close(handle)
        return None
    if path.exists():
        return handle
    os.close(handle)
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
