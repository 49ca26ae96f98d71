"""Every method beside every other: the rows against the runs they come from, and what happens to runs that are there.

Two methods on sixty short examples; what each of them learns is tested elsewhere."""

import json
import signal
import subprocess
import sys
import time
from typing import get_args

import numpy as np
import pytest

from minift.cli.apart import digest
from minift.cli.common import peak_memory_bytes
from minift.cli.compare import METHODS, NOTHING
from minift.train.methods import Method

SHORT = ["--steps", "2", "--batch-size", "2", "--eval-examples", "6", "--seq-len", "64"]


@pytest.fixture
def options(tmp_path):
    lines = (json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}."}) + "\n" for i in range(60))
    (tmp_path / "few.jsonl").write_text("".join(lines))
    return [*SHORT, "--data", tmp_path / "few.jsonl", "--out", tmp_path / "out"]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_rows_pictures_and_runs_that_are_there(call, tmp_path, options):
    methods = ["--methods", "prompt", "full+paged-adamw8bit"]
    status, rows, captured = call("compare", *methods, "--seeds", 3, 4, *options, "--json")
    assert status == 0
    assert [row["method"] for row in rows] == [NOTHING, "prompt", "full+paged-adamw8bit"]
    nothing, prompt, full = rows
    out = tmp_path / "out"
    assert rows == summary(out)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert nothing["trainable_parameters"] == nothing["optimizer_bytes"] == nothing["seconds"] == 0
    assert nothing["eval_loss"] == nothing["eval_loss_before"] == full["eval_loss_before"] != full["eval_loss"]
    assert prompt["trainable_parameters"] == 20 * 128 and prompt["optimizer_bytes"] == 8 * 20 * 128
    assert full["trainable_parameters"] == full["total_parameters"] == 1_000_576
    assert 2 * 1_000_576 < full["optimizer_bytes"] < 2.1 * 1_000_576
    assert full["optimizer_resident_bytes"] <= 1_000_000 < full["optimizer_bytes"]
    for row in (prompt, full):
        runs = [summary(out / row["method"] / seed) for seed in ("3", "4")]
        losses = [run["eval_loss_after"] for run in runs]
        assert (row["eval_loss_lowest"], row["eval_loss_highest"]) == (min(losses), max(losses))
        assert row["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-15) and losses[0] != losses[1]
        assert row["peak_memory_bytes"] == max(run["peak_memory_bytes"] for run in runs) > row["weight_bytes"]
        assert 0 < row["seconds"] < max(run["seconds"] for run in runs)
        assert [run["optimizer"] for run in runs] == [row["method"].partition("+")[2] or "adamw"] * 2
    table = [line for line in captured.out.splitlines() if line.startswith(("nothing ", "prompt ", "full+paged"))]
    assert all(f"{row['eval_loss']:.3f}" in line for row, line in zip(rows, table, strict=True))

    when = {path: path.stat().st_mtime_ns for path in out.glob("*/*/summary.json")}
    (out / "prompt" / "4" / "asked.json").unlink()  # what is there is no longer known to be this run's
    status, again, _ = call("compare", *methods, "--seeds", 3, 4, *options, "--json")
    assert status == 0 and again[1]["eval_loss"] == prompt["eval_loss"]
    run_again = {path for path in when if path.stat().st_mtime_ns != when[path]}
    assert run_again == {out / "prompt" / "4" / "summary.json"}, "a finished run is not run again"

    status, _, captured = call("compare", *methods, "--seeds", 3, 4, *options, "--steps", "3")
    assert status == 2 and "asked.json: steps: found 2, needed 3" in captured.err
    with open(tmp_path / "few.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "And?", "completion": "No."}) + "\n")
    status, _, captured = call("compare", *methods, "--seeds", 3, 4, *options)
    assert status == 2 and "digest_of_the_data" in captured.err


def test_stopped_and_gone_on(call, tmp_path, options):
    """Ctrl-C goes to the run, which leaves a checkpoint, and the same command goes on from it.

    A step's speed is measured, so records that are the same are of the same steps, not of a run from the beginning."""
    command = ["compare", "--methods", "prompt", "--seeds", "0", *options, "--steps", "150", "--batch-size", "1"]
    command = list(map(str, command))
    process = subprocess.Popen([sys.executable, "-m", "minift", *command], stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "prompt" / "0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in said
    before = metrics.read_bytes()
    assert 3 < before.count(b"\n") < 151 and (metrics.parent / "checkpoint.safetensors").exists()

    status, rows, _ = call(*command, "--json")
    after = metrics.read_bytes()
    assert status == 0 and after.startswith(before) and after.count(b"\n") == 152
    assert summary(metrics.parent)["eval_loss_after"] == rows[1]["eval_loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "lora", "dora"],
            "--methods dora: needed one of full, head, lora, qlora, prompt, prefix, p-tuning",
        ),
        (["--methods", "lora+lion"], "with +adamw8bit or +paged-adamw8bit behind it"),
        (["--methods", "lora+"], "--methods lora+: needed"),
        (["--methods", "nothing"], "--methods nothing: needed"),
        (["--steps", "0"], "steps is 0, needed 1 or more"),
        (["--methods", "lora", "--model", "/nowhere"], "nothing/0: /nowhere: found nothing there"),
    ],
)
def test_refusals(call, tmp_path, arguments, message):
    status, _, captured = call("compare", *arguments, "--out", tmp_path / "out")
    assert status == 2 and message in captured.err
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_defaults_are_all_methods_and_optimizers():
    assert {name.partition("+")[0] for name in METHODS} == set(get_args(Method))
    assert {name.partition("+")[2] for name in METHODS} == {"", "adamw8bit", "paged-adamw8bit"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss is a process's own")
def test_peak_memory_is_not_that_of_who_started_it():
    large = np.ones(40_000_000)
    code = "from minift.cli.common import peak_memory_bytes; print(peak_memory_bytes())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert found < large.nbytes < peak_memory_bytes()


def test_digest_is_of_contents(tmp_path):
    assert digest("stdlib") == ""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("one")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != ""
    (tmp_path / "b" / "x").write_text("two")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
