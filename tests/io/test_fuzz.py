"""Whatever bytes are in a file: a documented error, or something that survives being saved and read again."""

import errno
import functools
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from fuzzing import assert_same, damaged, edited, examples, outcome
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from minift.data import jsonl
from minift.data.example import pair
from minift.io import (
    FormatError,
    Tokenizer,
    atomic,
    checksum,
    load_adapter,
    load_mlx_adapter,
    load_model,
    load_tokenizer,
    save_adapter,
    save_mlx_adapter,
    save_model,
)
from minift.io.bitsandbytes4 import FP4_STATE, STATE
from minift.io.checksum import SUMS
from minift.io.safetensors_file import SafetensorsFile, write_safetensors
from minift.models import llama
from minift.models.llama import Config
from minift.peft import lora
from minift.quant import double_quant, nf4
from minift.quant.codebooks import FP4_BY_CODE
from minift.quant.sixteen import to_bfloat16
from minift.train import checkpoint
from minift.train.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

CONFIG = Config(16, 32, 32, 1, 2, 1, 16, 64, tie_word_embeddings=True)
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def parameters():
    return llama.initialize(CONFIG, np.random.default_rng(0))


def contents(write):
    """{name: bytes} of the folder that `write(folder)` makes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "new")
        return {path.name: path.read_bytes() for path in (Path(folder) / "new").iterdir()}


def fill(folder, files):
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.name not in files:
            old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return sum(map(len, files.values()))


def split_safetensors(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header, numbers, size=None):
    header = header.encode("utf-8") if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if size is None else size) + header + numbers


def unsigned(data):
    """As other programs write it: without checksums, so that damage gets as far as the reader's other questions."""
    header, numbers = split_safetensors(data)
    del header["__metadata__"][checksum.ENTRY]
    return join_safetensors(json.dumps(header), numbers)


SIZES = st.none() | st.sampled_from([0, 1, 7, 100_000, 10_000_001, 2**31, 2**63, 2**64 - 1])


@st.composite
def damaged_safetensors(draw, data):
    data = draw(st.sampled_from([data, unsigned(data), unsigned(data)]))
    header, numbers = split_safetensors(data)
    return draw(
        damaged(data)
        | st.builds(join_safetensors, edited(header), st.just(numbers))
        | st.builds(join_safetensors, edited(header), damaged(numbers))
        | st.builds(join_safetensors, st.just(json.dumps(header)), st.just(numbers), SIZES)
        | st.binary(max_size=200)
        | st.builds(join_safetensors, st.binary(max_size=60), st.binary(max_size=16))
    )


def damaged_json(value):
    if isinstance(value, bytes):
        value = json.loads(value)
    good = json.dumps(value).encode()
    return edited(value).map(lambda s: s.encode("utf-8")) | damaged(good) | st.binary(max_size=60)


# --- safetensors ------------------------------------------------------------------------------------------------------


def every_dtype(path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = {t: x.astype(t) for t in ("float64", "float32", "float16", "uint8", "int8", "int64", "bool")}
    arrays |= {"bfloat16": to_bfloat16(x), "scalar": np.float32(1).reshape(()), "empty": x[:, :0]}
    path.mkdir()
    write_safetensors(path / "a.safetensors", arrays, {"format": "pt"}, {"bfloat16"})


SAFETENSORS = contents(every_dtype)["a.safetensors"]


@examples(400)
@given(data=damaged_safetensors(SAFETENSORS))
def test_safetensors(place, data):
    path = place / "a.safetensors"
    path.write_bytes(data)

    def read():
        file = SafetensorsFile(path)
        return {name: file.read(name) for name in file.names()}, file.metadata

    if (found := outcome(read, path, len(data))) is not None:
        write_safetensors(place / "again.safetensors", *found)
        again = SafetensorsFile(place / "again.safetensors")
        assert_same({name: again.read(name) for name in again.names()}, found[0])
        assert again.metadata == (found[1] or {"format": "pt"})


@st.composite
def damaged_checksums(draw):
    """The numbers as they were, and something wrong with their checksums, or with the file behind correct ones."""
    header, numbers = split_safetensors(SAFETENSORS)
    digests = draw(damaged_json(json.loads(header["__metadata__"][checksum.ENTRY])))
    header["__metadata__"][checksum.ENTRY] = digests.decode("utf-8", "replace")
    return join_safetensors(json.dumps(header), numbers)


@examples(300)
@given(data=damaged_checksums() | damaged(SAFETENSORS))
def test_checksums(place, data):
    """Refused, or to the bit what was written; or the entry itself has lost its name."""
    path = place / "a.safetensors"
    path.write_bytes(SAFETENSORS)
    written = SafetensorsFile(path)
    expected = {name: written.read(name) for name in written.names()}
    path.write_bytes(data)

    def read():
        file = SafetensorsFile(path)
        return {name: file.read(name) for name in file.names()}, file.metadata

    if (found := outcome(read, path, len(data))) is not None and checksum.ENTRY.encode() in data:
        assert_same(found[0], expected)
        assert found[1] == written.metadata


# --- models in folders ------------------------------------------------------------------------------------------------


def quantized_parameters(double):
    params = parameters()
    for name in (Q, UP):
        q = nf4.quantize(params[name], 64)
        params[name] = double_quant.compress(q) if double else q
    return params


MODEL = contents(lambda f: save_model(f, CONFIG, parameters()))
HALF = contents(lambda f: save_model(f, CONFIG, parameters(), dtype="bfloat16"))
NF4 = contents(lambda f: save_model(f, CONFIG, quantized_parameters(double=False), dtype="float16"))
DOUBLE = contents(lambda f: save_model(f, CONFIG, quantized_parameters(double=True), dtype="bfloat16"))
INDEX = "model.safetensors.index.json"


def check_model(path, place, size, **factors):
    for keep in (False, True) if path.is_dir() else (False,):
        if (found := outcome(lambda: load_model(path, keep), path, size, **factors)) is not None:  # noqa: B023
            config, params = found
            assert {name: w.shape for name, w in params.items()} == llama.shapes(config)
            save_model(place / "again_m", config, params, overwrite=True)
            again = load_model(place / "again_m", keep)
            assert again[0] == config
            assert_same(again[1], params)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = [json.loads(MODEL["config.json"])]
CONFIGS.append({k: v for k, v in CONFIGS[0].items() if k != "rope_parameters"} | {"rope_scaling": LLAMA3})
CONFIGS.append(json.loads(NF4["config.json"]))


@examples(250)
@given(data=st.sampled_from(CONFIGS).flatmap(damaged_json))
def test_config(place, data):
    size = fill(place / "m", {"model.safetensors": MODEL["model.safetensors"], "config.json": data})
    check_model(place / "m", place, size)


@examples(150)
@given(data=st.sampled_from([MODEL, HALF]).flatmap(lambda m: damaged_safetensors(m["model.safetensors"])))
def test_weights(place, data):
    size = fill(place / "m", {"model.safetensors": data, "config.json": MODEL["config.json"]})
    check_model(place / "m", place, size)


def in_shards(files):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(files["model.safetensors"])
        file = SafetensorsFile(Path(folder) / "a")
        names = file.names()
        halves = {"1.safetensors": names[:4], "2.safetensors": names[4:]}
        for shard, part in halves.items():
            write_safetensors(Path(folder) / shard, {name: file.read(name) for name in part})
        found = {shard: (Path(folder) / shard).read_bytes() for shard in halves}
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in halves.items() for name in part}}
    return found | {INDEX: json.dumps(index).encode(), "config.json": files["config.json"]}


SHARDS = in_shards(MODEL)


@examples(120)
@given(data=damaged_json(SHARDS[INDEX]))
def test_index(place, data):
    size = fill(place / "m", SHARDS | {INDEX: data})
    check_model(place / "m", place, size)


def rebuilt(files, change):
    """The folder with its tensors changed by hand: {name: (dtype, shape, bytes)}."""
    header, numbers = split_safetensors(files["model.safetensors"])
    header.pop("__metadata__", None)
    parts = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        parts[name] = [entry["dtype"], entry["shape"], numbers[begin:end]]
    change(parts)
    new, data = {}, b""
    for name, (dtype, shape, raw) in parts.items():
        new[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return files | {"model.safetensors": join_safetensors(json.dumps(new), data)}


SPECIAL = [np.nan, np.inf, -np.inf, -1.0, -0.0, 1e-45, 3e38, 65520.0]


def as_fp4(parts):
    for name in [name for name in parts if STATE in name]:
        dtype, _, raw = parts.pop(name)
        raw = raw.replace(b'"nf4"', b'"fp4"')
        parts[name.replace(STATE, FP4_STATE)] = [dtype, [len(raw)], raw]
        parts[name.replace(STATE, "quant_map")][2] = FP4_BY_CODE.tobytes()


FOUR_BIT = {"NF4": NF4, "DOUBLE": DOUBLE, "FP4": rebuilt(DOUBLE, as_fp4)}


@st.composite
def damaged_four_bits(draw):
    files = FOUR_BIT[draw(st.sampled_from(sorted(FOUR_BIT)))]

    def change(parts):
        names = sorted(name for name in parts if name.startswith((Q, UP)))
        states = {name: json.loads(parts[name][2]) for name in names if "quant_state" in name}
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from(names))
            if name not in parts:
                continue
            dtype, shape, raw = parts[name]
            kinds = ["state"] * 3 if name in states else ["special"] * 3 if dtype == "F32" else ["bytes"]
            match draw(st.sampled_from([*kinds, "cut", "extend", "remove", "shape", "dtype"])):
                case "state":
                    raw = draw(damaged_json(states[name]))
                    parts[name] = [dtype, [len(raw)], raw]
                case "special" if dtype == "F32" and len(raw) >= 4:
                    numbers = np.frombuffer(raw, np.float32).copy()
                    numbers[draw(st.integers(0, numbers.size - 1))] = draw(st.sampled_from(SPECIAL))
                    parts[name][2] = numbers.tobytes()
                case "cut" if dtype == "U8" and raw:
                    parts[name] = [dtype, [len(raw) - 1], raw[:-1]]
                case "extend" if dtype == "U8":
                    parts[name] = [dtype, [len(raw) + 1], raw + b"\x77"]
                case "remove":
                    del parts[name]
                case "shape":
                    parts[name][1] = draw(st.sampled_from([[*shape, 1], [1] * 40 + shape, [1] * 70 + shape]))
                case "dtype" if dtype == "F32":
                    parts[name] = ["BF16", [*shape, 2], raw]
                case _:
                    parts[name][2] = raw[:1] + bytes(draw(st.binary(min_size=len(raw), max_size=len(raw))))[1:]

    return rebuilt(files, change)


@examples(250)
@given(files=damaged_four_bits())
def test_four_bits(place, files):
    check_model(place / "m", place, fill(place / "m", {n: files[n] for n in ("config.json", "model.safetensors")}))


@pytest.mark.parametrize("nibble", [0, 6, 8, 15])
def test_a_padding_nibble_that_is_not_zeros_code(nibble, tmp_path):
    """An odd number of elements, in the last byte something: the file was damaged, or another program wrote it."""
    q = nf4.quantize(np.ones((3, 3), np.float32))
    codes = q.codes.copy()
    codes[-1] = codes[-1] & 0xF0 | nibble
    from minift.io.bitsandbytes4 import pack_tensor, unpack_tensor

    parts = pack_tensor("a.weight", q) | {"a.weight": codes}
    with pytest.raises(FormatError, match=rf"f: a.weight: found codes: odd size 9.* is {nibble}, not 7"):
        unpack_tensor("a.weight", parts, "f")


# --- adapters ---------------------------------------------------------------------------------------------------------


def an_adapter(**settings):
    rng = np.random.default_rng(0)
    return lora.detach(lora.attach(parameters(), ["q_proj", "up_proj"], r=2, lora_alpha=3, rng=rng, **settings))[1]


PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r".*up_proj": 5}, "modules_to_save": ["norm"]}
ADAPTERS = [
    contents(lambda f: save_adapter(f, an_adapter())),
    contents(lambda f: save_adapter(f, an_adapter(**PATTERNS))),
]
ADAPTER = ADAPTERS[0]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_CONFIGS = [json.loads(files[ADAPTER_CONFIG]) for files in ADAPTERS]
ADAPTER_CONFIGS.append(ADAPTER_CONFIGS[0] | {"target_modules": r".*\.(q|up)_proj", "exclude_modules": ["k_proj"]})
ADAPTER_CONFIGS.append(ADAPTER_CONFIGS[0] | {"layers_to_transform": [0], "layers_pattern": ["layers"]})
ADAPTER_FILES = [ADAPTERS[0], ADAPTERS[1], ADAPTERS[0], ADAPTERS[0]]
MLX = contents(lambda f: save_mlx_adapter(f, an_adapter()))
MLX_WEIGHTS = "adapters.safetensors"


def check_adapter(place, files, params):
    """`files` beside an empty list of checksums, unless they bring their own."""
    warned = files.get(SUMS) not in (None, ADAPTERS[0][SUMS], ADAPTERS[1][SUMS])
    size = fill(place / "a", files if warned else files | {SUMS: b""})
    if (adapter := outcome(lambda: load_adapter(place / "a", params), place / "a", size, warned=warned)) is not None:
        save_adapter(place / "again_a", adapter, overwrite=True)
        again = load_adapter(place / "again_a", params)
        assert_same(again.arrays, adapter.arrays)
        assert vars(again) | {"arrays": 0} == vars(adapter) | {"arrays": 0}


def check_mlx_adapter(place, files, params):
    size = fill(place / "x", MLX | files | {SUMS: b""})
    if (adapter := outcome(lambda: load_mlx_adapter(place / "x", params), place / "x", size)) is not None:
        save_mlx_adapter(place / "again_x", adapter, overwrite=True)
        assert_same(load_mlx_adapter(place / "again_x", params).arrays, adapter.arrays)


@examples(150)
@given(sums=damaged(ADAPTER[SUMS]) | st.binary(max_size=99))
def test_sums(place, sums):
    """Whatever they say, the file beside them is read; at most there is a warning."""
    check_adapter(place, ADAPTER | {SUMS: sums, ADAPTER_CONFIG: json.dumps(ADAPTER_CONFIGS[0]).encode()}, None)
    assert load_adapter(place / "again_a").r == 2


@examples(300)
@given(data=st.data(), which=st.integers(0, len(ADAPTER_CONFIGS) - 1), base=st.booleans())
def test_adapter_config(place, data, which, base):
    config = data.draw(damaged_json(ADAPTER_CONFIGS[which]))
    check_adapter(place, ADAPTER_FILES[which] | {ADAPTER_CONFIG: config}, parameters() if base else None)


@examples(200)
@given(data=st.data(), which=st.integers(0, 1), base=st.booleans())
def test_adapter_weights(place, data, which, base):
    weights = data.draw(damaged_safetensors(ADAPTERS[which][ADAPTER_WEIGHTS]))
    check_adapter(place, ADAPTERS[which] | {ADAPTER_WEIGHTS: weights}, parameters() if base else None)


@examples(150)
@given(data=damaged_json(MLX[ADAPTER_CONFIG]), base=st.booleans())
def test_mlx_adapter_config(place, data, base):
    check_mlx_adapter(place, {ADAPTER_CONFIG: data}, parameters() if base else None)


@examples(100)
@given(data=damaged_safetensors(MLX[MLX_WEIGHTS]), base=st.booleans())
def test_mlx_adapter_weights(place, data, base):
    check_mlx_adapter(place, {MLX_WEIGHTS: data}, parameters() if base else None)


# --- tokenizers -------------------------------------------------------------------------------------------------------

TOKENS = ["<s>", "</s>", *"abcdehlo", "Ġ", "he", "ll", "hell", "hello", "Ġhello"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]


def a_tokenizer():
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}")


def save_tokenizer(folder):
    folder.mkdir()
    a_tokenizer().save(folder)


TOKENIZER = contents(save_tokenizer) | {n: MODEL[n] for n in ("config.json", "generation_config.json")}
TOKENIZER["special_tokens_map.json"] = b'{"pad_token": {"content": "</s>"}}'
TEMPLATES = [{"name": "default", "template": "{{ a }}"}, {"name": "rag", "template": "b"}]
OLD_CONFIG = json.loads(TOKENIZER["tokenizer_config.json"]) | {"chat_template": TEMPLATES}
STOPS = json.loads(MODEL["generation_config.json"]) | {"eos_token_id": [1, 3]}


def check_tokenizer(path, place, size, **factors):
    if (found := outcome(lambda: load_tokenizer(path), path, size, **factors)) is not None:
        (place / "again").mkdir(exist_ok=True)
        fill(place / "again", {})
        found.save(place / "again")
        again = load_tokenizer(place / "again")
        assert json.loads(again.backend.to_str()) == json.loads(found.backend.to_str())
        assert (again.bos_token, again.eos_token, again.pad_token) == (
            found.bos_token,
            found.eos_token,
            found.pad_token,
        )
        assert again.chat_template == found.chat_template and again.vocab_size == found.vocab_size
        ids = [i for i in range(min(found.vocab_size, 40)) if found.backend.id_to_token(i) is not None]
        assert again.decode(ids) == found.decode(ids)


@examples(300)
@given(
    change=st.one_of(
        st.tuples(st.just("tokenizer.json"), damaged_json(TOKENIZER["tokenizer.json"])),
        st.tuples(st.just("tokenizer_config.json"), damaged_json(TOKENIZER["tokenizer_config.json"])),
        st.tuples(st.just("tokenizer_config.json"), damaged_json(OLD_CONFIG)),
        st.tuples(st.just("generation_config.json"), damaged_json(STOPS)),
        st.tuples(st.just("special_tokens_map.json"), damaged_json(TOKENIZER["special_tokens_map.json"])),
        st.tuples(st.just("config.json"), damaged_json(TOKENIZER["config.json"])),
        st.tuples(st.just("chat_template.jinja"), st.binary(max_size=9)),
    )
)
def test_tokenizer(place, change):
    files = TOKENIZER | dict([change])
    if change[1].find(b'"name"') >= 0:  # the old place of the template is read where the new one is empty
        del files["chat_template.jinja"]
    size = fill(place / "t", files)
    check_tokenizer(place / "t", place, size)


# --- GGUF -------------------------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PLAIN = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def gguf_string(s):
    raw = s if isinstance(s, bytes) else s.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(kind, value):
    if kind == STRING:
        return gguf_string(value)
    if kind == ARRAY:
        inner, items, claimed = value
        size = len(items) if claimed is None else claimed
        return struct.pack("<IQ", inner, size) + b"".join(gguf_value(inner, item) for item in items)
    return struct.pack("<" + PLAIN[kind], value)


def array(kind, items):
    return (ARRAY, (kind, items, None))


METADATA = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, 32),
    "llama.feed_forward_length": (U32, 32),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 10000.0),
    "llama.rope.dimension_count": (U32, 16),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "gpt-2"),
    "tokenizer.ggml.tokens": array(STRING, TOKENS),
    "tokenizer.ggml.token_type": array(I32, [3, 3] + [1] * (len(TOKENS) - 2)),
    "tokenizer.ggml.merges": array(STRING, [" ".join(m) for m in MERGES]),
    "tokenizer.ggml.bos_token_id": (U32, 0),
    "tokenizer.ggml.eos_token_id": (U32, 1),
    "tokenizer.chat_template": (STRING, "{{ messages }}"),
}
EXTRA = {  # known to the reader, and not in the file above
    "llama.rope.scaling.type": (STRING, "linear"),
    "llama.rope.scaling.factor": (F32, 2.0),
    "llama.expert_count": (U32, 0),
    "llama.attention.key_length": (U32, 16),
    "general.alignment": (U32, 64),
    "split.count": (U32, 1),
    "tokenizer.ggml.eot_token_id": (U32, 1),
}


@functools.cache
def gguf_tensors():
    """[name, dims from the inside out, type, bytes] of the small model; two of them are quantized."""
    import minift.io.gguf as ours

    theirs = {v: k for k, v in {**ours.TOP_NAMES, **ours.BLOCK_NAMES}.items()}
    found = []
    for name, w in parameters().items():
        key = theirs.get(name) or "blk.0." + theirs[name.split(".", 3)[3]]
        kind = {Q: gguf.GGMLQuantizationType.Q8_0, UP: gguf.GGMLQuantizationType.Q4_0}.get(
            name, gguf.GGMLQuantizationType.F32
        )
        raw = w.tobytes() if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(w, kind).tobytes()
        found.append((key, list(reversed(w.shape)), int(kind), raw))
    freqs = np.ones(8, np.float32)
    return [*found, ("rope_freqs.weight", [8], 0, freqs.tobytes())]


def gguf_bytes(metadata, tensors, counts=(None, None), offsets=None, version=3):
    pairs = list(metadata.items()) if isinstance(metadata, dict) else metadata
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", *(len(x) if n is None else n for n, x in zip(counts, (tensors, pairs), strict=True)))
    for key, (kind, value) in pairs:
        head += gguf_string(key) + struct.pack("<I", kind) + gguf_value(kind, value)
    alignment = 32
    data = b""
    for i, (name, dims, kind, raw) in enumerate(tensors):
        offset = (offsets or {}).get(i, len(data))
        head += gguf_string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        head += struct.pack("<IQ", kind, offset)
        data += raw + b"\0" * (-len(raw) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def test_the_gguf_written_here_is_one(tmp_path):
    """To the bit the file that gguf.GGUFWriter writes."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, (kind, value) in METADATA.items():
        if kind == ARRAY:
            writer.add_array(key, value[1])
        elif key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType(kind))
    for name, dims, kind, raw in gguf_tensors():
        dtype = np.float32 if kind == 0 else np.uint8
        shape = list(reversed(dims)) if kind == 0 else [dims[1], -1]
        data = np.frombuffer(raw, dtype).reshape(shape)
        writer.add_tensor(name, data, raw_dtype=None if kind == 0 else gguf.GGMLQuantizationType(kind))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert (tmp_path / "a.gguf").read_bytes() == gguf_bytes(METADATA, gguf_tensors())
    config, params = load_model(tmp_path / "a.gguf")
    assert config.head_dim == 16 and params.keys() == parameters().keys()
    assert load_tokenizer(tmp_path / "a.gguf").encode("hello hello") == [14, 15]


plain_values = st.one_of(
    st.tuples(st.just(U32), st.sampled_from([0, 1, 2, 3, 15, 16, 17, 32, 2**31, 2**32 - 1])),
    st.tuples(st.just(U64), st.sampled_from([0, 1, 2, 10**12, 2**63, 2**64 - 1])),
    st.tuples(st.just(I32), st.sampled_from([-1, 0, 1])),
    st.tuples(st.just(F32), st.sampled_from([0.0, -1.0, 0.5, 3e38, 1e-45, float("nan"), float("inf")])),
    st.tuples(st.just(F64), st.sampled_from([0.0, 1e300, 1e-300, float("nan")])),
    st.tuples(st.just(BOOL), st.booleans()),
    st.tuples(
        st.just(STRING), st.sampled_from(["", "llama", "none", "linear", "a b", "<s>", b"\xff", "\0", "x" * 500])
    ),
)
some_strings = st.lists(st.sampled_from([*TOKENS, "a b", "", b"\xff"]), max_size=18)
CLAIMS = st.none() | st.sampled_from([0, 1, 10**12, 2**63, 2**64 - 1])
gguf_values = plain_values | st.one_of(
    st.builds(lambda i, n: (ARRAY, (U32, i, n)), st.lists(st.integers(0, 20), max_size=20), CLAIMS),
    st.builds(lambda i, n: (ARRAY, (U8, i, n)), st.just([]), CLAIMS),
    st.builds(lambda i, n: (ARRAY, (F32, i, n)), st.lists(st.just(1.0), max_size=18), CLAIMS),
    st.builds(lambda i, n: (ARRAY, (BOOL, i, n)), st.lists(st.booleans(), max_size=18), CLAIMS),
    st.builds(
        lambda i, n: (ARRAY, (STRING, i, n)),
        st.lists(st.sampled_from([*TOKENS, "a b", "", b"\xff"]), max_size=18),
        CLAIMS,
    ),
    st.just((ARRAY, (ARRAY, [(U32, [1, 2], None), (U32, [3], None)], None))),
)


def nested_array(depth):
    value = (U32, [1], None)
    for _ in range(depth):
        value = (ARRAY, [value], None)
    return (ARRAY, value)


DEEP_ARRAYS = [nested_array(3), nested_array(300)]


@st.composite
def damaged_gguf(draw):
    metadata, tensors = list(METADATA.items()), [list(t) for t in gguf_tensors()]
    offsets, counts = {}, [None, None]
    for _ in range(draw(st.integers(1, 2))):
        i = draw(st.integers(0, len(metadata) - 1))
        j = draw(st.integers(0, len(tensors) - 1))
        _, dims, _, raw = tensors[j]
        match draw(st.sampled_from(["value", "value", "value", "extra", "drop", "twice", "tensor", "offset", "count"])):
            case "value":
                metadata[i] = (
                    metadata[i][0],
                    draw(gguf_values | st.sampled_from(DEEP_ARRAYS)),
                )
            case "extra":
                key = draw(st.sampled_from(sorted(EXTRA)))
                metadata.append((key, draw(st.just(EXTRA[key]) | gguf_values)))
            case "drop":
                del metadata[i]
            case "twice":
                metadata.append(metadata[i])
            case "offset":
                offsets[j] = draw(st.sampled_from([0, 1, 16, 32, 4096, 10**12, 2**63, 2**64 - 32, 2**64 - 4096]))
            case "count":
                counts[draw(st.integers(0, 1))] = draw(st.sampled_from([0, 1, 10**12, 2**63, 2**64 - 1]))
            case _:
                how = draw(st.sampled_from(["name", "dims", "kind", "special", "remove"]))
                if how == "name":
                    tensors[j][0] = draw(st.sampled_from(["output.weight", "blk.1.attn_q.weight", "", b"\xff"]))
                elif how == "dims":
                    choices = [[], [0], [32], [*dims, 1], list(reversed(dims)), [2**32, 2**32], [10**12], [0, 2**62]]
                    tensors[j][1] = draw(st.sampled_from([*choices, [1] * 70, [2**63, 2], [2**64 - 1], [*dims[:1], 0]]))
                elif how == "kind":
                    tensors[j][2] = draw(st.sampled_from([*range(42), 255, 2**32 - 1]))
                elif how == "special":
                    numbers = np.frombuffer(raw, np.float16).copy()
                    numbers[: draw(st.integers(1, 40))] = draw(st.sampled_from([np.nan, np.inf, 65504.0, -1.0]))
                    tensors[j][3] = numbers.tobytes()
                elif len(tensors) > 1:
                    del tensors[j]
    return gguf_bytes(metadata, tensors, counts, offsets, draw(st.sampled_from([3, 3, 3, 2, 1, 4])))


any_gguf = damaged_gguf() | damaged(gguf_bytes(METADATA, gguf_tensors())) | st.binary(max_size=100)
any_gguf |= st.binary(max_size=60).map(lambda b: b"GGUF\3\0\0\0" + b)
GGUF_MEMORY = {"times": 200}  # the gguf package makes two NumPy arrays of a string, which may be empty: 8 bytes


@examples(300)
@given(data=any_gguf)
def test_gguf(place, data):
    path = place / "m.gguf"
    path.write_bytes(data)
    check_model(path, place, len(data), **GGUF_MEMORY)
    check_tokenizer(path, place, len(data), **GGUF_MEMORY)


# --- checkpoints ------------------------------------------------------------------------------------------------------

IDENTITY = {"model": "tiny", "r": 2, "seed": 0}
LIKE = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}


def a_checkpoint(best=True):
    rng = np.random.default_rng(0)
    groups = [{n: rng.standard_normal(a.shape).astype(np.float32) for n, a in LIKE.items()} for _ in range(4)]
    return Checkpoint(7, IDENTITY, *groups[:3], groups[3] if best else {}, 0.5 if best else None)


def save_checkpoint(folder, best=True):
    folder.mkdir()
    checkpoint.save(folder, a_checkpoint(best))


CHECKPOINT = contents(save_checkpoint)[checkpoint.NAME]


@st.composite
def damaged_checkpoint(draw):
    header, numbers = split_safetensors(unsigned(CHECKPOINT))
    facts = draw(damaged_json(json.loads(header["__metadata__"]["minift"])))
    header["__metadata__"]["minift"] = facts.decode("utf-8", "replace")
    return join_safetensors(json.dumps(header), numbers)


@examples(300)
@given(data=damaged_checkpoint() | damaged_safetensors(CHECKPOINT))
def test_checkpoint(place, data):
    check_checkpoint(place, data)


def check_checkpoint(place, data):
    size = fill(place / "c", {checkpoint.NAME: data})
    path = place / "c" / checkpoint.NAME
    if (found := outcome(lambda: checkpoint.load(place / "c", IDENTITY, LIKE), path, size)) is not None:
        (place / "again").mkdir(exist_ok=True)
        fill(place / "again", {})
        checkpoint.save(place / "again", found)
        again = checkpoint.load(place / "again", IDENTITY, LIKE)
        for group in ("parameters", "m", "v", "best"):
            assert_same(getattr(again, group), getattr(found, group))
        assert (again.step, again.best_loss) == (found.step, found.best_loss)
        assert type(found.step) is int and found.step >= 0


# --- JSONL ------------------------------------------------------------------------------------------------------------

LINES = [
    {"prompt": "2 + 2?", "completion": "4", "source": {"a": [1, 2]}},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    {"instruction": "Add.", "input": "2, 2", "output": "4"},
    {"text": "as it is\n"},
]
GOOD = "".join(json.dumps(line) + "\n" for line in LINES).encode()
lines = st.sampled_from(LINES).flatmap(edited).map(str.encode) | st.binary(max_size=30)


@examples(400)
@given(data=st.lists(lines, max_size=3).map(b"\n".join) | damaged(GOOD))
def test_jsonl(place, data):
    path = place / "a.jsonl"
    path.write_bytes(data)
    if (found := outcome(lambda: jsonl.read(path), path, len(data))) is not None:
        jsonl.write(place / "again.jsonl", found)
        assert jsonl.read(place / "again.jsonl") == found


# --- work without bound -----------------------------------------------------------------------------------------------


def many_keys(n):
    return "{" + "".join(f'"{i}":0,' for i in range(n)) + '"x":0,"x":0}'


def test_a_million_keys_take_no_more_than_a_moment(place):
    """Looking for the repeated one by counting each of them takes the square of their number."""
    text = many_keys(200_000)
    (place / "a.jsonl").write_text(text)
    assert outcome(lambda: jsonl.read(place / "a.jsonl"), place, len(text), times=100) is None
    size = fill(place / "m", {"config.json": text.encode()})
    assert outcome(lambda: load_model(place / "m"), place, size, times=100) is None


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"])
def test_a_config_of_a_trillion_is_refused_before_anything_is_made(place, key):
    values = CONFIGS[0] | {key: 10**12}
    size = fill(place / "m", MODEL | {SUMS: b"", "config.json": json.dumps(values).encode()})
    assert outcome(lambda: load_model(place / "m"), place / "m", size, times=2) is None


@pytest.mark.parametrize("kind", [U8, I32, F64, STRING, ARRAY])
@pytest.mark.parametrize("key", ["general.name", "tokenizer.ggml.tokens", "llama.block_count"])
def test_a_gguf_array_of_a_trillion_is_refused(place, kind, key):
    data = gguf_bytes(METADATA | {key: (ARRAY, (kind, [], 10**12))}, gguf_tensors())
    path = place / "m.gguf"
    path.write_bytes(data)
    assert outcome(lambda: load_model(path), path, len(data), **GGUF_MEMORY) is None


@pytest.mark.parametrize("depth", [50, 300, *range(850, 1000, 5), 100_000])
def test_json_of_any_depth(place, depth):
    """It can be just shallow enough to be parsed and too deep to be shown."""
    deep = "[" * depth + "]" * depth
    for key in ("hidden_size", "rope_scaling", "vocab_size", "quantization_config"):
        size = fill(
            place / "m",
            MODEL
            | {SUMS: b"", "config.json": json.dumps(CONFIGS[0] | {key: 0}).replace(": 0,", f": {deep},", 1).encode()},
        )
        check_model(place / "m", place, size)
    for key in ("r", "target_modules", "init_lora_weights", "rank_pattern", "modules_to_save", "new"):
        values = json.dumps({**ADAPTER_CONFIGS[0], key: "HERE"}).replace('"HERE"', deep)
        check_adapter(place, ADAPTER | {ADAPTER_CONFIG: values.encode()}, None)
    for key in ("eos_token", "chat_template"):
        values = json.dumps({key: "HERE"}).replace('"HERE"', deep)
        size = fill(place / "t", TOKENIZER | {"tokenizer_config.json": values.encode()})
        check_tokenizer(place / "t", place, size)
    size = fill(place / "t", TOKENIZER | {"generation_config.json": f'{{"eos_token_id": {deep}}}'.encode()})
    check_tokenizer(place / "t", place, size)
    facts = json.dumps({"step": 1, "identity": "HERE", "best_loss": None}).replace('"HERE"', deep)
    header, numbers = split_safetensors(unsigned(CHECKPOINT))
    header["__metadata__"]["minift"] = facts
    check_checkpoint(place, join_safetensors(json.dumps(header), numbers))


# --- a full disk ------------------------------------------------------------------------------------------------------


def full(*arguments, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {
    "model": lambda f: save_model(f / "m", CONFIG, parameters(), a_tokenizer(), overwrite=True),
    "adapter": lambda f: save_adapter(f / "a", an_adapter(), overwrite=True),
    "mlx adapter": lambda f: save_mlx_adapter(f / "x", an_adapter(), overwrite=True),
    "checkpoint": lambda f: checkpoint.save(f, a_checkpoint()),
    "tokenizer": lambda f: a_tokenizer().save(f),
    "examples": lambda f: jsonl.write(f / "x.jsonl", [pair("q", "a")]),
}


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "where", [(os, "fsync"), (os, "replace"), (os, "rename"), (atomic, "_exchange"), (checksum, "write_sums")]
)
def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch, writer, where):
    """Whatever step fails: the files before, byte for byte, and nothing beside them."""
    WRITERS[writer](tmp_path)
    before = everything(tmp_path)
    if where[1] == "rename":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    monkeypatch.setattr(*where, full)
    if writer in ("model", "adapter", "mlx adapter") or where[1] in ("fsync", "replace"):
        with pytest.raises(OSError, match="No space left"):
            WRITERS[writer](tmp_path)
    assert everything(tmp_path) == before


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from minift.io.safetensors_file import write_safetensors
from minift.io import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    if sys.argv[2] == "bytes":
        atomic_write(sys.argv[1], b"new" * 100_000)
    else:
        write_safetensors(sys.argv[1], {"a": np.ones(100_000, np.float32)})
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("what", ["bytes", "safetensors"])
def test_a_file_that_may_not_grow_leaves_the_old_one(tmp_path, what):
    """No monkeypatching: the system itself stops the writing after 50,000 bytes."""
    (tmp_path / "a").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "a", what], capture_output=True, text=True)
    assert done.returncode == 0 and "Error" in done.stdout, done
    assert everything(tmp_path) == {Path("a"): b"old"}
