"""The real thing: SmolLM2-135M-Instruct from its GGUF, against transformers' own reading of the same file."""

import copy
import json
import random
import re

import numpy as np
import pytest
import test_tokenizer as texts
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import assert_same_bits, numpy_state
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import smollm2
from minift.io import load_model, load_tokenizer, save_model
from minift.models import llama

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "In 2024 it's 1,234.56% of (7 + 8) * 90.",
    "def f(x):\n    return x  # twice\n\n\n\tpass\r\n",
    "  leading and trailing  ",
    "Ünïcödé, naïve, Straße, 東京, Привет, שלום, नमस्ते",
    "🎉👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b\u00a0",
    "we'll they've I'D it'S",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name>x<file_sep>",
    "https://example.com/a?b=1&c=2 snake_case camelCase 0xFF 1e-5",
]


@pytest.fixture(scope="module")
def path():
    found = smollm2.smollm2_gguf()
    if found is None:
        pytest.skip(smollm2.why_not())
    return found


@pytest.fixture(scope="module")
def model(path):
    return load_model(path)


@pytest.fixture(scope="module")
def ours(path):
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def theirs(path):
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def torch_model(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def test_every_weight_is_that_of_transformers(model, torch_model):
    config, params = model
    assert_same_bits(params, numpy_state(torch_model))
    assert sum(p.size for p in params.values()) == 134_515_008
    c = torch_model.config
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, key) == getattr(c, key)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(c, key)
    assert np.float32(config.rms_norm_eps) == np.float32(c.rms_norm_eps) and config.rms_norm_eps == 1e-5
    assert config.rope_theta == c.rope_parameters["rope_theta"] == 100000.0


def test_logits_are_those_of_transformers(model, ours, torch_model):
    config, params = model
    tokens = np.array([ours.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n")])
    logits, _ = llama.forward(params, tokens, config)
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_it_answers(model, ours):
    config, params = model
    prompt = ours.encode(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    )
    tokens = llama.generate(params, np.array([prompt]), config, max_new_tokens=6)
    assert "Paris" in "".join(ours.decode_stream(np.asarray(tokens)[0, len(prompt) :]))


def random_texts(n):
    draw = random.Random(0)
    alphabet = "etaoin shrdlu ETA 0123456789 \n\t.,;'\"()[]{}<>|_-+=/\\@#$%^&*é東🎉ß\u0301\u200d"
    return ["".join(draw.choices(alphabet, k=draw.randrange(200))) for _ in range(n)]


def cut_elsewhere(text):
    """Where the rule for SmolLM differs from GPT-2's: digits that are not 0–9, and several spaces before a digit."""
    return any(c.isnumeric() and not c.isascii() for c in text) or re.search(r"\s\s[0-9]", text)


def test_ids_are_those_of_transformers(ours, theirs):
    alike = [text for text in TEXTS + random_texts(300) if not cut_elsewhere(text)]
    assert len(alike) > 200
    for text in alike:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == len(theirs) == 49152
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token_id, ours.bos_token_id, ours.pad_token_id) == (2, 1, 2)
    assert ours.stop_token_ids == (2,)


@pytest.fixture(scope="module")
def right(theirs):
    backend = copy.deepcopy(theirs.backend_tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


MISSING = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])  # of those that UTF-8 has, not in the vocabulary


@given(text=texts.TEXTS)
def test_any_text_comes_back(ours, right, text):
    """But for bytes that the model does not know; they fall out, in the library too."""
    ids = ours.encode(text)
    assert ids == right.encode(text, add_special_tokens=False).ids
    kept = text.encode().translate(None, MISSING).decode("utf-8", "replace")
    assert ours.decode(ids) == right.decode(ids, skip_special_tokens=False) == texts.decoded_by_hand(ours, ids) == kept


def test_the_bytes_that_the_model_does_not_know(ours):
    known = {texts.bytes_of(t) for t, i in ours.backend.get_vocab().items() if i > 16}  # behind the special ones
    never = bytes([0xC0, 0xC1, *range(0xF5, 0x100)])  # in UTF-8
    assert bytes(b for b in range(256) if bytes([b]) not in known) == bytes(sorted(MISSING + never))


@given(ids=st.lists(st.integers(0, 49151), max_size=20))
def test_any_ids_are_decoded_as_by_hand(ours, ids):
    assert ours.decode(ids) == texts.decoded_by_hand(ours, ids)


def test_where_transformers_differs(ours, theirs, right):
    """transformers 5.23 does not know the name "smollm" in a GGUF and cuts words as GPT-2 does. With the rule that the
    model was trained with (every digit by itself, first), it agrees with us on every text."""
    for text in ["a ½ b", "x²³ Ⅷ", "if x:\n    10", "1.  2"]:
        assert cut_elsewhere(text)
        assert ours.encode(text) != theirs.encode(text, add_special_tokens=False)
    for text in [*TEXTS, *random_texts(300), "a ½ b", "x²³ Ⅷ ٣٤ ①②", "if x:\n    10"]:
        assert ours.encode(text) == right.encode(text, add_special_tokens=False).ids


def test_offsets(ours):
    for text in TEXTS:
        ids, offsets = ours.encode_with_offsets(text)
        assert ids == ours.encode(text)
        spans = list(dict.fromkeys(offsets))
        assert not text or (spans[0][0] == 0 and spans[-1][1] == len(text))


def test_as_a_folder_for_transformers(model, ours, torch_model, tmp_path):
    """GGUF → our folder in bfloat16 → transformers: weights rounded once, the same tokenizer and stop token."""
    config, params = model
    save_model(tmp_path / "m", config, params, ours, dtype="bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert again.dtype == torch.bfloat16 and again.generation_config.eos_token_id == 2
    expected = dict(torch_model.named_parameters())
    for name, p in again.named_parameters():
        assert torch.equal(p, expected[name].to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    for text in [*TEXTS, "a ½ b"]:
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["rms_norm_eps"] == 1e-5
