"""The words of a text that say what it is about, and which of them are forms of one word.

Words that stand in every text carry no content, and neither do those that names and docstrings say of everything. Forms
of one word have one stem ("parse", "parsing"; "directory", "directories"), which is found by cutting the ending.
"""

from __future__ import annotations

import re
from functools import lru_cache

# What carries no content: function words, and what names and docstrings say of everything.
_FUNCTION_WORDS = """
    a an the this that these those it its they their there here he she you your we our i me my one
    of to in on at by for from with into onto as about over under up out off per via than then upon within
    is are was be been being am do does did done has have had can could may might will would shall should must
    and or not no nor if else whether when while where which who whom whose what how why because so but only also just
    all any each every both either neither some more most less least such same other another very
"""
_SAID_OF_EVERYTHING = """
    get set return make new use using used given specified called object value thing something function method class
    module attribute instance name call name python etc default current
"""
IGNORED = frozenset((_FUNCTION_WORDS + _SAID_OF_EVERYTHING).split())
# Longest first, so that the first that fits is the one.
_ENDINGS = "ations ation ators ator ions ings able ion ing ors ers ies ied or er ed es s e y"
_SUFFIXES = tuple(_ENDINGS.split())

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def content_words(text: str) -> set[str]:
    """The words of a text that are not in every text."""
    return {word for found in WORD.findall(text) if (word := found.lower()) not in IGNORED}


@lru_cache(maxsize=1 << 15)
def stem(word: str) -> str:
    """The word without its ending, at least three letters long."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word
