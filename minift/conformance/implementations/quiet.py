"""Libraries have much to say when they are imported about optional parts of theirs that are not there."""

from __future__ import annotations

import importlib
import logging
import warnings
from types import ModuleType


def absent(error: ImportError) -> str:
    """Why there is nothing to run."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.partition('.')[0]} is not installed"
    return f"it cannot be imported: {error}"


def import_quietly(name: str) -> ModuleType:
    """The module, without warnings. ImportError as always."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        logging.disable(before)
