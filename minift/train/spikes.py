"""Long sequences among short ones: what lies in a device's memory over a run, with paged moments and without.

Activations grow with the length of a batch and are gone when the optimizer steps; the optimizer's state is used only
then. Without paging both must fit at once, at the longest sequence of the run. With it, the backward pass of a long
sequence evicts as many pages as it needs, and the step after it brings them back: a few page faults, where there would
have been no memory.                                                              (Dettmers et al. 2023, 2305.14314, §3)

What is simulated are the activations, which are counted and not formed. Pages, budgets, evictions and faults are those
of `minift.optim.pager`, at work on real moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit
from minift.optim.paged import PagedAdamW
from minift.optim.pager import Pager

Record = dict[str, Any]


def lengths_with_spikes(
    steps: int = 60, short: int = 300, long: int = 1400, every: int = 15, seed: int = 0
) -> list[int]:
    """Tokens of each step: `short` within a fifth, and each `every` steps one of `long`."""
    around = np.random.default_rng(seed).integers(short * 4 // 5, short * 6 // 5, steps, endpoint=True)
    return [long if step % every == 0 else int(length) for step, length in enumerate(around, 1)]


def resident_bytes(
    tokens: Sequence[int],
    optimizer: AdamW | AdamW8bit,
    parameters: int = 1 << 18,
    bytes_per_token: int = 2048,
    device_bytes: int = 3_000_000,
    page_elements: int = 1 << 14,
    folder: Path | None = None,
) -> list[Record]:
    """Two records a step, `backward` and `update`: bytes of activations, of resident pages and of the whole state, and
    page faults so far. `device_bytes` is what weights and gradients have left.

    ValueError where the activations of one step do not fit by themselves, or a page does not."""
    if max(tokens) * bytes_per_token > device_bytes:
        found = f"{max(tokens):,} tokens of {bytes_per_token:,} bytes"
        raise ValueError(f"{found} do not fit {device_bytes:,} bytes of device memory, even with no page beside them")
    theta = {"w": np.zeros((parameters // 64, 64), np.float32)}
    paged = PagedAdamW(optimizer, Pager(device_bytes, folder), page_elements)
    records = []
    for step, length in enumerate(tokens, 1):
        rng = np.random.default_rng(step)
        for phase in ("backward", "update"):
            activations = length * bytes_per_token if phase == "backward" else 0
            paged.pager.limit(device_bytes - activations)
            if phase == "update":
                gradient = rng.standard_normal(theta["w"].shape, np.float32)
                paged.update(theta, {"w": gradient}, 1e-3)
            records.append(
                {"step": step, "phase": phase, "tokens": length, "activation_bytes": activations}
                | {"resident_bytes": paged.pager.resident_bytes, "state_bytes": paged.nbytes}
                | {"page_faults": paged.pager.faults, "device_bytes": device_bytes}
            )
    return records
