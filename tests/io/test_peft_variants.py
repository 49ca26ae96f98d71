"""What PEFT can say about layers, one by one: which, of what rank, on what scale, and what is trained in full.

The oracle is PEFT itself: its adapters give the same logits here, ours give the same logits there, and it has nothing
to say about them (a warning is an error in these tests).
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SIZES, assert_same_bits, assert_same_logits, config, numpy_state, torch_llama
from transformers import LlamaConfig, LlamaForSequenceClassification

from minift.io import FormatError, load_adapter, load_adapters, peft_config, save_adapter
from minift.models import llama
from minift.nn.linear import linear
from minift.nn.weight import replace, trainable
from minift.peft import lora, targets
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = [  # what PEFT says of itself, and of a tied model
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer.*"),
]

Q = "model.layers.0.self_attn.q_proj"
SETTINGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 5, r"layers.1.mlp.down_proj": 2}},
    "first key": {
        "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 5},
        "alpha_pattern": {".*v_proj": 2, "v_proj": 9},
    },
    "alphas": {"alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 2.5, "down_proj": 11}},
    "both, rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.1\..*proj": 4}},
    "head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm"]},  # input_layernorm and post_attention_layernorm end in it too
    "embeddings": {"modules_to_save": ["embed_tokens", "model.norm"]},
    "whole block part": {"modules_to_save": ["layers.1.mlp"]},  # its down_proj gets no adapter
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
    "excluded": {"exclude_modules": ["layers.0.self_attn.v_proj", "down_proj"]},
    "excluded by regex": {"exclude_modules": r".*\.0\..*"},
    "one block": {"layers_to_transform": 1},
    "blocks": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "path and blocks": {"layers_to_transform": [1], "target_modules": [Q, "v_proj"]},  # a whole path is always meant
}


@pytest.fixture
def params():
    return numpy_state(torch_llama())


def theirs(settings, network=None, name="default", **more):
    """A PEFT model with random adapters and whole weights; B too, since zeros would hide mistakes."""
    base = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(network or torch_llama(), LoraConfig(**(base | settings | more)), adapter_name=name)
    return randomized(model)


def randomized(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p))
            elif "modules_to_save" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_and_back(tmp_path, params, settings):
    """Theirs here; ours there, after the adapter has been on a model and come off again."""
    model = theirs(settings)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", params)
    assert_same_logits(params, adapter, model)
    base, again = lora.detach(lora.insert(params, adapter))
    assert all(base[name].dense() is params[name] for name in params)
    assert_same_bits(again.arrays, adapter.arrays)
    for name, written in (("read", adapter), ("detached", again)):
        save_adapter(tmp_path / name, written)
        assert_same_logits(params, adapter, PeftModel.from_pretrained(torch_llama(), tmp_path / name))
        third = load_adapter(tmp_path / name, params)
        assert {**vars(third), "arrays": 0} == {**vars(written), "arrays": 0}


def made_here(params, rng, **settings):
    """An adapter of ours in the middle of training."""
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "lora_alpha": 7} | settings
    carried = lora.attach(params, rng=rng, **settings)
    random = {name: rng.standard_normal(a.shape).astype(np.float32) for name, a in trainable(carried).items()}
    return lora.detach(replace(carried, random))[1]


OURS = {
    "ranks and alphas": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1},
        "alpha_pattern": {r"layers\.0\..*": 2.5},
    },
    "in full": {"modules_to_save": ["lm_head", "model.norm", "layers.0.self_attn.v_proj"]},
    "everything": {
        "target_modules": "all-linear",
        "modules_to_save": ["embed_tokens"],
        "rank_pattern": {r"mlp\..*": 2},
    },
}


def ours_in_peft(tmp_path, params, adapter):
    save_adapter(tmp_path / "ours", adapter, overwrite=True)
    assert_same_logits(params, adapter, PeftModel.from_pretrained(torch_llama(), tmp_path / "ours"))


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
def test_what_we_attach_runs_in_peft(tmp_path, params, rng, settings):
    ours_in_peft(tmp_path, params, made_here(params, rng, **settings))


def test_suffixes_and_dots_mean_the_layer_that_they_should(tmp_path):
    """Twelve blocks: `layers.1` and `layers.11`; and a block's number matched by a dot, `layers.1.` and `layers.10.`"""
    params = numpy_state(torch_llama(num_hidden_layers=12))
    rng = np.random.default_rng(0)
    adapter = made_here(params, rng, target_modules=["q_proj"], alpha_pattern={r"layers\.1\.self_attn\.q_proj": 90})
    assert list(adapter.alpha_pattern) == ["model.layers.1.self_attn.q_proj"]
    save_adapter(tmp_path / "a", adapter)
    model = PeftModel.from_pretrained(torch_llama(num_hidden_layers=12), tmp_path / "a")
    for i in range(12):
        scale = model.get_submodule(f"base_model.model.model.layers.{i}.self_attn.q_proj").scaling["default"]
        assert scale == (90 if i == 1 else 7) / 3


def test_named_adapters(tmp_path, params, rng):
    """PEFT keeps `default` in the folder and the others in folders of their names; so do we."""
    model = theirs({})
    model.add_adapter("poems", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomized(model).save_pretrained(tmp_path / "both")
    adapters = load_adapters(tmp_path / "both", params)
    assert list(adapters) == ["default", "poems"]
    for name, adapter in adapters.items():
        model.set_adapter(name)
        assert_same_logits(params, adapter, model)
        for again in (load_adapter(tmp_path / "both", params, name), load_adapter(tmp_path / "both" / name)):
            assert_same_bits(again.arrays, adapter.arrays)
    for name, adapter in adapters.items():
        save_adapter(tmp_path / "ours", adapter, name=name)
    model = PeftModel.from_pretrained(torch_llama(), tmp_path / "ours")
    model.load_adapter(tmp_path / "ours" / "poems", "poems")
    for name, adapter in adapters.items():
        model.set_adapter(name)
        assert_same_logits(params, adapter, model)


def test_a_folder_of_named_adapters_is_none_itself(tmp_path, params, rng):
    adapter = made_here(params, rng)
    for name in ("poems", "code"):
        save_adapter(tmp_path / "a", adapter, name=name)
    assert list(load_adapters(tmp_path / "a")) == ["code", "poems"]
    for name in (None, "default"):
        with pytest.raises(FormatError, match=r"a: found no adapter but inside: code, poems, needed .*a/code"):
            load_adapter(tmp_path / "a", name=name)
    with pytest.raises(FormatError, match=r"a/prose/adapter_config.json: found No such file"):
        load_adapter(tmp_path / "a", name="prose")
    with pytest.raises(FormatError, match="found no adapter, needed adapter_config"):
        load_adapters(tmp_path)
    for name in ("", "..", "a/b"):
        with pytest.raises(FormatError, match="for an adapter, needed one that a folder can have"):
            save_adapter(tmp_path / "a", adapter, name=name)
    save_adapter(tmp_path / "default", adapter)  # a folder of that name is one like any other
    assert (tmp_path / "default" / "adapter_config.json").exists()
    with pytest.raises(FormatError, match="the folder 'code' inside"):
        save_adapter(tmp_path / "a", adapter, overwrite=True)


def test_a_classifier(tmp_path, params, rng):
    """The head of a classifier is new, so PEFT saves it whole, and names two that it might be called."""
    torch.manual_seed(3)
    network = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=299))
    network.model.load_state_dict(torch_llama().model.state_dict())
    model = theirs({"task_type": "SEQ_CLS"}, network)
    model.save_pretrained(tmp_path / "a")
    body = {name: w for name, w in params.items() if name != llama.HEAD}
    with pytest.raises(FormatError, match=r"score.weight: found a surplus tensor"):
        load_adapter(tmp_path / "a", body)
    with_head = body | {"score.weight": np.zeros((3, 32), np.float32)}

    def logits(carried):
        tokens = np.arange(24).reshape(2, 12) * 7 % SIZES["vocab_size"]
        hidden, _ = llama.backbone(carried, tokens, config())
        return linear(hidden[:, -1], carried["score.weight"])[0]

    adapter = load_adapter(tmp_path / "a", with_head)
    assert adapter.modules_to_save == ("score",)
    assert_same_logits(with_head, adapter, model, logits)
    save_adapter(tmp_path / "ours", adapter)
    again = PeftModel.from_pretrained(
        LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=299)), tmp_path / "ours"
    )
    again.get_base_model().model.load_state_dict(model.get_base_model().model.state_dict())
    assert_same_logits(with_head, adapter, again, logits)


def test_tied_embeddings_come_apart_first(tmp_path, rng):
    """PEFT trains a copy of one of the two and leaves the other, though the model says that they are one."""
    params = numpy_state(torch_llama(tie_word_embeddings=True))
    for module in ("lm_head", "embed_tokens"):
        model = theirs({"modules_to_save": [module]}, torch_llama(tie_word_embeddings=True))
        model.save_pretrained(tmp_path / module)
        with pytest.raises(FormatError, match=rf"{module}.weight: .* its output matrix at once, .*lm_head.weight"):
            load_adapter(tmp_path / module, params)
        with pytest.raises(ValueError, match=rf"{module}: the model's output matrix is its table of embeddings"):
            lora.insert(params, load_adapter(tmp_path / module))
        with pytest.raises(ValueError, match=rf"{module}: the model's output matrix is its table of embeddings"):
            lora.attach(params, modules_to_save=[module], rng=rng)
        untied = params | {llama.HEAD: params[llama.EMBEDDING].copy()}  # as the message says, and then it is PEFT's
        assert_same_logits(untied, load_adapter(tmp_path / module, untied), model)


# --- refusals ---------------------------------------------------------------------------------------------------------


def edit(folder, change=None, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if change is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")


P = "base_model.model."
A, B, HEAD = f"{P}{Q}.lora_A.weight", f"{P}{Q}.lora_B.weight", f"{P}lm_head.weight"


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (
            {"rank_pattern": {"q_proj": 5}},
            {"rank_pattern": {}},
            rf"{Q}.lora_A.weight: found shape \(5, 32\), needed \(3",
        ),
        ({"rank_pattern": {"q_proj": 5}}, {"rank_pattern": {"q_proj": 4}}, r"found shape \(5, 32\), needed \(4, in\)"),
        ({}, {"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: found 0, needed a whole number"),
        ({}, {"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: q_proj: found 2.5"),
        ({}, {"rank_pattern": [3]}, r"rank_pattern: found \[3\], needed an object"),
        ({}, {"alpha_pattern": {"q_proj": -1}}, "alpha_pattern: q_proj: found -1, needed a positive"),
        ({}, {"alpha_pattern": {"q_(": 1}}, r"alpha_pattern: found .*q_\(.* is no regular expression"),
        ({}, {"target_modules": "q_("}, r"target_modules: found 'q_\(', needed a regular expression"),
        ({}, {"exclude_modules": "(?P<"}, "exclude_modules: found .* needed a regular expression"),
        ({}, {"exclude_modules": [3]}, r"exclude_modules: found \[3\], needed a list of module names"),
        ({}, {"exclude_modules": ["q_proj"]}, f"target_modules: .* what means the adapted layer {Q}, after exclude"),
        ({}, {"layers_to_transform": [1]}, "target_modules: .* what means the adapted layer model.layers.0"),
        ({}, {"layers_to_transform": "1"}, "layers_to_transform: found '1', needed the number of a block"),
        ({}, {"layers_to_transform": [True]}, r"layers_to_transform: found \[True\]"),
        ({}, {"layers_to_transform": 1, "target_modules": ".*proj"}, "layers_to_transform: found 1, needed it unset"),
        ({}, {"layers_pattern": "layers"}, "layers_pattern: found 'layers', needed layers_to_transform with it"),
        ({}, {"layers_to_transform": 1, "layers_pattern": "(?i)x("}, "layers_pattern: found .* a regular expression"),
        ({}, {"modules_to_save": ["lm_head"]}, r"modules_to_save: found \['lm_head'\], needed no 'lm_head', for which"),
        ({}, {"modules_to_save": ["classifier", "score"]}, "needed no 'classifier', for which there are no tensors"),
        ({}, {"modules_to_save": "lm_head"}, "modules_to_save: found 'lm_head', needed a list"),
        ({}, {"modules_to_save": [""]}, r"modules_to_save: found \[''\], needed a list"),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": None}, "lm_head.weight: found a surplus tensor"),
        ({}, {"ensure_weight_tying": True}, "ensure_weight_tying: found True, needed false: untie"),
        (
            {},
            {"trainable_token_indices": [3]},
            r"trainable_token_indices: found \[3\], needed it unset: .* merge it with",
        ),
        ({}, {"target_parameters": ["x"]}, "target_parameters: found .* merge it with PEFT"),
        ({}, {"init_lora_weights": "olora"}, "init_lora_weights: .*path_initial_model_for_weight_conversion"),
    ],
)
def test_refuses_a_wrong_configuration(tmp_path, settings, change, message):
    theirs(settings).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", **change)
    with pytest.raises(FormatError, match=message):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(HEAD), r"modules_to_save: found \['lm_head', 'norm'\], needed no 'lm_head'"),
        (lambda t: t.pop(f"{P}model.norm.weight"), "model.norm.weight: found nothing"),
        (
            lambda t: t.update({HEAD: t[HEAD][:-1].clone()}),
            r"lm_head.weight: found shape \(299, 32\), needed \(300",
        ),
        (lambda t: t.update({HEAD: t[HEAD].reshape(-1)}), r"lm_head.weight: found shape \(9600,\), needed \(300, 32\)"),
        (lambda t: t.update({f"{P}lm_head.bias": torch.ones(300)}), "lm_head.bias: found a surplus tensor"),
        (lambda t: t.update({f"{P}model.x_norm.weight": torch.ones(32)}), "x_norm.weight: found a surplus tensor"),
        (
            lambda t: t.update({f"{P}model.embed_tokens.weight": torch.ones(300, 32)}),
            "s.weight: found a surplus",
        ),
        (lambda t: t.update({f"{P}{Q}.weight": torch.ones(32, 32)}), "q_proj.weight: found a surplus tensor"),
        (lambda t: t.update({f"{P}model.embed_tokens.lora_embedding_A": torch.ones(3, 300)}), "leave embed_tokens out"),
        (lambda t: t.update({f"{P}{Q}.lora_magnitude_vector": torch.ones(32)}), "magnitude_vector: found a surplus"),
        (lambda t: t.pop(A), "lora_A.weight: found nothing, needed the other half"),
        (lambda t: t.update({HEAD: t[HEAD] * float("nan")}), "lm_head.weight: found nan"),
    ],
)
def test_refuses_wrong_tensors_beside_whole_weights(tmp_path, params, change, message):
    theirs({"modules_to_save": ["lm_head", "norm"]}).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", change)
    with pytest.raises(FormatError, match=message):
        load_adapter(tmp_path / "a", params)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (
            {"exclude_modules": ["v_proj"]},
            {"exclude_modules": None, "layers_to_transform": None},
            "'v_proj', for which",
        ),
        ({"layers_to_transform": [0]}, {"layers_to_transform": [0, 1]}, r"layers.1.*found nothing \(6 tensors"),
        (
            {"target_modules": r".*\.0\..*q_proj"},
            {"target_modules": ".*q_proj"},
            r"layers.1.*found nothing \(2 tensors",
        ),
        ({"exclude_modules": r".*\.1\..*"}, {"exclude_modules": None}, r"layers.1.*found nothing \(6 tensors"),
    ],
)
def test_what_is_meant_must_be_there(tmp_path, params, settings, change, message):
    theirs(settings).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", **change)
    with pytest.raises(FormatError, match=message):
        load_adapter(tmp_path / "a", params)


def test_refuses_to_write_an_alpha_for_no_layer(tmp_path, params, rng):
    adapter = dataclasses.replace(made_here(params, rng), alpha_pattern={"model.layers.7.self_attn.q_proj": 3.0})
    with pytest.raises(FormatError, match=r"alpha_pattern: found model.layers.7.self_attn.q_proj"):
        save_adapter(tmp_path / "a", adapter)
    assert not (tmp_path / "a").exists()


# --- wrong versions, which the checks above must tell from ours -------------------------------------------------------


def ignored(fields, key, paths):
    return {}


def last_key_wins(pattern, paths):
    return {path: value for key, value in pattern.items() for path in targets.pattern_values({key: 1}, paths)}


def substring(pattern, paths):
    return {path: value for path in paths for key, value in reversed(pattern.items()) if key in path}


def at_a_dot(self, path):
    return any(f".{name}." in f".{path}." for name in self.modules_to_save)


def whatever_block(path, layers_pattern):
    return 1


WRONG_READERS = {
    "alpha pattern ignored": ("alphas", "minift.io.peft_config.PeftConfig.alphas", lambda self, paths: {}),
    "patterns ignored": ("ranks", "minift.io.peft_config._pattern", ignored),
    "last key": ("first key", "minift.io.peft_config.pattern_values", last_key_wins),
    "keys are no expressions": ("first key", "minift.io.peft_config.pattern_values", substring),
    "modules to save at a dot": ("norms", "minift.peft.targets.Selection.saves", at_a_dot),
    "blocks ignored": ("blocks", "minift.peft.targets._index", whatever_block),
    "default rank in rsLoRA": (
        "both, rsLoRA",
        "minift.peft.lora.LoRA.scaling",
        property(lambda self: lora.scaling(self.lora_alpha, 3, self.use_rslora)),
    ),
}


@pytest.mark.parametrize("wrong", WRONG_READERS)
def test_a_wrong_reader_is_noticed(tmp_path, params, monkeypatch, wrong):
    settings, name, version = WRONG_READERS[wrong]
    monkeypatch.setattr(name, version)
    with pytest.raises((AssertionError, FormatError)):
        test_peft_and_back(tmp_path, params, SETTINGS[settings])


def names_only(values, paths):
    """Module names alone: whatever layer of that name comes last gives its value to all."""
    return {path.split(".")[-1]: value for path, value in values.items()}


def no_anchor(values, paths):
    return {path.split(".", 3)[-1]: value for path, value in values.items()}


@pytest.mark.parametrize("wrong", [names_only, no_anchor, lambda values, paths: {}])
def test_a_wrong_writer_of_patterns_is_noticed(tmp_path, params, rng, monkeypatch, wrong):
    adapter = made_here(params, rng, alpha_pattern={r"layers\.0\..*": 2.5})
    ours_in_peft(tmp_path, params, adapter)
    monkeypatch.setattr(peft_config, "as_pattern", wrong)
    with pytest.raises(AssertionError):
        ours_in_peft(tmp_path, params, adapter)
