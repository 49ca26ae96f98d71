"""The tokenizer wrapper: exact round trips, offsets that cover the text, files of transformers 4 and 5."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minift.io import TINY, FormatError, Tokenizer, load_tokenizer

CHARACTERS = st.characters(exclude_categories=["Cs"])
PIECES = [
    "the",
    " quick",
    "<|im_start|>",
    "<|im_end|>",
    "\n",
    "\r\n",
    "  ",
    "1234",
    "½",
    "é",
    "🎉",
    "👩‍👩‍👧",
    "'s",
    "\0",
    "\x01\x1b\x7f\x85",  # control characters
    "\u202e",  # from here on right to left
    "שָׁלוֹם مرحبا",
    "e\u0301\u0327o\u0308",  # combining marks, which a normalizer would put together
    "\u0301",
    "\ufeff",
    "\u2028",
    "\ufffd",
    "\U0010ffff\ufffe",
    "🇫🇷🏴\U000e0067\U000e007f",
]
TEXTS = st.one_of(st.text(CHARACTERS), st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=3)).map("".join))


@pytest.fixture(scope="module")
def shared(bpe):
    return Tokenizer(tokenizers.Tokenizer.from_str(bpe), bos_token="<|im_start|>", eos_token="<|im_end|>")


def bytes_of(token):
    """By hand: GPT-2 writes a byte as the character of its number, or as the next one from 256 on if that is blank."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printed}
    table |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printed)}
    return bytes(table[c] for c in token)


def decoded_by_hand(tokenizer, ids):
    """Bytes that are not UTF-8 become U+FFFD, as Unicode recommends: one for each sequence that could have gone on."""
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    parts = (tokenizer.backend.id_to_token(i) for i in ids)
    return b"".join(t.encode() if i in special else bytes_of(t) for i, t in zip(ids, parts, strict=True)).decode(
        "utf-8", "replace"
    )


# --- text ↔ ids -------------------------------------------------------------------------------------------------------


@given(text=TEXTS)
def test_decoding_gives_the_text_back(shared, text):
    assert shared.decode(shared.encode(text)) == text


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def raw():
    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))


@given(text=TEXTS)
def test_the_built_in_tokenizer_loses_nothing(tiny, raw, text):
    """Against the library on the same file, and against bytes put together by hand."""
    ids = tiny.encode(text)
    assert ids == raw.encode(text, add_special_tokens=False).ids
    assert tiny.decode(ids) == raw.decode(ids, skip_special_tokens=False) == decoded_by_hand(tiny, ids) == text


@given(ids=st.lists(st.integers(0, 2047), max_size=20))
def test_any_ids_are_decoded_as_by_hand(tiny, ids):
    assert tiny.decode(ids) == decoded_by_hand(tiny, ids)


def test_every_character_of_the_first_planes(shared):
    """All of Unicode that is not a surrogate, in lines: every byte value that UTF-8 can have occurs."""
    for start in range(0, 0x11000, 0x100):
        text = "".join(chr(c) for c in range(start, start + 0x100) if not 0xD800 <= c < 0xE000)
        assert shared.decode(shared.encode(text)) == text


@given(text=TEXTS)
def test_offsets_cover_the_text(shared, text):
    """In order, without a gap; tokens of one character share its span; the ids are those of `encode`."""
    ids, offsets = shared.encode_with_offsets(text)
    assert ids == shared.encode(text) and len(ids) == len(offsets)
    end = 0
    for (left, right), previous in zip(offsets, [(0, 0), *offsets], strict=False):
        assert left == end or (left, right) == previous or (left < end <= right), (offsets, text)
        assert left < right
        end = max(end, right)
    assert end == len(text)


def test_offsets_keep_the_space(shared):
    ids, offsets = shared.encode_with_offsets("the the")
    assert [("the the")[a:b] for a, b in offsets] == ["the", " the"] and len(ids) == 2


def test_special_tokens(shared):
    text = "<|im_start|>the<|im_end|>"
    ids = shared.encode(text)
    assert (ids[0], ids[-1]) == (1, 2) == (shared.backend.token_to_id(shared.bos_token), shared.eos_token_id)
    assert shared.decode(ids) == text and shared.decode(ids, skip_special_tokens=True) == "the"
    assert shared.bos_token_id == 1 and shared.pad_token_id is None and shared.stop_token_ids == (2,)
    assert "eos '<|im_end|>'" in repr(shared)


def test_nothing_is_added_cut_or_padded(bpe):
    """A file may ask for a template around the text, for truncation and for padding; offsets lose no spaces either."""
    backend = tokenizers.Tokenizer.from_str(bpe)
    plain = Tokenizer(tokenizers.Tokenizer.from_str(bpe))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    template = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    ours = Tokenizer(backend)
    for text in ["the quick brown fox", "x"]:
        assert ours.encode_with_offsets(text) == plain.encode_with_offsets(text)


# --- streams ----------------------------------------------------------------------------------------------------------


@given(text=TEXTS)
def test_a_stream_adds_up_and_never_splits_a_character(shared, text):
    ids = shared.encode(text)
    pieces = list(shared.decode_stream(iter(ids)))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 280), max_size=30), skip=st.booleans())
def test_a_stream_of_any_ids_is_their_decoding(shared, ids, skip):
    """Also where the bytes are no UTF-8: a model may write anything."""
    assert "".join(shared.decode_stream(ids, skip)) == shared.decode(ids, skip)


def test_a_stream_does_not_wait_for_the_end(shared):
    ids = shared.encode("the quick brown")
    stream = shared.decode_stream(iter(ids))
    assert next(stream) == shared.decode(ids[:1])


def test_a_stream_of_a_sentencepiece_like_tokenizer():
    """Decoders that look at neighbors (a leading space is dropped) stream too."""
    vocab = {"▁the": 0, "▁a": 1, "b": 2, "<0xC3>": 3, "<0xA9>": 4}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ours = Tokenizer(backend)
    for ids in ([0, 1, 2], [1, 3, 4, 0], [3], [2, 3, 3, 4]):
        assert "".join(ours.decode_stream(ids)) == ours.decode(ids)


# --- files ------------------------------------------------------------------------------------------------------------


def assert_same(a, b):
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "stop_token_ids", "vocab_size"):
        assert getattr(a, name) == getattr(b, name), name
    for text in PIECES:
        assert a.encode_with_offsets(text) == b.encode_with_offsets(text)


def test_round_trip(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert_same(load_tokenizer(tmp_path), tokenizer)


def test_transformers_reads_what_we_write(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert theirs.chat_template == tokenizer.chat_template
    for text in ["the quick 12 ½ brown", "<|im_start|>the<|im_end|>", "  it's\n\n"]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text


def test_reads_what_transformers_5_writes(tmp_path, bpe, tokenizer):
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(bpe),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    theirs.chat_template = tokenizer.chat_template
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    assert_same(load_tokenizer(tmp_path), tokenizer)


def test_reads_what_transformers_4_wrote(tmp_path, bpe, tokenizer):
    """Merges as strings, the template inside the configuration, tokens as objects, or in a file of their own."""
    old = json.loads(bpe)
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(old))
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "normalized": False, "special": True}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": eos, "chat_template": tokenizer.chat_template})
    )
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    assert_same(load_tokenizer(tmp_path), tokenizer)
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": tokenizer.chat_template}]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    assert_same(load_tokenizer(tmp_path), tokenizer)


def test_the_post_processor_survives(tmp_path, bpe):
    """We do not use it, transformers does: what was read is written."""
    backend = tokenizers.Tokenizer.from_str(bpe)
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    Tokenizer(backend).save(tmp_path)
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("the").tokens == ["<|im_start|>", "the"]


@pytest.mark.parametrize("eos, expected", [(2, (2,)), ([0, 2], (2, 0)), ([7, 0], (2, 7, 0)), (None, (2,))])
def test_stop_tokens_come_from_the_generation_settings(tmp_path, tokenizer, eos, expected):
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert load_tokenizer(tmp_path).stop_token_ids == expected


def test_a_saved_model_keeps_its_stop_tokens(tmp_path, bpe):
    from small_models import torch_llama

    from minift.io import load_model, save_model

    torch_llama().save_pretrained(tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    ours = Tokenizer(tokenizers.Tokenizer.from_str(bpe), eos_token="<|im_end|>", stop_token_ids=[0])
    save_model(tmp_path / "n", config, params, ours)
    assert load_tokenizer(tmp_path / "n").stop_token_ids == (2, 0)


def test_refusals(tmp_path, tokenizer, bpe):
    with pytest.raises(FormatError, match=r"tokenizer.json: found No such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer.json: found .*, needed a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"tokenizer.json: found .*, needed a tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    for name, text, message in [
        ("tokenizer_config.json", "[]", r"tokenizer_config.json: found JSON of type list"),
        ("tokenizer_config.json", '{"eos_token": "<nowhere>"}', r"eos_token '<nowhere>' is not in the vocabulary"),
        ("tokenizer_config.json", '{"eos_token": 3}', r"eos_token: found 3"),
        (
            "chat_template.jinja",
            "\udcff",
            r"chat_template.jinja: found .*invalid start byte, needed a template in UTF-8$",
        ),
        ("generation_config.json", '{"eos_token_id": "2"}', r"generation_config.json: eos_token_id: found \['2'\]"),
        ("config.json", '{"vocab_size": 100}', r"tokenizer.json: vocab: found token id \d+, needed less .* 100"),
    ]:
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(FormatError, match=message):
            load_tokenizer(tmp_path)
        (tmp_path / name).write_bytes(kept if kept is not None else b"{}")
