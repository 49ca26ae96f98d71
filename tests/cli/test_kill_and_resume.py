"""`kill -9` at a random moment of a real run, then --resume: the same bits as a run that nobody killed."""

import os
import random
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "minift", "finetune", "--steps", "14", "--save-every", "2", "--eval-every", "5"]
COMMAND += ["--eval-examples", "8", "--batch-size", "4", "--lora-dropout", "0.1", "--gradient-accumulation-steps", "2"]
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1"}


def learned(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([*COMMAND, "--out", folder], env=ENVIRONMENT, check=True, capture_output=True)
    return learned(folder)


def kill(command, tmp_path, seed):
    """Run a command in `tmp_path` and kill it after some of its steps."""
    chance = random.Random(seed)
    process = subprocess.Popen([*command, "--out", tmp_path], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    metrics, wanted = tmp_path / "metrics.jsonl", chance.randint(5, 12)  # lines; the first checkpoint is at step 2
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= wanted:
            break
        time.sleep(0.002)
    time.sleep(chance.random() * 0.05)
    process.kill()
    assert process.wait() == -9, "it was over before it could be killed"


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed(uninterrupted, tmp_path, seed):
    kill(COMMAND, tmp_path, seed)
    assert not (tmp_path / "adapter").exists()
    subprocess.run([*COMMAND, "--out", tmp_path, "--resume"], env=ENVIRONMENT, check=True, capture_output=True)
    assert learned(tmp_path) == uninterrupted


def test_killed_and_resumed_with_moments_in_pages(tmp_path):
    """All parameters learn, and a sixth of their moments fit the budget; the file of pages goes with the process."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cut.mkdir()
    plain = [*COMMAND, "--method", "full", "--optimizer"]
    paged = [*plain, "paged-adamw8bit", "--page-budget", "300000"]
    subprocess.run([*plain, "adamw8bit", "--out", whole], env=ENVIRONMENT, check=True, capture_output=True)
    kill(paged, cut, 0)
    names = {"metrics.jsonl", "checkpoint.safetensors"}
    assert all(entry.name in names or entry.name.startswith(".checkpoint.safetensors.tmp-") for entry in cut.iterdir())
    subprocess.run([*paged, "--out", cut, "--resume"], env=ENVIRONMENT, check=True, capture_output=True)
    one, other = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, cut))
    assert one == other
