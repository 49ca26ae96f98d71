"""Every public function and dataclass of the reference that works on arrays has its twin: the same name and parameters.

What has none stands in WITHOUT_TWIN with its reason, and nothing else does.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import types

import numpy as np
import pytest
import torch

PACKAGES = ("nn", "quant", "peft", "optim", "models", "rlhf")
NAMES, NUMBERS = "works on names, not on numbers: the twin uses it as it is", "works on single numbers, not on tensors"
SCORES = "works on the scores of a whole set, on the host: the twin uses it as it is"
TEXTS = "works on texts and files, and on what the host knows of them: the twin uses it as it is"
AUTOGRAD = "adds up cotangents, which autograd does"
CHOSEN = "tokens are chosen on the host, by the reference's code"
DRAWN = "made in NumPy, then taken to a device: both start from the same bits"
STUDY = "a step on the way to the function that has the twin"

WITHOUT_TWIN = {
    "nn.weight.add": AUTOGRAD,
    "nn.weight.times": AUTOGRAD,
    "nn.weight.gradients": AUTOGRAD,
    "nn.linear.sum_to": "the pullback of broadcasting is autograd's",
    "nn.linear.rows": "minift_kernels.backend.rows, which every kernel uses",
    "nn.embedding.scatter_add_1": STUDY,
    "nn.embedding.scatter_add_2": STUDY,
    "nn.attention.attention_1": STUDY,
    "nn.attention.attention_2": STUDY,
    "nn.attention.attention_3": "the twin is called attention, as is the reference's last form",
    "nn.dropout.fold_in": NUMBERS,
    "nn.threads": "torch brings its own threads",
    "quant.blockwise.count_below_1": STUDY,
    "quant.blockwise.count_below_2": STUDY,
    "quant.blockwise.count_below_3": STUDY,
    "quant.blockwise.count_below": "torch.bucketize, or eight steps in the kernel",
    "quant.blockwise.chunks": "walks through a CPU's cache",
    "quant.blockwise.for_scaled_chunks": "walks through a CPU's cache",
    "quant.blockwise.refuse_non_finite": "the twin uses it as it is, to say where the NaN is",
    "quant.blockwise.element_count": NUMBERS,
    "quant.blockwise.block_count": NUMBERS,
    "quant.blockwise.check_codebook": "codebooks are NumPy's tables, and are checked there",
    "quant.blockwise.numbers_per_scale": NUMBERS,
    "quant.int8_vectorwise.integer_product_1": STUDY,
    "quant.codebooks": "tables, made once in NumPy; a twin takes them to its device",
    "quant.nf4.normal_quantiles": "derives the table, once, in NumPy; the twin imports the table",
    "quant.nf4.check_block_size": NUMBERS,
    "quant.double_quant.overhead_bits": NUMBERS,
    "quant.sixteen": "torch has both types: params.from_numpy makes a Frozen tensor of what is stored so",
    "peft.targets": NAMES,
    "peft.adapter": NAMES,
    "peft.batched.forward_1": STUDY,
    "optim.schedules": NUMBERS,
    "optim.adamw8bit.largest_step": NUMBERS,
    "nn.lstm.lstm_1": STUDY,
    "nn.lstm.lstm_2": "the twin is called lstm, as is the reference's last form",
    "peft.p_tuning.fresh": "drawn in NumPy, then taken to a device: both start from the same bits",
    "rlhf.logprobs.answer_mask": TEXTS,
    "rlhf.logprobs.answers": TEXTS,
    "rlhf.logprobs.counts": TEXTS,
    "rlhf.pairs": TEXTS,
    "rlhf.raters": TEXTS,
    "rlhf.rubric": TEXTS,
    "rlhf.rollouts": "samples texts with the reference's generation; rounds in torch are not written yet",
    "rlhf.measure": "measures texts sampled by the reference; in torch it is not written yet",
    "rlhf.training": "the loops of the commands; in torch they are not written yet",
    "rlhf.advantages.gae_2": "T² numbers a row: the form that the recursion, and its scan, are held against",
    "rlhf.reward_model.ranking_loss_1": STUDY,
    "rlhf.reward_model.normalization": SCORES,
    "rlhf.reward_model.accuracy": SCORES,
    "rlhf.reward_model.calibration": SCORES,
    "rlhf.ppo.too_far": NUMBERS,
    "rlhf.ppo.next_kl_coef": NUMBERS,
    "rlhf.ppo.Settings": NUMBERS,
    "models.generation.check_settings": NUMBERS,
    "models.generation.choose": CHOSEN,
    "models.generation.probabilities": CHOSEN,
    "models.generation.sample": CHOSEN,
    "models.llama.shapes": NAMES,
    "models.llama.initialize": DRAWN,
    "models.gpt2.shapes": NAMES,
    "models.bert.shapes": NAMES,
    "models.bert.initialize": DRAWN,
}
WITHOUT_PARAMETER: dict[str, str] = {}
MORE = {  # parameters by keyword that a twin has beside the reference's and `backend`
    "nn.attention.attention": ("tiles",),
    "models.llama.backbone": ("dtype",),
    "models.gpt2.backbone": ("dtype",),
    "models.gpt2.block": ("tiles",),
    "models.bert.backbone": ("dtype",),
    "models.bert.block": ("tiles",),
    "models.bert.embed": ("dtype",),
    "models.classifier.features": ("dtype",),
    "models.classifier.logits": ("dtype",),
    "rlhf.actor_critic.assess": ("dtype",),
    "rlhf.actor_critic.forward": ("dtype",),
    "rlhf.actor_critic.loss": ("dtype",),
    "rlhf.dpo.answer_log_probs": ("dtype",),
    "rlhf.dpo.loss": ("dtype",),
    "rlhf.dpo.reference_log_probs": ("dtype",),
    "rlhf.logprobs.sequence_log_probs": ("dtype",),
    "rlhf.reward_model.loss": ("dtype",),
    "rlhf.reward_model.score": ("dtype",),
}
DEFAULTS = {(torch.float32, np.float32)}  # what is the same in torch and in NumPy


def reference_modules():
    return [
        f"{package}.{found.name}"
        for package in PACKAGES
        for found in pkgutil.iter_modules(importlib.import_module(f"minift.{package}").__path__)
    ]


MODULES = [name for name in reference_modules() if name not in WITHOUT_TWIN]


def functions(module):
    """Public functions defined in the module, and the public methods of its dataclasses."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            found[name] = value
        elif dataclasses.is_dataclass(value):
            methods = {n: f for n, f in vars(value).items() if isinstance(f, types.FunctionType | property)}
            found |= {f"{name}.{n}": f for n, f in methods.items() if not n.startswith("_")}
    return found


def twins_of(name):
    return [importlib.import_module(f"{package}.{name}") for package in ("minift", "minift_kernels")]


def lookup(module, dotted):
    value = module
    for part in dotted.split("."):
        value = inspect.getattr_static(value, part, None)
    return value


def parameters(function, without=()):
    """(name, kind, default) of each; `**options` are handed on, and come after all others."""
    found = [p for p in inspect.signature(function).parameters.values() if p.name not in without]
    return [(p.name, p.kind, p.default) for p in sorted(found, key=lambda p: p.kind is p.VAR_KEYWORD)]


@pytest.mark.parametrize("name", MODULES)
def test_every_function_has_its_twin(name):
    reference, twin = twins_of(name)
    for function, ours in functions(reference).items():
        theirs = lookup(twin, function)
        full = f"{name}.{function}"
        if full in WITHOUT_TWIN:
            assert getattr(theirs, "__module__", None) != twin.__name__, f"{full} has a twin: take it off the list"
            continue
        assert theirs is not None, f"{full} has no twin"
        if isinstance(ours, property):
            assert isinstance(theirs, property)
            continue
        dropped = {p.rpartition(".")[2] for p in WITHOUT_PARAMETER if p.rpartition(".")[0] == full}
        expected, found = parameters(ours, dropped), parameters(theirs)
        if expected and expected[-1][1] is inspect.Parameter.VAR_KEYWORD:
            assert found.pop() == expected.pop(), full
        more = found[len(expected) :]
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in more), f"{full}: {more}"
        assert {name for name, _, _ in more} <= {"backend", *MORE.get(full, ())}, f"{full}: {more}"
        assert [p[:2] for p in found[: len(expected)]] == [p[:2] for p in expected], full
        for (parameter, _, default), (_, _, wanted) in zip(found, expected, strict=False):
            same = default == wanted or (default, wanted) in DEFAULTS
            assert same, f"{full}: {parameter} is {default!r} by default, {wanted!r} in the reference"


@pytest.mark.parametrize("name", MODULES)
def test_dataclasses_have_the_same_fields(name):
    reference, twin = twins_of(name)
    classes = [c for c in vars(reference).values() if inspect.isclass(c) and c.__module__ == reference.__name__]
    for ours in (c for c in classes if dataclasses.is_dataclass(c) and not c.__name__.startswith("_")):
        theirs = getattr(twin, ours.__name__, None)
        if f"{name}.{ours.__name__}" in WITHOUT_TWIN or theirs is ours:
            continue
        assert theirs is not None, f"{name}.{ours.__name__} has no twin"
        wanted, found = ([f.name for f in dataclasses.fields(c)] for c in (ours, theirs))
        assert found[: len(wanted)] == wanted, ours.__name__


def test_the_lists_name_what_exists():
    for dotted in [*WITHOUT_TWIN, *(name.rpartition(".")[0] for name in WITHOUT_PARAMETER), *MORE]:
        package, module, *rest = dotted.split(".")
        found = importlib.import_module(f"minift.{package}.{module}")
        assert not rest or lookup(found, ".".join(rest)) is not None, dotted
