"""Hugging Face folders: what transformers writes we read bit for bit, what we write it reads bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import assert_same_bits, numpy_state, torch_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from minift.io import FormatError, huggingface, load_model, save_model
from minift.models import llama
from minift.models.llama import Config
from minift.nn.rope import RopeScaling
from minift.nn.weight import Frozen

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def edit_config(folder, drop=(), **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in drop} | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def saved(tmp_path):
    """A folder that transformers wrote, untied, and the model in it."""
    model = torch_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m", model


# --- what transformers writes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_transformers_writes(tmp_path, tied, dtype):
    model = torch_llama(tie_word_embeddings=tied, dtype=dtype)
    model.save_pretrained(tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    assert_same_bits(params, numpy_state(model))
    assert config.tie_word_embeddings is tied and ("lm_head.weight" in params) is not tied
    assert all(p.flags.writeable and p.flags.c_contiguous for p in params.values())


def test_reads_shards(tmp_path):
    model = torch_llama()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert_same_bits(load_model(tmp_path / "m")[1], numpy_state(model))


def test_reads_without_prefix_and_with_known_constants(saved):
    """Files of the bare network have no "model."; old ones carry the rotary frequencies, or a tied head."""
    folder, model = saved

    def strip(tensors):
        for name in [n for n in tensors if n.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(folder, strip)
    assert_same_bits(load_model(folder)[1], numpy_state(model))


def test_a_tied_file_may_repeat_its_embedding_but_not_differ(tmp_path):
    model = torch_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "m")

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(tmp_path / "m", repeat)
    assert_same_bits(load_model(tmp_path / "m")[1], numpy_state(model))

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][7, 3] += 1

    edit_weights(tmp_path / "m", differ)
    with pytest.raises(FormatError, match=r"m/model.safetensors: lm_head.weight: .*other numbers"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "rope, expected",
    [
        ({"rope_type": "default", "rope_theta": 5000.0}, None),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, RopeScaling("linear", 2.0)),
        (LLAMA3, RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
    ],
)
def test_configs_of_versions_4_and_5_mean_the_same(tmp_path, rope, expected):
    """Version 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling; the frequencies are transformers' own."""
    model = torch_llama(rope_parameters=rope)
    model.save_pretrained(tmp_path / "m")
    new, _ = load_model(tmp_path / "m")
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    scaling = None if rope["rope_type"] == "default" else scaling
    edit_config(
        tmp_path / "m",
        drop=("rope_parameters", "dtype", "head_dim"),
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        torch_dtype="float32",
    )
    old, _ = load_model(tmp_path / "m")
    assert old == new and new.rope_scaling == expected and new.rope_theta == rope["rope_theta"]
    if scaling is not None:  # the oldest spelling
        edit_config(tmp_path / "m", rope_scaling={"type" if k == "rope_type" else k: v for k, v in scaling.items()})
        assert load_model(tmp_path / "m")[0] == new
    from minift.nn.rope import frequencies

    expected_omega = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(
        frequencies(new.head_dim, new.rope_theta, new.rope_scaling), expected_omega, rtol=2**-21
    )  # its own powers are float32


def test_missing_settings_get_the_defaults_of_llama_config(saved):
    folder, model = saved
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = json.loads((folder / "config.json").read_text())
    kept = {key: values[key] for key in (*sizes, "num_key_value_heads", "model_type")}
    (folder / "config.json").write_text(json.dumps(kept))
    config, _ = load_model(folder)
    fresh = type(model.config)(**{k: v for k, v in kept.items() if k != "model_type"})
    for key in ("max_position_embeddings", "rms_norm_eps", "head_dim", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(fresh, key), key
    assert config.rope_theta == fresh.rope_parameters["rope_theta"]


def test_logits_are_those_of_transformers(saved):
    """The whole way: file → NumPy model, against file → torch model."""
    folder, model = saved
    config, params = load_model(folder)
    tokens = np.arange(24).reshape(2, 12) * 7 % 300
    ours, _ = llama.forward(params, tokens, config)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


# --- what we write ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", [None, LLAMA3, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}])
def test_transformers_reads_what_we_write(tmp_path, tied, rope):
    model = torch_llama(tie_word_embeddings=tied, **({"rope_parameters": rope} if rope else {}))
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_model(tmp_path / "theirs")
    save_model(tmp_path / "ours", config, params)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(numpy_state(again), numpy_state(model))
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    assert load_model(tmp_path / "ours")[0] == config
    assert_same_bits(load_model(tmp_path / "ours")[1], params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_files_are_rounded_as_torch_rounds(tmp_path, dtype):
    model = torch_llama()
    model.save_pretrained(tmp_path / "m")
    save_model(tmp_path / "ours", *load_model(tmp_path / "m"), dtype=dtype)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    for name, p in model.state_dict().items():
        assert stored[name].dtype == getattr(torch, dtype)
        assert torch.equal(stored[name], p.to(getattr(torch, dtype))), name
    assert LlamaForCausalLM.from_pretrained(tmp_path / "ours").dtype == getattr(torch, dtype)


def test_frozen_weights_are_saved_and_adapters_refused(saved, tmp_path):
    from minift.peft import lora

    folder, _ = saved
    config, params = load_model(folder)
    save_model(tmp_path / "frozen", config, {name: Frozen(w) for name, w in params.items()})
    assert_same_bits(load_model(tmp_path / "frozen")[1], params)
    adapted = lora.attach(params, ["q_proj"], r=2, rng=np.random.default_rng(0))
    with pytest.raises(FormatError, match=r"q_proj.weight: found LoRA.*merge"):
        save_model(tmp_path / "adapted", config, adapted)
    assert not (tmp_path / "adapted").exists()


def test_refuses_to_save_what_could_not_be_loaded(saved, tmp_path):
    config, params = load_model(saved[0])
    name = "model.norm.weight"
    for bad, words in [
        (params[name][:-1], "shape"),
        (np.full_like(params[name], np.nan), "not finite"),
        (np.full_like(params[name], 1e6), "float16"),
    ]:
        with pytest.raises(FormatError, match=rf"{name}: .*{words}|{words}.*{name}"):
            save_model(tmp_path / "x", config, params | {name: bad}, dtype="float16")
    with pytest.raises(FormatError, match=r"lm_head.weight: found nothing"):
        save_model(tmp_path / "x", config, {k: v for k, v in params.items() if k != "lm_head.weight"})
    with pytest.raises(FormatError, match="extra: found a parameter"):
        save_model(tmp_path / "x", config, params | {"extra": params[name]})
    with pytest.raises(FormatError, match="int8"):
        save_model(tmp_path / "x", config, params, dtype="int8")
    assert not (tmp_path / "x").exists()


def test_does_not_overwrite_a_folder_unless_asked(saved, tmp_path):
    folder, model = saved
    config, params = load_model(folder)
    with pytest.raises(FormatError, match=r"m: found a folder that is not empty.*overwrite=True"):
        save_model(folder, config, params)
    assert_same_bits(load_model(folder)[1], numpy_state(model))
    doubled = {name: 2 * w for name, w in params.items()}
    save_model(folder, config, doubled, overwrite=True)
    assert_same_bits(load_model(folder)[1], doubled)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_save_that_fails_half_way_leaves_the_old_folder(saved, tmp_path, monkeypatch):
    folder, model = saved
    config, params = load_model(folder)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(huggingface, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(folder, config, params, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "new", config, params)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same_bits(load_model(folder)[1], numpy_state(model))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2"}, "model_type: found 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"mlp_bias": True}, "mlp_bias: found True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5"),
        ({"hidden_size": "32"}, "hidden_size: found '32'"),
        ({"hidden_size": True}, "hidden_size: found True"),
        ({"num_attention_heads": 0}, "num_attention_heads: found 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, needed a divisor"),
        ({"head_dim": 7}, "head_dim: found 7, needed an even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: found 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: found 1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type: found 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor: found nothing"),
        ({"rope_parameters": {"rope_type": "default", "factor": 3}}, "factor: found 3, needed no such key"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta: found 6.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters: found"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor: found 1.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: found 'gptq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "load_in_8bit: found True"),
    ],
)
def test_refuses_other_configurations(saved, change, message):
    folder, _ = saved
    edit_config(folder, **change)
    with pytest.raises(FormatError, match="config.json.*" + message):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "model_type": "llama"}', "\ufeff{}", '"é'])
def test_refuses_bad_json(saved, text):
    folder, _ = saved
    (folder / "config.json").write_bytes(text.encode("latin-1" if text == '"é' else "utf-8"))
    with pytest.raises(FormatError, match=r"config.json: found .*, needed"):
        load_model(folder)


def _drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _add(tensors):
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)


def _transpose(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous()


def _poison(tensors):
    tensors["model.norm.weight"][5] = float("nan")


def _infinite(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.float16)
    tensors["model.layers.1.mlp.up_proj.weight"][1, 2] = float("-inf")


def _huge_in_bfloat16(tensors):
    tensors["model.embed_tokens.weight"] = torch.full((300, 32), 3.4e38).to(torch.bfloat16)  # rounds to infinity


def _int8(tensors):
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)


def _double(tensors):
    tensors["norm.weight"] = tensors["model.norm.weight"].clone()


@pytest.mark.parametrize(
    "change, message",
    [
        (_drop, r"m: model.layers.1.mlp.up_proj.weight: found nothing"),
        (_add, r"model.safetensors: model.layers.1.self_attn.q_proj.bias: found a tensor"),
        (
            _transpose,
            r"model.safetensors: model.layers.0.mlp.up_proj.weight: found shape \(32, 48\), needed .*\(48, 32\)",
        ),
        (_poison, r"model.safetensors: model.norm.weight: found nan at flat index 5 \(1 not finite\)"),
        (
            _infinite,
            r"model.safetensors: model.layers.1.mlp.up_proj.weight: found -inf at flat index 34 \(1 not",
        ),
        (_huge_in_bfloat16, r"model.safetensors: model.embed_tokens.weight: found inf at flat index 0 \(9,600 not fin"),
        (_int8, r"model.safetensors: model.norm.weight: found dtype I8"),
        (_double, r"norm.weight: found the same parameter"),
    ],
)
def test_refuses_wrong_tensors(saved, change, message):
    folder, _ = saved
    edit_weights(folder, change)
    with pytest.raises(FormatError, match=message):
        load_model(folder)


def test_refuses_every_truncation(saved):
    folder, _ = saved
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in [*range(0, 40), *range(40, len(data), 1009), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"model.safetensors: "):
            load_model(folder)


def test_refuses_incomplete_folders(tmp_path, saved):
    folder, _ = saved
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FormatError, match=r"m: found only pytorch_model.bin, which are pickles.*needed model.safetensors"
    ):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match="m: found no weights"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config.json: found No such file"):
        load_model(folder)
    with pytest.raises(FormatError, match="nowhere: found nothing there"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(FormatError, match=r"type '.pt'"):
        load_model(tmp_path / "model.pt")


def test_refuses_wrong_shards(tmp_path):
    torch_llama().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index_path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted(set(index["weight_map"].values()), key=[*index["weight_map"].values()].count, reverse=True)
    first = next(name for name, shard in index["weight_map"].items() if shard == shards[0])  # of several in that file

    index_path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != first}}))
    with pytest.raises(FormatError, match=f"{shards[0]}: {first}: found a tensor, needed what"):
        load_model(tmp_path / "m")
    index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {"more": shards[0]}}))
    with pytest.raises(FormatError, match=f"{shards[0]}: more: found nothing, needed what"):
        load_model(tmp_path / "m")
    index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {"more": "../secret.safetensors"}}))
    with pytest.raises(FormatError, match=r"weight_map: found '../secret.safetensors'"):
        load_model(tmp_path / "m")
    index_path.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(FormatError, match=r"index.json: weight_map: found list"):
        load_model(tmp_path / "m")
    index_path.write_text(json.dumps(index))
    Path(tmp_path / "m" / shards[1]).unlink()
    with pytest.raises(FormatError, match=f"{shards[1]}: found .*[Nn]o such file"):
        load_model(tmp_path / "m")


def test_the_built_in_model_is_named_when_it_is_not_there(monkeypatch, tmp_path):
    import minift.io

    monkeypatch.setattr(minift.io, "TINY", tmp_path / "assets" / "tiny")
    with pytest.raises(FormatError, match=r"assets/tiny: found nothing there, needed the built-in model"):
        load_model("tiny")


def test_configurations_survive_the_round_trip():
    from minift.io.llama_config import format_config, parse_config

    config = Config(100, 24, 40, 3, 6, 2, 8, 77, 1e-6, 12345.0, RopeScaling("llama3", 32.0, 1.5, 5.0, 4096), True)
    values = json.loads(json.dumps(format_config(config, "float32", {})))
    assert parse_config(values, "x") == config
