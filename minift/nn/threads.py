"""How many cores there are, and two ways to use them beside the threads inside a matrix product.

NumPy's element-wise functions run on one core, but release Python's lock while they compute, so threads can share out
what is independent. The number of threads is the one that BLAS has been given: all cores, unless OPENBLAS_NUM_THREADS
or the like says otherwise, and one inside `one_core_each`, where every core has work already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

from threadpoolctl import ThreadpoolController

MANY = 32  # pieces; fewer are not worth a thread


def count() -> int:
    """How many threads a matrix product may use."""
    return max((library["num_threads"] for library in _blas().info()), default=1)


def on_all_cores(work: Callable[..., None], pieces: Iterable[tuple]) -> None:
    """`work(*piece)` for each piece; they write to different places, so their order does not matter."""
    todo = list(pieces)
    threads = count() if len(todo) >= MANY else 1
    size = -(-len(todo) // threads)

    def run(first):
        for piece in todo[first : first + size]:
            work(*piece)

    if threads == 1:
        run(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(0, len(todo), size)))


@contextmanager
def one_core_each(threads: int) -> Iterator[Callable[..., Iterator]]:
    """`with one_core_each(n) as each:` `each` is `map`, in order, on n threads with a core for each."""
    with _blas().limit(limits=1), ThreadPoolExecutor(threads) as pool:
        yield pool.map


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
