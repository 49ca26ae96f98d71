"""Every claim against arithmetic of its own: numbers written out by hand, other formulas, other code.

The expected figure of each row stands here with how one gets it without the code under test."""

import dataclasses
import json
import math

import numpy as np
import pytest

from minift.claims import claim
from minift.cli.claims import CLAIMS, as_row
from minift.peft import soft_prompt
from minift.quant.codebooks import INT4
from minift.train import memory

# What is found by plain arithmetic, the relative error that is allowed, and the verdict as its first word.
BY_HAND = {
    "square-matrix": (2 * 128 * 8, 0, "true"),
    # 28 matrices: per layer q and o 128×128, k and v 64×128, gate and up 336×128, down 128×336
    "rectangular-matrix": (4 * 8 * (2 * 256 + 2 * 192 + 3 * 480), 0, "true"),
    "cost-in-parameters": (100 - 100 * 18_874_368 / 175_255_800_000, 1e-12, "true"),
    "cost-in-arithmetic": (100 / 3, 0.01, "false"),
    "ten-thousand-times-fewer": (175_255_800_000 / 18_874_368, 1e-12, "depends"),
    "checkpoint-size": (37.748736, 1e-12, "approximately"),
    "training-memory": (2.1030696, 1e-12, "depends"),
    "speed": (100 * 10.6 / 43.1, 1e-12, "true"),
    "count-roberta-base": (0.294912, 1e-12, "true"),
    "count-roberta-large": (0.786432, 1e-12, "true"),
    "count-deberta-xxl": (4.718592, 1e-12, "true"),
    "count-gpt-2-medium": (0.393216, 1e-12, "false"),
    "count-gpt-2-large": (0.737280, 1e-12, "approximately"),
    "count-gpt-3": (4.718592, 1e-12, "true"),
    "count-gpt-3-r8": (37.748736, 1e-12, "true"),
    "starts-as-the-base": (0, 0, "true"),
    "rank-of-the-update": (8, 0, "true"),
    "rank-after-merging": (128, 0, "depends"),
    "merging-adds-no-latency": (4 * 7 + 1, 0, "true"),
    "four-bits": (4.5, 0, "depends"),
    "textbook-saving": (0.373046875, 1e-4, "false"),  # and 32 bits for the whole tensor's mean
    "overhead": (0.5, 0, "true"),
    "overhead-left": (0.126953125, 3e-4, "true"),
    "saving": (0.373046875, 1e-4, "true"),
    # 80 layers of four 8,192² and three 8,192·22,016
    "saving-at-65b": (80 * (4 * 8192**2 + 3 * 8192 * 22016) * 0.373046875 / 8e9, 1e-12, "true"),
    "full-65b": (65_285_660_672 * 12 / 1e9, 1e-12, "true"),
    "guanaco-65b": (32.380 + 1.0277 + 1.0486 + 1.5991, 1e-3, "depends"),
    "adapter-of-7b": (6_738_415_616 * 0.004 / 1e6, 1e-12, "approximately"),
    "sixteen-levels": (16, 0, "true"),
    "equation-four": (15, 0, "false"),
    "paging-changes-nothing": (0, 0, "true"),
    "bytes-of-adam": (8, 0, "true"),
    "bytes-of-adam-in-8-bits": (2 + 8 / 256, 0, "true"),
    "saved-gpt-2": (1.5 * (6 - 8 / 2048), 1e-12, "approximately"),
    "saved-roberta-large": (0.355 * (6 - 8 / 2048), 1e-12, "approximately"),
    "five-tokens": (20_480, 0, "true"),
    "hundredth-of-a-percent": (40.96 / 11_000, 1e-12, "true"),
    "tenth-of-a-percent": (49_152_000 / 354_920_000, 1e-12, "depends"),
    "network-is-dropped": (0, 0, "true"),
    "p-tuning-folds-too": (0, 0, "true"),
    "from-a-tenth-to-three-percent": (491_520_000 / 355_000_000, 1e-12, "true"),
    "comparisons-in-a-batch": (64 * 36, 0, "true"),
    "first-ratio": (1, 0, "true"),
    "perplexity": (2048, 1e-9, "true"),
}

# What is measured: between these, and the verdict.
MEASURED = {
    "cost-in-memory": (82, 83.34, "false"),  # under 10/12
    "merging-changes-nothing": (1e-8, 1e-5, "approximately"),
    "qlora-65b": (47, 49, "depends"),
    "equal-use": (1.6, 1.9, "false"),
    "optimal-in-squares": (0.40, 0.50, "false"),
    "optimal-in-magnitude": (0.1, 1, "approximately"),
    "better-than-int4": (0.75, 0.85, "true"),
    "better-than-fp4": (0.86, 0.95, "true"),
    "fp4-better-than-int4": (0.1, 0.2, "depends"),
    "one-table-for-all-blocks": (0.5, 2, "true"),
    "as-good-as-32-bits": (-1, 1, "true"),
    "loss-at-the-start": (7.6, 7.75, "approximately"),
    "reward-has-no-zero": (0, 1e-12, "true"),
    "kl-of-best-of-n": (1.835, 1.8352, "true"),  # log 16 − 15/16 = 1.83509
    "kl-with-few-answers": (1.2, math.log(4), "depends"),
    "guanaco-7b": (4.0, 4.3, "depends"),
    "guanaco-13b": (7.4, 8, "depends"),
    "guanaco-33b": (18, 19, "depends"),
}
IN_WORDS = {"as-good-as-16-bits": ("0 % lost", "depends")}


@pytest.fixture(scope="module")
def found():
    return {name: compute() for name, compute in CLAIMS.items()}


def test_every_claim_has_its_expected_row():
    assert {*BY_HAND, *MEASURED, *IN_WORDS} == {*CLAIMS}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(found, name):
    value, error, verdict = BY_HAND[name]
    assert found[name].found == pytest.approx(value, rel=error, abs=0)
    assert found[name].verdict.partition(":")[0] == verdict


@pytest.mark.parametrize("name", MEASURED)
def test_measured(found, name):
    low, high, verdict = MEASURED[name]
    assert low <= found[name].found <= high
    assert found[name].verdict.partition(":")[0] == verdict


@pytest.mark.parametrize("name", IN_WORDS)
def test_in_words(found, name):
    assert (found[name].found, found[name].verdict.partition(":")[0]) == IN_WORDS[name]


def test_rows(found):
    for name, c in found.items():
        row = as_row(name, c)
        assert {"claim", "source", "claimed", "found", "verdict", "command"} <= row.keys()
        first, colon, on = row["verdict"].partition(": ")
        assert first in ("true", "false", "approximately", "depends") and bool(on) == (first == "depends") == bool(
            colon
        )
        assert row["command"].startswith("minift ") and row["how"] and row["source"].startswith(c.source)
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert CLAIMS[name].__doc__


def test_what_a_verdict_depends_on_is_computed(found):
    assert "37,142× at r = 1, 9,285× at r = 4, 4,643× at r = 8" in found["ten-thousand-times-fewer"].verdict
    assert "4.500 with them, 4.127 if" in found["four-bits"].verdict
    assert "0.069 % with 5 tokens, 0.14 % with 10 tokens, 2.8 % with 200" in found["tenth-of-a-percent"].verdict
    # best of 16 among m: Σ ((i/m)¹⁶ − ((i−1)/m)¹⁶) log(m (…)), written as a loop
    for m in (4, 16, 256):
        terms = [(i / m) ** 16 - ((i - 1) / m) ** 16 for i in range(1, m + 1)]
        kl = math.fsum(p * math.log(p * m) for p in terms)
        assert f"{kl:.3f} with {m}" in found["kl-with-few-answers"].verdict


def test_the_best_table_is_no_worse_than_those_around_it():
    """Lloyd's iteration has ended: moving any of the sixteen values up or down makes the error larger."""
    from minift.claims import nf4
    from minift.quant import blockwise

    table = nf4._best_table(64, 2)
    best = nf4._decibels(table, 64)
    for i in range(16):
        for step in (-0.01, 0.01):
            moved = table.copy()
            moved[i] += np.float32(step)
            assert nf4._decibels(moved, 64) < best
    magnitude = nf4._best_table(64, 1)
    x = nf4._normal()
    least = blockwise.round_trip_error(x, magnitude, 64)
    assert all(least < blockwise.round_trip_error(x, t, 64) for t in (table, nf4.CODE, nf4.INT4, nf4.E2M1))


def test_verdicts():
    assert claim.rounded(0.373, 0.373046875, 3) == "true"
    assert claim.rounded(0.5, 0.373, 1) == "false"
    assert claim.rounded(4.7, 4.718592, 2) == "true" and claim.rounded(4.7, 4.76, 2) == "approximately"
    assert claim.rounded(10_000, 9285, 1) == "approximately" and claim.rounded(10_000, 8999, 2) == "false"
    assert claim.near(-10, -10.9) == "approximately" and claim.near(-10, -11.1) == "false"
    assert claim.holds(True) == "true" and claim.holds(False) == "false"
    assert claim.depends("on r") == "depends: on r"


def test_the_command(monkeypatch, capsys, tmp_path):
    """What it prints, writes and refuses, for claims that take no time."""
    from minift.cli import main

    quick = ["five-tokens", "count-gpt-2-medium", "four-bits"]
    assert main(["claims", "--only", *quick, "--json", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])
    assert [row["name"] for row in rows] == quick and rows == json.loads((tmp_path / "summary.json").read_text())
    assert "A prompt of five tokens for T5-XXL is 20,480 numbers" in out and "tables 2 to 4" in out
    assert "minift memory --model 'GPT-2-medium'" in out and "depends: on the scales" in out

    monkeypatch.setattr("minift.cli.claims.CLAIMS", {name: CLAIMS[name] for name in quick})
    assert main(["claims"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert lines.index("Prompt tuning (Lester et al. 2021, arXiv 2104.08691)") > 0
    assert "five tokens of T5-XXL: 20,480 numbers 20,480 20,480 true" in [" ".join(line.split()) for line in lines]
    assert "3 claims, 0 s: 1 true, 1 false, 1 depends" in out
    assert main(["claims", "--list"]) == 0 and capsys.readouterr().out.split() == quick
    assert main(["claims", "--only", "nf5"]) == 2
    assert "--only nf5: no such claim, needed one of five-tokens, " in capsys.readouterr().err


WRONG = {  # what is broken: where, by what, and which rows must show it
    "an adapter of one matrix": ("minift.peft.lora.trainable_parameters", lambda d, k, r: r * k, "checkpoint-size"),
    "moments of 16 bits in the bill": ("minift.claims.qlora.bill", lambda *a, **k: _halved(*a, **k), "full-65b"),
    "a KL without its second term": ("minift.claims.rlhf.best_of", lambda s: (0, math.log(len(s))), "kl-of-best-of-n"),
    "no codebook but int4": ("minift.claims.nf4.CODE", INT4, "sixteen-levels"),
    "scales that cost nothing": ("minift.quant.double_quant.overhead_bits", lambda b, n: 0.0, "saving-at-65b"),
    "every printed number is right": ("minift.claims.lora.rounded", lambda *a: "true", "count-gpt-2-medium"),
    "a ratio that is never 1": (
        "minift.rlhf.ppo.ratio",
        lambda new, old, mask: np.exp(new - old + 1e-6),
        "first-ratio",
    ),
    "a network that is not dropped": ("minift.peft.soft_prompt.fold", lambda p: _shifted(p), "network-is-dropped"),
}


def _halved(*arguments, **options):
    return [dataclasses.replace(item, nbytes=item.nbytes / 2) for item in memory.bill(*arguments, **options)]


def _shifted(params):
    table, _ = soft_prompt.encode(params)
    return soft_prompt.bare(params) | {"prefix_embeddings": table + np.float32(0.01)}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_broken_shows(monkeypatch, what):
    """Nothing is hard-coded: break what a claim is computed from, and its row is another."""
    place, broken, name = WRONG[what]
    monkeypatch.setattr(place, broken)
    row = CLAIMS[name]()
    if name in BY_HAND:
        value, error, verdict = BY_HAND[name]
        same = row.found == pytest.approx(value, rel=error, abs=0) and row.verdict.partition(":")[0] == verdict
    else:
        same = row.verdict == MEASURED[name][2]
    print(f"{what:<34}{name}: found {row.found}, {row.verdict}")
    assert not same
