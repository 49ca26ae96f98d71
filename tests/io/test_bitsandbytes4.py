"""4-bit checkpoints: bitsandbytes' own dequantize is the oracle, its bits are ours, in both directions."""

import copy
import json

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import assert_same_bits, numpy_state, torch_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minift.io import FormatError, bitsandbytes4, load_model, save_model
from minift.io.bitsandbytes4 import STATE, pack_tensor, unpack_tensor
from minift.models import llama
from minift.quant import double_quant, nf4
from minift.quant.nf4 import NF4Tensor

SETTINGS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
Q = "model.layers.1.mlp.up_proj.weight"


def quantized_folder(folder, dtype=torch.float32, **settings):
    """A folder in 4 bits that transformers and bitsandbytes wrote, and the model as they have it in memory."""
    torch_llama(hidden_size=64, intermediate_size=96, tie_word_embeddings=False).save_pretrained(folder / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, **(SETTINGS | settings))
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=config, dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(folder / "q")
    return folder / "q", model


def dequantized_by_bitsandbytes(model):
    """Every parameter, by bitsandbytes' own dequantize.

    It is asked for a flat tensor, reshaped here: asked for rows that are no multiple of the block size, as down_proj's
    of 96 are, bitsandbytes 0.50.2's AVX-512 kernel begins a new block with every row, and gives wrong numbers."""

    def plain(p):
        if not isinstance(p, bnb.nn.Params4bit):
            return p.detach().float().numpy()
        state = copy.copy(p.quant_state)
        state.shape = torch.Size([p.quant_state.shape.numel()])
        flat = bnb.functional.dequantize_4bit(p.data, state)
        return flat.reshape(p.quant_state.shape).float().numpy()

    return {name: plain(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decodes_to_the_bits_of_bitsandbytes(tmp_path, double, dtype):
    folder, model = quantized_folder(tmp_path, dtype, bnb_4bit_use_double_quant=double)
    _, params = load_model(folder)
    assert_same_bits(params, dequantized_by_bitsandbytes(model))
    _, kept = load_model(folder, keep_quantized=True)
    quantized = {name for name, w in kept.items() if isinstance(w, NF4Tensor)}
    assert quantized == {n for n in params if n.split(".")[-2] in llama.LINEAR_MODULES}
    assert all(isinstance(kept[n].absmax, np.ndarray) is not double for n in quantized)
    if dtype == torch.float32:
        assert_same_bits({n: kept[n].dense() for n in quantized}, {n: params[n] for n in quantized})


def test_bytes_stored_under_another_dtype(tmp_path):
    """`bnb_4bit_quant_storage=bfloat16` (for FSDP) keeps the same bytes in a tensor that is called bfloat16."""
    folder, model = quantized_folder(tmp_path, bnb_4bit_quant_storage=torch.bfloat16)
    assert load_file(folder / "model.safetensors")[Q].dtype == torch.bfloat16
    assert_same_bits(load_model(folder)[1], dequantized_by_bitsandbytes(model))


@pytest.mark.parametrize("double", [False, True])
def test_transformers_reads_what_we_write(tmp_path, double):
    torch_llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "plain")
    config, params = load_model(tmp_path / "plain")
    mixed = dict(params)
    for name, w in params.items():
        if name.split(".")[-2] in llama.LINEAR_MODULES and "layers.0.self_attn.v" not in name:  # one stays as it is
            q = nf4.quantize(w)
            mixed[name] = double_quant.compress(q) if double else q
    save_model(tmp_path / "q", config, mixed)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True, device_map="cpu")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = {n: w.dense() if isinstance(w, NF4Tensor) else w for n, w in mixed.items()}
    assert_same_bits(dequantized_by_bitsandbytes(model), expected)
    assert_same_bits(load_model(tmp_path / "q")[1], expected)
    kept = load_model(tmp_path / "q", keep_quantized=True)[1]
    for name, q in mixed.items():
        if isinstance(q, NF4Tensor):
            assert_same_bits(pack_tensor(name, kept[name]), pack_tensor(name, q))


def test_our_file_has_the_tensors_that_theirs_has(tmp_path):
    """Names, dtypes and shapes; and the codes, since quantizing is the same rule."""
    folder, _ = quantized_folder(tmp_path)
    config, params = load_model(tmp_path / "plain")
    quantized = {
        n: double_quant.compress(nf4.quantize(w)) if n.split(".")[-2] in llama.LINEAR_MODULES else w
        for n, w in params.items()
    }
    save_model(tmp_path / "ours", config, quantized)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "ours", folder))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if STATE in name:
            a, b = (json.loads(bytes(t[name].numpy())) for t in (ours, theirs))
            assert a.keys() == b.keys() and a["shape"] == b["shape"] and a["dtype"] == b["dtype"]
            assert abs(a["nested_offset"] - b["nested_offset"]) <= 1e-6 * b["nested_offset"]  # torch's float32 mean
        else:
            assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        if name in quantized:
            assert torch.equal(ours[name], theirs[name]), name
    a, b = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path / "ours", folder))
    assert a.keys() == b.keys() and a["bnb_4bit_use_double_quant"] is b["bnb_4bit_use_double_quant"] is True


def test_refuses_fp4(tmp_path):
    folder, _ = quantized_folder(tmp_path, bnb_4bit_quant_type="fp4")
    with pytest.raises(FormatError, match=r"model.safetensors: model.*found bitsandbytes' FP4, needed NF4"):
        load_model(folder)


def test_refuses_to_write_a_quantized_embedding(tmp_path):
    torch_llama().save_pretrained(tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    params["model.embed_tokens.weight"] = nf4.quantize(params["model.embed_tokens.weight"])
    with pytest.raises(FormatError, match=r"embed_tokens.weight: found NF4Tensor.*needed an array"):
        save_model(tmp_path / "q", config, params)


# --- one tensor -------------------------------------------------------------------------------------------------------


def packed(rng, double=True, shape=(48, 64)):
    q = nf4.quantize(rng.standard_normal(shape).astype(np.float32))
    return pack_tensor("w.weight", double_quant.compress(q) if double else q)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 65), (64, 300)])
def test_a_tensor_survives_the_round_trip(rng, double, shape):
    tensors = packed(rng, double, shape)
    q = unpack_tensor("w.weight", tensors)
    assert q.shape == shape
    assert_same_bits(pack_tensor("w.weight", q), tensors)


def change_state(tensors, **changes):
    key = f"w.weight.{STATE}"
    state = {k: v for k, v in (json.loads(tensors[key].tobytes()) | changes).items() if v != "drop"}
    return tensors | {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("w.weight", np.zeros((5, 1), np.uint8), r"w.weight: found codes"),
        ("w.weight.absmax", np.zeros(48, np.float32), r"absmax: found dtype float32, needed uint8"),
        ("w.weight.absmax", np.zeros(47, np.uint8), r"w.weight: found absmax: 47 scales, needed 48"),
        ("w.weight.quant_map", np.linspace(-1, 1, 16, dtype=np.float32), r"quant_map: found another table"),
        ("w.weight.nested_absmax", np.zeros(2, np.float32), r"w.weight.absmax: found absmax"),
        ("w.weight.nested_absmax", np.full(1, np.nan, np.float32), r"nested_absmax: found a negative or infinite"),
        ("w.weight.nested_quant_map", np.zeros(256, np.float32), r"w.weight.absmax: found code"),
        (f"w.weight.{STATE}", np.frombuffer(b"{", np.uint8), r"nf4: found bad JSON"),
        (f"w.weight.{STATE}", np.zeros(3, np.float32), r"nf4: found dtype float32"),
    ],
)
def test_refuses_wrong_parts(rng, key, value, message):
    with pytest.raises(FormatError, match=message):
        unpack_tensor("w.weight", packed(rng) | {key: value}, "file")
    if key != "w.weight":
        tensors = packed(rng)
        del tensors[key]
        with pytest.raises(FormatError, match=rf"file: {key}: found nothing, needed a part of a 4-bit tensor"):
            unpack_tensor("w.weight", tensors, "file")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quant_type": "fp4"}, "quant_type: found 'fp4'"),
        ({"blocksize": 63}, "block_size: 63"),
        ({"blocksize": "64"}, "blocksize: found '64'"),
        ({"shape": [48, 65]}, "w.weight: found codes"),
        ({"shape": [48, -64]}, "shape: found"),
        ({"shape": "drop"}, "shape: found nothing"),
        ({"dtype": "int8"}, "dtype: found 'int8'"),
        ({"nested_offset": "drop"}, "nested_offset: found nothing"),
        ({"nested_offset": None}, "nested_offset: found None"),
        ({"nested_blocksize": 128.5}, "nested_blocksize: found 128.5"),
        ({"secret": 1}, "secret: found 1, needed no such setting"),
    ],
)
def test_refuses_wrong_settings(rng, changes, message):
    with pytest.raises(FormatError, match=message):
        unpack_tensor("w.weight", change_state(packed(rng), **changes), "file")


def test_refuses_negative_scales(rng):
    tensors = packed(rng, double=False)
    tensors["w.weight.absmax"] = -tensors["w.weight.absmax"]
    with pytest.raises(FormatError, match=r"w.weight.absmax: found a negative"):
        unpack_tensor("w.weight", tensors)


def test_refuses_surplus_parts_of_a_plain_tensor(tmp_path):
    torch_llama().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    save_file(load_file(path) | {f"{Q}.absmax": torch.ones(24)}, path)
    with pytest.raises(FormatError, match=rf"{Q}.*nf4: found nothing"):
        load_model(tmp_path / "m")


# --- wrong decoders, which the property above must tell from ours ----------------------------------------------------


def low_nibble_first(q):
    return NF4Tensor((q.codes << 4) | (q.codes >> 4), q.absmax, q.shape, q.block_size).dense()


def offset_forgotten(q):
    return nf4.dequantize(NF4Tensor(q.codes, q.scales() - q.absmax.offset, q.shape, q.block_size))


def nested_scale_forgotten(q):
    scales = q.absmax.code[q.absmax.codes] + q.absmax.offset
    return nf4.dequantize(NF4Tensor(q.codes, scales, q.shape, q.block_size))


def transposed(q):
    return np.ascontiguousarray(q.dense().reshape(q.shape[::-1]).T)


def not_rounded(q):
    return q.dense()


@pytest.mark.parametrize("wrong", [low_nibble_first, offset_forgotten, nested_scale_forgotten, transposed, not_rounded])
def test_wrong_decoders_are_rejected(tmp_path, wrong, monkeypatch):
    folder, model = quantized_folder(tmp_path, torch.bfloat16)
    monkeypatch.setattr(bitsandbytes4, "dequantize", lambda q, dtype: wrong(q))
    with pytest.raises(AssertionError):
        assert_same_bits(load_model(folder)[1], dequantized_by_bitsandbytes(model))


def test_plain_checkpoints_still_load_beside(tmp_path):
    model = torch_llama()
    model.save_pretrained(tmp_path / "m")
    assert_same_bits(load_model(tmp_path / "m", keep_quantized=True)[1], numpy_state(model))
