"""A GPT-2 folder in the commands: shown, continued, fine-tuned, merged, quantized; refused where only Llama works."""

import dataclasses

import numpy as np
import pytest

from minift.io import load_model, load_tokenizer, save_model
from minift.models import gpt2

QUICK = ["--steps", "3", "--eval-examples", "12", "--batch-size", "4", "--json"]
CONFIG = gpt2.Config(2048, 48, 96, 2, 3, 320)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    shapes = gpt2.shapes(CONFIG).items()
    params = {n: (rng.standard_normal(s) * 0.05).astype(np.float32) for n, s in shapes}
    params = {n: w + ("ln_" in n and n.endswith("weight")) for n, w in params.items()}
    save_model(tmp_path / "gpt2", CONFIG, params, load_tokenizer("tiny"))
    return tmp_path / "gpt2"


def test_info(call, folder):
    status, facts, captured = call("info", folder, "--tensors", "--json")
    assert status == 0 and facts["config"] == dataclasses.asdict(CONFIG)
    assert facts["parameters"] == sum(int(np.prod(s)) for s in gpt2.shapes(CONFIG).values())
    assert "transformer.h.1.attn.c_attn.weight" in captured.out and "(144, 48)" in captured.out


@pytest.mark.parametrize("method", ["full", "head", "lora", "qlora"])
def test_finetune_and_generate(call, folder, tmp_path, method):
    command = ["finetune", "--method", method, "--model", folder, *QUICK, "--out", tmp_path / "run"]
    status, result, captured = call(*command)
    assert status == 0, captured.err
    assert result["eval_loss_before"] != result["eval_loss_after"]
    learned = {"full": result["total_parameters"], "head": 2048 * 48, "lora": 9216, "qlora": 9216}[method]
    assert result["trainable_parameters"] == learned  # of LoRA, 2 · 8 · (192 + 96 + 144 + 144)
    if method in ("full", "head"):
        model, adapter = result["adapter"], []
        config, _ = load_model(model)
        assert config == dataclasses.replace(CONFIG, tie_word_embeddings=method == "full")
    else:
        model, adapter = folder, ["--adapter", result["adapter"]]
    status, said, _ = call("generate", "a", "--raw", "--model", model, *adapter, "--max-new-tokens", "4", "--json")
    assert status == 0 and said["tokens"] <= 4
    status, asked, _ = call("generate", "a", "--model", model, *adapter, "--max-new-tokens", "4", "--json")
    assert status == 0
    if adapter:
        merge = ["merge", "--model", folder, *adapter, "--out", tmp_path / "merged", "--eval-examples", "2", "--json"]
        status, _, captured = call(*merge)
        assert status == 0, captured.err
        _, same, _ = call("generate", "a", "--model", tmp_path / "merged", "--max-new-tokens", "4", "--json")
        assert same["text"] == asked["text"]


def test_both_engines_follow_the_same_losses(call, folder, tmp_path):
    losses = []
    for device in ("cpu", "cpu-torch"):
        options = ["--method", "qlora", "--device", device, "--model", folder, *QUICK]
        status, result, captured = call("finetune", *options, "--warmup-steps", "0", "--out", tmp_path / device)
        assert status == 0, captured.err
        losses.append((result["eval_loss_before"], result["eval_loss_after"], result["optimizer_bytes"]))
    assert np.allclose(*losses, rtol=1e-4, atol=0)  # where a gradient is near 0, Adam enlarges a rounding
    before, after, _ = losses[0]
    assert before - after > 20e-4 * before, "a step that was left out would not be seen"


def test_quantize(call, folder, tmp_path):
    status, facts, captured = call("quantize", folder, tmp_path / "nf4", "--json")
    assert status == 0, captured.err
    assert facts["quantized_layers"] == 8
    assert load_model(tmp_path / "nf4")[0] == CONFIG


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["finetune", "--method", "prefix", *QUICK], "soft prompts stand before Llama models only"),
        (["rlhf"], "RLHF works with Llama models only"),
        (["memory"], "this estimate works with Llama models only"),
        (["generate", "a", "--raw", "--max-new-tokens", "400"], "the model has learned 320 positions"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*may go beyond the 320 tokens")
def test_refusals(call, folder, tmp_path, command, message):
    out = ["--out", tmp_path / "run"] if command[0] in ("finetune", "rlhf") else []
    status, _, captured = call(*command, "--model", folder, *out)
    assert status != 0 and message in captured.err + captured.out
