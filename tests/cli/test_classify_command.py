"""`minift classify` from the command line: what it says, what it leaves, and what it refuses."""

import json

import numpy as np
import pytest
import transformers

from minift.cli import main
from minift.data.split import is_held_out
from minift.io import load_adapter, load_model
from minift.models import classifier
from minift.nn.weight import trainable
from minift.train import classify


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Animals and tools, told apart by their words."""
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rng = np.random.default_rng(0)
    words = {"animal": ["cat", "dog", "cow", "eats", "sleeps"], "tool": ["saw", "nail", "drill", "cuts", "holds"]}
    lines = {f"the {' '.join(rng.choice(words[label], 4))}": label for _ in range(60) for label in words}
    path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in lines.items()))
    assert any(is_held_out(text, 0.2) for text in lines)
    return path


def run(capsys, data, out, *more):
    code = main(["classify", "--model", "tiny", "--data", str(data), "--out", str(out), "--json", *more])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]) if code == 0 else said


@pytest.mark.parametrize("method", ["features", "head", "lora", "full"])
def test_each_method(method, data, tmp_path, capsys):
    code, summary = run(capsys, data, tmp_path, "--method", method, "--steps", "30")
    assert code == 0
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"] > summary["most_frequent_accuracy"] - 0.1
    assert summary["naive_bayes_accuracy"] > 0.9  # the words say it
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    confusion = np.array(summary["confusion"])
    assert confusion.sum() == summary["held_out"]
    assert np.trace(confusion) == round(summary["accuracy"] * summary["held_out"])
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("loss.png", "confusion.png"))
    assert (tmp_path / {"features": "features", "lora": "adapter"}.get(method, "model")).is_dir()


def test_what_is_saved_is_what_was_measured(data, tmp_path, capsys):
    """The adapter has its head, and of the full model transformers knows the labels."""
    _, summary = run(capsys, data, tmp_path / "l", "--method", "lora", "--steps", "3", "--r", "2")
    config, params = load_model("tiny")
    headed = classifier.with_head(params, config, 2, np.random.default_rng(1))
    assert load_adapter(tmp_path / "l" / "adapter", headed).modules_to_save == ("score",)
    run(capsys, data, tmp_path / "f", "--method", "full", "--steps", "3")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "f" / "model")
    assert loaded.config.id2label == {0: "animal", 1: "tool"} and summary["labels"] == ["animal", "tool"]


@pytest.mark.parametrize("method", ["features", "lora"])
def test_resumed_is_the_same_bits(method, data, tmp_path, capsys, monkeypatch):
    """Ten steps at once, or stopped in the seventh and gone on from the checkpoint after the fifth."""
    options = ["--method", method, "--steps", "10", "--save-every", "5", "--eval-every", "5", "--r", "2"]
    _, whole = run(capsys, data, tmp_path / "a", *options)
    name = {"features": "feature_loss", "lora": "loss"}[method]
    right, seen = getattr(classify, name), set()

    def stops(params, batch, *rest):
        seen.add(trainable(params)[next(iter(trainable(params)))].tobytes())  # another value each step
        if len(seen) == 7:
            raise KeyboardInterrupt
        return right(params, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(classify, name, stops)
        assert run(capsys, data, tmp_path / "b", *options)[0] == 130
    _, again = run(capsys, data, tmp_path / "b", *options, "--resume")
    weights = {"features": "features/classifier.safetensors", "lora": "adapter/adapter_model.safetensors"}[method]
    assert (tmp_path / "b" / weights).read_bytes() == (tmp_path / "a" / weights).read_bytes()
    assert again["accuracy"] == whole["accuracy"]
    records = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 11))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seq-len", "2"], "seq_len is 2, needed 3 or more"),
        (["--r", "0"], "r is 0, needed 1 or more"),
        (["--model", "nowhere"], "nowhere: found nothing there"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--resume"], "nothing|no checkpoint"),
    ],
)
def test_what_is_refused(more, message, data, tmp_path, capsys):
    code, said = run(capsys, data, tmp_path / "o", *more)
    assert code == 2
    assert any(part in said.err for part in message.split("|")), said.err
    assert not (tmp_path / "o" / "features").exists()


def test_a_folder_of_something_else_is_not_replaced(data, tmp_path, capsys):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "thesis.tex").write_text("years of work")
    code, said = run(capsys, data, tmp_path, "--steps", "1")
    assert code == 2 and "thesis.tex" in said.err
