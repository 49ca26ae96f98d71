"""Which layers are meant: PEFT's own matching is the oracle, on names chosen to trap."""

import dataclasses
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from minift.peft import targets
from minift.peft.targets import Selection, as_pattern, pattern_values
from peft import LoraConfig

LAYERS = [
    f"model.{stack}.{i}.{module}"
    for stack in ("layers", "xlayers")
    for i in (0, 1, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.qq_proj", "mlp.down_proj", "mlp.layers.1.q_proj")
] + ["model.layersx1.self_attn.q_proj", "x.model.layers.1.self_attn.q_proj"]
NAMES = [
    "q_proj",
    "proj",
    "self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    LAYERS[0],
    "down_proj",
    "mlp.layers.1.q_proj",
]
EXPRESSIONS = [r".*layers\.1\..*", r".*q_proj", "q_proj", r".*\.(0|11)\..*proj", "all-linear", r"model.layers.1.mlp.*"]
KEYS = [*NAMES, *EXPRESSIONS[:-2], "^model.layers.1.self_attn.q_proj", "layers.1..*", r"1\.mlp\.down_proj|q_proj", ".*"]


CHOICES = {
    "target_modules": [[name] for name in NAMES] + [["down_proj", LAYERS[1]], *EXPRESSIONS[:-2]],
    "exclude_modules": [None, ["self_attn.q_proj", "layers.1.mlp.down_proj"], r".*layers\.1\..*"],
    "layers_to_transform": [None, [], [0], [1, 11]],
    "layers_pattern": [None, [], ["layers"], ["x?layers", "mlp.layers"], ["(x)layers"]],
    "modules_to_save": [[], ["lm_head"], ["down_proj"], ["mlp", "self_attn"]],
}


@pytest.mark.parametrize("target_modules", CHOICES["target_modules"], ids=str)
def test_peft_chooses_the_same_layers(target_modules):
    for settings in map(dict, product(*([(key, value) for value in values] for key, values in CHOICES.items()))):
        if settings["target_modules"] != target_modules:
            continue
        if isinstance(target_modules, str) or not settings["layers_to_transform"]:
            settings |= {"layers_to_transform": None, "layers_pattern": None}  # others PEFT refuses, as our reader does
        theirs = LoraConfig(**settings)
        ours = Selection(**{k: v if isinstance(v, str) else tuple(v or ()) for k, v in settings.items()})
        for path in LAYERS:
            found = check_target_module_exists(theirs, path)
            assert ours.adapts(path) == (bool(found) and not isinstance(found, _ExcludedModule)), (path, settings)


@given(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
def test_peft_finds_the_same_key(keys):
    pattern = {key: 2.0 + i for i, key in enumerate(keys)}
    theirs = {path: pattern.get(get_pattern_key(pattern.keys(), path), 0.0) for path in LAYERS}
    found = pattern_values(pattern, LAYERS)
    assert {path: found.get(path, 0.0) for path in LAYERS} == theirs


@given(values=st.dictionaries(st.sampled_from(LAYERS), st.sampled_from([2.0, 3.0])))
def test_a_written_pattern_means_to_peft_exactly_these_layers(values):
    pattern = as_pattern(values, LAYERS)
    for path in LAYERS:
        assert pattern.get(get_pattern_key(pattern.keys(), path), 0.0) == values.get(path, 0.0), path


def test_a_pattern_is_as_short_as_it_can_be():
    paths = [f"model.layers.{i}.{m}_proj" for i in range(3) for m in "qv"]
    assert as_pattern({p: 5.0 for p in paths if p.endswith("q_proj")}, paths) == {"q_proj": 5.0}
    assert as_pattern({paths[2]: 5.0}, paths) == {r"^model\.layers\.1\.q_proj": 5.0}
    odd = ["model.a+b.c(d", "model.axb.c(d", "model.aab.c(d"]
    assert as_pattern({odd[0]: 5.0}, odd) == {r"^model\.a\+b\.c\(d": 5.0}


def test_a_module_to_save_matches_within_a_word():
    """As PEFT has it (the logits are compared in tests/io/test_peft_variants.py)."""
    norm = Selection(modules_to_save=("norm",))
    assert norm.saves("model.norm")
    assert norm.saves("model.layers.0.input_layernorm")
    assert norm.saves("model.layers.0.norm.inner")  # the module around it
    assert not norm.saves("model.normal")
    assert not Selection().saves("model.norm")
    with pytest.raises(dataclasses.FrozenInstanceError):
        norm.modules_to_save = ()


WRONG = {
    "names only": lambda values, paths: {path.split(".")[-1]: value for path, value in values.items()},
    "dots not escaped": lambda values, paths: {f"^{path}": value for path, value in values.items()},
    "not from the start": lambda values, paths: {re.escape(path): value for path, value in values.items()},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_patterns_are_rejected(monkeypatch, wrong):
    monkeypatch.setitem(globals(), "as_pattern", wrong)
    with pytest.raises((AssertionError, ExceptionGroup)):
        test_a_written_pattern_means_to_peft_exactly_these_layers()


def test_regular_expressions_that_are_none():
    for wrong in (
        lambda: targets.expression("a{99999999999}"),
        lambda: Selection("q_(").adapts("q_proj"),
        lambda: pattern_values({"(?i)q": 1}, ["q"]),
    ):
        with pytest.raises(ValueError, match="is no regular expression: "):
            wrong()
