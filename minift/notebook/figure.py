"""One look for all pictures of the course: readable on a phone, on white and on black."""

from __future__ import annotations

COLORS = ("#4878cf", "#d65f5f", "#55a868", "#b47cc7", "#c4ad66", "#77bedb")


def figures() -> None:
    """Set matplotlib's defaults for the notebook: call it once, in the first cell."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.2),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",  # a picture keeps its paper in a dark theme: its black text stays readable
            "axes.prop_cycle": cycler(color=COLORS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.titlesize": "medium",
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "savefig.bbox": "tight",
        }
    )
