"""GPT-2 in Hugging Face folders, and PEFT's adapters on it: what transformers and PEFT write we read, and back.

Conv1D lies (in, out) in files and (out, in) here; no side of a matrix in this model is as long as another.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import assert_same_bits, cast
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from minift.io import FormatError, load_adapter, load_model, save_adapter, save_model
from minift.models import gpt2
from minift.nn.weight import Frozen
from minift.peft import lora, qlora
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer.*"),
]

CONFIG = gpt2.Config(90, 24, 56, 2, 3, 48, layer_norm_epsilon=1e-4)
ATTENTION = "transformer.h.0.attn.c_attn"


def network(seed=0, **changes):
    """Random in every parameter, so that no two tensors are alike."""
    sizes = {"vocab_size": 90, "n_embd": 24, "n_inner": 56, "n_layer": 2, "n_head": 3, "n_positions": 48}
    torch.manual_seed(seed)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "sdpa"}
    model = GPT2LMHeadModel(GPT2Config(**sizes, layer_norm_epsilon=1e-4, **tokens, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1 if p.ndim == 1 else 0))
    return model.eval()


def state(model):
    """Its parameters as ours: matrices of Conv1D turned around."""
    found = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    turned = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return {name: np.ascontiguousarray(w.T) if name.endswith(turned) else w for name, w in found.items()}


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.fixture
def saved(tmp_path):
    model = network()
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m", model


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_reads_what_transformers_writes(tmp_path, tied, dtype):
    model = network(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    assert_same_bits(params, state(model))
    assert config == (CONFIG if tied else dataclasses.replace(CONFIG, tie_word_embeddings=False))
    assert all(w.flags.writeable and w.flags.c_contiguous for w in params.values())


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_we_write(tmp_path, tied):
    model = network(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    save_model(tmp_path / "ours", config, {n: Frozen(w) for n, w in params.items()})
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and type(theirs) is GPT2LMHeadModel
    assert_same_bits(state(theirs), params)
    assert load_model(tmp_path / "ours")[0] == config
    tokens = torch.arange(24).reshape(2, 12) * 7 % 90
    with torch.no_grad():
        assert torch.equal(theirs.eval()(tokens).logits, model(tokens).logits)


def test_reads_names_without_prefix_and_the_constants_of_old_files(saved):
    """The first checkpoints on the hub: of the bare network, with the causal mask among the tensors."""
    folder, model = saved
    tensors = {n.removeprefix("transformer."): w for n, w in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 48, 48).tril() for layer in range(2)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    save_file(tensors | masks, folder / "model.safetensors")
    assert_same_bits(load_model(folder)[1], state(model))


def test_a_folder_in_four_bits(saved, tmp_path):
    """Codes and scales as they are: bitsandbytes' Linear4bit takes the place of Conv1D, and lies (out, in)."""
    config, params = load_model(saved[0])
    quantized = qlora.quantize(params)
    save_model(tmp_path / "nf4", config, quantized)
    _, found = load_model(tmp_path / "nf4", keep_quantized=True)
    tokens = np.arange(24).reshape(2, 12) * 7 % 90
    assert np.array_equal(*(gpt2.forward(p, tokens, config)[0] for p in (found, quantized)))
    assert sum(not isinstance(w, np.ndarray) for w in found.values()) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function: found 'gelu', needed 'gelu_new' or"),
        ({"scale_attn_weights": False}, "scale_attn_weights: found False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: found True"),
        ({"add_cross_attention": True}, "add_cross_attention: found True"),
        ({"n_head": 5}, "n_embd: found 24, needed a multiple of n_head = 5"),
        ({"n_layer": 3}, r"transformer.h.2.ln_1.weight: found nothing \(12 parameters are missing\)"),
        ({"n_layer": 10**9}, "num_hidden_layers: found 1000000000"),
        ({"n_inner": None}, r"transformer.h.0.mlp.c_fc.weight: found shape \(24, 56\), needed shape \(24, 96\)"),
        ({"tie_word_embeddings": False}, "lm_head.weight: found nothing"),
        ({"model_type": "gptj"}, "model_type: found 'gptj', needed 'llama' or 'gpt2'"),
    ],
)
def test_refuses_what_it_would_not_compute(saved, changes, message):
    edit_config(saved[0], **changes)
    with pytest.raises(FormatError, match=message):
        load_model(saved[0])


def test_refuses_a_matrix_that_was_turned_around(saved):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{ATTENTION}.weight"] = tensors[f"{ATTENTION}.weight"].T.contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"c_attn.weight: found shape \(72, 24\), needed shape \(24, 72\)"):
        load_model(folder)


# --- adapters ---------------------------------------------------------------------------------------------------------


def assert_same_logits(params, adapter, theirs):
    """In float64, within what float32 moves ours times 16 · 2⁻²⁹; see small_models.assert_same_logits."""
    tokens = np.arange(24).reshape(2, 12) * 7 % 90

    def ours(dtype):
        carried = cast(lora.insert({n: w.astype(dtype) for n, w in params.items()}, adapter), dtype)
        return gpt2.forward(carried, tokens, CONFIG)[0]

    double = ours(np.float64)
    with torch.no_grad():
        expected = theirs.double().eval()(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(double - expected).max() <= 16 * 2.0**-29 * np.abs(double - ours(np.float32)).max()
    return double


@pytest.mark.parametrize("modules", [["c_attn"], ["c_attn", "mlp.c_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT then sets it right
def test_peft_and_back(tmp_path, modules, fan_in_fan_out):
    settings = {"r": 3, "lora_alpha": 7, "target_modules": modules, "task_type": "CAUSAL_LM"}
    model = get_peft_model(network(), LoraConfig(**settings, fan_in_fan_out=fan_in_fan_out))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p))
    model.save_pretrained(tmp_path / "theirs")
    params = state(network())
    adapter = load_adapter(tmp_path / "theirs", params)
    logits = assert_same_logits(params, adapter, model)
    assert np.abs(logits - gpt2.forward(params, np.arange(24).reshape(2, 12) * 7 % 90, CONFIG)[0]).max() > 0.1

    save_adapter(tmp_path / "ours", lora.detach(lora.insert(params, adapter))[1])
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert_same_logits(params, adapter, PeftModel.from_pretrained(network(), tmp_path / "ours"))


def test_peft_reads_ours_without_a_warning(tmp_path, recwarn, rng):
    params = state(network())
    adapter = lora.detach(lora.attach(params, ["c_attn"], rng=rng))[1]
    save_adapter(tmp_path / "a", adapter)
    PeftModel.from_pretrained(network(), tmp_path / "a")
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]


def test_merged_as_peft_merges(tmp_path, rng):
    """ΔW = s B A is transposed on its way into Conv1D."""
    params = state(network())
    adapter = lora.detach(lora.attach(params, ["c_attn"], rng=rng))[1]
    arrays = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in adapter.arrays.items()}
    adapter = dataclasses.replace(adapter, arrays=arrays)
    save_adapter(tmp_path / "a", adapter)
    theirs = state(PeftModel.from_pretrained(network(), tmp_path / "a").merge_and_unload())
    ours = lora.merge(lora.insert(params, adapter))
    name = f"{ATTENTION}.weight"
    exact = params[name].astype(float) + adapter.scaling(ATTENTION) * (
        arrays[f"{ATTENTION}.lora_B.weight"].astype(float) @ arrays[f"{ATTENTION}.lora_A.weight"]
    )
    r, size = (
        8,
        np.abs(params[name])
        + 2 * (np.abs(arrays[f"{ATTENTION}.lora_B.weight"]) @ np.abs(arrays[f"{ATTENTION}.lora_A.weight"])),
    )
    for found in (theirs[name], ours[name].array):
        assert (np.abs(found - exact) <= (r + 3) * 2.0**-24 * 1.01 * size).all()
