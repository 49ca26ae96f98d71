"""Whatever bit is flipped in a file that minift wrote: an error that says so, or the very same content."""

import contextlib
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_fuzz import ADAPTER, MODEL, fill, join_safetensors, split_safetensors

from minift.io import FormatError, atomic_folder, checksum, load_adapter, load_model
from minift.io.safetensors_file import SafetensorsFile, write_safetensors
from minift.quant.sixteen import to_bfloat16

HALF = to_bfloat16(np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5)
ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(3, 2), "b": HALF, "s": np.float64(7.5), "e": np.ones((2, 0))}
ARRAYS |= {"twin": ARRAYS["a"].copy()}


@pytest.fixture
def path(tmp_path):
    write_safetensors(tmp_path / "f.safetensors", ARRAYS, {"format": "pt", "fact": "step 12"}, {"b"})
    return tmp_path / "f.safetensors"


def everything(path):
    file = SafetensorsFile(path)
    return {
        name: (file.dtype(name), file.shape(name), file.raw(name).tobytes()) for name in file.names()
    }, file.metadata


def test_the_entry_is_what_the_formula_says(path):
    """By hand: SHA-256 of ["name", "dtype", [shape]] and the bytes as the library reads them."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    found = json.loads(metadata.pop("minift.sha256"))
    texts = {"a": b'["a", "F32", [3, 2]]', "b": b'["b", "BF16", [2, 3]]', "s": b'["s", "F64", []]'}
    texts |= {"e": b'["e", "F64", [2, 0]]', "twin": b'["twin", "F32", [3, 2]]'}
    expected = {name: hashlib.sha256(text + ARRAYS[name].tobytes()).hexdigest() for name, text in texts.items()}
    expected["__metadata__"] = hashlib.sha256(b'[["fact", "step 12"], ["format", "pt"]]').hexdigest()
    assert found == expected and metadata == {"format": "pt", "fact": "step 12"}


def flips(data):
    """Every bit of the numbers, and of the header one in each byte."""
    start = len(data) - sum(a.nbytes for a in ARRAYS.values())
    for at in range(len(data)):
        for bit in range(8) if at >= start else (at % 7,):
            yield at >= start, data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_every_flipped_bit_is_refused_or_changes_nothing(path):
    expected, metadata = everything(path)
    in_numbers = refused = 0
    for number, data in flips(path.read_bytes()):
        path.write_bytes(data)
        try:
            found, facts = everything(path)
        except FormatError as error:
            assert str(path) in str(error)
            in_numbers += number
            refused += 1
            continue
        assert not number and found == expected
        unchecked = {key: value for key, value in facts.items() if "sha256" not in key and key in metadata}
        assert unchecked.items() <= metadata.items()
    assert in_numbers == 8 * sum(a.nbytes for a in ARRAYS.values()) and refused > in_numbers


def test_without_the_entry_many_load(path, tmp_path):
    """The test above can fail: most bits of the numbers may be flipped in the library's files, and nobody notices."""
    save_file({name: np.asarray(array) for name, array in ARRAYS.items()}, path)
    loaded = 0
    for number, data in flips(path.read_bytes()):
        path.write_bytes(data)
        with contextlib.suppress(FormatError):
            loaded += number and everything(path) is not None
    assert loaded == 8 * sum(a.nbytes for a in ARRAYS.values())


def test_the_message_says_what_to_do(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last of the narrowest
    path.write_bytes(data)
    file = SafetensorsFile(path)
    assert np.array_equal(file.read("a"), ARRAYS["a"])  # the others are all right
    with pytest.raises(FormatError, match=r"f\.safetensors: b: found something else .* damaged.*copy the file again"):
        file.read("b")


def rename(header, digests):
    header["c"] = header.pop("a")
    digests["c"] = digests.pop("a")


def exchange_names(header, digests):  # of two tensors of the same bytes
    digests["a"], digests["twin"] = digests["twin"], digests["a"]


def reshape(header, digests):
    header["a"]["shape"] = [2, 3]


def retype(header, digests):
    header["a"]["dtype"] = "I32"


def other_facts(header, digests):
    header["__metadata__"]["fact"] = "step 13"


def fewer(header, digests):
    del digests["b"]


def more(header, digests):
    digests["d"] = digests["a"]


def no_digest(header, digests):
    digests["a"] = None


CHANGES = [rename, exchange_names, reshape, retype, other_facts, fewer, more, no_digest]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_written_is_the_name_the_dtype_the_shape_and_the_facts(path, change):
    header, numbers = split_safetensors(path.read_bytes())
    digests = json.loads(header["__metadata__"]["minift.sha256"])
    change(header, digests)
    header["__metadata__"]["minift.sha256"] = json.dumps(digests)
    path.write_bytes(join_safetensors(json.dumps(header), numbers))
    with pytest.raises(FormatError, match="damaged"):
        everything(path)


def only_the_bytes(name, dtype, shape, data):
    return hashlib.sha256(data).hexdigest()


def no_shape(name, dtype, shape, data):
    return hashlib.sha256(json.dumps([name, dtype]).encode() + data.tobytes()).hexdigest()


def run_together(name, dtype, shape, data):
    """Nothing between the parts: ("a", "1", …) and ("a1", "", …) are the same."""
    return hashlib.sha256(f"{name}{dtype}{shape}".encode() + data.tobytes()).hexdigest()


@pytest.mark.parametrize("wrong", [only_the_bytes, no_shape, run_together])
def test_wrong_digests_are_rejected(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(checksum, "of_tensor", wrong)
    write_safetensors(tmp_path / "f.safetensors", ARRAYS, {"format": "pt", "fact": "step 12"}, {"b"})
    with pytest.raises(AssertionError):
        test_the_entry_is_what_the_formula_says(tmp_path / "f.safetensors")


def test_the_same_content_makes_the_same_file_in_every_process(tmp_path):
    code = "import sys, numpy as np; from minift.io.safetensors_file import write_safetensors as w; "
    code += "w(sys.argv[1], {'a': np.ones(3), 'b': np.ones(2, np.uint8)}, {'format': 'pt', 'x': 'y', 'z': '1'})"
    for name in "12":
        subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert load_file(tmp_path / "1")["a"].tolist() == [1, 1, 1]


def test_views_and_other_byte_orders_are_written_as_they_read(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"view": x[::-1, ::2].T, "big": x.astype(">f4"), "flags": x > 5, "half": x.astype(np.float16)}
    write_safetensors(tmp_path / "f", arrays)
    for name, found in load_file(tmp_path / "f").items():
        assert found.dtype == arrays[name].dtype.newbyteorder("="), name
        np.testing.assert_array_equal(found, arrays[name])
    with pytest.raises(FormatError, match="c: found dtype complex128, needed one of F64"):
        write_safetensors(tmp_path / "f", {"c": np.ones(2, complex)})


def test_other_libraries_pass_over_the_entry(tmp_path):
    """transformers and PEFT load the numbers that stand in the files."""
    import torch
    from peft.utils.save_and_load import load_peft_weights
    from transformers import AutoModelForCausalLM

    fill(tmp_path / "m", MODEL)
    fill(tmp_path / "a", ADAPTER)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    adapter = load_peft_weights(str(tmp_path / "a"), device="cpu")
    for found, path in ((dict(model.named_parameters()), "m/model"), (adapter, "a/adapter_model")):
        file = SafetensorsFile(tmp_path / f"{path}.safetensors")
        with safe_open(file.path, "np") as opened:
            assert "minift.sha256" in opened.metadata()
        assert found.keys() == set(file.names())
        for name, tensor in found.items():
            assert tensor.detach().numpy().tobytes() == file.read(name).tobytes(), name


# --- the files beside the tensors -------------------------------------------------------------------------------------


def check(folder):
    return subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )


def test_sha256sum_checks_a_folder(tmp_path):
    for files in (MODEL, ADAPTER):
        fill(tmp_path / "f", files)
        done = check(tmp_path / "f")
        assert (done.returncode, done.stdout.count(": OK")) == (0, len(files) - 1)
        assert files["SHA256SUMS"].count(b"\n") == len(files) - 1
    with open(tmp_path / "f" / "adapter_model.safetensors", "ab") as file:
        file.write(b"\0")
    assert "adapter_model.safetensors: FAILED" in check(tmp_path / "f").stdout


def test_a_changed_configuration_is_said_and_read(tmp_path):
    """A number that is still a number: nothing else could notice it. And people may change it."""
    alpha = json.loads(ADAPTER["adapter_config.json"])["lora_alpha"]
    changed = ADAPTER["adapter_config.json"].replace(b'"lora_alpha": 3', b'"lora_alpha": 7')
    fill(tmp_path / "a", ADAPTER | {"adapter_config.json": changed})
    with pytest.warns(UserWarning, match=r"a/adapter_config\.json: not as it was written.*damaged.*delete its line"):
        assert load_adapter(tmp_path / "a").lora_alpha == 7 != alpha
    lines = ADAPTER["SHA256SUMS"].splitlines(keepends=True)
    kept = b"".join(line for line in lines if b"adapter_config" not in line)
    fill(tmp_path / "a", ADAPTER | {"adapter_config.json": changed, "SHA256SUMS": kept})
    assert load_adapter(tmp_path / "a").lora_alpha == 7  # and no warning, which would be an error here
    fill(tmp_path / "m", MODEL | {"config.json": MODEL["config.json"] + b" "})
    with pytest.warns(UserWarning, match=r"m/config\.json: not as it was written"):
        load_model(tmp_path / "m")


def test_every_text_file_of_a_tokenizer_is_looked_at(tmp_path, tokenizer):
    from minift.io import load_tokenizer

    with atomic_folder(tmp_path / "t") as new:
        tokenizer.save(new)
    load_tokenizer(tmp_path / "t")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        kept = (tmp_path / "t" / name).read_bytes()
        (tmp_path / "t" / name).write_bytes(kept + b" ")
        with pytest.warns(UserWarning, match=f"t/{name}: not as it was written"):
            load_tokenizer(tmp_path / "t")
        (tmp_path / "t" / name).write_bytes(kept)


@pytest.mark.parametrize("sums", [b"", b"\xff\0", b"config.json", b"  config.json  x\n" * 99, b"ab *config.json\n"])
def test_sums_that_say_nothing_are_no_hindrance(tmp_path, sums):
    fill(tmp_path / "m", MODEL | {"SHA256SUMS": sums})
    load_model(tmp_path / "m")
