"""A command in a process of its own, so that its peak memory is its alone; one that is finished is not run again.

A run has a folder. `asked.json` says what is asked for, before anything is computed; `output.txt` is what the command
prints; and `summary.json`, which every command writes last, says that it is finished. Between the two a checkpoint lets
it go on. What was asked for includes the files that are read, by their contents: a run of another text is another run.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.io import FormatError, atomic_write
from minift.io.errors import shown
from minift.io.json_file import parse_json
from minift.train import checkpoint
from minift.train.loop import METRICS, stop_signals

ASKED, OUTPUT, SUMMARY = "asked.json", "output.txt", "summary.json"
EVERY = 0.2  # seconds between two looks at a running process


@dataclass(frozen=True)
class Run:
    """`minift COMMAND` with these settings, in this folder. `digests` are those of the files that it reads."""

    command: str
    settings: dict[str, Any]  # by the names of the command's fields
    folder: Path
    digests: dict[str, str]

    @property
    def finished(self) -> bool:
        """Whether its results are there. FormatError where the folder holds another run."""
        path = self.folder / ASKED
        if not path.exists():
            return False
        there, asked = parse_json(path.read_bytes(), path), self._asked()
        for key in {**asked, **there}:
            if there.get(key) != asked.get(key):
                needed = f"{shown(asked.get(key))}, as asked for now; use another --out, or remove {self.folder}"
                raise FormatError(path, key, shown(there.get(key)), needed)
        return (self.folder / SUMMARY).exists()

    @property
    def step(self) -> int:
        """The last step that was recorded; 0 before the first."""
        path = self.folder / METRICS
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # without a line that is being written
        return json.loads(lines[-1])["step"] if lines else 0

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / METRICS).read_text(encoding="utf-8").splitlines()]

    def arguments(self) -> list[str]:
        """As they stand behind `minift` on a command line."""
        options = [[f"--{name.replace('_', '-')}", str(value)] for name, value in self.settings.items()]
        return [self.command, *(part for option in options for part in option), "--out", str(self.folder)]

    def carry_out(self, report: Callable[[int], None] = lambda step: None) -> bool:
        """Run it, or go on with it, and wait; `report(step)` while it runs. False where somebody has stopped it.

        Ctrl-C is passed on once, so the command leaves a checkpoint. ValueError with its own message where it fails."""
        begun = (self.folder / ASKED).exists() and (self.folder / checkpoint.NAME).exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SUMMARY).unlink(missing_ok=True)  # of something else that had this folder
        atomic_write(self.folder / ASKED, (json.dumps(self._asked(), indent=2) + "\n").encode())
        command = [sys.executable, "-m", "minift", *self.arguments(), *(["--resume"] if begun else [])]
        with open(self.folder / OUTPUT, "wb") as output, stop_signals() as stopped:
            # in a group of its own: the terminal's Ctrl-C comes to us alone, and to the command through us, not twice
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, process_group=0)
            try:
                passed_on = False
                while process.poll() is None:
                    if stopped() and not passed_on:
                        process.send_signal(signal.SIGINT)
                        passed_on = True
                    report(self.step)
                    time.sleep(EVERY)
            finally:
                if process.poll() is None:  # a second Ctrl-C
                    process.kill()
                    process.wait()
        if process.returncode and not stopped():
            said = (self.folder / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            why = said[-1].removeprefix("minift: ") if said else f"it ended with status {process.returncode}"
            raise ValueError(f"{self.folder}: {why}")
        return (self.folder / SUMMARY).exists()

    def _asked(self) -> dict[str, Any]:
        return {"command": self.command, **self.settings, **self.digests}


def digest(source: str) -> str:
    """Of a file, or of all files in a folder; empty for what is neither, such as the name of something built in."""
    path, sha256 = Path(source), hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with open(file, "rb") as opened:
            sha256.update(hashlib.file_digest(opened, "sha256").digest())
    return sha256.hexdigest()[:16] if files else ""
