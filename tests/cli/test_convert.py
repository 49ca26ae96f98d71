"""`minift convert`, and what `minift info` and `--adapter` say about adapters of every kind."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from minift.io import load_adapter, load_model, load_tokenizer, save_adapter, save_mlx_adapter
from minift.models import llama
from minift.nn.weight import replace, trainable
from minift.peft import lora


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder of two: `default`, and `poems` with all that differs from layer to layer."""
    folder, (_, params), rng = tmp_path_factory.mktemp("adapters"), load_model("tiny"), np.random.default_rng(0)
    plain = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7}
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*v_proj": 2.5}}
    for name, settings in (("default", plain), ("poems", plain | patterns | {"modules_to_save": ["model.norm"]})):
        carried = lora.attach(params, rng=rng, **settings)
        random = {n: 0.1 * rng.standard_normal(a.shape).astype(np.float32) for n, a in trainable(carried).items()}
        save_adapter(folder / "a", lora.detach(replace(carried, random))[1], name=name)
    return folder / "a"


def test_an_adapter_goes_to_mlx_and_comes_back(call, tmp_path, adapters):
    status, result, captured = call("convert", adapters, tmp_path / "mlx", "--json")
    assert (status, result["from"], result["to"], result["parameters"]) == (0, "peft", "mlx", 4 * 3 * (256 + 192))
    assert f"is now an adapter of mlx-lm in {tmp_path / 'mlx'}" in captured.out
    assert (tmp_path / "mlx" / "adapters.safetensors").exists()
    status, result, _ = call("convert", tmp_path / "mlx", tmp_path / "peft", "--json")
    assert (status, result["from"], result["to"]) == (0, "mlx", "peft")
    first, last = load_adapter(adapters), load_adapter(tmp_path / "peft", load_model("tiny")[1])
    assert first.arrays.keys() == last.arrays.keys()
    assert all(np.array_equal(first.arrays[name], last.arrays[name]) for name in first.arrays)
    answers = [
        call("generate", "What is `int`?", "--adapter", a, "--max-new-tokens", "6", "--json")[1]["text"]
        for a in (adapters, tmp_path / "peft")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_becomes_a_folder_that_transformers_loads(call, tmp_path, dtype):
    options = [] if dtype == "float32" else ["--to", "hf", "--dtype", dtype]
    status, result, _ = call("convert", "tiny", tmp_path / "hf", *options, "--json")
    assert (status, result["from"], result["to"], result["dtype"]) == (0, "model", "hf", dtype)
    assert result["parameters"] == 1_000_576
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype)
    state, (_, params) = network.state_dict(), load_model("tiny")
    for name, weight in params.items():
        assert torch.equal(state[name], torch.from_numpy(weight).to(getattr(torch, dtype))), name
    tokens = load_tokenizer("tiny").encode("Return the sum.")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").encode("Return the sum.") == tokens
    status, _, captured = call("convert", "tiny", tmp_path / "hf")
    assert (status, "needed an empty or new one, or --overwrite" in captured.err) == (2, True)
    assert call("convert", "tiny", tmp_path / "hf", "--overwrite")[0] == 0


def test_what_cannot_be_converted(call, tmp_path, adapters):
    save_mlx_adapter(tmp_path / "mlx", load_adapter(adapters))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("notes")
    out, before = tmp_path / "out", sorted(tmp_path.rglob("*"))
    for arguments, message in (
        (["tiny", out, "--to", "mlx"], "tiny: found a model, needed an adapter for --to mlx"),
        ([adapters, out, "--to", "hf"], "found an adapter of PEFT, needed a model (`minift merge` makes one"),
        ([tmp_path / "mlx", out, "--to", "hf"], "found an adapter of mlx-lm, needed a model"),
        ([adapters, out, "--dtype", "float16"], "--dtype float16 is for models"),
        ([adapters / "poems", out], "model.norm: found a weight trained in full"),
        (["no/such", out], "no/such: found nothing there"),
        ([adapters, tmp_path / "notes", "--overwrite"], "found a folder with other things (notes.txt)"),
        ([adapters, tmp_path / "notes"], "not empty"),
    ):
        status, _, captured = call("convert", *arguments)
        assert status == 2, arguments
        assert message in captured.err
        assert sorted(tmp_path.rglob("*")) == before


def test_info_on_an_adapter(call, tmp_path, adapters):
    status, facts, captured = call("info", adapters, "--json")
    assert status == 0
    assert (facts["kind"], facts["r"], facts["lora_alpha"], facts["scaling"]) == ("peft", 3, 7.0, [7 / 3])
    assert (facts["adapted_layers"], facts["rank_pattern"], facts["modules_to_save"]) == (8, {}, [])
    assert (facts["over_nf4"], facts["bytes"]) == (False, 4 * facts["parameters"])
    assert "also here" in captured.out
    assert "poems" in captured.out
    status, facts, captured = call("info", adapters / "poems", "--json")
    paths = [f"model.layers.{i}.self_attn" for i in range(4)]
    assert facts["r"] == 2  # of most layers, the first of two that are as many
    assert facts["rank_pattern"] == {f"{path}.v_proj": 3 for path in paths}
    assert facts["alpha_pattern"] == {f"{paths[0]}.v_proj": 2.5}
    assert facts["scaling"] == [2.5 / 3, 7 / 3, 7 / 2]
    assert facts["modules_to_save"] == ["model.norm"]
    printed = [" ".join(line.split()) for line in captured.out.splitlines()]
    for line in (
        "trained in full model.norm",
        "scaling 0.833333, 2.33333, 3.5",
        "target_modules q_proj, v_proj: 8 layers",
    ):
        assert line in printed
    save_mlx_adapter(tmp_path / "mlx", load_adapter(adapters))
    status, facts, captured = call("info", tmp_path / "mlx", "--json")
    assert (facts["kind"], facts["r"], facts["adapted_layers"]) == ("mlx", 3, 8)
    assert "of mlx-lm" in captured.out


def test_the_folder_of_a_run_says_where_the_adapter_is(call, tmp_path, adapters):
    run = tmp_path / "run"
    save_adapter(run / "adapter", dataclasses.replace(load_adapter(adapters), over_nf4=True))  # as --method qlora does
    (run / "metrics.jsonl").write_text("")
    out = tmp_path / "out"
    commands = ["info", run], ["generate", "x", "--adapter", run], ["merge", "--adapter", run], ["convert", run, out]
    for command in commands:
        status, _, captured = call(*command)
        assert status == 2
        assert f"{run}: found no adapter but inside: adapter, needed one of them: {run / 'adapter'}" in captured.err
    status, facts, captured = call("info", run / "adapter", "--json")
    assert (status, facts["over_nf4"]) == (0, True)
    assert "NF4 weights" in captured.out
    _, _, captured = call("convert", run / "adapter", tmp_path / "mlx")
    assert "it was trained over NF4 weights" in captured.out


def test_an_adapter_by_its_name(call, tmp_path, adapters):
    ask = ["generate", "Return the", "--raw", "--max-new-tokens", "6", "--json", "--adapter"]
    (config, params), tokenizer = load_model("tiny"), load_tokenizer("tiny")
    tokens = np.array([tokenizer.encode("Return the")])
    for name in ("default", "poems"):
        status, result, _ = call(*ask, adapters / name)
        carried = lora.insert(params, load_adapter(adapters, params, name))
        steps = llama.stream(carried, tokens, config, 6, stop_tokens=tokenizer.stop_token_ids)
        new = [int(token) for (token,) in steps]
        assert status == 0
        assert result["text"] == tokenizer.decode([token for token in new if token not in tokenizer.stop_token_ids])
    status, _, captured = call(*ask, adapters / "prose")
    assert status == 2
    assert "prose" in captured.err
    save_mlx_adapter(tmp_path / "mlx", load_adapter(adapters))
    status, _, captured = call(*ask, tmp_path / "mlx")
    assert status == 2
    assert "found an adapter of mlx-lm, needed one of PEFT, as `minift convert` makes of it" in captured.err


def test_merging_what_was_trained_in_full(call, tmp_path, adapters):
    assert call("merge", "--adapter", adapters / "poems", "--out", tmp_path / "merged")[0] == 0
    _, written = load_model(tmp_path / "merged")
    adapter = load_adapter(adapters / "poems")
    assert np.array_equal(written["model.norm.weight"], adapter.arrays["model.norm.weight"])
