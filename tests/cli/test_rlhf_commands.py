"""minift reward, dpo, ppo and rlhf, at sizes that take seconds: what they print, save, refuse and go on from."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import transformers

import peft
from minift.cli.policy import load_reward
from minift.cli.ppo import Ppo
from minift.data import comparisons
from minift.data.comparisons import Comparison
from minift.data.example import Message
from minift.io import load_adapter, load_model, load_tokenizer, save_adapter
from minift.models import llama
from minift.nn.weight import replace, trainable
from minift.peft import lora
from minift.rlhf import ppo, reward_model, training
from minift.rlhf.rollouts import scored_by_model
from rounding import moved_by_rounding

SIZES = ["--max-new-tokens", 6, "--eval-questions", 8, "--batch-size", 8, "--rounds", 2]
NEEDED = """
    reward_accuracy gold_before gold_after gold_standard_error reward_before reward_after distinct_before distinct_after
    names_before names_after kl seconds
"""


@pytest.fixture
def sft(tmp_path):
    """An adapter that has learned something."""
    rng = np.random.default_rng(5)
    attached = lora.attach(load_model("tiny")[1], ["q_proj", "v_proj"], r=2, lora_alpha=4, rng=rng)
    moved = {n: a + 0.02 * rng.standard_normal(a.shape).astype(a.dtype) for n, a in trainable(attached).items()}
    save_adapter(tmp_path / "sft", lora.detach(replace(attached, moved))[1])
    return tmp_path / "sft"


@pytest.fixture
def rated(tmp_path):
    prompts = [(Message("user", f"What does `f{i}.g` do?"),) for i in range(12)]
    found = [Comparison(p, f"Return {i} of g.", f"{i} no", tie=i == 3) for i, p in enumerate(prompts)]
    comparisons.write(tmp_path / "rated.jsonl", found)
    return tmp_path / "rated.jsonl"


@pytest.fixture
def short(tmp_path):
    (tmp_path / "my.py").write_text("def short(prompt, answer):\n    return -len(answer)\n")
    return f"{tmp_path / 'my.py'}:short"


def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


# --- reward -----------------------------------------------------------------------------------------------------------


def test_reward_learns_and_is_what_the_file_says(call, sft, rated, tmp_path):
    arguments = [rated, "--adapter", sft, "--out", tmp_path / "reward", "--steps", 12, "--batch-size", 4, "--json"]
    status, found, captured = call("reward", *arguments)
    assert status == 0 and "12 comparisons in" in captured.out and "1 of them ties" in captured.out
    assert (found["comparisons"], found["held_out"], found["reward_accuracy"]) == (11, 1, 1.0)
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert sum(pairs for _, _, pairs in found["calibration"]) == 1
    config, params = load_model("tiny")
    headed = reward_model.with_head(params, np.random.default_rng(9))
    adapter = load_adapter(tmp_path / "reward" / "adapter", headed)
    score = scored_by_model(lora.insert(headed, adapter), config, load_tokenizer("tiny"))
    said = [c for c in comparisons.read(rated) if not c.tie]
    chosen, rejected = (score([c.prompt for c in said], [getattr(c, k) for c in said]) for k in ("chosen", "rejected"))
    assert (chosen > rejected).mean() > 0.9


def test_transformers_scores_as_the_reward_model_does(call, plain, rated, tmp_path):
    """Its adapter on the base model, and the whole model that --whole writes, which `ppo` takes as well."""
    folder, config, params = plain(tied=True)
    out = tmp_path / "reward"
    call("reward", rated, "--model", folder, "--out", out, "--steps", 3, "--batch-size", 4, "--whole")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    with_adapter = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    headed = reward_model.with_head(params, np.random.default_rng(0))
    ours = lora.insert(headed, load_adapter(out / "adapter", headed))
    batch = training.as_pairs(comparisons.read(rated)[:3], load_tokenizer("tiny")).batch
    bound, exact = moved_by_rounding(lambda p: reward_model.score(p, batch, config)[0], ours, config.intermediate_size)
    assert np.ptp(exact) > 100 * bound
    for theirs in (with_adapter, whole):  # the built-in tokenizer pads with a token that ends no text
        with torch.no_grad():
            scores = theirs(torch.tensor(batch.tokens.astype(np.int64))).logits[:, 0].numpy()
        assert np.abs(scores - exact).max() <= bound
    assert np.abs(reward_model.score(ours, batch, config)[0] - exact).max() <= bound
    said = comparisons.read(rated)[:3]
    given = [c.prompt for c in said], [c.chosen for c in said]
    a, b = (load_reward(str(out / part), str(folder))(*given) for part in ("adapter", "model"))
    assert np.abs(a - b).max() <= 2 * bound


@pytest.mark.parametrize("command", ["dpo", "ppo"])
def test_transformers_answers_as_the_policy_does(call, plain, rated, short, tmp_path, command):
    """What was learned and the adapter that it began with, in one adapter that PEFT reads: the same logits."""
    folder, config, params = plain(tied=True)
    rng = np.random.default_rng(5)
    first = lora.attach(params, ["q_proj", "v_proj"], r=2, lora_alpha=6, rng=rng)
    moved = {n: a + 0.1 * rng.standard_normal(a.shape).astype(a.dtype) for n, a in trainable(first).items()}
    begin = lora.detach(replace(first, moved))[1]
    save_adapter(tmp_path / "first", begin)
    given = [rated, "--steps", 2] if command == "dpo" else ["--reward", short, *SIZES[:4], "--rounds", 1]
    few = ["--batch-size", 4, "--learning-rate", 0.01, "--adapter", tmp_path / "first", "--out", tmp_path / "out"]
    status, _, captured = call(command, *given, "--model", folder, *few)
    assert status == 0, captured.err
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    ours = lora.insert(params, load_adapter(tmp_path / "out" / "adapter", params))
    tokens = rng.integers(0, config.vocab_size, (2, 12))
    bound, exact = moved_by_rounding(lambda p: llama.forward(p, tokens, config)[0], ours, config.intermediate_size)
    before = llama.forward(lora.insert(params, begin), tokens, config)[0]
    assert np.abs(exact - before).max() > 100 * bound  # something was learned
    with torch.no_grad():
        assert np.abs(theirs(torch.tensor(tokens)).logits.numpy() - exact).max() <= bound
    assert np.abs(llama.forward(ours, tokens, config)[0] - exact).max() <= bound


# --- dpo --------------------------------------------------------------------------------------------------------------


def test_dpo_begins_at_ln_2_and_its_adapter_holds_both(call, sft, rated, tmp_path):
    arguments = [rated, "--adapter", sft, "--out", tmp_path / "dpo", "--steps", 8, "--batch-size", 4, "--json"]
    status, found, _ = call("dpo", *arguments)
    assert status == 0 and abs(found["eval_loss_before"] - math.log(2)) < 1e-4 > 0
    assert found["eval_loss_after"] < found["eval_loss_before"] and found["rewards/accuracies"] == 1
    adapter = load_adapter(tmp_path / "dpo" / "adapter", load_model("tiny")[1])
    assert set(adapter.ranks.values()) == {8, 10}  # q and v have the first one's two beside the new eight
    status, _, _ = call("generate", "Why?", "--adapter", tmp_path / "dpo" / "adapter", "--max-new-tokens", 3, "--json")
    assert status == 0


# --- ppo --------------------------------------------------------------------------------------------------------------


def test_ppo_against_a_function(call, sft, short, tmp_path):
    out = tmp_path / "ppo"
    arguments = ["--reward", short, "--adapter", sft, "--out", out, *SIZES, "--json"]
    status, found, captured = call("ppo", *arguments)
    assert status == 0 and set(NEEDED.split()) - {"reward_accuracy"} <= found.keys()
    assert found["reward_before"] < 0 and "held out: gold" in captured.out
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = [r for r in records if "kl_coef" in r]
    assert [r["first_ratio"] for r in rounds] == [1.0, 1.0] and [r["updates"] for r in rounds] == [4, 4]
    assert {"reward", "kl", "entropy", "clipfrac", "length", "distinct", "ended"} <= rounds[0].keys()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and samples[0].keys() >= {"prompt", "before", "after"}
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    first = weights(out)

    status, again, _ = call("ppo", *arguments, "--resume")  # nothing is left to do
    assert (status, weights(out)) == (0, first)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}

    (tmp_path / "my.py").write_text("def short(prompt, answer):\n    return len(answer)\n")
    status, _, captured = call("ppo", *arguments, "--resume")
    assert status == 2 and "digest_of_the_data" in captured.err


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("nowhere.py:f", "nowhere.py: no such file"),
        ("{my}:long", "no function 'long'"),
        ("{sft}", "modules_to_save|score"),
    ],
)
def test_a_reward_that_is_none_is_refused(call, sft, short, tmp_path, source, complaint):
    source = source.format(my=tmp_path / "my.py", sft=sft)
    status, _, captured = call("ppo", "--reward", source, "--out", tmp_path / "out")
    assert status == 2 and any(part in captured.err for part in complaint.split("|"))
    assert not (tmp_path / "out").exists()


# --- switches ---------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """What a training was told."""


def told(monkeypatch, call, name, *arguments):
    """The arguments that a command passes on to `training.NAME`, which is not run."""

    def tell(*given, **options):
        raise Reached(given, options)

    monkeypatch.setattr(training, name, tell)
    with pytest.raises(Reached) as caught:
        call(*arguments)
    return caught.value.args


OF_PPO = {
    "num_ppo_epochs": 3,
    "num_mini_batches": 2,
    "kl_coef": 0.3,
    "kl_estimator": "k3",
    "kl_target": 4.0,
    "kl_horizon": 500.0,
    "cliprange": 0.1,
    "vf_coef": 0.7,
    "cliprange_value": None,
    "entropy_coef": 0.02,
    "gamma": 0.9,
    "lam": 0.8,
    "whiten_rewards": True,
    "whiten_advantages": False,
    "missing_eos_penalty": 1.5,
    "target_kl": 0.05,
    "temperature": 0.6,
}


def test_every_detail_of_ppo_is_a_switch_of_the_command(call, short, monkeypatch):
    """Each with TRL's name and the default of `ppo.Settings`, a sentence in --help, and an effect on what is run."""
    defaults = {f.name: f.default for f in dataclasses.fields(ppo.Settings)}
    assert OF_PPO.keys() == defaults.keys()
    assert all(OF_PPO[name] != default for name, default in defaults.items())
    of_command = {f.name: f.default for f in dataclasses.fields(Ppo)}
    assert defaults.items() <= of_command.items()

    switches = []
    for name, value in OF_PPO.items():
        option = name.replace("_", "-")
        switches += [f"--{option}" if value is True else f"--no-{option}"] if isinstance(value, bool) else []
        switches += [f"--{option}", value] if not isinstance(value, bool) else []
    given, options = told(monkeypatch, call, "train_ppo", "ppo", "--reward", short, *switches, "--no-normalize-rewards")
    assert dataclasses.asdict(given[6]) == OF_PPO and options["normalize_rewards"] is False


def test_the_details_of_dpo_and_of_the_reward_model_are_switches(call, rated, monkeypatch):
    chosen = {"beta": 0.3, "label_smoothing": 0.1, "loss_type": "ipo"}
    switches = [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", value)]
    assert told(monkeypatch, call, "train_dpo", "dpo", rated, *switches)[1].items() >= chosen.items()
    found = told(monkeypatch, call, "train_reward_model", "reward", rated, "--center", 0.2)[1]
    assert found["center"] == 0.2


def test_a_leash_that_cannot_be_steered_is_refused_before_anything_is_written(call, short, tmp_path):
    arguments = ["--reward", short, "--out", tmp_path / "ppo", "--kl-target", 1, "--kl-horizon", 10, *SIZES[:4]]
    status, _, captured = call("ppo", *arguments, "--batch-size", 64)
    assert status == 2 and "horizon is 10.0 for rounds of 64 answers" in captured.err
    assert not (tmp_path / "ppo").exists()


# --- the circle -------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch):
    """A rubric that random answers do not all fail alike: gold is the share of vowels."""

    def vowels(prompt, answer):
        return sum(c in "aeiou" for c in answer) / max(1, len(answer))

    monkeypatch.setattr("minift.rlhf.raters.gold", vowels)


def test_the_circle_goes_around_and_goes_on(call, sft, tmp_path, judged, monkeypatch):
    out = tmp_path / "rlhf"
    few = ["--questions", 12, "--answers-each", 3, "--reward-steps", 4, "--dpo-steps", 3, "--best-of", 2]
    arguments = ["--adapter", sft, "--out", out, *few, *SIZES, "--json"]
    status, found, captured = call("rlhf", *arguments)
    assert status == 0, captured.err
    assert set(NEEDED.split()) <= found.keys()
    assert json.loads((out / "summary.json").read_text()) == found
    assert list(found["policies"]) == ["SFT", "DPO", "PPO", "best of 2"]
    assert all({"gold", "gain", "kl", "distinct", "names"} <= row.keys() for row in found["policies"].values())
    assert found["policies"]["SFT"]["gain"] == 0 == found["policies"]["SFT"]["kl"]
    assert found["policies"]["best of 2"]["kl"] == pytest.approx(math.log(2) - 0.5)
    assert found["policies"]["best of 2"]["reward"] >= found["policies"]["SFT"]["reward"] - 0.5
    assert found["noise_ceiling"] == 0.9 and 0 <= found["reward_accuracy"] <= 1
    assert len(comparisons.read(out / "comparisons.jsonl")) == found["comparisons"] <= 36
    assert "names" in captured.out and "distinct" in captured.out
    first = {part: weights(out / part) for part in ("reward", "dpo", "ppo")}

    for name in ("answers.jsonl", "ppo/checkpoint.safetensors"):  # as if it had been stopped somewhere
        path = out / name
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7])) if name.endswith(
            "jsonl"
        ) else path.unlink()
    status, again, _ = call("rlhf", *arguments, "--resume")
    assert status == 0 and first == {part: weights(out / part) for part in first}
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}

    status, _, captured = call("rlhf", *arguments, "--resume", "--temperature", 0.9)
    assert status == 2 and "answers of another run" in captured.err


@pytest.mark.parametrize("command", ["reward", "dpo", "ppo", "rlhf"])
def test_help_teaches(call, command, capsys):
    with pytest.raises(SystemExit):
        call(command, "--help")
    said = capsys.readouterr().out
    assert f"minift {command}" in said and ("leash" in said or command == "reward")
