"""Adapters of mlx-lm against y = x Wᵀ + scale · (x lora_a) lora_b in float64; mlx itself needs Apple's machines."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import assert_same_bits

from minift.conformance import bounds
from minift.io import FormatError, load_mlx_adapter, mlx_adapter, save_mlx_adapter
from minift.models import llama
from minift.nn.weight import replace, trainable
from minift.peft import lora

CONFIG = llama.Config(23, 12, 20, 3, 4, 2, 6)  # q_proj is (24, 12), v_proj (12, 12), down_proj (12, 20)
Q, V, DOWN = (f"model.layers.{{}}.{m}" for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


@pytest.fixture
def params(rng):
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in llama.shapes(CONFIG).items()}


def write(folder, rng, paths, sizes, rank=3, **changes):
    """What mlx-lm writes: its own names, shapes and configuration."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for path, (d_out, d_in) in zip(paths, sizes, strict=True):
        tensors[f"{path}.lora_a"] = rng.standard_normal((d_in, rank)).astype(np.float32)
        tensors[f"{path}.lora_b"] = rng.standard_normal((rank, d_out)).astype(np.float32)
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    values = {
        "batch_size": 4,  # the settings of a training run are there too
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": rank, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
        "num_layers": 2,
    } | changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return tensors


LAST_TWO = [Q.format(1), DOWN.format(1), Q.format(2), DOWN.format(2)]
SIZES = [(24, 12), (12, 20)] * 2


def check_formula(adapter, params, files, scale, rng):
    """Each adapted layer computes the formula on what lies in the files, within the bound of the product."""
    carried = lora.insert(params, adapter)
    adapted = {name.rpartition(".")[0] for name in files}
    assert {n.removesuffix(".weight") for n, w in carried.items() if isinstance(w, lora.LoRA)} == adapted
    for path in adapted:
        W = params[f"{path}.weight"]
        a, b = (files[f"{path}.{part}"].astype(float) for part in ("lora_a", "lora_b"))
        x = rng.standard_normal((4, W.shape[1])).astype(np.float32)
        exact = x.astype(float) @ W.T.astype(float) + scale * (x.astype(float) @ a) @ b
        y, _ = carried[f"{path}.weight"].linear(x)
        # one rounding of scale = alpha / r, one each of a matrix that a quotient went into
        allowed = bounds.lora(x.astype(float), W, a.T, b.T, scale, np.float32) * (1 + 1e-6)
        extra = 2 * bounds.unit_roundoff(np.float32) * abs(scale) * (np.abs(x) @ np.abs(a)) @ np.abs(b)
        assert (np.abs(y - exact) <= allowed + extra).all()


def test_reads_what_mlx_writes(tmp_path, params, rng):
    files = write(tmp_path / "m", rng, LAST_TWO, SIZES)
    adapter = load_mlx_adapter(tmp_path / "m", params)
    check_formula(adapter, params, files, 20.0, rng)
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora) == (3, 60.0, False)
    assert set(adapter.target_modules) == set(LAST_TWO)
    assert_same_bits(load_mlx_adapter(tmp_path / "m").arrays, adapter.arrays)


def test_the_defaults_of_mlx(tmp_path, params, rng):
    """Without keys, a Llama's queries and values; without a positive number of blocks, all of them."""
    every = [module.format(i) for i in range(3) for module in (Q, V)]
    settings = {"rank": 2, "scale": 0.5}
    files = write(tmp_path / "m", rng, every, [(24, 12), (12, 12)] * 3, 2, num_layers=-1, lora_parameters=settings)
    adapter = load_mlx_adapter(tmp_path / "m", params)
    check_formula(adapter, params, files, 0.5, rng)
    assert adapter.target_modules == ("q_proj", "v_proj")


def made_here(params, rng, **settings):
    carried = lora.attach(params, ["q_proj", "down_proj"], r=3, lora_alpha=7, rng=rng, **settings)
    random = {name: rng.standard_normal(a.shape).astype(np.float32) for name, a in trainable(carried).items()}
    return lora.detach(replace(carried, random))[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.25},
        {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {r"layers\.1\..*": 2.5}},
        {"use_rslora": True, "rank_pattern": {r"layers\.0\..*q_proj": 1}},
    ],
)
def test_what_we_write_computes_the_formula(tmp_path, params, rng, settings):
    adapter = made_here(params, rng, **settings)
    save_mlx_adapter(tmp_path / "m", adapter)
    values = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    files = load_file(tmp_path / "m" / "adapters.safetensors")
    inner = values["lora_parameters"]
    assert values["fine_tune_type"] == "lora"
    assert inner["rank"] == max(adapter.ranks.values())
    for path in adapter.ranks:
        d_out, d_in = params[f"{path}.weight"].shape
        assert files[f"{path}.lora_a"].shape == (d_in, inner["rank"])
        assert files[f"{path}.lora_b"].shape == (inner["rank"], d_out)
        assert path in inner["keys"]
    check_formula(adapter, params, files, inner["scale"], rng)
    again = load_mlx_adapter(tmp_path / "m", params)
    check_formula(again, params, files, inner["scale"], rng)
    assert again.lora_dropout == adapter.lora_dropout


def test_one_rank_and_one_scale_stay_bit_for_bit(tmp_path, params, rng):
    adapter = dataclasses.replace(made_here(params, rng), over_nf4=True)
    save_mlx_adapter(tmp_path / "m", adapter)
    again = load_mlx_adapter(tmp_path / "m", params)
    assert_same_bits(again.arrays, adapter.arrays)
    assert {**vars(again), "arrays": 0, "lora_alpha": 0} == {**vars(adapter), "arrays": 0, "lora_alpha": 0}
    assert again.lora_alpha == pytest.approx(7, rel=2**-52)  # 7 / 3 · 3


# --- refusals ---------------------------------------------------------------------------------------------------------

PARAMETERS = {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type: found 'dora', needed 'lora'"),
        ({"fine_tune_type": "full"}, "fine_tune_type: found 'full'"),
        ({"lora_parameters": None}, "lora_parameters: found None, needed an object"),
        ({"lora_parameters": PARAMETERS | {"alpha": 16}}, "alpha: found 16, needed it unset: early mlx-lm"),
        ({"lora_parameters": PARAMETERS | {"rank": 4}}, r"lora_.: found shape .*, needed \((in, 4|4, out)\)"),
        ({"lora_parameters": PARAMETERS | {"rank": 0}}, "rank: found 0"),
        ({"lora_parameters": PARAMETERS | {"scale": 0}}, "scale: found 0"),
        ({"lora_parameters": PARAMETERS | {"scale": 1e308}}, "scale: found 1e.308, needed a number whose product"),
        ({"lora_parameters": {"rank": 3}}, "scale: found nothing"),
        ({"lora_parameters": PARAMETERS | {"dropout": 1}}, "dropout: found 1"),
        ({"lora_parameters": PARAMETERS | {"keys": []}}, r"keys: found \[\]"),
        ({"lora_parameters": PARAMETERS | {"keys": ["self_attn.q_proj"]}}, "down_proj.lora_.: found a surplus tensor"),
        ({"num_layers": None}, "num_layers: found None"),
        ({"num_layers": 3}, r"layers.0.*lora_a: found nothing \(4 tensors are missing\)"),
        (
            {"num_layers": 1},
            "layers.1.*lora_.: found a surplus tensor, .* in the last 1 block",
        ),
    ],
)
def test_refuses_a_wrong_configuration(tmp_path, params, rng, changes, message):
    write(tmp_path / "m", rng, LAST_TWO, SIZES, **changes)
    with pytest.raises(FormatError, match=message):
        load_mlx_adapter(tmp_path / "m", params)


A, B = f"{Q.format(1)}.lora_a", f"{Q.format(1)}.lora_b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "found no tensors"),
        (lambda t: t.pop(A), "lora_a: found nothing, needed the other half"),
        (lambda t: (t.pop(A), t.pop(B)), r"lora_a: found nothing \(2 tensors are missing\)"),
        (lambda t: t.update({A: t[A].T}), r"lora_a: found shape \(3, 12\), needed \(in, 3\)"),
        (lambda t: t.update({A: t[A][:-1]}), r"lora_a: found shape \(11, 3\), needed \(12, r\)"),
        (lambda t: t.update({B: t[B][:, :-1]}), r"lora_b: found shape \(3, 23\), needed \(r, 24\)"),
        (lambda t: t.update({B: t[B].reshape(-1)}), r"lora_b: found shape \(72,\)"),
        (lambda t: t.update({B: t[B] * np.nan}), "lora_b: found nan"),
        (lambda t: t.update({B: t[B].astype(np.int32)}), "lora_b: found dtype I32"),
        (lambda t: t.update({f"{Q.format(1)}.m": t[B][0]}), "q_proj.m: found a surplus tensor"),
        (lambda t: t.update({"lora_a": t[A]}), "lora_a: found a surplus tensor"),
    ],
)
def test_refuses_wrong_tensors(tmp_path, params, rng, change, message):
    tensors = write(tmp_path / "m", rng, LAST_TWO, SIZES)
    change(tensors)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, tmp_path / "m" / "adapters.safetensors")
    with pytest.raises(FormatError, match=message):
        load_mlx_adapter(tmp_path / "m", params)


def test_refuses_to_write(tmp_path, params, rng):
    adapter = made_here(params, rng)
    half = {name: array for name, array in adapter.arrays.items() if name != f"{Q.format(1)}.lora_B.weight"}
    for wrong, message in (
        (
            made_here(params, rng, modules_to_save=["lm_head"]),
            "lm_head: found a weight trained in full, ",
        ),
        (dataclasses.replace(adapter, arrays={}), "found no tensors"),
        (dataclasses.replace(adapter, arrays=half), "lora_B.weight: found nothing"),
        (dataclasses.replace(adapter, arrays={n: a * np.nan for n, a in adapter.arrays.items()}), "found nan"),
    ):
        with pytest.raises(FormatError, match=message):
            save_mlx_adapter(tmp_path / "m", wrong)
        assert not (tmp_path / "m").exists()
    save_mlx_adapter(tmp_path / "m", adapter)
    with pytest.raises(FormatError, match="overwrite=True"):
        save_mlx_adapter(tmp_path / "m", adapter)
    save_mlx_adapter(tmp_path / "m", adapter, overwrite=True)


# --- wrong versions ---------------------------------------------------------------------------------------------------


def scale_for_alpha(adapter):
    """As if `scale` were α, to be divided by the rank."""
    return dataclasses.replace(adapter, lora_alpha=adapter.lora_alpha / adapter.r)


def not_transposed(adapter):
    """The same numbers, read row by row into the other shape."""
    arrays = {n: np.ascontiguousarray(a.T).reshape(a.shape) for n, a in adapter.arrays.items()}
    return dataclasses.replace(adapter, arrays=arrays)


@pytest.mark.parametrize("wrong", [scale_for_alpha, not_transposed])
def test_a_wrong_reader_is_noticed(tmp_path, params, rng, wrong):
    files = write(tmp_path / "m", rng, LAST_TWO, SIZES)
    adapter = load_mlx_adapter(tmp_path / "m", params)
    with pytest.raises(AssertionError):
        check_formula(wrong(adapter), params, files, 20.0, rng)


def first_blocks(path, tensors, keys, blocks, params):
    """`num_layers` counted from the bottom."""
    assert all(int(name.split(".")[2]) < blocks for name in tensors)


def test_counting_blocks_from_the_bottom_is_noticed(tmp_path, params, rng, monkeypatch):
    monkeypatch.setattr(mlx_adapter, "_check_against", first_blocks)
    with pytest.raises(AssertionError):
        test_reads_what_mlx_writes(tmp_path, params, rng)
