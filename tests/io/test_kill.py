"""`kill -9` at a random moment of a process that does nothing but save checkpoints: there is always one to read."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from minift.io import FormatError
from minift.train import checkpoint

TRIES = int(os.environ.get("MINIFT_KILLS", 20))
IDENTITY = {"run": "kill"}
LIKE = {"w": np.zeros((400, 250), np.float32)}  # 0.4 MB a group, so that a write takes a while

SAVER = """
    import sys
    from pathlib import Path
    import numpy as np
    from minift.train import checkpoint
    PATCH
    step = 0
    while True:
        step += 1
        groups = [{"w": np.full((400, 250), 4 * step + i, np.float32)} for i in range(4)]
        checkpoint.save(Path(sys.argv[1]), checkpoint.Checkpoint(step, {"run": "kill"}, *groups, 0.5))
        if step == 1:
            print(flush=True)
"""
NAIVE = """
    import minift.io.safetensors_file as file
    def write(path, content):
        content(other := path.with_name(".other"))
        with open(path, "wb", buffering=0) as target:
            for half in (other.read_bytes()[:800_000], other.read_bytes()[800_000:]):
                target.write(half)
    file.atomic_write = write
"""


def unreadable(folder, patch, tries):
    """How many of these kills left something other than one whole checkpoint; and at how many different steps."""
    code = textwrap.dedent(SAVER).replace("PATCH", textwrap.dedent(patch))
    chance, broken, steps = random.Random(0), 0, set()
    for i in range(tries):
        place = folder / str(i)
        place.mkdir()
        with subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE) as process:
            process.stdout.readline()  # there is one checkpoint
            time.sleep(chance.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        try:
            found = checkpoint.load(place, IDENTITY, LIKE)
        except FormatError:
            broken += 1
            continue
        for i, group in enumerate((found.parameters, found.m, found.v, found.best)):
            broken += not np.array_equal(group["w"], np.full((400, 250), 4 * found.step + i, np.float32))
        steps.add(found.step)
        strays = [p.name for p in place.iterdir() if p.name != checkpoint.NAME]
        assert all(name.startswith(".") for name in strays), strays  # ours, `.NAME.tmp-…`, and the library's own
    return broken, len(steps)


def test_a_killed_process_leaves_a_checkpoint(tmp_path):
    broken, moments = unreadable(tmp_path, "", TRIES)
    assert broken == 0 and moments > min(TRIES, 20) // 4, "the kills all came at the same moment"


def test_a_plain_write_does_not(tmp_path):
    """The same kills find half-written checkpoints of a program that writes them in place."""
    assert unreadable(tmp_path, NAIVE, 8)[0] > 0


def test_a_checkpoint_cut_off_anywhere_is_refused(tmp_path):
    groups = [{"w": np.ones((400, 250), np.float32)}] * 4
    checkpoint.save(tmp_path, checkpoint.Checkpoint(1, IDENTITY, *groups, 0.5))
    path = tmp_path / checkpoint.NAME
    data = path.read_bytes()
    for size in [*range(0, 600, 7), *range(600, len(data), 100_001), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=str(path)):
            checkpoint.load(tmp_path, IDENTITY, LIKE)
