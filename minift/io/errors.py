"""The one exception of `minift.io`: a file that is not what it should be, said so that it can be repaired."""

from __future__ import annotations

from os import PathLike


class FormatError(ValueError):
    """A file cannot be read or written as asked: which file, which key in it, what was found, what was needed.

    `key` is a tensor's name, a configuration key or, where the whole file is meant, the empty string.
    """

    def __init__(self, path: str | PathLike[str], key: str, found: object, needed: object):
        self.path, self.key, self.found, self.needed = str(path), key, str(found), str(needed)
        where = f"{path}: {key}" if key else f"{path}"
        super().__init__(f"{where}: found {found}, needed {needed}")
