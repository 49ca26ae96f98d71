"""Which layers an adapter means: PEFT's rules for names, regular expressions and patterns.

A layer goes by its path, `model.layers.0.self_attn.q_proj`; its weight is called that and `.weight`. The rules differ
from setting to setting, and each has its trap: a name in `target_modules` matches at a dot, one in `modules_to_save`
also within a word ("norm" means `input_layernorm` too), and a key of a pattern is a regular expression in which a dot
stands for any character.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

TABLES = ("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings")
# … whose rows are looked up, nothing is multiplied: no adapter fits
NOT_LINEAR = (*TABLES, "lm_head", "score", "classifier")  # tables and heads: not meant by "all-linear"
ALL_LINEAR = "all-linear"
SOFT_PROMPTS = ("prompt_embeddings", "prefix_embeddings", "prompt_encoder.")  # stand before the text, not in a layer


@dataclass(frozen=True)
class Selection:
    """The five settings of PEFT's LoraConfig that together choose layers."""

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    def adapts(self, path: str) -> bool:
        """Whether the linear layer of this path gets A and B; one that is trained in full does not (or, where PEFT sees
        that too late, fails there). ValueError for what is no regular expression."""
        if (self.exclude_modules and _matches(path, self.exclude_modules)) or self.saves(path):
            return False
        if not _matches(path, self.target_modules):
            return False
        if not self.layers_to_transform or path in self.target_modules:  # a whole path is meant whatever its block
            return True
        return _index(path, self.layers_pattern) in self.layers_to_transform

    def saves(self, path: str) -> bool:
        """Whether the module of this path, or one around it, is trained in full: its path ends in one of the names."""
        around = accumulate(path.split("."), "{}.{}".format)  # model, model.layers, model.layers.0, …
        return any(module.endswith(self.modules_to_save) for module in around)


def targets(params: Mapping[str, Any], target_modules: str | Iterable[str]) -> list[str]:
    """The names of the weights that `target_modules` means: names such as "q_proj" or whole paths (both match from the
    end, at a dot), one regular expression that must match the whole path, or "all-linear".

    ValueError for one that matches nothing; a table of embeddings is none, since no adapter fits it."""
    linear = linear_layers(params)
    names = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    if not names:
        raise ValueError(f"target_modules is empty, needed some of {_leaves(linear)}, or {ALL_LINEAR!r}")
    for name in () if isinstance(names, str) else names:
        if not any(_matches(path, (name,)) for path in linear.values()):
            raise ValueError(f"target_modules: {name!r} matches no linear layer; there are {_leaves(linear)}")
    chosen = [name for name, path in linear.items() if _matches(path, names)]
    if not chosen and names != ALL_LINEAR:
        raise ValueError(f"target_modules={names!r}, a regular expression, matches none of {_leaves(linear)}")
    return chosen


def saved(params: Mapping[str, Any], modules_to_save: Iterable[str]) -> list[str]:
    """The names of the weights and biases that `modules_to_save` means: those of every module whose path ends in one of
    these, and of the modules in it. ValueError for one that matches nothing."""
    names: dict[str, None] = {}
    for module in modules_to_save:
        selection = Selection(modules_to_save=(module,))
        found = [name for name in params if module and selection.saves(name.rpartition(".")[0])]
        if not found:
            raise ValueError(f"modules_to_save: {module!r} matches no module of the model")
        names |= dict.fromkeys(found)
    return [name for name in params if name in names]


def linear_layers(params: Mapping[str, Any]) -> dict[str, str]:
    """{name of the weight: path} of every matrix that an adapter fits."""
    matrices = (name for name, weight in params.items() if len(weight.shape) == 2 and not name.startswith(SOFT_PROMPTS))
    paths = {name: name.removesuffix(".weight") for name in matrices}
    return {name: path for name, path in paths.items() if _leaf(path) not in TABLES}


def short_targets(params: Mapping[str, Any], paths: Iterable[str]) -> tuple[str, ...]:
    """The shortest `target_modules` that means exactly these layers: module names if they do, else whole paths."""
    paths = tuple(paths)
    leaves = sorted({_leaf(path) for path in paths})
    meant = {path for path in linear_layers(params).values() if _leaf(path) in leaves}
    return tuple(leaves if meant == set(paths) else sorted(paths))


def pattern_values(pattern: Mapping[str, float], paths: Iterable[str]) -> dict[str, float]:
    """The layers for which a `rank_pattern` or `alpha_pattern` decides, and what.

    The first key decides that, as a regular expression, matches the end of a path, at a dot. ValueError for a key that
    is none."""
    expressions = {key: expression(rf"(.*\.)?({key})$") for key in pattern}
    found = {}
    for path in paths:
        key = next((key for key, matching in expressions.items() if matching.match(path)), path)
        if key in pattern:
            found[path] = pattern[key]
    return found


def as_pattern(values: Mapping[str, float], paths: Iterable[str]) -> dict[str, float]:
    """A pattern by which, of all the adapted `paths`, exactly those in `values` get exactly these values.

    By a module's name where all layers of that name agree, else by the whole path from its start, dots escaped."""
    of_leaf: dict[str, set[float | None]] = {}
    for path in paths:
        of_leaf.setdefault(_leaf(path), set()).add(values.get(path))
    pattern = {}
    for path, value in values.items():
        leaf = _leaf(path)
        pattern[re.escape(leaf) if len(of_leaf[leaf]) == 1 else f"^{re.escape(path)}"] = value
    return pattern


def expression(text: str) -> re.Pattern[str]:
    """Compiled. ValueError for what is no regular expression."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r:.200} is no regular expression: {error}") from error


def _matches(path: str, names: str | tuple[str, ...]) -> bool:
    if names == ALL_LINEAR:
        return _leaf(path) not in NOT_LINEAR
    if isinstance(names, str):
        return bool(expression(names).fullmatch(path))
    return any(f".{path}".endswith(f".{name}") for name in names)


def _index(path: str, layers_pattern: tuple[str, ...]) -> int | None:
    """The number of the block that a layer is in: the first one in its path, or the first behind one of the names."""
    before = [rf"(?:^|.*?\.){name}" for name in layers_pattern] or [r".*?\.[^.]*"]
    numbered = (expression(rf"{start}\.(\d+)\.") for start in before)
    found = next((match for one in numbered if (match := one.match(path))), None)
    return found and int(found[found.re.groups])


def _leaf(path: str) -> str:
    return path.split(".")[-1]


def _leaves(linear: dict[str, str]) -> list[str]:
    return sorted({_leaf(path) for path in linear.values()})
