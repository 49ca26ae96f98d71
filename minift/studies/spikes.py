"""Long sequences among short ones: what lies in a device's memory over a run, with paged moments and without.

Activations grow with the length of a batch and are gone when the optimizer steps; the optimizer's state is used only
then. Without paging both must fit at once, at the longest sequence of the run. With it, the backward pass of a long
sequence evicts as many pages as it needs, and the step after it brings them back: a few page faults, where there would
have been no memory.                                                              (Dettmers et al. 2023, 2305.14314, §3)

What is simulated are the activations, which are counted and not formed. Pages, budgets, evictions and faults are those
of `minift.optim.pager`, at work on real moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit
from minift.optim.paged import PagedAdamW
from minift.optim.pager import Pager

Record = dict[str, Any]


def run(model: str, seed: int, say: Callable[[str], None]) -> list[Record]:
    """Sixty steps with 8-bit moments, every fifteenth of them of a long text; the same whatever the `model`."""
    return resident_bytes(lengths_with_spikes(seed=seed), AdamW8bit())


def rows(records: Sequence[Record]) -> list[Record]:
    """What the run came to, in one row."""
    most = max(r["activation_bytes"] for r in records)
    return [
        {
            "device_bytes": records[0]["device_bytes"],
            "peak_without_paging": most + records[-1]["state_bytes"],
            "peak_with_paging": max(r["activation_bytes"] + r["resident_bytes"] for r in records),
            "page_faults": records[-1]["page_faults"],
        }
    ]


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


def draw(records: Sequence[Record], path: Path) -> None:
    """Bytes by step with paging and without, and page faults, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    at = [r["step"] + (0.0 if r["phase"] == "update" else -0.5) for r in records]  # the update comes last
    activations, resident, state = (
        np.array([r[key] for r in records]) / 1e6 for key in ("activation_bytes", "resident_bytes", "state_bytes")
    )
    above.step(at, activations + state.max(), where="post", color="C3", linewidth=1, label="without paging")
    above.step(at, activations + resident, where="post", color="C0", label="with paging")
    above.fill_between(at, activations, step="post", color="0.85", label="activations")
    above.axhline(records[0]["device_bytes"] / 1e6, color="k", linestyle="--", linewidth=1, label="the device's memory")
    above.set(ylabel="resident (MB)", title="a long sequence among short ones")
    above.legend(loc="upper left", fontsize="small")
    updates = [r for r in records if r["phase"] == "update"]
    faults = np.diff([0, *(r["page_faults"] for r in updates)])
    below.bar([r["step"] for r in updates], faults, color="C0")
    below.set(xlabel="step", ylabel="page faults")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
