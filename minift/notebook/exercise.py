"""An exercise says whether it is solved, and lets the rest of the notebook run if it is not.

    with attempt("5.1"):
        check("nf4.quantize", my_quantize)

`check` raises its counterexample, which would end "run all cells" at the first exercise. Here it is shown instead.
With MINIFT_EXERCISES=strict in the environment it is raised: so the solutions are tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def attempt(exercise: str) -> Iterator[None]:
    """Run the checks of an exercise: "solved", or what the first of them found, without a traceback.

    Whatever the checks raise is shown in this way, mistakes of the solution included; KeyboardInterrupt is not."""
    try:
        yield
    except Exception as error:
        if os.environ.get("MINIFT_EXERCISES") == "strict":
            raise
        print(f"Exercise {exercise}: not yet.\n{_found(error)}")
    else:
        print(f"Exercise {exercise}: solved.")


def _found(error: Exception) -> str:
    if isinstance(error, AssertionError):
        return str(error) or "An assertion does not hold."
    return f"It raised {type(error).__name__}: {error}"
