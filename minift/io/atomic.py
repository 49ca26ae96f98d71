"""A file is there whole or not at all.

A process that is killed while it writes leaves half a file. So everything is written under a temporary name in the
same directory, flushed to the disk, and only then renamed: a rename either happened or did not. The directory is
flushed too, because it is the directory that holds the new name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minift.io.errors import FormatError


def atomic_write(path: str | os.PathLike[str], content: bytes | Callable[[Path], object]) -> None:
    """Replace the file `path` by `content`: bytes, or a function that writes them to the path it is given.

    If anything fails, also inside `content`, the file that was there before is untouched and nothing else is left
    behind; a killed process can leave `.NAME.tmp-…` beside it. Raises OSError, and whatever `content` raises.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that nobody else can read
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """`with atomic_folder(path) as folder:` fill `folder`; it gets the name `path` when the block ends well.

    If the block fails, `path` is as it was. An existing folder that is not empty is refused (FormatError) unless
    `overwrite`; then it is replaced as a whole, and between the two renames it is called `.NAME.old-…`. Only an
    earlier result is replaced: a folder with other folders in it, or with none of the new files, is refused as well.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FormatError(path, "", "a file", "a folder, or a name that is free")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FormatError(path, "", "a folder that is not empty", "an empty or new one, or overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        yield temporary
        refuse_to_destroy(path, {file.name for file in temporary.iterdir()})
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_to_destroy(path: Path, names: set[str]) -> None:
    """Somebody who passes the wrong path with `overwrite` shall not lose a folder full of other things.

    FormatError unless `path` is free, empty, or an earlier result: files only, and among them one of `names`."""
    for above in (path, *path.parents):
        if above.exists() and not above.is_dir():
            raise FormatError(above, "", "a file", "a folder, or a name that is free")
    old = list(path.iterdir()) if path.exists() else []
    if folders := [entry.name for entry in old if entry.is_dir()]:
        raise FormatError(path, "", f"the folder {folders[0]!r} inside", "a folder of files that may be replaced")
    if old and not names & {entry.name for entry in old}:
        raise FormatError(path, "", f"a folder with other things ({old[0].name})", f"one with {min(names, default='')}")


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    os.replace(path, old)  # onto an empty directory
    try:
        os.rename(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
