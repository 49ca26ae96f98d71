"""The loop with moments in 8 bits and in pages: checkpoints hold them as they are, runs go on in the same bits."""

import dataclasses
import json

import numpy as np
import pytest
from small_run import SETTINGS

from minift.data.batches import batch_indices, pad
from minift.io import FormatError
from minift.io.safetensors_file import SafetensorsFile, write_safetensors
from minift.models import llama
from minift.nn.weight import trainable
from minift.optim.adamw8bit import AdamW8bit, zero_moments
from minift.train import checkpoint, sft
from minift.train.loop import Settings, fit

CONFIG = llama.Config(300, 16, 24, 1, 4, 2, 4, tie_word_embeddings=True)
TABLE = "model.embed_tokens.weight"  # 4,800 numbers; everything else has fewer than 4,096
ARRAYS = llama.initialize(CONFIG, np.random.default_rng(0), std=0.3)
KINDS = ("adamw8bit", "paged-adamw8bit")


def batches(step):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 300, rng.integers(3, 9)).astype(np.int32) for _ in range(11)]
    return [pad([(rows[i], rows[i]) for i in batch_indices(11, 4, 3, step - 1)])]


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def run(optimizer, killed_at=None, settings=SETTINGS, **options):
    def report(record):
        if record["step"] == killed_at and "loss" in record:
            raise Killed

    settings = dataclasses.replace(settings, optimizer=optimizer)
    return fit(ARRAYS, lambda p, b, n, key: sft.loss(p, b, CONFIG, n), batches, settings, report=report, **options)


def load(folder):
    identity = json.loads(SafetensorsFile(folder / checkpoint.NAME).metadata["minift"])["identity"]
    moments = {name: zero_moments(a) for name, a in ARRAYS.items()}
    return checkpoint.load(folder, identity, ARRAYS, moments)


def raw(folder, without=()):
    file = SafetensorsFile(folder / checkpoint.NAME)
    return {name: (file.dtype(name), file.raw(name).tobytes()) for name in file.names() if name not in without}


@pytest.mark.parametrize("optimizer", KINDS)
@pytest.mark.parametrize("killed_at", [4, 8])
def test_resumed_training_ends_in_the_same_bits(tmp_path, optimizer, killed_at):
    whole = run(optimizer, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        run(optimizer, killed_at, folder=tmp_path / "cut")
    assert load(tmp_path / "cut").step == (killed_at - 1) // 3 * 3
    resumed = run(optimizer, folder=tmp_path / "cut", resume=True)
    for name, array in trainable(whole.params).items():
        assert array.tobytes() == trainable(resumed.params)[name].tobytes(), name
    assert raw(tmp_path / "whole") == raw(tmp_path / "cut")


def test_pages_change_no_bit(tmp_path):
    """Nor does another budget for the rest of a run."""
    plain = run("adamw8bit", folder=tmp_path / "plain")
    tight = dataclasses.replace(SETTINGS, page_budget=20_000)
    with pytest.raises(Killed):
        run("paged-adamw8bit", 5, tight, folder=tmp_path / "paged")
    paged = run(
        "paged-adamw8bit",
        settings=dataclasses.replace(tight, page_budget=11_000),
        folder=tmp_path / "paged",
        resume=True,
    )
    assert raw(tmp_path / "plain") == raw(tmp_path / "paged")
    assert plain.records[-2]["loss"] == paged.records[-2]["loss"]
    assert plain.optimizer_bytes == paged.optimizer_bytes
    assert plain.paging == {}
    assert paged.paging["budget_bytes"] == 11_000 >= paged.paging["peak_resident_bytes"] > 9_000
    assert paged.paging["page_faults"] > paged.paging["evictions"] > 6


def test_a_checkpoint_holds_codes_and_scales(tmp_path):
    result = run("adamw8bit", folder=tmp_path)
    file = SafetensorsFile(tmp_path / checkpoint.NAME)
    for group in ("first_moment", "second_moment"):
        full = f"{group}/{TABLE}"
        assert (file.dtype(f"{full}.codes"), file.shape(f"{full}.codes")) == ("U8", (4800,))
        assert (file.dtype(f"{full}.absmax"), file.shape(f"{full}.absmax")) == ("F32", (19,))
        assert full not in file.names()
        assert file.dtype(f"{group}/model.norm.weight") == "F32"
    others = sum(a.size for a in ARRAYS.values()) - 4800
    assert result.optimizer_bytes == 2 * 4800 + 8 * 19 + 8 * others
    again = load(tmp_path)
    optimizer = AdamW8bit(step=again.step, m=again.m, v=again.v)
    assert optimizer.nbytes == result.optimizer_bytes


@pytest.mark.parametrize("change", ["missing", "shape", "dtype", "nan"])
def test_damaged_moments_are_refused(tmp_path, change):
    run("adamw8bit", folder=tmp_path)
    path, name = tmp_path / checkpoint.NAME, f"second_moment/{TABLE}.absmax"
    file = SafetensorsFile(path)
    arrays = {n: file.read(n) for n in file.names()}
    absmax = arrays.pop(name)
    found = {
        "shape": absmax[:-1],
        "dtype": absmax.astype(np.float64),
        "nan": np.where(np.arange(19) == 3, np.nan, absmax).astype(np.float32),
    }
    if change in found:
        arrays[name] = found[change]
    write_safetensors(path, arrays, metadata=file.metadata)
    text = {
        "missing": "found nothing, needed an array for everything that learns",
        "shape": r"found float32 \(18,\), needed float32 \(19,\)",
        "dtype": r"found float64 \(19,\), needed float32 \(19,\)",
        "nan": "found nan at flat index 3",
    }[change]
    with pytest.raises(FormatError, match=f"absmax: {text}"):
        run("adamw8bit", folder=tmp_path, resume=True)


def test_a_run_of_another_optimizer_is_not_resumed(tmp_path):
    run("adamw", folder=tmp_path)
    with pytest.raises(FormatError, match=r"optimizer: found 'adamw8bit', needed 'adamw', as the run was started"):
        run("adamw8bit", folder=tmp_path, resume=True)


def test_the_loss_falls_as_with_32_bits():
    settings = dataclasses.replace(SETTINGS, steps=30, keep_best=False)
    losses = {
        kind: [r["loss"] for r in run(kind, settings=settings).records if "loss" in r] for kind in ("adamw", KINDS[0])
    }
    exact, found = map(np.array, losses.values())
    assert exact[-3:].mean() < exact[:3].mean() - 0.5
    assert np.abs(found - exact).max() < 0.02 * exact[0]


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(
        ValueError, match=r"optimizer is 'sgd', needed one of \('adamw', 'adamw8bit', 'paged-adamw8bit'\)"
    ):
        Settings(optimizer="sgd")
    with pytest.raises(ValueError, match="page_budget is 0, needed 1 or more"):
        Settings(page_budget=0)
    with pytest.raises(ValueError, match="does not fit a budget of 100: raise the budget"):
        run("paged-adamw8bit", settings=dataclasses.replace(SETTINGS, page_budget=100))


@pytest.mark.parametrize("optimizer", KINDS)
def test_another_engine_goes_on_with_the_checkpoint(tmp_path, optimizer):
    """From NumPy to torch and back: the files have the same layout, and the losses are those of one engine."""
    engine = pytest.importorskip("minift_kernels.train.engine", reason="needs torch").on("cpu")
    twin = pytest.importorskip("minift_kernels.train.sft", reason="needs torch")

    def in_torch(killed_at=None, **options):
        def report(record):
            if record["step"] == killed_at and "loss" in record:
                raise Killed

        settings = dataclasses.replace(SETTINGS, optimizer=optimizer)
        loss = lambda p, b, n, key: twin.loss(p, b, CONFIG, n)  # noqa: E731
        return fit(ARRAYS, loss, batches, settings, report=report, engine=engine, **options)

    whole = run(optimizer, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        run(optimizer, 5, folder=tmp_path / "cut")
    with pytest.raises(Killed):
        in_torch(8, folder=tmp_path / "cut", resume=True)
    assert raw(tmp_path / "cut").keys() == raw(tmp_path / "whole").keys()
    resumed = run(optimizer, folder=tmp_path / "cut", resume=True)
    assert resumed.optimizer_bytes == whole.optimizer_bytes
    losses = [[r["loss"] for r in result.records if "loss" in r] for result in (whole, resumed)]
    assert np.abs(np.subtract(*losses)).max() <= 1e-5 * losses[0][0]
