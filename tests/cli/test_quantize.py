"""`minift quantize`: what it writes, what it says that cost, and what it keeps and refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minift.io import TINY, load_model, load_tokenizer, save_model
from minift.models import llama
from minift.nn.weight import dense
from minift.peft import qlora
from minift.quant.codebooks import FP4_BY_CODE
from minift.quant.nf4 import NF4Tensor


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 64), ("bfloat16", 128), ("float16", 32)])
def test_what_is_written_and_what_is_said(call, tmp_path, plain, double, dtype, block_size):
    folder, _, params = plain()
    options = ["--block-size", block_size, "--dtype", dtype, *(["--double-quant"] if double else [])]
    status, result, captured = call("quantize", folder, tmp_path / "q", *options, "--json")
    assert status == 0
    expected = qlora.quantize(params, "all-linear", block_size, double)
    _, kept = load_model(tmp_path / "q", keep_quantized=True)
    _, read = load_model(tmp_path / "q")
    for name, w in expected.items():
        if isinstance(w, NF4Tensor):
            assert np.array_equal(kept[name].codes, w.codes), name
            assert kept[name].scales().tobytes() == w.scales().tobytes(), name
            assert isinstance(kept[name].absmax, np.ndarray) is not double

    layers = result["layers"]
    for kind in (*llama.LINEAR_MODULES, "all linear layers", "embeddings, norms, head", "the model"):
        linear = llama.LINEAR_MODULES if kind == "all linear layers" else (kind,)
        rest = kind.startswith("embeddings")
        chosen = [
            name
            for name in params
            if kind == "the model" or (name.split(".")[-2] in (llama.LINEAR_MODULES if rest else linear)) is not rest
        ]
        lost = np.concatenate([(read[n].astype(np.float64) - params[n]).ravel() for n in chosen])
        norm = np.linalg.norm(np.concatenate([params[n].astype(np.float64).ravel() for n in chosen]))
        assert layers[kind]["error"] == pytest.approx(np.linalg.norm(lost) / norm, rel=1e-9)
        width = 4 if dtype == "float32" else 2
        assert layers[kind]["parameters"] == lost.size
        assert layers[kind]["bytes_before"] == width * lost.size
        after = sum(w.nbytes if isinstance(w := expected[n], NF4Tensor) else width * w.size for n in chosen)
        assert layers[kind]["bytes_after"] == after
        assert layers[kind]["bits_per_parameter"] == 8 * after / lost.size
        assert f"\n{kind} " in captured.out
    bits = 4 + (8 if double else 32) / block_size
    assert layers["all linear layers"]["bits_per_parameter"] == pytest.approx(bits, rel=0.01)
    assert 0.08 < layers["q_proj"]["error"] < 0.11
    assert (result["quantized_layers"], result["kept_layers"]) == (28, 0)
    assert result["bytes_on_disk"] == (tmp_path / "q" / "model.safetensors").stat().st_size

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    layer = model.model.layers[0].mlp.down_proj
    assert layer.weight.quant_state.dtype == layer.compute_dtype == model.dtype == getattr(torch, dtype)
    assert (layer.weight.quant_state.blocksize, layer.weight.quant_state.nested) == (block_size, double)


def test_what_is_in_4_bits_already_is_kept(call, tmp_path):
    """The built-in model: byte for byte the file that it came from, whatever else is asked for."""
    status, result, captured = call("quantize", "tiny", tmp_path / "q", "--block-size", "128", "--json")
    assert (status, result["quantized_layers"], result["kept_layers"]) == (0, 0, 28)
    said = "28 of 28 linear layers are in NF4 already (blocks of 64, double-quantized scales) and are kept as they are"
    assert said in captured.out
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert all(row["error"] == 0 for row in result["layers"].values())


def test_a_model_of_which_a_part_is_in_4_bits(call, tmp_path, plain):
    _, config, params = plain()
    once = qlora.quantize(params, ["q_proj"], block_size=32)
    save_model(tmp_path / "part", config, once, load_tokenizer("tiny"))
    status, result, captured = call("quantize", tmp_path / "part", tmp_path / "q", "--json")
    assert (status, result["quantized_layers"], result["kept_layers"]) == (0, 24, 4)
    assert "4 of 28 linear layers are in NF4 already" in captured.out
    _, read = load_model(tmp_path / "q")
    expected = qlora.quantize(once, use_double_quant=False)
    assert all(np.array_equal(read[name], dense(w)) for name, w in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no/such", "OUT"], "no/such: found nothing there, needed a folder or a .gguf file"),
        (["tiny", "OUT", "--block-size", "100"], "block_size: 100, needed one of 32, 64"),
        (["tiny", "FULL"], "found a folder that is not empty"),
        (["tiny", "FULL", "--overwrite"], "found a folder with other things (notes.txt)"),
        (["BAD", "OUT"], "model.safetensors: model.norm.weight: found nan"),
        (["FP4", "OUT"], "found bitsandbytes' FP4, which is only decoded, needed NF4"),
        (["HUGE", "OUT", "--dtype", "float16"], "as float16: model.norm.weight: found inf"),
    ],
)
def test_refusals(call, tmp_path, plain, options, message):
    folder, config, params = plain()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("notes")
    norm = "model.norm.weight"
    save_model(tmp_path / "huge", config, params | {norm: params[norm] + 1e5}, load_tokenizer("tiny"))
    if "BAD" in options:
        tensors = load_file(folder / "model.safetensors")
        tensors[norm][3] = float("nan")
        save_file(tensors, folder / "model.safetensors")
    if "FP4" in options:
        save_model(tmp_path / "fp4", config, qlora.quantize(params, use_double_quant=False), load_tokenizer("tiny"))
        tensors = load_file(tmp_path / "fp4" / "model.safetensors")
        for name in [name for name in tensors if name.endswith("__nf4")]:
            state = json.loads(bytes(tensors.pop(name).numpy())) | {"quant_type": "fp4"}
            raw = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
            tensors[name.replace("__nf4", "__fp4")] = raw
        table = torch.from_numpy(FP4_BY_CODE.copy())
        tables = {name: table.clone() for name in tensors if name.endswith("quant_map")}
        save_file(tensors | tables, tmp_path / "fp4" / "model.safetensors")
    places = {"OUT": "new", "FULL": "full", "BAD": "plain", "FP4": "fp4", "HUGE": "huge"}
    before = sorted(tmp_path.rglob("*"))
    status, _, captured = call("quantize", *(tmp_path / places[o] if o in places else o for o in options))
    assert status == 2
    assert message in captured.err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
