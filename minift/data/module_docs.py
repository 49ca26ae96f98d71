"""A classification task on real text: to which module of the standard library does this docstring belong?

As with the questions and answers of `stdlib_docs`, nothing is stored and nothing is fetched: the Python that runs says
what its functions do. The answer would often stand in the text, so all names are masked: those of the documented thing
itself, and those of all the modules in every text, whatever its own.
"""

from __future__ import annotations

import functools
import inspect
import re

from minift.data.docstrings import without_signature
from minift.data.labeled import LabeledText, Split, split
from minift.data.stdlib_docs import public_names

MODULES = (
    "asyncio", "curses", "decimal", "email", "http", "importlib", "inspect", "logging",
    "mailbox", "multiprocessing", "os", "pathlib", "socket", "unittest", "urllib", "xml",
)  # fmt: skip
LONGEST = 300  # characters
FEWEST = 4  # words that must be left
MASK = "_"

_MODULE_NAMES = re.compile(rf"\b(?:{'|'.join(MODULES)})\b", re.IGNORECASE)


@functools.cache
def embedded() -> Split:
    """The task, split by the hash of the text: (text, module) to learn from, and held out."""
    found = []
    for name, thing in sorted(public_names().items()):
        module = name.partition(".")[0]
        doc = getattr(thing, "__doc__", None)
        if module in MODULES and isinstance(doc, str) and (text := masked(doc, name)):
            found.append(LabeledText(text, module))
    return split(found)


def masked(doc: str, name: str) -> str:
    """The beginning of a docstring of `name` on one line, without signature and names; "" where too little is left."""
    text = " ".join(without_signature(inspect.cleandoc(doc)).split())
    if len(text) > LONGEST:
        text = text[:LONGEST].rpartition(" ")[0]
    own = "|".join(re.escape(part) for part in name.split("."))
    text = re.sub(rf"\b(?:{own})\b", MASK, _MODULE_NAMES.sub(MASK, text), flags=re.IGNORECASE)
    return text if len(re.findall(r"[A-Za-z]{2,}", text)) >= FEWEST else ""
