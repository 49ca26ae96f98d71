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


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed(uninterrupted, tmp_path, seed):
    chance = random.Random(seed)
    process = subprocess.Popen([*COMMAND, "--out", tmp_path], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    metrics, wanted = tmp_path / "metrics.jsonl", chance.randint(5, 12)  # lines; the first checkpoint is at step 2
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= wanted:
            break
        time.sleep(0.002)
    time.sleep(chance.random() * 0.05)
    process.kill()
    assert process.wait() == -9, "it was over before it could be killed"
    assert not (tmp_path / "adapter").exists()
    subprocess.run([*COMMAND, "--out", tmp_path, "--resume"], env=ENVIRONMENT, check=True, capture_output=True)
    assert learned(tmp_path) == uninterrupted
