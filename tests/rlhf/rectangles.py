"""Masks and rectangles that aim at trouble, and what may stand outside a mask without mattering."""

import numpy as np

POISON = (1e6, -1e6, np.inf, np.nan)

# seed, rows, width, kind of mask
SHAPES = [
    (1, 3, 7, "answers"),
    (2, 2, 5, "full"),
    (3, 1, 1, "full"),
    (4, 4, 9, "episodes"),
    (5, 5, 4, "one"),
    (6, 2, 12, "answers"),
]


def mask_of(case, rng):
    """Answers behind prompts of some length; whole rows; single tokens; several episodes in a row."""
    _, rows, width, kind = case
    t = np.arange(width)
    if kind == "full":
        return np.ones((rows, width), bool)
    if kind == "one":
        return t == rng.integers(0, width, (rows, 1))
    if kind == "episodes":
        mask = rng.random((rows, width)) < 0.7
        mask[:, 0], mask[:, 1] = True, False
        mask[:, 3:5] = True
        return mask
    start = rng.integers(1, width - 1, (rows, 1))
    return (t >= start) & (t < start + 1 + rng.integers(0, width - start, (rows, 1)))


def poisoned(x, mask, poison):
    return np.where(mask, x, x.dtype.type(poison))


def dyadic(rng, shape, dtype=np.float64):
    """Small multiples of 1/8: sums and products of a few are exact."""
    return (rng.integers(-16, 17, shape) / 8).astype(dtype)
