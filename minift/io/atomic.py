"""A file is there whole or not at all.

A process that is killed while it writes leaves half a file. So everything is written under a temporary name in the
same directory, flushed to the disk, and only then renamed: a rename either happened or did not. The directory is
flushed too, because it is the directory that holds the new name. What a killed process leaves under a temporary name
is cleaned up by the next one that writes the same file or folder: see `leftovers`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minift.io import checksum, leftovers
from minift.io.errors import FormatError

EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def atomic_write(path: str | os.PathLike[str], content: bytes | Callable[[Path], object]) -> None:
    """Replace the file `path` by `content`: bytes, or a function that writes them to the path it is given.

    If anything fails, also inside `content`, the file that was there before is untouched and nothing else is left
    behind; a killed process can leave `.NAME.tmp-…` beside it. Raises OSError, and whatever `content` raises.
    """
    path = Path(path)
    with leftovers.temporary(path) as temporary:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        temporary.chmod(0o666 & ~_umask())  # temporary files are made so that nobody else can read them
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """`with atomic_folder(path) as folder:` fill `folder`; it gets the name `path` when the block ends well.

    The checksums of its files are added as `SHA256SUMS`. If the block fails, `path` is as it was. An existing folder
    that is not empty is refused (FormatError) unless `overwrite`; then it is replaced as a whole. Only an earlier
    result is replaced: a folder with other folders in it, or with none of the new files, is refused as well.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FormatError(path, "", "a file", "a folder, or a name that is free")
    path.parent.mkdir(parents=True, exist_ok=True)
    with leftovers.temporary(path, folder=True) as temporary:
        if not overwrite:
            refuse_to_replace(path, "overwrite=True")
        yield temporary
        refuse_to_destroy(path, {file.name for file in temporary.iterdir()})
        checksum.write_sums(temporary)
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        old = _replace_folder(temporary, path)
    sync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_to_replace(path: Path, otherwise: str = "--overwrite") -> None:
    """FormatError if `path` is a folder with something in it; `otherwise` is how one says that it may be replaced."""
    if path.is_dir() and any(path.iterdir()):
        raise FormatError(path, "", "a folder that is not empty", f"an empty or new one, or {otherwise}")


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


def _replace_folder(new: Path, path: Path) -> Path | None:
    """Give `new` the name `path`; what the folder is called that had it before, if one did."""
    if not path.exists():
        os.rename(new, path)
        return None
    if _exchange(new, path):
        return new
    old = leftovers.aside(path, new)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    return old


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step, so that there is never none of them; False where system or disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(HERE, os.fsencode(a), HERE, os.fsencode(b), EXCHANGE) == 0


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
