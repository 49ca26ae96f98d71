"""A number that somebody has printed, and what comes out when one computes it.

Four verdicts. A printed figure is rounded, so `rounded` asks whether what was found, rounded to as many digits, is the
same. A claim that is true under conditions which the sentence does not name gets "depends: …", with the numbers on
which it depends.
"""

from __future__ import annotations

from dataclasses import dataclass

TRUE, FALSE, APPROXIMATELY = "true", "false", "approximately"
TEXTBOOK = "A textbook chapter on fine-tuning"
NEAR = 0.1  # relative; further off is no approximation


@dataclass(frozen=True)
class Claim:
    """`claimed` is the printed figure, the only one that is not computed; `how` is the arithmetic behind `found`."""

    claim: str
    source: str
    claimed: float | str
    found: float | str
    verdict: str
    how: str
    place: str = ""  # section or table of the source
    command: str = ""  # that shows more of it


def rounded(claimed: float, found: float, digits: int) -> str:
    """true if `found`, in as many digits as are printed, is the printed number; approximately within a tenth of it."""
    if float(f"{found:.{digits - 1}e}") == float(f"{claimed:.{digits - 1}e}"):
        return TRUE
    return near(claimed, found)


def near(claimed: float, found: float) -> str:
    """approximately within a tenth of what is claimed, else false."""
    return APPROXIMATELY if abs(found - claimed) <= NEAR * abs(claimed) else FALSE


def holds(condition: bool) -> str:
    """true or false: of counts, of bits, and of what is said to be at most or at least something."""
    return TRUE if condition else FALSE


def depends(on: str) -> str:
    """Not wrong, and not the whole sentence."""
    return f"depends: {on}"
