"""`kill -9` at a random moment of a process that does nothing but save: there is always something whole to read.

A nursery imports everything once and forks savers, so that a kill costs a tenth of a second.
"""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from minift.io import FormatError, load_adapter, load_model, save_adapter, save_model
from minift.models import llama
from minift.models.llama import Config
from minift.peft.lora import Adapter
from minift.train import checkpoint

TRIES = 7 * int(os.environ.get("MINIFT_KILLS", 1))  # of each kind; times five in `make test-all`
IDENTITY = {"run": "kill"}
LIKE = {"w": np.zeros((400, 250), np.float32)}  # 0.4 MB a group, so that a write takes a while
CONFIG = Config(500, 64, 96, 2, 4, 2, 16, tie_word_embeddings=True)
LAYER = "model.layers.0.self_attn.q_proj."


def save(kind, folder, number):
    """Something full of this number."""
    if kind == "checkpoint":
        groups = [{"w": np.full((400, 250), 4 * number + i, np.float32)} for i in range(4)]
        checkpoint.save(folder, checkpoint.Checkpoint(number, IDENTITY, *groups, 0.5))
    elif kind == "model":
        params = {name: np.full(shape, number, np.float32) for name, shape in llama.shapes(CONFIG).items()}
        save_model(folder / kind, CONFIG, params, overwrite=True)
    else:
        shapes = {"lora_A": (8, 9000), "lora_B": (3000, 8)}
        arrays = {f"{LAYER}{half}.weight": np.full(shape, number, np.float32) for half, shape in shapes.items()}
        save_adapter(folder / kind, Adapter(arrays, 8, float(number), ("q_proj",)), overwrite=True)


def load(kind, folder):
    """The number that it is full of. FormatError, or AssertionError, if it is not whole."""
    if kind == "checkpoint":
        found = checkpoint.load(folder, IDENTITY, LIKE)
        for i, group in enumerate((found.parameters, found.m, found.v, found.best)):
            assert np.array_equal(group["w"], np.full((400, 250), 4 * found.step + i, np.float32))
        return found.step
    if kind == "model":
        _, arrays = load_model(folder / kind)
        number = arrays["model.norm.weight"][0]
    else:
        adapter = load_adapter(folder / kind)
        arrays, number = adapter.arrays, adapter.lora_alpha
    assert all((array == number).all() for array in arrays.values())
    return number


NURSERY = """
import itertools, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_kill
PATCH
for line in sys.stdin:
    kind, folder = line.rstrip("\\n").split(" ", 1)
    if (child := os.fork()) == 0:
        for number in itertools.count(1):
            test_kill.save(kind, Path(folder), number)
            if number == 1:
                print(os.getpid(), flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""
NAIVE_FILE = """
import time
import minift.io.safetensors_file as file
def write(path, content):
    content(other := path.with_name(".other"))
    with open(path, "wb", buffering=0) as target:
        target.write(other.read_bytes()[:300_000])
        time.sleep(0.02)
        target.write(other.read_bytes()[300_000:])
file.atomic_write = write
"""
NAIVE_FOLDER = """
import contextlib
from minift.io import huggingface, peft_adapter
@contextlib.contextmanager
def folder(path, overwrite):
    path.mkdir(exist_ok=True)
    yield path
huggingface.atomic_folder = peft_adapter.atomic_folder = folder
"""


def kills(kind, folder, tries, patch=""):
    """How many of these kills left something other than one whole result; and at how many different moments."""
    chance, broken, moments = random.Random(kind), 0, set()
    code = NURSERY.replace("PATCH", patch)
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        for i in range(tries):
            place = folder / str(i)
            place.mkdir()
            print(kind, place, file=nursery.stdin, flush=True)
            saver = int(nursery.stdout.readline())  # there is one whole result
            time.sleep(chance.random() * 0.06)
            os.kill(saver, signal.SIGKILL)
            assert nursery.stdout.readline() == "gone\n"
            try:
                moments.add(load(kind, place))
            except (FormatError, AssertionError):
                broken += 1
            if not patch:
                name = checkpoint.NAME if kind == "checkpoint" else kind
                assert all(p.name == name or p.name.startswith(f".{name}.tmp-") for p in place.iterdir())
                save(kind, place, 7)  # the next one cleans up
                assert [p.name for p in place.iterdir()] == [name] and load(kind, place) == 7
        nursery.stdin.close()
    return broken, len(moments)


KINDS = ["checkpoint", "model", "adapter"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_saver_leaves_something_whole(tmp_path, kind):
    broken, moments = kills(kind, tmp_path, TRIES)
    assert broken == 0 and moments > min(TRIES, 8) // 4, "the kills all came at the same moment"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_times(tmp_path, kind):
    broken, moments = kills(kind, tmp_path, 5 * TRIES)
    assert broken == 0 and moments > 3


@pytest.mark.parametrize(
    ("kind", "patch"),
    [("checkpoint", NAIVE_FILE), ("model", NAIVE_FOLDER + NAIVE_FILE), ("adapter", NAIVE_FOLDER + NAIVE_FILE)],
)
def test_a_plain_write_does_not(tmp_path, kind, patch):
    """The same kills find what is half-written by programs that write in place, and take a while."""
    assert kills(kind, tmp_path, 8, patch)[0] > 0


def test_a_checkpoint_cut_off_anywhere_is_refused(tmp_path):
    save("checkpoint", tmp_path, 1)
    path = tmp_path / checkpoint.NAME
    data = path.read_bytes()
    for size in [*range(0, 600, 7), *range(600, len(data), 100_001), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=str(path)):
            checkpoint.load(tmp_path, IDENTITY, LIKE)


def test_a_checkpoint_of_nan_is_refused_on_both_sides(tmp_path):
    save("checkpoint", tmp_path, 3)
    (other := tmp_path / "other").mkdir()
    for i, what in enumerate(("parameter", "first_moment", "second_moment", "best")):
        groups = [{"w": np.ones((400, 250), np.float32)} for _ in range(4)]
        groups[i]["w"][1, 2] = np.nan if i % 2 else np.inf
        with pytest.raises(FormatError, match=rf"{what}/w: found (nan|inf) at flat index 252 \(1 not finite\)"):
            checkpoint.save(tmp_path, checkpoint.Checkpoint(4, IDENTITY, *groups, 0.5))
        assert load("checkpoint", tmp_path) == 3  # the one before is still there
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "require_finite", lambda *_: None)
            checkpoint.save(other, checkpoint.Checkpoint(4, IDENTITY, *groups, 0.5))
        with pytest.raises(FormatError, match=rf"{what}/w: found (nan|inf) at flat index 252"):
            checkpoint.load(other, IDENTITY, LIKE)
