"""The commands, as a user calls them: what they print, what they write, and what they say about bad input."""

import dataclasses
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minift.cli import COMMANDS, main
from minift.io import load_adapter, load_model, load_tokenizer, save_model
from minift.models import llama
from minift.nn.weight import dense
from minift.peft import lora, qlora

QUICK = ["--steps", "3", "--eval-examples", "12", "--batch-size", "4", "--json"]


@pytest.fixture
def run():
    """The same in a process of its own, where no signatures are checked: faster for what computes a lot."""

    def run(*arguments, stdin=""):
        command = [sys.executable, "-m", "minift", *map(str, arguments)]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        result = json.loads(done.stdout.splitlines()[-1]) if "--json" in arguments and done.returncode == 0 else None
        return done.returncode, result, done.stderr

    return run


@pytest.fixture
def few(tmp_path):
    """Options for a short run on sixty short examples."""
    lines = (json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}."}) + "\n" for i in range(60))
    (tmp_path / "few.jsonl").write_text("".join(lines))
    return [*QUICK, "--data", str(tmp_path / "few.jsonl")]


@pytest.fixture
def finetuned(call, tmp_path):
    """A LoRA of three steps."""
    assert call("finetune", *QUICK, "--learning-rate", "0.01", "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run" / "adapter"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "head"])
def test_finetune_over_sixteen_bits(call, few, tmp_path, method, dtype):
    """Two bytes for each number that does not learn; generation runs on the same rounded weights."""
    status, result, _ = call("finetune", *few, "--method", method, "--dtype", dtype, "--out", tmp_path / "run")
    assert status == 0
    learned = result["trainable_parameters"]
    wide = 4 * learned if method == "head" else 0
    assert result["weight_bytes"] == 2 * 1_000_576 + wide and result["trainable_bytes"] == 4 * learned
    if method == "lora":
        options = ["--max-new-tokens", 4, "--dtype", dtype, "--json"]
        assert call("generate", "Hi", "--adapter", tmp_path / "run" / "adapter", *options)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "full"], "--method full --dtype bfloat16: all weights learn"),
        (["--device", "cpu-torch"], "--device cpu-torch --dtype bfloat16: torch keeps frozen weights"),
    ],
)
def test_sixteen_bits_where_they_cannot_be(call, few, tmp_path, options, message):
    status, _, captured = call("finetune", *few, "--dtype", "bfloat16", *options, "--out", tmp_path / "run")
    assert status == 2 and message in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["full", "head", "lora", "qlora"])
def test_finetune(call, tmp_path, method):
    status, result, captured = call("finetune", "--method", method, *QUICK, "--out", tmp_path / "run")
    assert status == 0
    untied = 2048 * 128 if method == "head" else 0  # the output matrix, no longer the table of embeddings
    assert result["total_parameters"] == 1_000_576 + untied
    assert f"of {result['total_parameters']:,} parameters learn" in captured.out
    config, params = load_model("tiny")
    linear = [params[n].shape for n in lora.targets(params, "all-linear")]
    expected = {
        "full": 1_000_576,
        "head": 2048 * 128,
        "lora": sum(8 * (o + i) for o, i in linear),
        "qlora": sum(8 * (o + i) for o, i in linear),
    }[method]
    assert result["trainable_parameters"] == expected
    assert result["trainable_bytes"] == 4 * expected
    assert result["optimizer_bytes"] == 8 * expected
    assert result["eval_loss_before"] != result["eval_loss_after"]
    assert result["peak_memory_bytes"] > result["weight_bytes"]
    if method == "qlora":
        elsewhere = 4 * (1_000_576 - sum(o * i for o, i in linear))
        assert 0.5 < (result["weight_bytes"] - elsewhere) * 8 / sum(o * i for o, i in linear) / 4.13 < 1.01
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3]
    assert "the answer" in captured.out
    if method in ("full", "head"):
        config, params = load_model(result["adapter"])
        assert sum(w.size for w in params.values()) == result["total_parameters"]
        assert config.tie_word_embeddings == (method == "full")
    else:
        assert load_adapter(result["adapter"]).r == 8


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged-adamw8bit"])
def test_optimizers(call, few, tmp_path, optimizer):
    """Every matrix has 4,096 numbers or more and gets moments in 8 bits; gains of norms keep theirs."""
    options = ["--method", "full", "--optimizer", optimizer, "--page-budget", "500000", "--out", tmp_path / "run"]
    status, result, captured = call("finetune", *few, *options)
    assert status == 0
    norms = 9 * 128
    assert result["optimizer"] == optimizer
    assert result["optimizer_bytes"] == (1_000_576 - norms) * (2 + 8 / 256) + 8 * norms
    assert ("page_faults" in result) == (optimizer == "paged-adamw8bit")
    if optimizer == "paged-adamw8bit":
        assert 450_000 < result["peak_resident_bytes"] <= result["budget_bytes"] == 500_000
        shown = f"at most 0.50 of 0.50 MB; {result['page_faults']:,} page faults, {result['evictions']:,} evictions"
        assert shown in captured.out


def test_finetune_on_a_file(call, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}."}) + "\n" for i in range(60))
    )
    options = ["--target-modules", "q_proj", "v_proj", "--r", "2", "--gradient-accumulation-steps", "2"]
    status, result, _ = call("finetune", "--data", data, *QUICK, *options, "--out", tmp_path / "run")
    assert status == 0
    assert result["trainable_parameters"] == 4 * 2 * ((128 + 128) + (128 + 64))
    assert load_adapter(tmp_path / "run" / "adapter").target_modules == ("q_proj", "v_proj")


def test_questions_are_shown_as_they_are(call, tmp_path, monkeypatch):
    """No markup, no emoji, no line wrapped; of a conversation its last answer, and nothing of what nobody asked."""
    monkeypatch.setenv("COLUMNS", "60")
    asked = "[/red] :cat: " + 7 * "word "
    turns = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello {}."), ("user", asked)]
    forms = {
        "multi": [*turns, ("assistant", "[bold] {}.")],
        "thanks": [*turns, ("assistant", "[bold] {}."), ("user", "Thanks.")],
        "unasked": [("assistant", "Hello {}.")],
    }
    for name, form in forms.items():
        lines = (
            json.dumps({"messages": [{"role": role, "content": text.format(i)} for role, text in form]})
            for i in range(60)
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        status, _, captured = call("finetune", "--data", tmp_path / f"{name}.jsonl", *QUICK, "--out", tmp_path / name)
        assert status == 0
        assert (f"\n{asked.strip()}\n" in captured.out) == (name != "unasked")
        assert ("  the answer  [bold] " in captured.out) == (name != "unasked")
        assert "Hello" not in captured.out


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m minift info tiny --tensors | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_training_outlives_its_reader(tmp_path, few):
    """`minift finetune | head`: the run goes on to its end, and says on stderr that nobody reads."""
    for merged, said in (("", True), ("2>&1", False)):
        command = [sys.executable, "-m", "minift", "finetune", *few, "--out", str(tmp_path / f"run{merged}")]
        pipe = f"{shlex.join(command)} {merged} | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
        assert done.returncode == 0 and "parameters learn" in done.stdout
        assert (done.stderr.count("nobody reads this output any more; training goes on") == 1) == said, done.stderr
        assert "Traceback" not in done.stderr
        assert load_adapter(tmp_path / f"run{merged}" / "adapter").r == 8
        assert json.loads((tmp_path / f"run{merged}" / "summary.json").read_text())["eval_loss_after"] > 0


def test_the_text_of_generate_ends_with_its_reader():
    """There the output is all there is."""
    pipe = f"{sys.executable} -m minift generate Hello --raw --max-new-tokens 400 | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 1)


def test_target_modules_by_a_regular_expression(call, run, tmp_path, few):
    expression = r".*layers\.[13]\..*(q|up)_proj"
    status, result, _ = run("finetune", *few, "--target-modules", expression, "--out", tmp_path / "run")
    assert status == 0
    assert result["trainable_parameters"] == 2 * 8 * ((128 + 128) + (352 + 128))
    bill = call("memory", "--model", "tiny", "--method", "lora", "--target-modules", expression, "--json")[1]
    assert bill["adapters"] == result["trainable_bytes"]
    adapter = load_adapter(result["adapter"], load_model("tiny")[1])
    assert {name.split(".")[2] for name in adapter.arrays} == {"1", "3"}
    for wrong, message in (("(q_proj", "needed a regular expression (missing )"), ("x+", "matches none of")):
        status, _, captured = call("finetune", *few, "--target-modules", wrong, "--out", tmp_path / "wrong")
        assert status == 2
        assert message in captured.err


def test_texts_beyond_what_the_model_was_made_for(run, tmp_path, few):
    """Of 40 tokens, here: to the token, and once a command."""
    config, params = load_model("tiny")
    config = dataclasses.replace(config, max_position_embeddings=40)
    save_model(tmp_path / "short", config, params, load_tokenizer("tiny"))
    model, said = ["--model", tmp_path / "short"], "minift: warning: {} may go beyond the 40 tokens"
    size = len(load_tokenizer("tiny").encode("Return the"))
    for new in (40 - size, 41 - size):
        _, _, err = run("generate", "Return the", "--raw", *model, "--max-new-tokens", new)
        assert (said.format("prompt and answer together") in err) == (new + size > 40)
    _, _, err = run("generate", "Hi", *model, "--max-new-tokens", "50")
    assert err.count(said.format("prompt and answer together")) == 1
    _, result, err = run("chat", *model, "--max-new-tokens", "50", "--json", stdin="one\ntwo\nthree\n")
    assert len(result["messages"]) == 6 and err.count("warning") == 1
    for length in (40, 41):
        status, _, err = run("finetune", *model, *few, "--seq-len", length, "--out", tmp_path / "run")
        assert status == 0
        assert (said.format("examples of --seq-len") in err) == (length > 40)


def test_a_damaged_adapter(call, run, tmp_path, few):
    """A changed configuration is said and read; a flipped bit among the numbers is refused; so is a lost name."""
    finetuned = Path(run("finetune", *few, "--out", tmp_path / "run")[1]["adapter"])
    config = finetuned / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16.0', '"lora_alpha": 48.0'))
    status, info, captured = call("info", finetuned, "--json")
    assert (status, info["lora_alpha"]) == (0, 48)
    assert f"minift: warning: {config}: not as it was written" in captured.err
    weights = finetuned / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 4
    weights.write_bytes(data)
    status, _, captured = call("generate", "Hi", "--adapter", finetuned)
    assert status == 2
    assert f"{weights}: base_model.model.model.layers." in captured.err
    assert "the file is damaged" in captured.err
    finetuned.rename(finetuned.parent / ".adapter.old-12345678")
    for command in (["info", finetuned], ["generate", "Hi", "--adapter", finetuned], ["merge", "--adapter", finetuned]):
        status, _, captured = call(*command)
        assert status == 2
        assert f"mv {finetuned.parent}/.adapter.old-12345678 {finetuned}" in captured.err


def test_a_learning_rate_of_zero_is_not_the_default(call, tmp_path):
    _, result, _ = call("finetune", *QUICK, "--learning-rate", "0", "--out", tmp_path / "run")
    assert result["eval_loss_before"] == result["eval_loss_after"]


def test_one_example_is_too_few(call, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "What is it?", "completion": "It is it."}\n')
    status, _, captured = call("finetune", "--data", tmp_path / "one.jsonl", *QUICK, "--out", tmp_path / "run")
    assert status == 2
    assert "one.jsonl: no example is held out" in captured.err


def test_what_lies_in_the_way_is_found_before_the_work(call, tmp_path, finetuned):
    (tmp_path / "file").write_text("notes")
    notes = tmp_path / "notes" / "adapter"
    notes.mkdir(parents=True)
    (notes / "notes.txt").write_text("notes")
    (tmp_path / "notes" / "model").symlink_to(notes)
    for command in (["finetune", *QUICK], ["finetune", *QUICK, "--method", "full"], ["pretrain", "--steps", "1"]):
        for out, message in (("file", "found a file"), ("notes", "found a folder with other things (notes.txt)")):
            status, _, captured = call(*command, "--out", tmp_path / out)
            assert (status, captured.out) == (2, "")
            assert message in captured.err
    for out, message in (("file", "found a file"), ("notes/adapter", "found a folder that is not empty")):
        status, _, captured = call("merge", "--adapter", finetuned, "--out", tmp_path / out)
        assert status == 2
        assert message in captured.err
    status, _, captured = call("merge", "--adapter", finetuned, "--out", notes, "--overwrite")
    assert status == 2
    assert "other things" in captured.err
    assert sorted(p.name for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "run")) == [
        *("adapter", "file", "model", "notes", "notes.txt")
    ]


def test_other_data_is_not_resumed(call, tmp_path):
    data = tmp_path / "pairs.jsonl"
    for answer in ("yes", "no"):
        lines = [json.dumps({"prompt": f"Is {i} even?", "completion": f"{answer}, {i}."}) + "\n" for i in range(60)]
        data.write_text("".join(lines))
        again = ["--resume"] if answer == "no" else []
        status, _, captured = call("finetune", "--data", data, *QUICK, "--out", tmp_path / "run", *again)
    assert status == 2
    assert "digest_of_the_data" in captured.err


def test_generate_and_merge_and_info(call, tmp_path, finetuned):
    question = "What does `math.isqrt` do?"
    status, with_adapter, captured = call(
        "generate", question, "--adapter", finetuned, "--max-new-tokens", "12", "--json"
    )
    assert status == 0
    assert with_adapter["text"] in captured.out
    assert "<|im_end|>" not in with_adapter["text"]
    status, merged, _ = call("merge", "--adapter", finetuned, "--out", tmp_path / "merged", "--json")
    assert (status, merged["merged_layers"]) == (0, 28)
    status, after, _ = call("generate", question, "--model", tmp_path / "merged", "--max-new-tokens", "12", "--json")
    assert after["text"] == with_adapter["text"]

    _, params = load_model("tiny")
    _, written = load_model(tmp_path / "merged")
    expected = lora.merge(lora.insert(params, load_adapter(finetuned)))
    for name, weight in written.items():
        assert np.array_equal(weight, dense(expected[name])), name
    assert not np.array_equal(written["model.layers.0.mlp.up_proj.weight"], params["model.layers.0.mlp.up_proj.weight"])

    status, info, captured = call("info", finetuned, "--tensors", "--json")
    assert (info["r"], info["parameters"]) == (8, 74_752)
    assert "layers.3.mlp.down_proj.lora_B" in captured.out
    status, info, _ = call("info", "tiny", "--json")
    assert info["parameters"] == 1_000_576
    assert info["config"]["hidden_size"] == 128


def test_merging_what_qlora_trained(call, tmp_path):
    """Into the weights that it was trained on, by default. (The built-in model's lie near the NF4 grid already, since
    it is stored in 4 bits, so only bits can tell the two bases apart.)"""
    call("finetune", "--method", "qlora", *QUICK, "--learning-rate", "0.01", "--out", tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    _, params = load_model("tiny")
    for base, under in (("auto", qlora.quantize(params)), ("nf4", qlora.quantize(params)), ("original", params)):
        assert call("merge", "--adapter", adapter, "--base", base, "--out", tmp_path / base)[0] == 0
        _, written = load_model(tmp_path / base)
        expected = lora.merge(lora.insert(under, load_adapter(adapter)))
        assert all(np.array_equal(written[name], dense(weight)) for name, weight in expected.items())
    _, trained_on = load_model(tmp_path / "auto")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(trained_on[name], written[name])
    status, _, captured = call("merge", "--adapter", adapter, "--out", tmp_path / "auto")
    assert status == 2
    assert "not empty" in captured.err


def test_the_merged_model_runs_in_transformers(call, tmp_path, finetuned):
    import torch
    import transformers

    call("merge", "--adapter", finetuned, "--out", tmp_path / "merged")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    config, params = load_model(tmp_path / "merged")
    tokens = np.array([load_tokenizer(tmp_path / "merged").encode("Return the sum of all the numbers.")])
    exact, _ = llama.forward({n: w.astype(np.float64) for n, w in params.items()}, tokens, config)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(tokens)).logits.numpy()
    ours, _ = llama.forward(params, tokens, config)
    # as close to the float64 result as we are, within a factor: two float32 computations of the same function
    assert np.abs(theirs - exact).max() <= 4 * np.abs(ours - exact).max()


def test_raw_generation_and_sampling(call):
    raw = ["generate", "Return the", "--raw", "--max-new-tokens", "8", "--json"]
    greedy, again = (call(*raw)[1]["text"] for _ in range(2))
    assert greedy == again
    sampled = [call(*raw, "--temperature", "1.5", "--seed", seed)[1]["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert call(*raw, "--temperature", "1.5", "--top-k", "1")[1]["text"] == greedy


def test_chat(call, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is `int`?\n\n/reset\nWhat is `list`?\nAnd `dict`?\n/quit\n"))
    status, result, _ = call("chat", "--max-new-tokens", "5", "--temperature", "0", "--system", "Be brief.", "--json")
    assert status == 0
    assert [m["role"] for m in result["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert result["messages"][1]["content"] == "What is `list`?"


@pytest.mark.parametrize("end", ["Ctrl-C", "Ctrl-D"])
def test_chat_ends_politely(tmp_path, end):
    """At the prompt, where it waits for the next question: status 0, and the conversation in JSON."""
    command = [sys.executable, "-m", "minift", "chat", "--max-new-tokens", "4", "--json", "--out", str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as chat:
        chat.stdin.write("What is `int`?\n")
        chat.stdin.flush()
        chat.stdout.readline()  # the answer
        if end == "Ctrl-C":
            time.sleep(0.5)
            chat.send_signal(signal.SIGINT)
        out, err = chat.communicate()
    assert (chat.returncode, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    assert [m["role"] for m in result["messages"]] == ["user", "assistant"]
    assert json.loads((tmp_path / "summary.json").read_text()) == result


@pytest.mark.parametrize(
    ("arguments", "gigabytes"),
    [
        # 65.3e9 parameters: 2 bytes of weight, 2 of gradient, 8 of Adam; the paper says "more than 780 GB"
        (["--model", "65B", "--method", "full"], 12 * 65_285_660_672 / 1e9),
        # and "less than 48 GB"
        (["--model", "65B", "--method", "qlora", "--r", "64"], None),
    ],
)
def test_memory(call, arguments, gigabytes):
    _, result, captured = call("memory", *arguments, "--json")
    without = (result["total"] - result["activations"]) / 1e9
    if gigabytes is not None:
        assert without == pytest.approx(gigabytes, rel=1e-12)
    else:
        assert without < 48
        linear = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
        assert result["weights_in_4_bits"] == linear / 2
        assert result["quantization_constants"] == pytest.approx(linear * 0.126953125 / 8, rel=1e-9)
    assert "activations" in captured.out


def test_memory_of_the_built_in_model_is_what_it_takes(call, tmp_path):
    """The bill against the arrays themselves."""
    _, bill, _ = call("memory", "--model", "tiny", "--method", "qlora", "--weight-bits", "32", "--json")
    _, run, _ = call("finetune", "--method", "qlora", *QUICK, "--out", tmp_path / "run")
    billed = bill["weights_in_4_bits"] + bill["quantization_constants"] + bill["other_weights"]
    assert run["weight_bytes"] == pytest.approx(billed, rel=1e-3)  # offsets and short nested blocks are not billed
    assert (run["trainable_bytes"], run["optimizer_bytes"]) == (bill["adapters"], bill["optimizer_state"])


@pytest.mark.parametrize(
    "arguments", [["memory"], ["info"], ["generate", "Hello", "--max-new-tokens", "2"], ["memory", "--model", "GPT-3"]]
)
def test_out_holds_what_json_prints(call, tmp_path, arguments):
    status, result, _ = call(*arguments, "--out", tmp_path / "new" / "folder", "--json")
    assert status == 0
    assert json.loads((tmp_path / "new" / "folder" / "summary.json").read_text()) == result


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("head", ["--optimizer", "adamw8bit"]),
        ("full", []),
        ("lora", ["--target-modules", "self_attn.q_proj", "model.layers.0.mlp.up_proj"]),
    ],
)
def test_the_bill_is_what_finetune_says(call, tmp_path, method, options):
    """Tied embeddings come apart when the head alone learns; target modules have the same forms in both commands."""
    bill = call("memory", "--model", "tiny", "--method", method, "--weight-bits", "32", *options, "--json")[1]
    run = call("finetune", "--method", method, *QUICK, *options, "--out", tmp_path / "run")[1]
    assert (bill["weights"], bill["optimizer_state"]) == (run["weight_bytes"], run["optimizer_bytes"])


@pytest.mark.parametrize("command", ["finetune", "pretrain", "memory"])
def test_a_budget_below_a_page_is_refused_before_anything_is_loaded(call, tmp_path, command):
    options = ["--optimizer", "paged-adamw8bit", "--page-budget", "33279", "--out", tmp_path / "run"]
    missing = ["--model", tmp_path / "nothing"] if command != "pretrain" else []
    status, _, captured = call(command, *options, *missing)
    assert status != 0 and "--page-budget 33,279: a page takes up to 33,280 bytes" in captured.err
    assert not (tmp_path / "run").exists()


def test_memory_of_the_lora_paper(call):
    rows = {row["model"]: row for row in call("memory", "--model", "lora-paper", "--json")[1]["rows"]}
    assert rows["GPT-3"]["lora_parameters"] == 4_718_592  # 4.7M, table 4
    assert rows["GPT-3 (r=8)"]["lora_parameters"] == 37_748_736
    assert rows["RoBERTa-base"]["lora_parameters"] == 294_912
    assert rows["GPT-2-medium"]["lora_parameters"] == 393_216  # the paper prints 0.35M, which does not follow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["finetune", "--model", "no/such/model"],
            "no/such/model: found nothing there, needed a folder or a .gguf file",
        ),
        (
            ["finetune", "--data", "no/such.jsonl"],
            "minift: no/such.jsonl: No such file or directory, needed a JSONL file that can be read",
        ),
        (["finetune", "--target-modules", "q_prj"], "'q_prj' matches no linear layer"),
        (["finetune", "--r", "0"], "r is 0"),
        (["finetune", "--target-modules", "embed_tokens"], "'embed_tokens' matches no linear layer"),
        (["finetune", "--lora-alpha", "0"], "lora_alpha is 0"),
        (["finetune", "--lora-dropout", "1"], "lora_dropout is 1"),
        (["finetune", "--batch-size", "-1"], "batch_size is -1, needed 1 or more"),
        (["finetune", "--gradient-accumulation-steps", "0"], "gradient_accumulation_steps is 0"),
        (["finetune", "--eval-examples", "-3"], "eval_examples is -3"),
        (["finetune", "--seq-len", "1"], "seq_len is 1, needed 2 or more"),
        (["finetune", "--eval-every", "0"], "eval_every is 0, needed 1 or more"),
        (["finetune", "--save-every", "0"], "save_every is 0"),
        (["finetune", "--learning-rate", "nan"], "learning_rate is nan"),
        (["finetune", "--warmup-steps", "-1"], "warmup_steps is -1"),
        (["finetune", "--max-grad-norm", "0"], "max_grad_norm is 0"),
        (["finetune", "--seed", "-1"], "seed is -1"),
        (["pretrain", "--eval-every", "0"], "eval_every is 0"),
        (["pretrain", "--seq-len", "1"], "seq_len is 1"),
        (["generate", "caf\udce9"], "not valid Unicode (U+DCE9"),
        (["generate", "x", "--temperature", "nan"], "temperature is nan"),
        (["memory", "--r", "-3"], "r is -3"),
        (["memory", "--batch-size", "0"], "batch_size is 0"),
        (["finetune", "--seq-len", "5"], "within 5 tokens"),
        (["finetune", "--resume"], "no checkpoint"),
        (["generate", "x", "--adapter", "no/adapter"], "no/adapter"),
        (["generate", "", "--raw"], "a prompt is empty"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1"),
        (["generate", "x", "--top-k", "0"], "top_k is 0, needed at least 1"),
        (["generate", "x", "--top-p", "1.5"], "top_p is 1.5, needed 0 < top_p <= 1"),
        (["generate", "x", "--max-new-tokens", "-1"], "max_new_tokens is -1, needed 0 or more"),
        (["generate", "x", "--raw", "--max-new-tokens", "-100"], "max_new_tokens is -100"),
        (["chat", "--temperature", "0", "--top-p", "0"], "top_p is 0.0"),
        (["chat", "--max-new-tokens", "-5"], "max_new_tokens is -5"),
        (["memory", "--model", "8B"], "8B: found nothing there"),
        (["memory", "--target-modules", "nothing", "--method", "lora"], "'nothing' matches no linear layer"),
    ],
)
def test_bad_input(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, captured = call(*arguments)
    assert status == 2
    assert message in captured.err
    assert captured.err.startswith("minift: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "default" in text
