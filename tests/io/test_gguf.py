"""GGUF: files written here by the gguf package, as llama.cpp's converter would, and read back to the bit."""

import json

import gguf as gguf_package
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from small_models import assert_same_bits, numpy_state, torch_llama
from transformers import AutoModelForCausalLM

from minift.io import FormatError, gguf, load_model, load_tokenizer
from minift.io.gguf import half_split
from minift.io.gguf_tokenizer import WORDS
from minift.models import llama
from minift.nn.rope import RopeScaling, frequencies

BACK = {v: k for k, v in {**gguf.TOP_NAMES, **gguf.BLOCK_NAMES}.items()}
Q8 = GGMLQuantizationType.Q8_0


def converter_permute(w, heads):
    """Written down independently of the reader, element by element: rows of a head from halves to pairs."""
    rows, per_head = len(w), len(w) // heads
    out = np.empty_like(w)
    for row in range(rows):
        head, within = divmod(row, per_head)
        half, i = divmod(within, per_head // 2)
        out[head * per_head + 2 * i + half] = w[row]
    return out


def write_gguf(path, model, quantization=None, drop=(), extra=(), **changes):
    """The file that llama.cpp's converter would write for this torch model."""
    c = model.config
    values = {
        "general.architecture": "llama",
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.rope.freq_base": c.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": c.head_dim,
        "llama.vocab_size": c.vocab_size,
        "general.name": "test",
    } | changes
    writer = GGUFWriter(path, values.pop("general.architecture"))
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    tensors = {}
    for name, w in numpy_state(model).items():
        module = name.split(".")[-2]
        parts = name.split(".", 3)
        theirs = BACK[name] if name in BACK else f"blk.{parts[2]}.{BACK[parts[3]]}"
        tensors[theirs] = converter_permute(w, heads[module]) if module in heads else w
    for name, w in (tensors | dict(extra)).items():
        if name in drop:
            continue
        if quantization is not None and w.ndim == 2:
            writer.add_tensor(name, gguf_package.quants.quantize(w, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model():
    return torch_llama(
        tie_word_embeddings=True, num_attention_heads=6, num_key_value_heads=2, head_dim=8, hidden_size=24
    )


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_weights_come_back_to_the_bit(tmp_path, tied, heads, kv_heads):
    model = torch_llama(
        tie_word_embeddings=tied, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8, hidden_size=24
    )
    config, params = load_model(write_gguf(tmp_path / "m.gguf", model))
    assert_same_bits(params, numpy_state(model))
    assert list(params) == list(llama.shapes(config))
    c = model.config
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, key) == getattr(c, key)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(c, key)
    assert config.rope_theta == c.rope_parameters["rope_theta"]
    assert all(p.flags.writeable and p.flags.c_contiguous for p in params.values())  # no view of the file


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_quantized_weights_are_what_transformers_decodes(tmp_path, kind):
    model = torch_llama(hidden_size=64, intermediate_size=96)
    write_gguf(tmp_path / "m.gguf", model, GGMLQuantizationType[kind])
    _, params = load_model(tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert_same_bits(params, numpy_state(theirs))


def test_logits_are_those_of_the_original(tmp_path, model):
    """Rotary embedding, permutation and head counts together: the reason for all of this."""
    config, params = load_model(write_gguf(tmp_path / "m.gguf", model))
    tokens = np.arange(20).reshape(1, 20)
    ours, _ = llama.forward(params, tokens, config)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("heads", [1, 3])
def test_interleave_is_a_permutation_and_half_split_its_inverse(rng, heads):
    w = rng.standard_normal((heads * 8, 5)).astype(np.float32)
    np.testing.assert_array_equal(gguf.interleave(w, heads), converter_permute(w, heads))
    np.testing.assert_array_equal(gguf.half_split(gguf.interleave(w, heads), heads), w)


WRONG = {
    "not undone": lambda w, heads: w,
    "done twice": lambda w, heads: gguf.interleave(w, heads),
    "all rows as one head": lambda w, heads: w.reshape(-1, 2, w.shape[1]).swapaxes(0, 1).reshape(w.shape),
    "columns for rows": lambda w, heads: w.reshape(len(w), -1, 2).swapaxes(1, 2).reshape(w.shape),
    "query heads for keys": lambda w, heads: half_split(w, 4),
    "key heads for queries": lambda w, heads: half_split(w, 2),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_permutations_are_rejected(tmp_path, monkeypatch, wrong):
    model = torch_llama(tie_word_embeddings=True)  # 4 query heads, 2 key heads
    monkeypatch.setattr(gguf, "half_split", WRONG[wrong])
    with pytest.raises(AssertionError):
        assert_same_bits(load_model(write_gguf(tmp_path / "m.gguf", model))[1], numpy_state(model))
    with pytest.raises(AssertionError):
        test_logits_are_those_of_the_original(tmp_path, model)


# --- positions --------------------------------------------------------------------------------------------------------


def test_linear_scaling(tmp_path, model):
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    config, _ = load_model(write_gguf(tmp_path / "m.gguf", model, **changes))
    assert config.rope_scaling == RopeScaling("linear", 2.5)


def llama31_divisors(scaling, head_dim=8, theta=5e5):
    return (frequencies(head_dim, theta) / frequencies(head_dim, theta, scaling)).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_recovered_from_its_divisors(tmp_path, factor):
    model = torch_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    scaling = RopeScaling("llama3", factor)
    divisors = llama31_divisors(scaling)
    path = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": divisors}.items())
    assert load_model(path)[0].rope_scaling == scaling
    other = llama31_divisors(RopeScaling("llama3", factor, 1.0, 3.0, 1000))
    path = write_gguf(tmp_path / "n.gguf", model, extra={"rope_freqs.weight": other}.items())
    with pytest.raises(FormatError, match=r"n.gguf: rope_freqs.weight: found divisors"):
        load_model(path)
    path = write_gguf(tmp_path / "o.gguf", model, extra={"rope_freqs.weight": np.ones(4, np.float32)}.items())
    assert load_model(path)[0].rope_scaling is None


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general.architecture": "qwen2"}, "general.architecture: found 'qwen2', needed 'llama'"),
        ({"llama.expert_count": 8}, "llama.expert_count: found 8"),
        ({"llama.block_count": None}, "llama.block_count: found nothing"),
        ({"llama.block_count": 3}, r"model.layers.2.input_layernorm.weight: found nothing \(9 tensors"),
        ({"llama.block_count": 1}, "blk.1.*weight: found a tensor that"),
        ({"llama.attention.head_count_kv": 4}, "llama.attention.head_count_kv: found 4, needed a divisor"),
        ({"llama.attention.head_count_kv": 3}, r".*k_proj.weight: found shape \(16, 24\), needed shape \(24, 24\)"),
        ({"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}, "llama.rope.dimension_count: found 4"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: found 'yarn'"),
        ({"split.count": 2}, "split.count: found 2"),
    ],
)
def test_refuses_other_models(tmp_path, model, changes, message):
    path = write_gguf(tmp_path / "m.gguf", model, **changes)
    with pytest.raises(FormatError, match="m.gguf: " + message):
        load_model(path)


def test_refuses_missing_surplus_and_wrong_tensors(tmp_path, model):
    with pytest.raises(FormatError, match=r"model.layers.1.mlp.up_proj.weight: found nothing \(1 tensors"):
        load_model(write_gguf(tmp_path / "a.gguf", model, drop=("blk.1.ffn_up.weight",)))
    with pytest.raises(FormatError, match=r"token_embd.weight: found nothing"):
        load_model(write_gguf(tmp_path / "b.gguf", model, drop=("token_embd.weight",)))
    bias = {"blk.0.attn_q.bias": np.zeros(48, np.float32)}
    with pytest.raises(FormatError, match=r"blk.0.attn_q.bias: found a tensor that a Llama model does not have"):
        load_model(write_gguf(tmp_path / "c.gguf", model, extra=bias.items()))
    nan = {"output_norm.weight": np.full(24, np.nan, np.float32)}
    with pytest.raises(FormatError, match=r"output_norm.weight: found nan at flat index 0 \(24 not finite\)"):
        load_model(write_gguf(tmp_path / "d.gguf", model, extra=nan.items()))


def test_refuses_truncated_and_damaged_files(tmp_path, model):
    path = write_gguf(tmp_path / "m.gguf", model)
    data = path.read_bytes()
    bad = tmp_path / "bad.gguf"
    for size in [0, 3, 4, 8, 23, 24, 100, 500, 1500, len(data) // 2, len(data) - 1]:
        bad.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"bad.gguf: "):
            load_model(bad)
    for start in (b"GGML", b"GGUF\xff\0\0\0"):
        bad.write_bytes(start + data[len(start) :])
        with pytest.raises(FormatError, match=r"bad.gguf: found ValueError"):
            load_model(bad)


def test_damage_in_the_header_is_refused_or_harmless(tmp_path, model, rng):
    """Any byte of the metadata may be wrong: a FormatError or a model of the right shapes, never another exception."""
    path = write_gguf(tmp_path / "m.gguf", model)
    data = path.read_bytes()
    bad = tmp_path / "bad.gguf"
    for at in rng.integers(0, 2000, 150):
        bad.write_bytes(data[:at] + bytes([rng.integers(256)]) + data[at + 1 :])
        try:
            config, params = load_model(bad)
        except FormatError:
            continue
        assert {name: w.shape for name, w in params.items()} == llama.shapes(config)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def metadata(bpe):
    """What a GGUF says about the small tokenizer."""
    backend = tokenizers.Tokenizer.from_str(bpe)
    tokens = sorted(backend.get_vocab(), key=backend.token_to_id)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(bpe)["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }


TEXTS = [
    "",
    " ",
    "the quick  brown\n\nfox",
    "it's 1,234.5 things",
    "½²Ⅷ 一二",
    "<|im_start|>the<|im_end|>",
    "é🎉\u200d",
]


def test_tokenizer_is_the_one_that_was_written(tmp_path, model, metadata, tokenizer):
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", model, **metadata))
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert (
        ours.stop_token_ids == (2, 0)
        and ours.chat_template == "{{ messages }}"
        and ours.vocab_size == tokenizer.vocab_size
    )
    for text in TEXTS:
        assert ours.encode_with_offsets(text) == tokenizer.encode_with_offsets(text)
        assert ours.decode(ours.encode(text)) == text


def test_words_are_cut_as_the_name_says(tmp_path, model, metadata):
    def cut(pre, text):
        words = WORDS[pre]().pre_tokenize_str(text)
        return [text[start:end] for _, (start, end) in words]

    text = "It'S 12345 a\n\n b"
    assert cut("gpt-2", text) == ["It", "'", "S", " 12345", " a", "\n\n", " b"]
    assert cut("smollm", text) == ["It", "'", "S", " ", "1", "2", "3", "4", "5", " a", "\n\n", " b"]
    assert cut("llama-bpe", text) == ["It", "'S", " ", "123", "45", " a", "\n\n", " b"]
    ids = {}
    for pre in WORDS:
        t = load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", model, **metadata | {"tokenizer.ggml.pre": pre}))
        ids[pre] = t.encode("the the12 ½²")
        assert t.decode(ids[pre]) == "the the12 ½²"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: found 'llama'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model: found None"),
        ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre: found 'default', needed 'gpt-2' or 'smollm'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre: found None"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type: found 2 types, needed 2"),
        ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id: found 300"),
        ({"tokenizer.ggml.merges": ["t h", "x"]}, "merges: found 'x'"),
        ({"tokenizer.ggml.merges": ["t nothere"]}, "merges: found .*nothere"),
    ],
)
def test_refuses_other_tokenizers(tmp_path, model, metadata, changes, message):
    path = write_gguf(tmp_path / "m.gguf", model, **metadata | changes)
    with pytest.raises(FormatError, match="m.gguf: .*" + message):
        load_tokenizer(path)


def test_refuses_a_repeated_token(tmp_path, model, metadata):
    metadata["tokenizer.ggml.tokens"][-1] = metadata["tokenizer.ggml.tokens"][-2]
    with pytest.raises(FormatError, match=r"tokenizer.ggml.tokens: found 1 repeated"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", model, **metadata))
