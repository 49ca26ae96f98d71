"""Every kernel against its peers and the machine's limit: one command, one JSON file.

    python kernels/benchmarks/run.py                     everything, on the GPU of this machine
    python kernels/benchmarks/run.py --only nf4 losses

Each file beside this one that has a function `rows(machine, replays)` is a family of kernels. A peer that is not
installed is left out and named. At the end stands which of the TARGETS are reached. The file goes to
kernels/benchmarks/results/<device>.json; nothing is quoted anywhere that does not stand in such a file.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
PEERS = ("bitsandbytes", "peft", "liger-kernel", "torchao")

# (name, family, which of its tasks: a regular expression from their beginning, beside what, at least). Beside "floor":
# which share of the machine's limit; beside a peer: how many times faster. The worst task counts.
TARGETS = (
    ("NF4 decoded to bfloat16, of a copy", "nf4", "dequantize to bfloat16", "floor", 0.9),
    ("NF4 decoded to bfloat16", "nf4", "dequantize to bfloat16", "bitsandbytes", 2.0),
    ("NF4 times a vector", "nf4_matmul", "1 rows", "bitsandbytes", 1.5),
    ("NF4 times a vector, by gemv_4bit", "nf4_matmul", "1 rows", "bitsandbytes, gemv", 1.5),
    ("NF4 times a vector, of bandwidth", "nf4_matmul", "1 rows", "floor", 0.7),
    ("NF4 times 2,048 rows", "nf4_matmul", "2048 rows", "cuBLAS", 0.85),
    ("NF4 times 8,192 rows", "nf4_matmul", "8192 rows", "cuBLAS", 0.95),
    ("QLoRA's linear layer", "lora", ".*both passes", "PEFT, bitsandbytes", 1.3),
    ("RMSNorm", "norms", "rms_norm", "liger", 1.0),
    ("cross-entropy", "losses", "", "liger", 1.0),
    ("SwiGLU", "mlp", "swiglu", "liger", 1.0),
    ("rotary positions", "rope", "", "liger", 1.0),
    ("attention, causal", "attention", "causal", "torch, flash", 0.8),
    ("attention, packed", "attention", "packed", "torch, flash", 0.8),
)


@dataclass
class Benchmarks:
    """Time the kernels of minift_kernels beside their peers."""

    only: tuple[str, ...] = ()
    """Families, by the names of the files; all if not given."""
    replays: int = 50
    """How often each graph is timed."""
    out: Path | None = None
    """Where the results go; results/<device>.json beside this file if not given."""

    def run(self) -> None:
        found = families()
        if unknown := set(self.only) - found.keys():
            raise SystemExit(f"--only {min(unknown)}: needed some of {', '.join(found)}")
        import timing

        on = timing.machine()
        rows, failures = {}, {}
        for name, family in found.items():
            if self.only and name not in self.only:
                continue
            try:
                rows[name] = family(on, self.replays)
            except Exception as error:  # the others' figures are not lost
                failures[name] = f"{type(error).__name__}: {error}"
                print(f"{name}: {failures[name]}")
            else:
                timing.show(rows[name], f"{name} on {on.name}")
        targets = reached(rows)
        show(targets)
        versions = {"torch": torch.__version__, "triton": metadata.version("triton")}
        versions |= {peer: _version(peer) for peer in PEERS}
        device = re.sub(r"\W+", "_", on.name).strip("_")
        out = self.out or FOLDER / "results" / f"{device}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": asdict(on), "versions": versions, "targets": targets, "failures": failures}
        out.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n")
        print(f"wrote {out}")
        if failures:
            raise SystemExit(f"failed: {', '.join(failures)}")


def families() -> dict[str, Callable]:
    """name -> rows(machine, replays) of each file here that has it."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    names = (path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem != "run")
    modules = {name: importlib.import_module(name) for name in names}
    return {name: module.rows for name, module in modules.items() if hasattr(module, "rows")}


def reached(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each target of these families what was wanted and found, and at which task; None where the peer is missing."""
    results = []
    for name, family, tasks, beside, wanted in TARGETS:
        if family not in rows:
            continue
        by_task: dict[str, dict[str, Any]] = {}
        for row in rows[family]:
            if re.match(tasks, row["task"]):
                by_task.setdefault(row["task"], {})[row["what"]] = row
        shares = {
            task: by["minift"]["of_floor"] if beside == "floor" else by[beside]["seconds"] / by["minift"]["seconds"]
            for task, by in by_task.items()
            if beside == "floor" or beside in by
        }
        worst = min(shares, key=shares.__getitem__, default=None)
        found = shares.get(worst)
        target = {"name": name, "beside": beside, "wanted": wanted, "found": found, "task": worst}
        results.append(target | {"reached": found is not None and found >= wanted})
    return results


def show(targets: list[dict[str, Any]]) -> None:
    table = Table(title="Targets")
    for heading in ("", "beside", "wanted", "found", "reached", "at worst for"):
        table.add_column(heading, justify="right" if heading in ("wanted", "found") else "left")
    for target in targets:
        found = target["found"]
        said = ["not measured", ""] if found is None else [f"{found:.2f}", "yes" if target["reached"] else "no"]
        table.add_row(target["name"], target["beside"], f"{target['wanted']:.2f}", *said, target["task"] or "")
    Console().print(table)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    tyro.cli(Benchmarks).run()
