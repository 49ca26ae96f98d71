"""LoRA adapters: PEFT reads ours, we read PEFT's, tensors equal to the bit; what PEFT only warns of is an error."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import assert_same_bits, assert_same_logits, numpy_state, torch_llama

import peft
from minift.io import FormatError, load_adapter, peft_adapter, save_adapter
from minift.peft import lora, qlora
from minift.peft.lora import Adapter
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = [  # what PEFT says of itself, of the made-up name of a base model, and of what it cannot merge
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in some/model"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias.*"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"


def torch_adapter(folder, **settings):
    """A PEFT model with random adapters, saved; B too, since zeros would hide mistakes."""
    config = LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings))
    model = get_peft_model(torch_llama(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p))
    model.save_pretrained(folder)
    return model.eval()


def their_arrays(model):
    found = peft.get_peft_model_state_dict(model)
    return {name.removeprefix("base_model.model."): p.numpy() for name, p in found.items()}


@pytest.fixture
def params():
    return numpy_state(torch_llama())


@pytest.fixture
def adapter(params, rng):
    adapted = lora.attach(params, TARGETS, r=3, lora_alpha=7, rng=rng, use_rslora=True, lora_dropout=0.25)
    _, fresh = lora.detach(adapted)
    arrays = {name: rng.standard_normal(a.shape).astype(np.float32) for name, a in fresh.arrays.items()}
    return Adapter(arrays, 3, 7, fresh.target_modules, True, 0.25)


def edit_config(folder, drop=(), **changes):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in drop} | changes))


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"target_modules": "all-linear"}]
)
def test_reads_what_peft_writes(tmp_path, settings, params):
    model = torch_adapter(tmp_path / "a", **settings)
    adapter = load_adapter(tmp_path / "a", params)
    assert_same_bits(adapter.arrays, their_arrays(model))
    config = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora) == (3, 7, config.use_rslora)
    assert adapter.lora_dropout == config.lora_dropout and set(adapter.target_modules) == set(config.target_modules)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_an_adapter_of_peft_does_here_what_it_does_there(tmp_path, params, settings):
    """The effect, not only the tensors: scaling, and which matrix is which."""
    model = torch_adapter(tmp_path / "a", **settings)
    assert_same_logits(params, load_adapter(tmp_path / "a", params), model)


def test_a_regular_expression_becomes_the_layers_it_meant(tmp_path, params):
    torch_adapter(tmp_path / "a", target_modules=r".*layers\.1\.self_attn\.[qv]_proj")
    adapter = load_adapter(tmp_path / "a", params)
    assert adapter.target_modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    edit_config(tmp_path / "a", target_modules=r".*layers\.0\..*")
    with pytest.raises(FormatError, match=r"target_modules: .*model.layers.1.self_attn.q_proj"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_what_we_write(tmp_path, adapter, rslora):
    adapter = Adapter(adapter.arrays, 3, 7, adapter.target_modules, rslora, 0.25)
    save_adapter(tmp_path / "a", adapter, "some/model")
    model = PeftModel.from_pretrained(torch_llama(), tmp_path / "a")
    assert_same_bits(their_arrays(model), adapter.arrays)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (3, 7, rslora, 0.25)
    assert config.target_modules == set(TARGETS) and config.base_model_name_or_path == "some/model"
    layer = model.get_submodule(f"base_model.model.{Q}")
    assert layer.scaling["default"] == lora.scaling(7, 3, rslora)


def test_round_trip(tmp_path, adapter, params):
    save_adapter(tmp_path / "a", adapter)
    again = load_adapter(tmp_path / "a", params)
    assert_same_bits(again.arrays, adapter.arrays)
    assert {**vars(again), "arrays": 0} == {**vars(adapter), "arrays": 0}


def test_the_base_that_it_was_trained_on_is_remembered(tmp_path, params, rng):
    """In the metadata of the tensors, where PEFT does not stumble over it."""
    for name, attach in (("qlora", qlora.attach), ("lora", lora.attach)):
        save_adapter(tmp_path / name, lora.detach(attach(params, TARGETS, rng=rng))[1])
        assert load_adapter(tmp_path / name).over_nf4 == (name == "qlora")
        PeftModel.from_pretrained(torch_llama(), tmp_path / name)
    torch_adapter(tmp_path / "theirs")
    assert not load_adapter(tmp_path / "theirs").over_nf4


def test_minimal_configuration_and_sixteen_bits(tmp_path):
    """PEFT fills r = 8 and lora_alpha = 8; adapters are often stored in bfloat16."""
    model = torch_adapter(tmp_path / "a", r=8, lora_alpha=8)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": TARGETS}))
    edit_weights(tmp_path / "a", lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}))
    adapter = load_adapter(tmp_path / "a")
    assert (adapter.r, adapter.lora_alpha) == (8, 8.0)
    expected = {k: torch.from_numpy(v).to(torch.bfloat16).float().numpy() for k, v in their_arrays(model).items()}
    assert_same_bits(adapter.arrays, expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_refuses_variants_that_peft_writes(tmp_path, settings, key):
    torch_adapter(tmp_path / "a", **settings)
    with pytest.raises(FormatError, match=rf"adapter_config.json: {key}: found"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "peft_type: found 'IA3'"),
        ({"something_new": {"a": 1}}, "something_new: found"),
        ({"r": 4}, r"adapter_model.safetensors: .*lora_A.weight: found shape \(3, 48\), needed \(4, in\)"),
        ({"r": 0}, "r: found 0"),
        ({"lora_alpha": "7"}, "lora_alpha: found '7'"),
        ({"lora_alpha": -1}, "lora_alpha: found -1"),
        ({"lora_dropout": 1.0}, "lora_dropout: found 1.0"),
        ({"use_rslora": 1}, "use_rslora: found 1"),
        ({"target_modules": None}, "target_modules: found None"),
        ({"target_modules": [*TARGETS, "k_proj"]}, "target_modules: .*'k_proj'"),
        ({"target_modules": TARGETS[1:]}, "target_modules: .*adapted layer model.layers.0.self_attn.q_proj"),
    ],
)
def test_refuses_wrong_configurations(tmp_path, changes, message):
    torch_adapter(tmp_path / "a")
    edit_config(tmp_path / "a", **changes)
    with pytest.raises(FormatError, match=message):
        load_adapter(tmp_path / "a")


def test_refuses_wrong_tensors(tmp_path, params):
    name = f"base_model.model.{Q}.lora_B.weight"
    other = f"base_model.model.{Q}.lora_A.weight"
    for change, message in [
        (lambda t: t.pop(name), f"{Q}.lora_B.weight: found nothing, needed the other half"),
        (lambda t: (t.pop(name), t.pop(other)), f"{Q}.lora_A.weight: found nothing"),  # needs the base model
        (lambda t: t.update(extra=torch.ones(1)), "extra: found a surplus tensor"),
        (lambda t: t.update({n.replace("q_", "k_"): t[n].clone() for n in (name, other)}), "k_proj"),
        (lambda t: t.update({name: t[name].T.contiguous()}), rf"{Q}.lora_B.weight: found shape \(3, 32\)"),
        (lambda t: t.update({name: t[name][:-1].contiguous()}), rf"{Q}.lora_B.weight: found shape \(31, 3\)"),
        (lambda t: t.update({name: t[name] * float("inf")}), f"{name}: found .* not finite"),
        (lambda t: t.update({name: t[name].to(torch.int32)}), f"{name}: found dtype I32"),
    ]:
        torch_adapter(tmp_path / "a")
        edit_weights(tmp_path / "a", change)
        with pytest.raises(FormatError, match=message):
            load_adapter(tmp_path / "a", params)


def test_refuses_an_adapter_of_another_model(tmp_path, adapter):
    save_adapter(tmp_path / "a", adapter)
    wider = numpy_state(torch_llama(hidden_size=64))
    with pytest.raises(FormatError, match=r"down_proj.lora_B.weight: found shape \(32, 3\), needed \(64, r\)"):
        load_adapter(tmp_path / "a", wider)
    deeper = numpy_state(torch_llama(num_hidden_layers=3))
    with pytest.raises(FormatError, match=r"model.layers.2.*found nothing \(6 tensors are missing\)"):
        load_adapter(tmp_path / "a", deeper)


def test_refuses_missing_files(tmp_path, adapter):
    save_adapter(tmp_path / "a", adapter)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model.bin: found a pickle"):
        load_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").unlink()
    with pytest.raises(FormatError, match=r"adapter_model.safetensors: found"):
        load_adapter(tmp_path / "a")
    with pytest.raises(FormatError, match=r"adapter_config.json: found No such file"):
        load_adapter(tmp_path / "b")


def test_refuses_to_write_what_it_would_not_read(tmp_path, adapter):
    name = f"{Q}.lora_A.weight"
    for arrays, message in [
        ({}, "no tensors"),
        ({name: adapter.arrays[name]}, "lora_B.weight: found nothing"),
        (adapter.arrays | {name: adapter.arrays[name].T}, rf"{name}: found shape"),
        (adapter.arrays | {"x": adapter.arrays[name]}, "x: found a surplus"),
        (adapter.arrays | {name: adapter.arrays[name] * np.nan}, f"{name}: found nan"),
    ]:
        with pytest.raises(FormatError, match=message):
            save_adapter(tmp_path / "a", Adapter(arrays, 3, 7, ("q_proj",)))
        assert not (tmp_path / "a").exists()
    save_adapter(tmp_path / "a", adapter)
    with pytest.raises(FormatError, match="overwrite=True"):
        save_adapter(tmp_path / "a", adapter)
    save_adapter(tmp_path / "a", adapter, overwrite=True)


# --- wrong writers, which the checks above must tell from ours ------------------------------------------------------


@pytest.mark.parametrize("forgotten", ["lora_alpha", "use_rslora", "r"])
def test_a_setting_that_is_not_saved_is_noticed(tmp_path, adapter, forgotten, monkeypatch):
    write = peft_adapter.json_bytes
    monkeypatch.setattr(peft_adapter, "json_bytes", lambda v: write({k: x for k, x in v.items() if k != forgotten}))
    with pytest.raises((AssertionError, FormatError)):
        test_round_trip(tmp_path, adapter, numpy_state(torch_llama()))


def test_swapped_matrices_are_noticed(tmp_path, adapter, monkeypatch):
    write = peft_adapter.write_safetensors

    def swap(path, arrays, metadata):
        swapped = {n.replace("_A", "_X").replace("_B", "_A").replace("_X", "_B"): a for n, a in arrays.items()}
        write(path, swapped, metadata)

    monkeypatch.setattr(peft_adapter, "write_safetensors", swap)
    with pytest.raises(FormatError, match="found shape"):
        test_round_trip(tmp_path, adapter, numpy_state(torch_llama()))
