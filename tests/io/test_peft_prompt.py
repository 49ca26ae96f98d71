"""Soft prompts: PEFT reads ours, we read PEFT's, and both compute the same logits, losses and gradients."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SIZES, config, in_double, numpy_state, torch_llama

from minift.conformance.bounds import gamma
from minift.data.batches import pad
from minift.io import FormatError, load_adapter, load_prompt, save_prompt
from minift.models import llama
from minift.nn.losses import IGNORE_INDEX
from minift.nn.weight import freeze, learns, replace, trainable
from minift.peft import p_tuning, prefix_tuning, prompt_tuning, soft_prompt
from minift.peft.soft_prompt import SoftPrompt
from minift.train import sft
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in some/model"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

P, WIDTH = 5, SIZES["hidden_size"]
THEIRS = {
    "prompt": (PromptTuningConfig, {}),
    "prefix": (PrefixTuningConfig, {}),
    "prefix, network": (PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 6}),
    "p, MLP": (PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "p, LSTM": (PromptEncoderConfig, {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM"}),
}
OURS = {
    "PROMPT_TUNING": lambda params, rng: prompt_tuning.attach(params, P, rng=rng),
    "PREFIX_TUNING": lambda params, rng: prefix_tuning.attach(params, P, rng=rng, encoder_hidden_size=6),
    "P_TUNING": lambda params, rng: p_tuning.attach(params, P, rng=rng, encoder="LSTM", encoder_hidden_size=6),
}


@pytest.fixture
def params():
    return numpy_state(torch_llama())


def torch_prompt(kind):
    """A PEFT model in the middle of training, its virtual tokens as large as PEFT draws them."""
    make, settings = THEIRS[kind]
    model = get_peft_model(torch_llama(), make(task_type="CAUSAL_LM", num_virtual_tokens=P, **settings))
    return model.eval()


def carried(model, params):
    """The same model here: frozen, with PEFT's parameters under their own names."""
    kind = model.peft_config["default"].peft_type.value
    found = {n.replace("default.", ""): p.detach().numpy() for n, p in model.named_parameters() if "prompt" in n}
    if len(found) == 1:
        name = prefix_tuning.TABLE if kind == "PREFIX_TUNING" else prompt_tuning.TABLE
        found = {name: found.popitem()[1]}
    return freeze(params) | found


def in_dtype(params, dtype):
    """Both in one type: what is frozen and what learns."""
    cast = {n: (w if learns(w) else w.array).astype(dtype) for n, w in params.items()}
    frozen = freeze({n: a for n, a in cast.items() if not learns(params[n])})
    return frozen | {n: a for n, a in cast.items() if learns(params[n])}


def tokens():
    return np.arange(24).reshape(2, 12) * 7 % SIZES["vocab_size"]


def assert_same(ours, theirs, what):
    """As in `small_models.assert_same_logits`: up to the network's condition, which float32 shows."""
    single, double = (ours(dtype) for dtype in (np.float32, np.float64))
    assert double.dtype == theirs.dtype == np.float64 and double.shape == theirs.shape, what
    slack = 16 * 2.0**-29 * np.abs(double - single).max()
    assert np.abs(double - theirs).max() <= slack, f"{what}: off by {np.abs(double - theirs).max():.3g} of {slack:.3g}"


def assert_same_logits(model, params):
    """PEFT returns logits of the virtual tokens too, where they stand at the input."""
    with torch.no_grad():
        theirs = in_double(model)(torch.from_numpy(tokens())).logits.numpy()[:, -12:]
    assert_same(lambda dtype: llama.forward(in_dtype(params, dtype), tokens(), config())[0], theirs, "logits")


@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_trains_is_the_same_here(params, kind):
    """With the encoders that are not in any file, and before a prefix or prompt is folded."""
    model = torch_prompt(kind)
    assert_same_logits(model, carried(model, params))


@pytest.mark.parametrize("kind", THEIRS)
def test_the_loss_and_the_gradients_of_peft(params, kind):
    """Labels: none at virtual tokens, each at its token, shifted once. Two rows, so that the sum over them shows."""
    model = in_double(torch_prompt(kind))
    labels = tokens().copy()
    labels[0, :5] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX  # nobody predicts the first token here; PEFT's prompt at the input would
    found = model(torch.from_numpy(tokens()), labels=torch.from_numpy(labels))
    shifted = found.logits[:, -12:-1].reshape(-1, SIZES["vocab_size"]), torch.from_numpy(labels)[:, 1:].reshape(-1)
    value = torch.nn.functional.cross_entropy(*shifted)  # their own is computed in float32
    assert abs(float((found.loss - value).detach())) <= gamma(SIZES["vocab_size"], np.float32) * float(value.detach())
    value.backward()
    mine = carried(torch_prompt(kind), params)
    batch = pad([(t.astype(np.int32), y.astype(np.int32)) for t, y in zip(tokens(), labels, strict=True)])

    def ours(dtype):
        loss, vjp = sft.loss(in_dtype(mine, dtype), batch, config())
        return {"loss": np.asarray(loss)} | vjp(dtype(1))

    theirs = {n.replace("default.", ""): p.grad.numpy() for n, p in model.named_parameters() if "prompt" in n}
    if len(theirs) == 1:
        theirs = {trainable(mine).popitem()[0]: theirs.popitem()[1]}
    theirs["loss"] = value.detach().numpy()
    results = {dtype: ours(dtype) for dtype in (np.float32, np.float64)}
    assert results[np.float64].keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_same(lambda dtype, n=name: results[dtype][n], expected, name)


@pytest.mark.parametrize("kind", THEIRS)
def test_reads_what_peft_writes(tmp_path, params, kind):
    model = torch_prompt(kind)
    model.save_pretrained(tmp_path / "a")
    prompt = load_prompt(tmp_path / "a", config())
    assert prompt.kind == model.peft_config["default"].peft_type.value
    expected = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"].numpy()
    assert np.array_equal(prompt.table, expected) and prompt.table.dtype == np.float32
    read = PeftModel.from_pretrained(torch_llama(), tmp_path / "a")
    assert_same_logits(read, soft_prompt.insert(params, prompt))


@pytest.mark.parametrize("kind", OURS)
def test_peft_reads_what_we_write(tmp_path, params, kind, rng):
    fresh = OURS[kind](params, rng)
    learned = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in trainable(fresh).items()}
    base, prompt = soft_prompt.detach(replace(fresh, learned))
    save_prompt(tmp_path / "a", prompt, config(), "some/model")
    model = PeftModel.from_pretrained(torch_llama(), tmp_path / "a")
    settings = model.peft_config["default"]
    assert settings.peft_type.value == kind and settings.num_virtual_tokens == P
    assert settings.base_model_name_or_path == "some/model"
    assert np.array_equal(model.prompt_encoder["default"].embedding.weight.detach().numpy(), prompt.table)
    assert_same_logits(model, soft_prompt.insert(base, prompt))
    again = load_prompt(tmp_path / "a", config())
    assert again.kind == kind and np.array_equal(again.table, prompt.table)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p, LSTM"])
def test_the_configuration_says_what_theirs_says(tmp_path, kind):
    """Every key that both write has the same value: with grouped heads a prefix has the sizes of keys."""
    torch_prompt(kind).save_pretrained(tmp_path / "theirs")
    save_prompt(tmp_path / "ours", load_prompt(tmp_path / "theirs"), config(), overwrite=True)
    theirs, ours = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("theirs", "ours"))
    assert {k: v for k, v in ours.items() if k != "base_model_name_or_path"}.items() <= theirs.items()


def test_minimal_configuration_and_sixteen_bits(tmp_path):
    torch_prompt("prefix").save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    table = load_file(path)["prompt_embeddings"].to(torch.bfloat16)
    save_file({"prompt_embeddings": table}, path)
    minimal = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": P}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(minimal))
    prompt = load_prompt(tmp_path / "a", config())
    assert np.array_equal(prompt.table, table.float().numpy()) and prompt.table.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type: found 'LORA', needed one of PROMPT_TUNING, PREFIX_TUNING, P_TUNING"),
        ({"peft_type": ["P_TUNING"]}, "peft_type"),
        ({"num_virtual_tokens": 4}, r"prompt_embeddings: found shape \(5, 64\), needed \(4, "),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: found 2, needed 1"),
        ({"num_layers": 3}, "num_layers: found 3, needed 2, as this model has"),
        ({"num_attention_heads": 4}, "num_attention_heads: found 4, needed 2"),
        ({"token_dim": 32}, "token_dim: found 32, needed 16"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"something_new": 1}, "something_new: found 1, needed it unset"),
    ],
)
def test_refuses_another_configuration(tmp_path, changes, message):
    torch_prompt("prefix").save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FormatError, match=message):
        load_prompt(tmp_path / "a", config())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "prompt_embeddings: found nothing"),
        ({"prompt_embeddings": torch.ones(5, 64), "more": torch.ones(1)}, "more: found a surplus tensor"),
        ({"prompt_embeddings": torch.ones(5)}, r"shape \(5,\), needed \(5, numbers"),
        ({"prompt_embeddings": torch.ones(5, 64, dtype=torch.int32)}, "dtype I32, needed F32, F16 or BF16"),
        ({"prompt_embeddings": torch.full((5, 64), float("nan"))}, "prompt_embeddings: found .*nan"),
        ({"prompt_embeddings": torch.ones(5, 63)}, r"shape \(5, 63\), needed rows of 64"),
    ],
)
def test_refuses_other_tensors(tmp_path, tensors, message):
    torch_prompt("prefix").save_pretrained(tmp_path / "a")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=f"(?i){message}"):
        load_prompt(tmp_path / "a", config())


def test_a_prompt_is_no_lora(tmp_path):
    torch_prompt("p, MLP").save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match="peft_type: found 'P_TUNING', needed 'LORA'"):
        load_adapter(tmp_path / "a")


def test_refuses_to_write_what_nobody_could_read(tmp_path, rng):
    table = rng.standard_normal((P, WIDTH)).astype(np.float32)
    nan = table.copy()
    nan[1, 2] = np.nan
    for prompt, message in (
        (SoftPrompt("PROMPT_TUNING", table[:, 1:]), r"shape \(5, 31\), needed rows of 32 numbers"),
        (SoftPrompt("PREFIX_TUNING", table), r"shape \(5, 32\), needed rows of 64 numbers"),
        (SoftPrompt("P_TUNING", table[:0]), "no virtual tokens"),
        (SoftPrompt("P_TUNING", nan), "(?i)nan"),
    ):
        with pytest.raises(FormatError, match=message):
            save_prompt(tmp_path / "a", prompt, config())
        assert not list(tmp_path.iterdir())
    save_prompt(tmp_path / "a", SoftPrompt("P_TUNING", table), config())
    with pytest.raises(FormatError):
        save_prompt(tmp_path / "a", SoftPrompt("P_TUNING", 2 * table), config())
    save_prompt(tmp_path / "a", SoftPrompt("P_TUNING", 2 * table), config(), overwrite=True)
    assert np.array_equal(load_prompt(tmp_path / "a").table, 2 * table)
