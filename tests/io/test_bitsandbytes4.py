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
from minift.io.bitsandbytes4 import FP4_STATE, STATE, pack_tensor, unpack_tensor
from minift.io.huggingface import as_stored, stored_bytes
from minift.models import llama
from minift.peft import qlora
from minift.quant import blockwise, double_quant, nf4
from minift.quant.codebooks import FP4, FP4_BY_CODE
from minift.quant.nf4 import NF4Tensor
from rounding import BFLOAT16, rounding_bound

SETTINGS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128}  # rows that bitsandbytes multiplies by, see below
TOKENS = np.arange(24).reshape(2, 12) * 7 % 300
Q = "model.layers.1.mlp.up_proj.weight"


def quantized_folder(folder, dtype=torch.float32, shard="5GB", sizes=SIZES, **settings):
    """A folder in 4 bits that transformers and bitsandbytes wrote, and the model as they have it in memory."""
    torch_llama(**sizes).save_pretrained(folder / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, **(SETTINGS | settings))
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=config, dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(folder / "q", max_shard_size=shard)
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


def logits_of(model):
    """In training mode, which changes nothing else here: for inference bitsandbytes 0.50.2 rounds weights, scales and
    activations to bfloat16 where the processor has AVX512-BF16, whatever the dtypes say."""
    with torch.no_grad():
        return model.train()(torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_decodes_to_the_bits_of_bitsandbytes(tmp_path, kind, double, dtype):
    folder, model = quantized_folder(tmp_path, dtype, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    _, params = load_model(folder)
    assert_same_bits(params, dequantized_by_bitsandbytes(model))
    if kind == "fp4":
        with pytest.raises(FormatError, match=r"q/model.safetensors: model.*_proj.weight: found bitsandbytes' FP4, wh"):
            load_model(folder, keep_quantized=True)
        return
    _, kept = load_model(folder, keep_quantized=True)
    quantized = {name for name, w in kept.items() if isinstance(w, NF4Tensor)}
    assert quantized == {n for n in params if n.split(".")[-2] in llama.LINEAR_MODULES}
    assert all(isinstance(kept[n].absmax, np.ndarray) is not double for n in quantized)
    if dtype == torch.float32:
        assert_same_bits({n: kept[n].dense() for n in quantized}, {n: params[n] for n in quantized})


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_stored_under_another_dtype(tmp_path, storage, kind):
    """`bnb_4bit_quant_storage=bfloat16` (for FSDP) keeps the same bytes in a tensor that is called bfloat16."""
    folder, model = quantized_folder(tmp_path, bnb_4bit_quant_storage=storage, bnb_4bit_quant_type=kind)
    assert load_file(folder / "model.safetensors")[Q].dtype == storage
    assert_same_bits(load_model(folder)[1], dequantized_by_bitsandbytes(model))


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_the_type_of_computation_is_not_that_of_the_weights(tmp_path, compute):
    """bitsandbytes dequantizes to the dtype that the matrix had; `bnb_4bit_compute_dtype` is for what comes after."""
    folder, model = quantized_folder(tmp_path, bnb_4bit_compute_dtype=compute)
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert values["bnb_4bit_compute_dtype"] == str(compute).removeprefix("torch.")
    _, params = load_model(folder)
    assert_same_bits(params, dequantized_by_bitsandbytes(model))
    assert not np.array_equal(params[Q], bitsandbytes4.rounded(params[Q], "bfloat16"))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_shards(tmp_path, kind):
    """The parts of one 4-bit tensor need not lie in one file."""
    folder, model = quantized_folder(tmp_path, shard="2KB", bnb_4bit_quant_type=kind)
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(where[name] != where[f"{name}.absmax"] for name in where if f"{name}.absmax" in where)
    assert_same_bits(load_model(folder)[1], dequantized_by_bitsandbytes(model))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_logits_are_those_of_transformers(tmp_path, kind, double):
    settings = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    folder, model = quantized_folder(tmp_path, sizes=WHOLE_BLOCKS, **settings)
    config, params = load_model(folder)
    bound, exact = rounding_bound(params, config, TOKENS)
    assert np.abs(llama.forward(params, TOKENS, config)[0] - exact).max() <= bound
    assert np.abs(logits_of(model) - exact).max() <= bound
    assert bound < 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_read_is_written_byte_for_byte(tmp_path, double, dtype):
    """Codes, scales, tables, nested parts and settings, in 4 bits; and everything else, in the dtype that it had."""
    folder, _ = quantized_folder(tmp_path, getattr(torch, dtype), bnb_4bit_use_double_quant=double)
    config, params = load_model(folder, keep_quantized=True)
    save_model(tmp_path / "again", config, params, dtype=dtype)
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert_same_bits(load_model(tmp_path / "again")[1], load_model(folder)[1])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_we_write_computes_the_same_in_transformers(tmp_path, double, dtype):
    """Its weights bit for bit what `as_stored` says, and its logits within rounding, of the type it computes in."""
    torch_llama(**WHOLE_BLOCKS, tie_word_embeddings=False).save_pretrained(tmp_path / "plain")
    config, params = load_model(tmp_path / "plain")
    quantized = qlora.quantize(params, use_double_quant=double)
    save_model(tmp_path / "q", config, quantized, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    layer = model.model.layers[1].mlp.up_proj
    assert model.dtype == layer.compute_dtype == layer.weight.quant_state.dtype == getattr(torch, dtype)
    expected = as_stored(quantized, dtype)
    assert_same_bits(load_model(tmp_path / "q")[1], expected)
    assert_same_bits(dequantized_by_bitsandbytes(model), expected)
    u = {"float32": None, "bfloat16": BFLOAT16, "float16": 2.0**-11}[dtype]
    bound, exact = rounding_bound(expected, config, TOKENS, u=u)
    assert np.abs(logits_of(model) - exact).max() <= bound < 0.3 * np.abs(exact).max()
    assert sum(t.numel() * t.element_size() for t in load_file(tmp_path / "q" / "model.safetensors").values()) == (
        stored_bytes(quantized, dtype)
    )


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


def test_refuses_scales_that_the_dtype_cannot_hold(tmp_path):
    torch_llama().save_pretrained(tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    params[Q] = nf4.quantize(1e6 * params[Q])
    save_model(tmp_path / "float32", config, params)
    with pytest.raises(FormatError, match=rf"as float16: {Q}: found inf at"):
        save_model(tmp_path / "float16", config, params, dtype="float16")
    assert not (tmp_path / "float16").exists()


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


def packed_fp4(rng, double=True, shape=(48, 64)):
    """What bitsandbytes makes of a flat tensor, under our names, with a shape of two dimensions."""
    w = torch.from_numpy(rng.standard_normal(np.prod(shape)).astype(np.float32))
    data, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="fp4", compress_statistics=double)
    tensors = {f"w.weight.{part}": t.numpy() for part, t in state.as_dict(packed=True).items()}
    values = json.loads(tensors[f"w.weight.{FP4_STATE}"].tobytes()) | {"shape": list(shape)}
    tensors |= {"w.weight": data.numpy(), f"w.weight.{FP4_STATE}": np.frombuffer(json.dumps(values).encode(), np.uint8)}
    return tensors, bnb.functional.dequantize_4bit(data, state).numpy().reshape(shape)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 65), (64, 300)])
def test_fp4_is_decoded_as_bitsandbytes_does(rng, double, shape):
    tensors, expected = packed_fp4(rng, double, shape)
    q = unpack_tensor("w.weight", tensors)
    assert q.shape == shape
    assert_same_bits({"w": bitsandbytes4.dequantize(q, "float32")}, {"w": expected})


def test_every_code_of_fp4(rng):
    """By hand: the high nibble first, each the index of a value, times its block's scale."""
    tensors, _ = packed_fp4(rng, double=False, shape=(8, 64))
    tensors["w.weight"] = np.arange(256, dtype=np.uint8)[:, None]
    scales = tensors["w.weight.absmax"]
    expected = [
        FP4_BY_CODE[code] * scales[(2 * byte + low) // 64]
        for byte in range(256)
        for low, code in enumerate((byte >> 4, byte & 15))
    ]
    decoded = bitsandbytes4.dequantize(unpack_tensor("w.weight", tensors), "float32")
    assert_same_bits({"w": decoded.ravel()}, {"w": np.array(expected)})


def test_refuses_wrong_fp4(rng):
    tensors, _ = packed_fp4(rng)
    swapped = tensors | {"w.weight.quant_map": np.sort(FP4_BY_CODE)}
    both = tensors | {f"w.weight.{STATE}": tensors[f"w.weight.{FP4_STATE}"]}
    for wrong, message in [
        (swapped, r"file: w.weight.quant_map: found another table, .*, needed the sixteen FP4 values"),
        (both, r"file: w.weight.quant_state.bitsandbytes__fp4: found FP4 beside quant_state.bitsandbytes__nf4"),
        (tensors | {"w.weight": tensors["w.weight"][:-1]}, r"file: w.weight: found codes: uint8 \(1535,\), needed"),
        (tensors | {"w.weight.absmax": tensors["w.weight.absmax"][:-1]}, r"file: w.weight: found absmax: .*\(47,\)"),
        ({k: v for k, v in tensors.items() if "nested_absmax" not in k}, r"nested_absmax: found nothing"),
    ]:
        with pytest.raises(FormatError, match=message):
            unpack_tensor("w.weight", wrong, "file")


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


def _change(name, **changes):
    def change(tensors):
        state = json.loads(bytes(tensors[name].numpy())) | changes
        tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _set(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(f"{Q}.absmax"), rf"{Q}.absmax: found nothing, needed a part of a 4-bit tensor"),
        (lambda tensors: tensors.pop(f"{Q}.quant_map"), rf"{Q}.quant_map: found nothing, needed a part"),
        (lambda tensors: tensors.pop(f"{Q}.{STATE}"), rf"{Q}.{STATE}: found nothing, needed a part"),
        (_set(f"{Q}.absmax", lambda a: a[:-1]), rf"{Q}: found absmax: .*\(95,\), needed .*\(96,\)"),
        (_set(f"{Q}.absmax", lambda a: a * torch.inf), rf"{Q}.absmax: found a negative or infinite scale, or NaN"),
        (_set(f"{Q}.absmax", lambda a: a * 1e6), rf"{Q}: found -?inf at flat index .*, needed finite numbers"),
        (_set(Q, lambda codes: codes[1:]), rf"{Q}: found codes: uint8 \(3071,\), needed uint8 \(3072,\)"),
        (_set(Q, lambda codes: codes.to(torch.int32)), rf"{Q}: found codes: uint8 \(12288,\), needed .*\(3072,\)"),
        (_change(f"{Q}.{STATE}", shape=[64, 96]), rf"{Q}: found shape \(64, 96\), needed shape \(96, 64\)"),
        (_change(f"{Q}.{STATE}", blocksize=128), rf"{Q}: found absmax: .*\(96,\), needed .*\(48,\)"),
    ],
)
def test_a_folder_is_refused_with_the_file_and_the_tensor(tmp_path, change, message):
    folder, _ = quantized_folder(tmp_path, torch.float16, bnb_4bit_use_double_quant=False)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    for keep in (True, False) if "flat index" not in message else (False,):
        with pytest.raises(FormatError, match=f"q/model.safetensors: {message}"):
            load_model(folder, keep_quantized=keep)


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


def fp4_sorted(codes, absmax, shape, block_size):
    """Takes a code for a place in the ascending table."""
    ranks = np.minimum(nf4.unpack(codes, int(np.prod(shape))), FP4.size - 1)
    return blockwise.BlockwiseTensor(ranks, absmax.decode(), FP4, shape, block_size)


def fp4_low_nibble_first(codes, absmax, shape, block_size):
    ranks = bitsandbytes4.FP4_RANKS[nf4.unpack((codes << 4) | (codes >> 4), int(np.prod(shape)))]
    return blockwise.BlockwiseTensor(ranks, absmax.decode(), FP4, shape, block_size)


def fp4_offset_forgotten(codes, absmax, shape, block_size):
    ranks = bitsandbytes4.FP4_RANKS[nf4.unpack(codes, int(np.prod(shape)))]
    return blockwise.BlockwiseTensor(ranks, absmax.decode() - absmax.offset, FP4, shape, block_size)


@pytest.mark.parametrize("wrong", [fp4_sorted, fp4_low_nibble_first, fp4_offset_forgotten])
def test_wrong_decoders_of_fp4_are_rejected(tmp_path, wrong, monkeypatch):
    folder, model = quantized_folder(tmp_path, bnb_4bit_quant_type="fp4")
    monkeypatch.setattr(bitsandbytes4, "_fp4_tensor", wrong)
    with pytest.raises(AssertionError):
        assert_same_bits(load_model(folder)[1], dequantized_by_bitsandbytes(model))


def test_plain_checkpoints_still_load_beside(tmp_path):
    model = torch_llama()
    model.save_pretrained(tmp_path / "m")
    assert_same_bits(load_model(tmp_path / "m", keep_quantized=True)[1], numpy_state(model))
