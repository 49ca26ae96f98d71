"""BERT folders: what transformers writes is read to the bit, what is not BERT is refused with file and key; and
classifiers that transformers and PEFT load, with the same logits."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from small_models import assert_same_bits, config, in_double, torch_llama
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from tokenizers import pre_tokenizers, processors

import peft
from minift.io import FormatError, Tokenizer, is_encoder, load_adapter, load_encoder, save_adapter
from minift.io.classifier import FEATURES, save_classifier, save_feature_classifier
from minift.io.encoder import format_config, parse_config
from minift.io.safetensors_file import SafetensorsFile, write_safetensors
from minift.models import bert, classifier
from minift.nn.weight import dense, replace, trainable
from minift.peft import lora
from minift.train import classify

SIZES = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-9,
}
CONFIG = bert.Config(**SIZES)
TOKENS = np.arange(16).reshape(2, 8) * 7 % 40
LENGTHS = np.array([8, 5])
LABELS = ["ant", "bee", "cat"]


def network(kind=transformers.BertModel, seed=0, **changes):
    torch.manual_seed(seed)
    model = kind(transformers.BertConfig(**SIZES | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    network().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def state(model):
    return {n: p.detach().numpy() for n, p in model.named_parameters()}


def tokenizer():
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"w{i}": i for i in range(4, 40)}
    backend = Backend(backends.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return Tokenizer(backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [transformers.BertModel, transformers.BertForPreTraining], ids=lambda k: k.__name__)
def test_what_transformers_writes_is_read_to_the_bit(tmp_path, kind):
    """Also from a file in which the trunk is called `bert.…`, beside the heads of pre-training."""
    model = network(kind)
    model.save_pretrained(tmp_path)
    found, params = load_encoder(tmp_path)
    assert found == CONFIG and is_encoder(tmp_path)
    assert list(params) == list(bert.shapes(CONFIG))
    whole = state(model)
    trunk = {n.removeprefix("bert."): w for n, w in whole.items() if not n.startswith("cls.")}
    assert_same_bits(params, {name: trunk[name] for name in params})


def test_a_config_comes_back(tmp_path):
    assert parse_config(format_config(CONFIG), "c") == CONFIG
    assert transformers.BertConfig(**format_config(CONFIG)).to_dict().items() >= SIZES.items()


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("model_type", "roberta", "'bert'"),
        ("hidden_act", "gelu_new", "the exact one"),
        ("position_embedding_type", "relative_key", "'absolute'"),
        ("is_decoder", True, "this model is an encoder"),
        ("quantization_config", {"quant_method": "gptq"}, "quantized encoders are not read"),
        ("num_attention_heads", 5, "a multiple of num_attention_heads = 5"),
        ("layer_norm_eps", 0, "a positive finite number"),
        ("num_hidden_layers", 10**12, "no more layers than"),
        ("vocab_size", 41, r"shape \(41, 12\)"),
        ("type_vocab_size", "two", "a whole number"),
    ],
)
def test_a_config_that_is_not_ours(folder, key, value, needed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(FormatError, match=needed):
        load_encoder(folder)


def changed(folder, change):
    file = SafetensorsFile(folder / "model.safetensors")
    arrays = {name: file.read(name).copy() for name in file.names()}
    change(arrays)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    write_safetensors(folder / "model.safetensors", arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("pooler.dense.bias"), r"pooler.dense.bias: found nothing \(1 parameters are missing\)"),
        (lambda a: a.update(extra=np.ones(2, np.float32)), "extra: found a tensor that this model does not have"),
        (lambda a: a.update({"bert.pooler.dense.bias": a["pooler.dense.bias"]}), "the same parameter as"),
        (lambda a: a["pooler.dense.bias"].__setitem__(3, np.nan), "pooler.dense.bias"),
        (lambda a: a.update({"pooler.dense.bias": np.ones(12, np.int32)}), "dtype I32, needed F32 or F16 or BF16"),
        (lambda a: a.update({"pooler.dense.bias": np.ones(11, np.float32)}), r"shape \(11,\), needed shape \(12,\)"),
    ],
)
def test_weights_that_do_not_fit(folder, change, message):
    changed(folder, change)
    with pytest.raises(FormatError, match=message):
        load_encoder(folder)


def test_constants_of_old_files_are_passed_over(folder):
    changed(folder, lambda a: a.update({"embeddings.position_ids": np.arange(16)[None]}))
    assert_same_bits(load_encoder(folder)[1], state(network()))


def test_what_is_no_encoder(tmp_path, folder):
    assert is_encoder("minilm") and is_encoder(folder)
    assert not is_encoder("tiny") and not is_encoder(tmp_path / "nothing") and not is_encoder(folder / "config.json")


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_stands_between_its_special_tokens(tmp_path):
    ours = tokenizer()
    assert ours.encode("w5 w6 nothing") == [5, 6, 1]
    assert ours.encode_framed("w5 w6 nothing") == [2, 5, 6, 1, 3]
    assert ours.encode_framed("w5 w6 nothing", 4) == [2, 5, 6, 3]  # the end is cut, not the frame
    with pytest.raises(ValueError, match="max_length is 2, needed more than the 2 tokens around a text"):
        ours.encode_framed("w5", 2)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.cls_token, again.sep_token, again.mask_token) == ("[CLS]", "[SEP]", None)
    assert again.encode_framed("w5 w6", 4) == [2, 5, 6, 3]
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert peer("w5 w6 w7 w8", truncation=True, max_length=5).input_ids == ours.encode_framed("w5 w6 w7 w8", 5)


def test_without_a_frame_nothing_is_added():
    plain = Tokenizer(Backend(backends.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    assert plain.encode_framed("b") == plain.encode("b") == [1]


# --- classifiers ------------------------------------------------------------------------------------------------------


def trained(params, rng):
    """Every number that learns, moved."""
    moved = {n: a + 0.2 * rng.standard_normal(a.shape).astype(a.dtype) for n, a in trainable(params).items()}
    return replace(params, moved)


def same_logits(params, sizes, model):
    """Both in float64, within what float32 does to ours; rows of different lengths, as each library pads."""

    def ours(dtype):
        return classifier.logits(in_dtype(params, dtype), TOKENS, LENGTHS, sizes)[0]

    double, single = ours(np.float64), ours(np.float32)
    model = in_double(model)
    with torch.no_grad():
        rows = [model(torch.tensor(row[None, :n])).logits.numpy()[0] for row, n in zip(TOKENS, LENGTHS, strict=True)]
        mask = torch.tensor(np.arange(8) < LENGTHS[:, None]).long()
        padded = torch.where(mask.bool(), torch.tensor(TOKENS), 0)
        together = model(padded, attention_mask=mask).logits.numpy()
    allowed = 16 * 2.0**-29 * np.abs(double - single).max()
    assert np.abs(double - np.stack(rows)).max() <= allowed
    assert np.abs(double - together).max() <= allowed


def in_dtype(params, dtype):
    """The same weights and adapters in this dtype."""
    if not any(isinstance(w, lora.LoRA) for w in params.values()):
        return {n: w.astype(dtype) for n, w in params.items()}
    base, adapter = lora.detach(params)
    arrays = {n: a.astype(dtype) for n, a in adapter.arrays.items()}
    return lora.insert(
        {n: dense(w).astype(dtype) for n, w in base.items()}, dataclasses.replace(adapter, arrays=arrays)
    )


def trunks():
    return {
        "bert": (CONFIG, lambda: state(network())),
        "llama": (config(), lambda: state(torch_llama())),
    }


@pytest.mark.parametrize("trunk", ["bert", "llama"])
@pytest.mark.parametrize("method", ["head", "full"])
def test_transformers_loads_a_classifier_and_gives_the_same_logits(trunk, method, tmp_path, rng):
    sizes, make = trunks()[trunk]
    params = trained(classify.prepare(method, make(), sizes, 3, rng=rng), rng)
    plain = {n: dense(w) for n, w in params.items()}
    save_classifier(tmp_path / "c", sizes, plain, LABELS, tokenizer())
    loaded, problems = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "c", output_loading_info=True
    )
    assert not any(problems.values()), problems
    assert loaded.config.id2label == dict(enumerate(LABELS)) and loaded.config.label2id["cat"] == 2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "c")("w5").input_ids == [2, 5, 3]
    same_logits(plain, sizes, loaded)


@pytest.mark.parametrize("trunk", ["bert", "llama"])
def test_peft_loads_an_adapter_with_its_head_and_gives_the_same_logits(trunk, tmp_path, rng):
    """Head and bias too; and what PEFT writes of it is read again to the bit."""
    sizes, make = trunks()[trunk]
    base = make()
    params = trained(classify.prepare("lora", base, sizes, 3, rng=rng, r=3, lora_alpha=5), rng)
    bare, adapter = lora.detach(params)
    save_adapter(tmp_path / "a", adapter)
    (torch_llama() if trunk == "llama" else network()).save_pretrained(tmp_path / "base")
    options = {"num_labels": 3} | ({"pad_token_id": 0} if trunk == "llama" else {})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"
    same_logits(params, sizes, loaded)
    loaded.float().save_pretrained(tmp_path / "again")
    again = load_adapter(tmp_path / "again", bare)
    assert_same_bits(again.arrays, adapter.arrays)
    head = classifier.head_module(sizes)
    parts = {f"{head}.weight", f"{head}.bias"} if trunk == "bert" else {f"{head}.weight"}
    assert {n for n in again.arrays if n.startswith(head)} == parts
    assert_same_bits(trainable(lora.insert(bare, again)), trainable(params))


def test_a_classifier_that_does_not_fit_its_labels(tmp_path, rng):
    params = classify.prepare("full", state(network()), CONFIG, 3, rng=rng)
    for labels, found in ((["a", "b"], "2 different labels"), (["a", "b", "a"], "2 different labels")):
        with pytest.raises(FormatError, match=rf"labels: found {found}, needed 3, one a row of the head"):
            save_classifier(tmp_path / "c", CONFIG, params, labels, tokenizer())
    params[classifier.BIAS] = np.full(3, np.nan, np.float32)
    with pytest.raises(FormatError, match=r"classifier\.bias"):
        save_classifier(tmp_path / "c", CONFIG, params, LABELS, tokenizer())
    assert not (tmp_path / "c").exists()


def test_a_classifier_on_features_comes_back(tmp_path, rng):
    params = classify.on_features(5, 3)
    params = {n: rng.standard_normal(w.shape).astype(np.float32) for n, w in params.items()}
    save_feature_classifier(tmp_path / "f", params, LABELS)
    file = SafetensorsFile(tmp_path / "f" / FEATURES)
    assert_same_bits({name: file.read(name) for name in file.names()}, params)
    assert json.loads((tmp_path / "f" / "labels.json").read_text()) == {"labels": LABELS}
    with pytest.raises(FormatError, match="a folder that is not empty"):
        save_feature_classifier(tmp_path / "f", params, LABELS)
