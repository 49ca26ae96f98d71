"""safetensors and bfloat16, against torch and the safetensors library."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import assert_same_bits

from minift.io import FormatError
from minift.io.safetensors_file import SafetensorsFile, write_safetensors
from minift.quant.sixteen import from_bfloat16, to_bfloat16


def torch_bfloat16(x):
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()


def same_bfloat16(ours, x):
    """Equal bits; where x is NaN any NaN, since torch has one and IEEE has many."""
    theirs = torch_bfloat16(x)
    nan = np.isnan(x)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(from_bfloat16(ours[nan])).all()


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_rounding_of_any_bits_is_torchs(bits):
    x = np.array(bits, np.uint32).view(np.float32)
    same_bfloat16(to_bfloat16(x), x)


def test_rounding_of_every_tie_and_its_neighbors():
    """All 65,536 bfloat16 values, the midpoints above them, and one float32 step to either side of a midpoint."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper | np.uint32(lower)).view(np.float32)
        same_bfloat16(to_bfloat16(x), x)
    exact = np.arange(65536, dtype=np.uint16)
    finite = np.isfinite(from_bfloat16(exact))
    np.testing.assert_array_equal(to_bfloat16(from_bfloat16(exact))[finite], exact[finite])


def truncate(x):
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def ties_up(x):
    return ((x.view(np.uint32).astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)


@pytest.mark.parametrize("wrong", [truncate, ties_up])
def test_wrong_roundings_are_rejected(wrong):
    x = np.array([0x3F808000, 0x3F80C000], np.uint32).view(np.float32)  # a tie to even, and above a tie
    same_bfloat16(to_bfloat16(x), x)
    with pytest.raises(AssertionError):
        same_bfloat16(wrong(x), x)


def test_scalars_views_and_empty_arrays(rng):
    for x in (
        np.array(1.1, np.float32),
        np.ones((3, 0), np.float32),
        rng.standard_normal((4, 6), np.float32)[:, ::2].T,
    ):
        assert to_bfloat16(x).shape == x.shape
        np.testing.assert_array_equal(to_bfloat16(x), torch_bfloat16(np.ascontiguousarray(x)).reshape(x.shape))


def test_reads_what_torch_writes(tmp_path, rng):
    dtypes = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int64,
        torch.bool,
    ]
    tensors = {str(d): torch.from_numpy(rng.standard_normal((3, 5)) * 9).to(d) for d in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt", "é": "ü"})
    file = SafetensorsFile(tmp_path / "f.safetensors")
    assert file.metadata == {"format": "pt", "é": "ü"} and sorted(file.names()) == sorted(tensors)
    expected = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}
    assert_same_bits({n: file.read(n) for n in tensors}, expected)


def test_torch_reads_what_we_write(tmp_path, rng):
    x = rng.standard_normal((4, 6)).astype(np.float32)
    arrays = {"a": x, "view": x[::2, ::-1].T, "b": to_bfloat16(x), "scalar": np.array(3.0)}
    arrays["u"] = (x > 0).astype(np.uint8)
    write_safetensors(tmp_path / "f.safetensors", arrays, {"k": "v"}, bfloat16={"b"})
    found = load_file(tmp_path / "f.safetensors")
    assert torch.equal(found.pop("b"), torch.from_numpy(x).to(torch.bfloat16))
    for name, t in found.items():
        assert t.numpy().dtype == arrays[name].dtype and t.shape == arrays[name].shape
        np.testing.assert_array_equal(t.numpy(), arrays[name])
    assert SafetensorsFile(tmp_path / "f.safetensors").metadata == {"k": "v"}


def raw_file(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{", "needed a complete safetensors file"),
        (b"[]", "needed a complete safetensors file"),
        ({"a": F32 | {"dtype": "X9"}}, "needed a complete safetensors file"),
        ({"a": F32 | {"shape": [3]}}, "needed a complete safetensors file"),
        ({"a": F32 | {"shape": [2**40, 2**40]}}, "needed a complete safetensors file"),
        ({"a": F32 | {"data_offsets": [0, 12]}}, "needed a complete safetensors file"),
        ({"a": F32, "b": F32}, "needed a complete safetensors file"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), "key 'a' twice"),
        (json.dumps({"a": F32}).encode() + b" " * 10_000_000, "a header of 10,0.. bytes|header of"),
    ],
)
def test_refuses_malformed_headers(tmp_path, header, message):
    raw_file(tmp_path / "f.safetensors", header)
    with pytest.raises(FormatError, match=rf"f.safetensors: .*({message})"):
        SafetensorsFile(tmp_path / "f.safetensors")


@given(at=st.integers(0, 199), byte=st.integers(0, 255))
def test_damage_is_refused_or_read(tmp_path_factory, at, byte):
    """One byte changed anywhere: a FormatError, or a file whose every tensor can be read. Never anything else."""
    path = tmp_path_factory.mktemp("d") / "f.safetensors"
    save_file({"aa": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
        for name in file.names():
            assert file.read(name).shape == file.shape(name)
    except FormatError as error:
        assert str(path) in str(error)
