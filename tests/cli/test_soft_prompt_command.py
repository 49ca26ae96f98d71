"""Soft prompts by command: trained, saved in PEFT's format, shown, and generated with."""

import numpy as np
import pytest

from minift.io import load_model, load_prompt, load_tokenizer
from minift.models import llama
from minift.peft import soft_prompt

QUICK = ["--steps", "3", "--eval-examples", "12", "--batch-size", "4", "--json"]
D, LAYERS, KEYS = 128, 4, 64  # of the built-in model
METHODS = {
    "prompt": (["--prompt-text", "Say what it does."], 6 * D, (6, D)),
    "prefix": ([], 2 * LAYERS * 6 * KEYS, (6, 2 * LAYERS * KEYS)),
    "prefix, network": (
        ["--encoder-hidden-size", "16"],
        6 * KEYS + 16 * (KEYS + 1) + 2 * LAYERS * KEYS * 17,
        (6, 2 * LAYERS * KEYS),
    ),
    "p-tuning": (["--encoder-hidden-size", "16"], 6 * D + 16 * (D + 1) + 16 * 17 + D * 17, (6, D)),
    "p-tuning, LSTM": (
        ["--encoder", "LSTM", "--encoder-hidden-size", "16"],
        6 * D + 2 * 64 * (D + 16 + 2) + 2 * 64 * (32 + 16 + 2) + 32 * 33 + D * 33,
        (6, D),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_finetune_info_generate(call, tmp_path, name):
    options, learned, shape = METHODS[name]
    method, out = name.split(",")[0], tmp_path / "run"
    command = ["finetune", "--method", method, "--num-virtual-tokens", "6", *options, *QUICK, "--out", out]
    status, result, _ = call(*command)
    assert status == 0
    assert result["trainable_parameters"] == learned and result["trainable_bytes"] == 4 * learned
    assert result["total_parameters"] == 1_000_576 and result["weight_bytes"] == 4 * 1_000_576
    assert result["eval_loss_before"] != result["eval_loss_after"]
    config, params = load_model("tiny")
    prompt = load_prompt(result["adapter"], config)
    assert prompt.table.shape == shape
    assert prompt.kind == {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "p-tuning": "P_TUNING"}[method]

    status, facts, captured = call("info", result["adapter"], "--tensors", "--json")
    assert status == 0 and "6, of" in captured.out and prompt.kind in captured.out
    assert facts == {
        "kind": prompt.kind,
        "virtual_tokens": 6,
        "parameters": prompt.table.size,
        "bytes": prompt.table.nbytes,
    }

    status, said, _ = call("generate", "a", "--raw", "--adapter", result["adapter"], "--max-new-tokens", "4", "--json")
    assert status == 0
    tokenizer = load_tokenizer("tiny")
    start = np.array([tokenizer.encode("a")])
    made = llama.generate(soft_prompt.insert(params, prompt), start, config, max_new_tokens=4)
    assert said["text"] == tokenizer.decode(made[0, start.size :]).split("<|im_end|>")[0]


@pytest.mark.parametrize("name", METHODS)
def test_torch_trains_the_same(call, tmp_path, name):
    """Losses as near as roundings let them be, with moments in 8 bits and in pages too, and the same files."""
    pytest.importorskip("minift_kernels", reason="needs torch")
    options, learned, shape = METHODS[name]
    optimizer = {"prefix": "adamw8bit", "p-tuning": "paged-adamw8bit"}.get(name, "adamw")
    options = ["--num-virtual-tokens", "6", "--optimizer", optimizer, *options, *QUICK]
    losses = []
    for device in ("cpu", "cpu-torch"):
        out = tmp_path / device
        command = ["finetune", "--method", name.split(",")[0], "--device", device, *options, "--out", out]
        status, result, _ = call(*command)
        assert status == 0 and result["trainable_parameters"] == learned
        assert load_prompt(result["adapter"]).table.shape == shape
        losses.append((result["eval_loss_before"], result["eval_loss_after"], result["optimizer_bytes"]))
    assert np.allclose(*losses, rtol=1e-4, atol=0)  # where a gradient is near 0, Adam enlarges a rounding


def test_a_prompt_from_a_text_starts_there(call, tmp_path):
    """After no step it is the text itself, repeated."""
    text = "Say what it does."
    options = ["--num-virtual-tokens", "9", "--prompt-text", text, "--steps", "0", "--eval-examples", "12"]
    status, result, _ = call("finetune", "--method", "prompt", *options, "--json", "--out", tmp_path / "run")
    assert status == 0
    _, params = load_model("tiny")
    expected = params[llama.EMBEDDING][np.resize(load_tokenizer("tiny").encode(text), 9)]
    assert np.array_equal(load_prompt(result["adapter"]).table, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "prefix", "--num-virtual-tokens", "0"], "num_virtual_tokens is 0, needed 1"),
        (["--method", "prompt", "--prompt-text", ""], "tokens is empty"),
        (["--method", "p-tuning", "--encoder-hidden-size", "0"], "encoder_hidden_size is 0"),
    ],
)
def test_refusals(call, tmp_path, options, message):
    status, _, captured = call("finetune", *options, *QUICK, "--out", tmp_path / "run")
    assert status != 0 and message in captured.err
    assert not (tmp_path / "run").exists()
