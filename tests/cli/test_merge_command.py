"""`minift merge`: the way that is right by default, the ways that one may choose, and what it says that each loses."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minift.data import stdlib_docs
from minift.io import load_model, load_tokenizer, save_adapter
from minift.io.huggingface import as_stored
from minift.models import llama
from minift.nn.weight import dense, replace, trainable
from minift.peft import lora, merge, qlora
from minift.quant.nf4 import NF4Tensor

f64 = np.float64


@pytest.fixture
def adapted(tmp_path, plain):
    """adapted(over_nf4) -> the options of `merge`, original weights, the unmerged model: α ≠ r, as if trained."""

    def adapted(over_nf4, tied=True):
        folder, config, original = plain(tied)
        rng = np.random.default_rng(1)
        base = qlora.quantize(original) if over_nf4 else original
        attached = lora.attach(base, ["q_proj", "o_proj", "up_proj", "down_proj"], r=4, lora_alpha=7, rng=rng)
        learned = {n: (0.05 * rng.standard_normal(a.shape)).astype("f") for n, a in trainable(attached).items()}
        trained = replace(attached, learned)
        save_adapter(tmp_path / "adapter", lora.detach(trained)[1])
        options = ["merge", "--model", folder, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--json"]
        return options, config, original, trained

    return adapted


def expected_merge(way, trained, original):
    return {
        "dequantized": lambda: merge.merge_dequantized(trained),
        "original": lambda: merge.merge_original(trained, original),
        "requantized": lambda: merge.merge_requantized(trained),
    }[way]()


@pytest.mark.parametrize("over_nf4", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table(call, adapted, over_nf4, dtype):
    """Every figure again, by hand: errors of the weights in float64, logits and loss of each model, bytes."""
    options, config, original, trained = adapted(over_nf4)
    status, result, captured = call(*options, "--dtype", dtype)
    exact = "dequantized" if over_nf4 else "original"
    assert (status, result["into"], result["exact"], result["merged_layers"]) == (0, exact, exact, 16)
    assert list(result["ways"]) == ["dequantized", "original", "requantized"]
    tokenizer = load_tokenizer("tiny")
    sections = stdlib_docs.embedded().held_out_text
    order = np.random.default_rng(0).permutation(len(sections))[:4]
    texts = [np.array(tokenizer.encode(sections[i].text)[:64]) for i in order]

    def logits(params):
        wide = {name: dense(w).astype(f64) for name, w in params.items()}
        return [llama.forward(wide, text[None], config, recompute=True)[0][0] for text in texts]

    def loss(found):
        p = [np.exp(z[:-1]) / np.exp(z[:-1]).sum(axis=1, keepdims=True) for z in found]
        right = [p[np.arange(len(text) - 1), text[1:]] for p, text in zip(p, texts, strict=True)]
        return -np.log(np.concatenate(right)).mean()

    unmerged = logits(trained)
    assert result["unmerged_loss"] == pytest.approx(loss(unmerged), rel=1e-5)
    adapters = {n: w for n, w in trained.items() if isinstance(w, lora.LoRA)}
    learned = {n: 7 / 4 * (w.B.astype(f64) @ w.A.astype(f64)) for n, w in adapters.items()}
    for way, row in result["ways"].items():
        merged = expected_merge(way, trained, original)
        stored = as_stored(merged, dtype)
        lost = [stored[n] - (w.base.dense().astype(f64) + learned[n]) for n, w in adapters.items()]
        norms = [np.sqrt(sum(np.square(x).sum() for x in part)) for part in (lost, learned.values())]
        assert row["error"] == pytest.approx(norms[0] / norms[1], rel=1e-6)
        found = logits(stored)
        moved = np.concatenate([np.abs(a - b) for a, b in zip(found, unmerged, strict=True)]).mean()
        assert row["logits"] == pytest.approx(moved, rel=1e-3, abs=1e-5)
        assert row["loss"] == pytest.approx(loss(found), rel=1e-5)
        assert f"{way:<12} " in captured.out
    errors = {way: row["error"] for way, row in result["ways"].items()}
    assert errors[exact] == min(errors.values()) < (1e-6 if dtype == "float32" else 0.1)
    assert errors["requantized"] > 0.1 and max(errors.values()) > 0.2
    said = " exact" if dtype == "float32" else " exact, rounded"
    assert [line.split()[0] for line in captured.out.splitlines() if line.rstrip().endswith(said)] == [exact]
    assert f"wrote {options[-2]}: the {exact} way, {dtype}\n" in captured.out
    assert ("--base nf4" in captured.out) is not over_nf4  # an adapter that says nothing may be one of QLoRA


@pytest.mark.parametrize("way", ["dequantized", "original", "requantized"])
@pytest.mark.parametrize("over_nf4", [True, False])
def test_each_way_is_written(call, tmp_path, adapted, over_nf4, way):
    options, _, original, trained = adapted(over_nf4)
    status, result, _ = call(*options, "--into", way, "--eval-examples", "0")
    assert (status, result["into"], result["unmerged_loss"]) == (0, way, None)
    assert all(row.keys() == {"error", "bytes"} for row in result["ways"].values())
    expected = expected_merge(way, trained, original)
    _, written = load_model(tmp_path / "out", keep_quantized=True)
    for name, w in written.items():
        assert np.array_equal(dense(w), dense(expected[name])), name
        assert isinstance(w, NF4Tensor) is (way == "requantized" and name.split(".")[-2] in llama.LINEAR_MODULES)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < size - result["ways"][way]["bytes"] < 30_000  # the header
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    kinds = {type(module).__name__ for name, module in loaded.named_modules() if name.endswith("q_proj")}
    assert kinds == ({"Linear4bit"} if way == "requantized" else {"Linear"})


def test_scales_in_8_bits(call, tmp_path, adapted):
    options, _, _, trained = adapted(over_nf4=True)
    sizes = []
    for double in (False, True):
        more = ["--into", "requantized", "--overwrite", "--eval-examples", "0", *(["--double-quant"] if double else [])]
        sizes.append(call(*options, *more)[1]["ways"]["requantized"]["bytes"])
        _, written = load_model(tmp_path / "out", keep_quantized=True)
        expected = merge.merge_requantized(trained, use_double_quant=double)
        for name, w in written.items():
            if isinstance(w, NF4Tensor):
                assert np.array_equal(w.codes, expected[name].codes)
                assert isinstance(w.absmax, np.ndarray) is not double
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_reads_the_merged_model(call, tmp_path, adapted, tied, dtype):
    options, config, _, trained = adapted(over_nf4=True, tied=tied)
    assert call(*options, "--dtype", dtype, "--eval-examples", "0")[0] == 0
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == getattr(torch, dtype) and loaded.config.tie_word_embeddings is tied
    expected = as_stored(merge.merge_dequantized(trained), dtype)
    found = {name: p.detach().float().numpy() for name, p in loaded.named_parameters()}
    assert found.keys() == expected.keys() and (llama.HEAD in found) is not tied
    assert all(np.array_equal(found[name], w) for name, w in expected.items())
    assert load_model(tmp_path / "out")[0] == config


def test_what_peft_says_nothing_of_the_user_can_say(call, tmp_path, adapted):
    """An adapter of PEFT's does not tell what it was trained over; --base nf4 does, and then the default follows."""
    options, _, original, trained = adapted(over_nf4=False)
    by_default = call(*options)[1]
    assert (by_default["exact"], by_default["into"]) == ("original", "original")
    told = call(*options, "--base", "nf4", "--overwrite")[1]
    assert (told["exact"], told["into"]) == ("dequantized", "dequantized")
    over_nf4 = lora.insert(qlora.quantize(original), lora.detach(trained)[1])
    _, written = load_model(tmp_path / "out")
    assert all(np.array_equal(written[n], dense(w)) for n, w in merge.merge_dequantized(over_nf4).items())


def test_an_adapter_that_does_nothing_has_no_share_to_lose(call, tmp_path, plain):
    folder, _, params = plain()
    fresh = lora.attach(qlora.quantize(params), ["q_proj"], r=2, rng=np.random.default_rng(0))
    save_adapter(tmp_path / "fresh", lora.detach(fresh)[1])
    options = ["--model", folder, "--adapter", tmp_path / "fresh", "--out", tmp_path / "out", "--eval-examples", "1"]
    status, result, captured = call("merge", *options, "--json")
    assert status == 0
    assert (result["ways"]["dequantized"]["error"], result["ways"]["original"]["error"]) == (0, None)
    assert "—" in captured.out and "Infinity" not in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-examples", "-1"], "eval_examples is -1, needed 0 or more"),
        (["--model", "tiny"], "adapter_model.safetensors: "),
        (["--dtype", "float16"], "the weights as float16: model.norm.weight: found inf"),
    ],
)
def test_refusals(call, tmp_path, adapted, plain, options, message):
    command, config, original, _ = adapted(over_nf4=True)
    if "tiny" in options:
        save_adapter(tmp_path / "adapter", lora.Adapter({**_other()}, 1, 1.0, ("q_proj",)), overwrite=True)
    if "float16" in options:
        from minift.io import save_model

        huge = original | {"model.norm.weight": original["model.norm.weight"] * 1e6}
        save_model(tmp_path / "plain", config, huge, load_tokenizer("tiny"), overwrite=True)
    status, _, captured = call(*command, *options)
    assert status == 2
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def _other():
    """An adapter of a wider model."""
    name = "model.layers.0.self_attn.q_proj."
    return {f"{name}lora_A.weight": np.ones((1, 256), "f"), f"{name}lora_B.weight": np.ones((256, 1), "f")}
