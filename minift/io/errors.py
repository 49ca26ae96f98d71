"""The one exception of `minift.io`: a file that is not what it should be, said so that it can be repaired."""

from __future__ import annotations

import reprlib
from os import PathLike

LONGEST = 500  # characters of a name or a value in a message
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxlong = 4, 20, 20, 60
_SHORT.maxstring = _SHORT.maxother = 100


class FormatError(ValueError):
    """A file cannot be read or written as asked: which file, which key in it, what was found, what was needed.

    `key` is a tensor's name, a configuration key or, where the whole file is meant, the empty string. The message can
    always be printed: what came out of a file may be megabytes long, or half a surrogate pair.
    """

    def __init__(self, path: str | PathLike[str], key: str, found: object, needed: object):
        self.path, self.key, self.found, self.needed = str(path), key, str(found), str(needed)
        where = f"{path}: {_cut(key)}" if key else f"{path}"
        message = f"{where}: found {_cut(self.found)}, needed {_cut(self.needed)}"
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


def shown(value: object) -> str:
    """`repr` of a value out of a file, cut short: it may be too long to read, and too deep for `repr`."""
    return _SHORT.repr(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
