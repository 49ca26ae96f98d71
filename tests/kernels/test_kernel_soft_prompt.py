"""Soft prompts in torch: the reference's logits, gradients, text and training, from the same parameters.

In float64 the two differ by roundings of 1e-16, so that 1e-9 separates them from any mistake.
"""

import dataclasses

import numpy as np
import pytest
import torch
from test_kernel_llama import close, tensor

from minift.data.batches import pad
from minift.models import llama as reference
from minift.nn.weight import replace, trainable
from minift.peft import p_tuning, prefix_tuning, prompt_tuning, soft_prompt
from minift.train import sft as reference_sft
from minift.train.loop import Settings, fit
from minift_kernels.models import llama
from minift_kernels.nn import weight
from minift_kernels.nn.attention import KVCache
from minift_kernels.params import from_numpy
from minift_kernels.peft import p_tuning as twin_p_tuning
from minift_kernels.peft import prefix_tuning as twin_prefix_tuning
from minift_kernels.peft import prompt_tuning as twin_prompt_tuning
from minift_kernels.peft import soft_prompt as twin
from minift_kernels.train import engine as torch_engine
from minift_kernels.train import sft
from nn.checks import kill_matrix

CONFIG = reference.Config(29, 12, 20, 2, 6, 2, 4, rope_theta=500.0, rms_norm_eps=3e-3)
P = 3
KINDS = {
    "prompt": lambda m, params, rng: m["prompt"].attach(params, P, rng=rng),
    "prefix": lambda m, params, rng: m["prefix"].attach(params, P, rng=rng),
    "prefix, network": lambda m, params, rng: m["prefix"].attach(params, P, rng=rng, encoder_hidden_size=5),
    "p, MLP": lambda m, params, rng: m["p"].attach(params, P, rng=rng, encoder_hidden_size=7),
    "p, LSTM": lambda m, params, rng: m["p"].attach(params, P, rng=rng, encoder="LSTM", encoder_hidden_size=5),
}
NUMPY = {"prompt": prompt_tuning, "prefix": prefix_tuning, "p": p_tuning}
TORCH = {"prompt": twin_prompt_tuning, "prefix": twin_prefix_tuning, "p": twin_p_tuning}


def model(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    params = {name: (0.5 * rng.standard_normal(s)).astype(dtype) for name, s in reference.shapes(CONFIG).items()}
    return params | {reference.EMBEDDING: 2 * params[reference.EMBEDDING]}


def prompted(kind, dtype=np.float64):
    """With a soft prompt in the middle of training; and the same as tensors."""
    rng = np.random.default_rng(5)
    params = KINDS[kind](NUMPY, model(dtype=dtype), rng)
    params = replace(
        params, {n: (0.7 * rng.standard_normal(a.shape)).astype(dtype) for n, a in trainable(params).items()}
    )
    return params, from_numpy(params, dtype=getattr(torch, np.dtype(dtype).name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_is_the_references(kind):
    """The same numbers from the same generator, in float32, that ask for a gradient; the rest is frozen."""
    wanted = KINDS[kind](NUMPY, model(dtype=np.float32), np.random.default_rng(7))
    found = KINDS[kind](TORCH, from_numpy(model(dtype=np.float32)), np.random.default_rng(7))
    assert list(found) == list(wanted)
    learned = weight.trainable(found)
    assert learned.keys() == trainable(wanted).keys()
    for name, array in trainable(wanted).items():
        assert learned[name].requires_grad and learned[name].is_leaf and learned[name].dtype == torch.float32
        slack = 2**-20 * np.abs(array).max() if kind == "prompt" else 0  # σ of a table, summed in another order
        assert np.abs(learned[name].detach().numpy() - array).max() <= slack, name


def logits_and_gradients(op, kind):
    """Also with recomputation, and with `lengths`, which only a cache needs."""
    params, there = prompted(kind)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 29, (2, 5))
    wanted, vjp = reference.forward(params, tokens, CONFIG)
    dlogits = rng.standard_normal(wanted.shape)
    gradients, learned = vjp(dlogits), weight.trainable(there)
    assert learned.keys() == gradients.keys()
    for recompute in (False, True):
        found = op.forward(there, tensor(tokens), CONFIG, recompute=recompute)
        close(found, wanted, "logits")
        for name, dw in zip(learned, torch.autograd.grad(found, [*learned.values()], tensor(dlogits)), strict=True):
            close(dw, gradients[name], name)


def the_same_text(op, kind):
    """Prompts of different lengths: the soft prompt stands before the first pass only, and counts in the cache."""
    params, there = prompted(kind)
    tokens = np.random.default_rng(2).integers(0, 29, (3, 6))
    options = {"max_new_tokens": 6, "lengths": np.array([6, 2, 4])}
    wanted = reference.generate(params, tokens, CONFIG, **options)
    assert np.array_equal(op.generate(there, tensor(tokens), CONFIG, **options).numpy(), wanted)


def the_same_loss(op, kind):
    """Its labels are the text's; in pages of different lengths."""
    params, there = prompted(kind)
    rng = np.random.default_rng(3)
    batch = pad([(row, row) for row in (rng.integers(0, 29, n).astype(np.int32) for n in (5, 2, 4))])
    wanted, vjp = reference_sft.loss(params, batch, CONFIG)
    found, found_vjp = sft.loss(there, batch, CONFIG)
    close(found, np.asarray(wanted), "loss")
    gradients = found_vjp(1.0)
    for name, gradient in vjp(1.0).items():
        close(gradients[name], gradient, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prop", [logits_and_gradients, the_same_text, the_same_loss], ids=lambda p: p.__name__)
def test_the_model_with_it(prop, kind):
    prop(llama, kind)


class Patched:
    """`llama` with another `prepend`."""

    def __init__(self, name, prepend):
        self.__name__, self.prepend = name, prepend

    def __getattr__(self, name):
        def call(*args, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(twin, "prepend", self.prepend)
                return getattr(llama, name)(*args, **options)

        return call


right = twin.prepend


def turned_around(params, x, *rest, **options):
    return right({n: w.flip(0) if n in twin.TABLES else w for n, w in params.items()}, x, *rest, **options)


def another_gradient(params, x, *rest, **options):
    y, lengths, prefix = right(params, x, *rest, **options)
    if prefix is not None:
        return y, lengths, 2 * prefix - prefix.detach()
    return 2 * y - y.detach(), lengths, None


def behind_the_text(params, x, *rest, **options):
    y, lengths, prefix = right(params, x, *rest, **options)
    return (y.roll(x.shape[1], 1) if y.shape != x.shape else y), lengths, prefix


def not_when_generating(params, x, *rest, cache=None, lengths=None, **options):
    return right(params, x, *rest, lengths=lengths, **options) if cache is None else (x, lengths, None)


def not_counted(params, x, *rest, lengths=None, **options):
    return right(params, x, *rest, lengths=None, **options)[0], lengths, right(params, x, *rest, **options)[2]


def keys_for_values(params, x, *rest, **options):
    y, lengths, prefix = right(params, x, *rest, **options)
    return y, lengths, None if prefix is None else prefix.flip(1)


def test_kill_matrix():
    wrong = [turned_around, another_gradient, behind_the_text, not_when_generating, not_counted, keys_for_values]
    versions = [Patched(f.__name__, f) for f in wrong]
    kill_matrix([logits_and_gradients, the_same_text], versions, ["prompt", "prefix"])


@pytest.mark.parametrize("kind", KINDS)
def test_taken_off_put_on_and_folded(kind):
    params, there = prompted(kind)
    tokens = tensor(np.random.default_rng(1).integers(0, 29, (2, 5)))
    logits = llama.forward(there, tokens, CONFIG)
    base, prompt = twin.detach(there)
    _, wanted = soft_prompt.detach(params)
    assert (
        prompt.kind == wanted.kind and repr(prompt) == repr(wanted) and base.keys() == soft_prompt.bare(params).keys()
    )
    close(prompt.table, wanted.table, "table")
    (folded,) = weight.trainable(twin.fold(there)).values()
    assert folded.requires_grad and torch.equal(folded, prompt.table)
    for again in (twin.insert(base, prompt), twin.insert(there, prompt), twin.fold(there)):
        assert torch.equal(llama.forward(again, tokens, CONFIG), logits)
    (learned,) = weight.trainable(twin.insert(base, prompt)).values()
    assert learned.requires_grad and not prompt.table.requires_grad
    assert (twin.length(there), twin.length(base), twin.kind(base)) == (P, 0, None)


def test_copied_from_a_text_it_is_the_text():
    """To the bit; repeated where the text is shorter."""
    base, typed = from_numpy(model()), torch.tensor([3, 17])
    params = twin_prompt_tuning.attach(base, P, tokens=typed)
    text = torch.tensor([[1, 2, 28], [4, 4, 9]])
    whole = torch.cat([torch.tensor([[3, 17, 3]] * 2), text], dim=1)
    assert torch.equal(llama.backbone(params, text, CONFIG), llama.backbone(base, whole, CONFIG)[:, P:])


def test_a_table_is_the_cache_that_a_text_leaves():
    base, typed = from_numpy(model(), dtype=torch.float64), torch.tensor([[3, 17, 5]])
    cache = KVCache(2, 1, 2, 8, 4, torch.float64)
    with torch.no_grad():
        llama.backbone(base, typed, CONFIG, cache=cache)
    kept = torch.stack([cache.keys[:, 0, :, :P], cache.values[:, 0, :, :P]], dim=1)
    table = twin_prefix_tuning.table(kept)
    assert torch.equal(twin_prefix_tuning.split(table, 2, 4), kept)
    text = torch.tensor([[1, 2, 28]])
    found = llama.forward(weight.freeze(base) | {twin_prefix_tuning.TABLE: table}, text, CONFIG)
    close(found, llama.forward(base, torch.cat([typed, text], dim=1), CONFIG)[:, P:].detach().numpy(), "logits")


def test_what_is_refused():
    base, text = from_numpy(model()), torch.zeros(1, 3, dtype=torch.int64)
    prompt = twin_prompt_tuning.attach(base, P, tokens=text[0])
    with pytest.raises(ValueError, match="a soft prompt of embeddings and packed rows"):
        llama.forward(prompt, text, CONFIG, segments=torch.zeros_like(text))
    with pytest.raises(ValueError, match="a prefix, and a soft prompt in the parameters"):
        llama.forward(prompt, text, CONFIG, prefix=torch.zeros(2, 2, 2, 1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="rows of 5 numbers, the model's embeddings 12"):
        llama.forward(base | {twin_prompt_tuning.TABLE: torch.zeros(2, 5)}, text, CONFIG)
    with pytest.raises(ValueError, match="carry no soft prompt"):
        twin.fold(base)
    with pytest.raises(ValueError, match="this model needs rows of hidden_size = 12"):
        twin.insert(base, twin.SoftPrompt("PROMPT_TUNING", torch.zeros(2, 5)))
    for options, message in (({}, "needed one of rng"), ({"tokens": text[0, :0]}, "tokens is empty")):
        with pytest.raises(ValueError, match=message):
            twin_prompt_tuning.attach(base, P, **options)
    with pytest.raises(ValueError, match="encoder_hidden_size is 0"):
        twin_prefix_tuning.attach(base, P, rng=np.random.default_rng(0), encoder_hidden_size=0)


@pytest.mark.parametrize("kind", ["prompt", "prefix, network", "p, LSTM"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged-adamw8bit"])
def test_training_is_the_references(kind, optimizer):
    """Six steps in float32: losses as near as roundings let them be."""
    params, _ = prompted(kind, np.float32)
    rng = np.random.default_rng(3)
    batch = pad([(row, row) for row in (rng.integers(0, 29, n).astype(np.int32) for n in (5, 2, 4))])
    settings = Settings(steps=6, learning_rate=0.01, warmup_steps=0, optimizer=optimizer, page_budget=200_000)
    ran = {}
    for name, engine, loss in (
        ("NumPy", None, lambda p, b, n, key: reference_sft.loss(p, b, CONFIG, n)),
        ("torch", torch_engine.on("cpu"), lambda p, b, n, key: sft.loss(p, b, CONFIG, n)),
    ):
        options = {} if engine is None else {"engine": engine}
        ran[name] = fit(params, loss, lambda step: [batch], dataclasses.replace(settings), **options)
    losses = [[r["loss"] for r in result.records if "loss" in r] for result in ran.values()]
    assert losses[0][-1] < losses[0][0]
    assert np.abs(np.subtract(*losses)).max() <= 1e-5 * losses[0][0]
    assert ran["torch"].optimizer_bytes == ran["NumPy"].optimizer_bytes and ran["torch"].paging == ran["NumPy"].paging
