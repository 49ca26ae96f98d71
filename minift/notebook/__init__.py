"""What the notebooks of the course need beside the library.

    from minift.notebook import SMALL, attempt

    steps = 5 if SMALL else 60                # SMALL is how the tests run a notebook
    with attempt("5.1"):                      # an exercise: the notebook goes on where the check finds a mistake
        check("nf4.quantize", my_quantize)

and `rate_in_notebook`, two answers with buttons under them, for a person who compares.
"""

from __future__ import annotations

import os

from minift.notebook.exercise import attempt
from minift.notebook.figure import figures
from minift.notebook.rating import RatingPanel, rate_in_notebook

SMALL = os.environ.get("MINIFT_NOTEBOOKS") == "small"

__all__ = ["SMALL", "RatingPanel", "attempt", "figures", "rate_in_notebook"]
