"""The studies of bits: quantization error, outliers, and a model's loss by data type, at small sizes."""

import json
import math

import numpy as np
import pytest

from minift.cli import main
from minift.io.safetensors_file import write_safetensors
from minift.models import llama
from minift.nn.weight import Frozen
from minift.studies import data_types, outliers, quantization
from minift.studies.formats import Format, encoder_layers, round_trip, share_on_a_grid
from quant.quant_checks import refused

f32 = np.float32
CONFIG = llama.Config(300, 32, 48, 2, 2, 1, 16, tie_word_embeddings=True)


def silent(text):
    pass


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        (Format("float32"), 32),
        (Format("bfloat16"), 16),
        (Format("int8", "row"), 8 + 32 / 128),
        (Format("int4", "tensor"), 4 + 32 / 8192),
        (Format("affine int4", 32), 4 + 64 / 32),
        (Format("nf4", 64), 4.5),
        (Format("nf4 + DQ", 64), 4 + 8 / 64 + (32 + 32) / 8192),  # 128 scales: one nested block, and the offset
    ],
)
def test_bits_and_errors_of_a_format(how, bits, rng):
    """Bits as counted by hand; an error that is zero for float32 alone, and halves with a bit more."""
    w = rng.standard_normal((64, 128)).astype(f32)
    w_hat, found = round_trip(w, how)
    assert found == bits and w_hat.shape == w.shape and w_hat.dtype == np.float32
    error = np.linalg.norm(w_hat - w) / np.linalg.norm(w)
    assert (error == 0) == (how.data_type == "float32")
    assert error < {32: 1e-9, 16: 0.003, 8: 0.01, 4: 0.25, 6: 0.1}[int(bits)]


def test_names_of_formats():
    assert str(Format("nf4", 64)) == "nf4, block 64" and str(Format("int8", "row")) == "int8, row"
    assert str(Format("float32")) == "float32"
    refused(lambda: round_trip(np.zeros((2, 2), f32), Format("int3", 2)), "data type 'int3', needed one of float32")


def test_a_grid_is_seen(rng):
    normal = rng.standard_normal((8, 100)).astype(f32)
    assert share_on_a_grid({"a": normal}) == 0
    on_grid = round_trip(normal, Format("affine int4", 100))[0]
    assert share_on_a_grid({"a": on_grid}) == 1
    assert share_on_a_grid({"a": on_grid, "b": normal}) == 0.5 and share_on_a_grid({}) == 0


# --- quantization -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path, rng):
    """A small encoder instead of MiniLM, few formats."""
    tensors = {
        "encoder.layer.0.attention.self.query.weight": rng.standard_normal((64, 64)).astype(f32),
        "encoder.layer.0.attention.self.query.bias": np.zeros(64, f32),
        "embeddings.word_embeddings.weight": np.ones((9, 64), f32),
    }
    (tmp_path / "encoder").mkdir()
    write_safetensors(tmp_path / "encoder" / "model.safetensors", tensors)
    assert list(encoder_layers(tmp_path / "encoder")) == ["encoder.layer.0.attention.self.query.weight"]
    monkeypatch.setattr(quantization, "minilm_folder", lambda: tmp_path / "encoder")
    kept = [Format(name, per) for name in ("int4", "nf4", "nf4 + DQ", "affine int4") for per in ("tensor", 64)]
    monkeypatch.setattr(quantization, "FORMATS", [Format("bfloat16"), *kept])
    monkeypatch.setattr(quantization, "MOST", 50_000)
    monkeypatch.setattr(quantization, "SIZE", 256)


def test_quantization(small, tmp_path):
    said = []
    records = quantization.run("tiny", 0, said.append)
    assert records == quantization.run("tiny", 0, silent)
    table = {(r["data_type"], r["scale"]): r for r in quantization.rows(records)}
    tiny = "tiny, on a 4-bit grid"
    assert len(table) == 9 and list(table["nf4", "block 64"])[3:] == ["normal", "normal, outliers", "MiniLM", tiny]
    for name in ("int4", "nf4", "affine int4"):
        for kind in ("normal", "normal, outliers", "MiniLM"):
            assert table[name, "block 64"][kind] < table[name, "tensor"][kind]
    assert table["nf4", "block 64"]["normal"] < table["int4", "block 64"]["normal"]
    assert table["nf4", "block 64"][tiny] == 0 < table["int4", "block 64"][tiny]
    assert any("tiny: 100% of its blocks of 32 hold no more than 16 values" in line for line in said)
    one = next(r for r in records if r["data_type"] == "bfloat16")
    assert math.isclose(10 ** (-one["sqnr_db"] / 20), one["relative_error"])
    quantization.draw(records, tmp_path / "q.png")
    assert is_png(tmp_path / "q.png")


def test_quantization_without_a_network(small, monkeypatch):
    def unreachable():
        raise OSError("no route to host")

    monkeypatch.setattr(quantization, "minilm_folder", unreachable)
    said = []
    records = quantization.run("tiny", 0, said.append)
    assert "MiniLM" not in {r["weights"] for r in records}
    assert "without MiniLM, which could not be fetched (no route to host): connect once" in said[0]


# --- outliers ---------------------------------------------------------------------------------------------------------


def test_outliers(monkeypatch, tmp_path):
    monkeypatch.setattr(outliers, "TOKENS", 24)
    monkeypatch.setattr(outliers, "TIMES", (1, 20))
    records = outliers.run("tiny", 0, silent)
    plain, in_x, _, in_w = records[:4]
    assert plain["LLM.int8"] == plain["vector-wise"] and plain["outlier_columns"] == 0
    assert in_x["outlier_columns"] == 4 / 512 and in_w["outlier_columns"] == 0
    assert in_x["LLM.int8"] < in_x["block-wise"] < in_x["vector-wise"] < in_x["per tensor"]
    assert in_w["LLM.int8"] == in_w["vector-wise"] > in_w["block-wise"]
    of_layers = records[4:]
    assert [(r["layer"], r["where"]) for r in of_layers] == [(i, m) for i in range(4) for m in outliers.READERS]
    table = {r["where"]: r for r in outliers.rows(records)}
    assert len(table) == 8 and table["input of o_proj"]["largest"] == max(
        r["largest"] for r in of_layers if r["where"] == "o_proj"
    )
    outliers.draw(records, tmp_path / "o.png")
    assert is_png(tmp_path / "o.png")


def test_watching_changes_nothing(rng):
    x, w = rng.standard_normal((2, 3, 8)).astype(f32), rng.standard_normal((4, 8)).astype(f32)
    records = []
    y, vjp = outliers.Watched(w, "model.layers.7.mlp.up_proj.weight", records).linear(x)
    wanted, wanted_vjp = Frozen(w).linear(x)
    assert y.tobytes() == wanted.tobytes() and vjp(y)[0].tobytes() == wanted_vjp(y)[0].tobytes()
    assert records[0]["where"] == "up_proj" and records[0]["layer"] == 7
    assert records[0]["largest"] == np.abs(x).max()


# --- data types -------------------------------------------------------------------------------------------------------


def test_data_types(monkeypatch, tmp_path):
    for name, value in (("LENGTH", 32), ("ROWS", 3)):
        monkeypatch.setattr(data_types, name, value)
    formats = [Format("float32"), Format("int8", "row"), Format("nf4", 64), Format("int4", "tensor")]
    said = []
    records = data_types.run("tiny", 0, said.append, formats)
    names = data_types.ON_GRID, data_types.OFF_GRID
    assert [(r["model"], r["data_type"]) for r in records] == [(n, f.data_type) for n in names for f in formats]
    assert any("was in 4 bits before" in line for line in said)
    for r in records:
        assert math.isclose(r["perplexity"], math.exp(r["loss"])) and r["tokens"] == 3 * 31
        assert (r["weight_error"] == 0) == (
            r["data_type"] == "float32" or (r["data_type"] == "nf4" and r["model"] == data_types.ON_GRID)
        )
    assert records[2]["increase"] == records[0]["increase"] == 0
    assert abs(records[3]["increase"]) > abs(records[1]["increase"]) > 0
    assert all("tokens" not in r for r in data_types.rows(records))
    data_types.draw(records, tmp_path / "d.png")
    assert is_png(tmp_path / "d.png")


def test_losses_are_of_rows(rng):
    """The mean of the rows is the mean of all tokens, and a row's loss is the cross-entropy of its logits."""
    params = llama.initialize(CONFIG, rng)
    texts = list(rng.integers(0, 300, (3, 12)).astype(np.int32))
    found = data_types.row_losses(params, CONFIG, texts)
    for row, loss in zip(texts, found, strict=True):
        logits = llama.forward(params, row[None], CONFIG)[0][0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(loss, -log_p[np.arange(11), row[1:]].mean(), rtol=1e-5)


def test_the_command(small, tmp_path, capsys):
    assert main(["study", "quantization", "--out", str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == rows
    assert rows[0]["data_type"] == "bfloat16" and is_png(tmp_path / "out" / "quantization.png")


def test_off_the_grid(rng):
    """Each row moves by a tenth of its size, the same for a seed; what is not quantized stays."""
    params = llama.initialize(CONFIG, rng)
    one, other = (data_types.off_the_grid(params, np.random.default_rng(3)) for _ in range(2))
    for name, w in params.items():
        assert one[name].tobytes() == other[name].tobytes() and one[name].dtype == np.float32
        moved = np.linalg.norm(one[name] - w) / np.linalg.norm(w)
        assert 0.09 < moved < 0.11 if "proj" in name else moved == 0
