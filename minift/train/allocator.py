"""Memory that a step has freed is kept for the next step.

A training step frees everything that it has computed, and the next one asks for as much again. The C library glibc
gives large freed blocks back to the operating system, which hands them out again page by page, each filled with
zeros first: up to a fifth of a step of a small model. It also keeps a separate pool of memory for each thread, so that
what one thread has freed is of no use to another.
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # the options of mallopt(3)


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 2 GB in one pool for all threads, large blocks too; False with another C library.

    It concerns the whole process, changes no result, and works best before the first thread starts."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(TRIM_THRESHOLD, 2**31 - 1), mallopt(MMAP_MAX, 0), mallopt(ARENA_MAX, 1)])
