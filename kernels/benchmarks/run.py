"""Every kernel against its peers and the machine's limit: one command, one JSON file.

    python kernels/benchmarks/run.py                     everything, on the GPU of this machine
    python kernels/benchmarks/run.py --only nf4 losses

Each file beside this one that has a function `rows(machine, replays)` is a family of kernels. A peer that is not
installed is left out and named. The file goes to kernels/benchmarks/results/<device>.json; nothing is quoted anywhere
that does not stand in such a file.
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

import torch
import tyro

FOLDER = Path(__file__).parent
PEERS = ("bitsandbytes", "peft", "liger-kernel", "torchao")


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
        rows = {}
        for name, family in found.items():
            if not self.only or name in self.only:
                rows[name] = family(on, self.replays)
                timing.show(rows[name], f"{name} on {on.name}")
        versions = {"torch": torch.__version__, "triton": metadata.version("triton")}
        versions |= {peer: _version(peer) for peer in PEERS}
        device = re.sub(r"\W+", "_", on.name).strip("_")
        out = self.out or FOLDER / "results" / f"{device}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": asdict(on), "versions": versions, "rows": rows}, indent=1) + "\n")
        print(f"wrote {out}")


def families() -> dict[str, Callable]:
    """name -> rows(machine, replays) of each file here that has it."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    names = (path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem != "run")
    modules = {name: importlib.import_module(name) for name in names}
    return {name: module.rows for name, module in modules.items() if hasattr(module, "rows")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    tyro.cli(Benchmarks).run()
