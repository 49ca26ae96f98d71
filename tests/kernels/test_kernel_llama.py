"""The whole model in torch: the reference's logits, gradients, text and losses, from the same parameters.

In float64 the two differ by roundings of 1e-16, so that 1e-9 separates them from any mistake. In float32 the yardstick
is what weights changed by their share of the rounding do to the exact result (`rounding`).
"""

import dataclasses

import numpy as np
import pytest
import torch

from minift.data.batches import pack, pad
from minift.models import llama as reference
from minift.nn.attention import KVCache
from minift.nn.weight import Frozen, dense, replace, thaw, trainable
from minift.peft import lora, qlora
from minift.train import engine, sft
from minift.train.loop import Settings, fit
from minift_kernels.models import llama
from minift_kernels.nn import weight
from minift_kernels.params import from_numpy
from minift_kernels.train import engine as torch_engine
from minift_kernels.train import sft as torch_sft
from rounding import rounding_bound
from train.small_run import examples

CONFIG = reference.Config(31, 16, 24, 2, 4, 2, 4, rms_norm_eps=1e-3, tie_word_embeddings=True)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)


def model(config=CONFIG, kind="full", seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    params = {n: w.astype(dtype) for n, w in reference.initialize(config, rng, std=0.3).items()}
    if kind == "full":
        return params
    attach = qlora.attach if kind == "qlora" else lora.attach
    adapted = attach(params, r=3, lora_alpha=7, lora_dropout=0.25, rng=rng)
    learned = {n: (0.2 * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in trainable(adapted).items()}
    return replace(adapted, learned)


def close(found, expected, what):
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    assert found.shape == expected.shape, f"{what}: {found.shape}, needed {expected.shape}"
    error, size = np.abs(found - expected).max(initial=0), np.abs(expected).max(initial=0)
    assert error <= 1e-9 * max(size, 1e-3), f"{what}: off by {error:.2e} at a size of {size:.2e}"


def tensor(x):
    return torch.from_numpy(np.array(x))


OPTIONS = {
    "plain": {},
    "packed": {"segments": np.array([[0, 0, 1, 1, 1, 2, -1], [0, 0, 0, 0, 1, 1, 1]])},
    "dropout": {"dropout_key": 12345},
    "recomputed": {"recompute": True, "dropout_key": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_logits_and_gradients_are_the_references(config, kind, options, rng):
    tokens, params = rng.integers(0, 31, (2, 7)), model(config, kind)
    logits, vjp = reference.forward(params, tokens, config, **options)
    dlogits = rng.standard_normal(logits.shape)
    there = from_numpy(params, dtype=torch.float64)
    given = {name: tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    found = llama.forward(there, tensor(tokens), config, **given)
    close(found, logits, "logits")
    gradients, learned = vjp(dlogits), weight.trainable(there)
    assert learned.keys() == gradients.keys()
    for name, dw in zip(learned, torch.autograd.grad(found, list(learned.values()), tensor(dlogits)), strict=True):
        if kind == "full":
            close(dw, gradients[name], name)
        else:  # adapters are kept in float32
            error = np.abs(dw.numpy() - gradients[name]).max()
            assert error <= 1e-6 * np.abs(gradients[name]).max(), f"{name}: off by {error:.2e}"


def test_soft_prompts_and_prefixes(rng):
    params, embeddings = model(UNTIED), rng.standard_normal((2, 5, 16))
    prefix = rng.standard_normal((2, 2, 2, 3, 4))
    hidden, vjp = reference.backbone(params, embeddings, UNTIED, prefix=prefix)
    dhidden = rng.standard_normal(hidden.shape)
    dembeddings, dprefix, gradients = vjp(dhidden)
    there = from_numpy(params, dtype=torch.float64)
    x, p = tensor(embeddings).requires_grad_(), tensor(prefix).requires_grad_()
    found = llama.backbone(there, x, UNTIED, prefix=p)
    close(found, hidden, "hidden")
    name = "model.layers.0.self_attn.k_proj.weight"
    wanted = (dembeddings, dprefix, gradients[name])
    for a, b, what in zip(torch.autograd.grad(found, (x, p, there[name]), tensor(dhidden)), wanted, "xpk", strict=True):
        close(a, b, what)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_the_same_text(kind, fused, rng):
    """Greedy and sampled, prompts of different lengths, and behind a prefix."""
    params, tokens = model(UNTIED, kind), rng.integers(0, 31, (3, 6))
    there = from_numpy(params, dtype=torch.float64)
    there = llama.fuse(there) if fused else there
    lengths = np.array([6, 2, 4])
    for options in (
        {"lengths": lengths},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "lengths": lengths},
        {"prefix": rng.standard_normal((2, 2, 2, 3, 4))},
    ):
        one, two = np.random.default_rng(3), np.random.default_rng(3)
        wanted = reference.generate(params, tokens, UNTIED, max_new_tokens=8, rng=one, **options)
        given = options | {"prefix": tensor(options["prefix"])} if "prefix" in options else options
        found = llama.generate(there, tensor(tokens), UNTIED, max_new_tokens=8, rng=two, **given)
        assert np.array_equal(found.numpy(), wanted)


def test_what_is_refused():
    params, tokens = from_numpy(model(), dtype=torch.float64), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shape \(3,\), needed \(batch, tokens\) with at least one token"):
        llama.forward(params, tokens[0], CONFIG)
    with pytest.raises(ValueError, match="put the prefix into the cache"):
        llama.backbone(params, tokens, CONFIG, prefix=torch.zeros(2, 2, 2, 1, 4), cache=object())
    with pytest.raises(IndexError, match="31"):
        llama.forward(params, tokens + 31, CONFIG)
    assert KVCache is not llama.KVCache


@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_every_kernel_together(kind, rng):
    """The whole model in the interpreter, a packed row with dropout: within the bound of its own roundings."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    params, tokens = model(config, kind, dtype=np.float32), rng.integers(0, 31, (1, 6))
    bound, exact = rounding_bound(params, config, tokens)
    there = from_numpy(params)
    logits = llama.forward(there, tensor(tokens), config, backend="interpreter")
    assert np.abs(logits.detach().numpy() - exact).max() <= bound
    segments, dlogits = tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor(rng.standard_normal(logits.shape)).float()
    results = {}
    for how in ("torch", "interpreter"):
        options = {"segments": segments, "dropout_key": 5, "backend": how}
        logits = llama.forward(there, tensor(tokens), config, **options)
        learned = weight.trainable(there)
        results[how] = torch.autograd.grad(logits, list(learned.values()), dlogits)
    for name, a, b in zip(learned, *results.values(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm(), f"{name}: off by {(a - b).norm() / b.norm():.2e}"


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_of_a_packed_batch_and_its_gradient(recompute):
    batch, params = pack(examples(), 12), model(UNTIED, "full")
    value, vjp = sft.loss(params, batch, UNTIED, 17.0)
    found, pullback = torch_sft.loss(from_numpy(params, dtype=torch.float64), batch, UNTIED, 17.0, recompute=recompute)
    close(found, np.asarray(value), "loss")
    gradients, wanted = pullback(0.7), vjp(0.7)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        close(gradient, wanted[name], name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_activations_of_16_bits_and_weights_that_learn_in_32(kind, dtype):
    """Loss and gradients are off by no more than what weights changed by √K u of 16 bits do to them, both ways."""
    params, batch, rng = model(UNTIED, kind, dtype=np.float32), pad(examples()), np.random.default_rng(0)
    size = np.sqrt(24) * torch.finfo(dtype).eps / 2
    matrices = {
        name: dense(w) * (1 + size * rng.choice([-1, 1], w.shape)).astype(np.float32) for name, w in params.items()
    }
    results = []
    for given, activations in ((params, torch.float32), (params, dtype), (matrices, torch.float32)):
        value, vjp = torch_sft.loss(from_numpy(given, dtype=activations), batch, UNTIED, dtype=activations)
        results.append((value, vjp(1.0)))
    (exact, gradients), (found, narrow), (moved, shifted) = results
    assert abs(found - exact) <= 4 * max(abs(moved - exact), size)
    assert all(gradient.dtype == torch.float32 for gradient in narrow.values())
    if kind == "full":  # where the shifted model has the same gradients
        apart = max(float((shifted[n] - g).norm() / g.norm()) for n, g in gradients.items())
        assert all((narrow[n] - g).norm() <= 4 * apart * g.norm() for n, g in gradients.items())


def run(params, config, on, steps=20, folder=None, **options):
    """`steps` of AdamW with dropout, decay and clipping: the losses, then the held-out ones; and the parameters."""
    data = examples()

    def loss(p, batch, normalizer, key):
        return on.loss(p, batch, config, normalizer, key)

    def batches(step):
        return [pad([data[(5 * step + i) % 11] for i in part]) for part in ((0, 1, 2), (3, 4))]

    settings = Settings(steps, 0.01, warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5, save_every=6, eval_every=10)
    held_out = pad(examples(5, seed=9))
    result = fit(
        params,
        loss,
        batches,
        settings,
        evaluate=lambda p: on.value(p, held_out, config, None),
        engine=on,
        folder=folder,
        **options,
    )
    losses = [record["loss"] for record in result.records if "loss" in record]
    return np.array(losses + [value for _, value in result.losses()]), result.params


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_training_follows_the_same_losses(kind):
    """Twenty steps of both engines. The yardstick: weights changed by √K u, K the longest sum, and trained as well."""
    params = model(CONFIG, kind, dtype=np.float32)
    one_row_at_a_time = dataclasses.replace(engine.NUMPY, loss=sft.loss)  # dropout draws for the whole batch
    wanted, learned = run(params, CONFIG, one_row_at_a_time)
    found, learned_in_torch = run(params, CONFIG, torch_engine.on("cpu"))
    rng = np.random.default_rng(0)
    size = np.sqrt(24) * 2.0**-24
    shifted = {n: a * (1 + size * rng.choice([-1, 1], a.shape)).astype(a.dtype) for n, a in trainable(params).items()}
    moved, _ = run(replace(params, shifted), CONFIG, one_row_at_a_time)
    apart, shaken = np.abs(found - wanted).max(), np.abs(moved - wanted).max()
    allowed = 4 * max(shaken, size * wanted.max())  # each of the two engines is off, in both directions
    assert apart <= allowed, f"{apart:.2e} apart, {allowed:.2e} allowed"
    assert wanted[19] < wanted[0], "it learned something"
    assert trainable(learned_in_torch).keys() == trainable(learned).keys()
    assert all(isinstance(a, np.ndarray) for a in trainable(learned_in_torch).values()), "the result is NumPy's"


def test_a_run_in_torch_is_resumed_bit_for_bit(tmp_path):
    params, on = model(CONFIG, "lora", dtype=np.float32), torch_engine.on("cpu")
    _, whole = run(params, CONFIG, on, folder=tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(record):
        if record["step"] == 9 and "loss" in record:
            raise Stopped

    with pytest.raises(Stopped):
        run(params, CONFIG, on, folder=tmp_path / "parts", report=stop)
    _, resumed = run(params, CONFIG, on, folder=tmp_path / "parts", resume=True)
    for name, array in trainable(whole).items():
        assert array.tobytes() == trainable(resumed)[name].tobytes(), name


def test_arguments_are_not_changed():
    params = model(CONFIG, "full", dtype=np.float32)
    before = {name: array.tobytes() for name, array in params.items()}
    run(params, CONFIG, torch_engine.on("cpu"), steps=2)
    assert {name: array.tobytes() for name, array in params.items()} == before
    assert not any(isinstance(w, Frozen) for w in thaw(params).values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"--device cuda: torch .* finds no GPU here; use --device cpu"):
        torch_engine.on("cuda")
