"""SmolLM2-135M-Instruct in torch: the reference's logits, LoRA and QLoRA gradients, and losses over twenty steps.

In plain PyTorch on a CPU. How close two float32 computations must be: `rounding`, and for gradients and losses what
weights changed by the same amount do to them.
"""

import numpy as np
import pytest
import torch

from minift.data.batches import pad
from minift.data.example import Message
from minift.data.templates import encode_prompt
from minift.io import load_model, load_tokenizer
from minift.models import llama as reference
from minift.nn.weight import Frozen, dense, replace, trainable
from minift.peft import lora, qlora
from minift.train import engine, sft
from minift.train.loop import Settings, fit
from minift_kernels.models import llama
from minift_kernels.params import from_numpy
from minift_kernels.train import engine as torch_engine
from minift_kernels.train import sft as torch_sft
from rounding import rounding_bound
from smollm2 import smollm2_gguf, why_not

PATH = smollm2_gguf()
pytestmark = [
    pytest.mark.skipif(PATH is None, reason=f"needs SmolLM2: {why_not()}"),
    pytest.mark.xdist_group("smollm2"),  # one worker holds the model
]

QUESTIONS = ["What is the capital of France?", "Write a haiku about the sea.", "Explain recursion to a child."]


@pytest.fixture(scope="module")
def model():
    return load_model(PATH)


@pytest.fixture(scope="module")
def texts():
    tokenizer = load_tokenizer(PATH)
    return [encode_prompt([Message("user", question)], tokenizer) for question in QUESTIONS]


def adapted(params, method):
    """An adapter that does something: B is not zero."""
    rng = np.random.default_rng(0)
    attach = qlora.attach if method == "qlora" else lora.attach
    params = attach(params, r=4, lora_alpha=24, rng=rng)
    learned = {n: (a + 0.01 * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in trainable(params).items()}
    return replace(params, learned)


def as_float64(params):
    """What these parameters stand for, exactly; a LoRA stays one."""

    def wide(w):
        if isinstance(w, lora.LoRA):
            return lora.LoRA(Frozen(dense(w.base).astype(np.float64)), *(x.astype(np.float64) for x in (w.A, w.B)), 24)
        return Frozen(dense(w).astype(np.float64))

    return {name: wide(w) for name, w in params.items()}


def move(params, size, seed=0):
    """Change every weight by ± size of itself, in place: twice a gigabyte would be two."""
    rng = np.random.default_rng(seed)
    for weight in params.values():
        parts = (weight.base.array, weight.A, weight.B) if isinstance(weight, lora.LoRA) else (weight.array,)
        for part in parts:
            part *= 1 + size * rng.choice(np.array([-1, 1], np.int8), part.shape)


def test_logits_are_within_the_bound(model, texts):
    config, params = model
    tokens = texts[2][None]
    bound, exact = rounding_bound(params, config, tokens)
    with torch.no_grad():
        found = llama.forward(from_numpy(params), torch.from_numpy(tokens.astype(np.int64)), config).numpy()
    print(f"\nbound {bound:.2e}, found {np.abs(found - exact).max():.2e}, logits up to {np.abs(exact).max():.1f}")
    assert np.abs(found - exact).max() <= bound


def test_the_same_tokens(model, texts):
    config, params = model
    wanted = reference.generate(params, texts[0][None], config, max_new_tokens=12)
    there = llama.fuse(from_numpy(params))
    found = llama.generate(there, torch.from_numpy(texts[0][None].astype(np.int64)), config, max_new_tokens=12)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_gradients_are_within_the_bound(model, texts, method):
    config, params = model
    params = adapted(params, method)
    batch = pad([(text, text) for text in texts[:2]])
    exact_params = as_float64(params)
    _, vjp = sft.loss(exact_params, batch, config)
    exact = vjp(1.0)
    move(exact_params, np.sqrt(config.intermediate_size) * 2.0**-24)
    _, vjp = sft.loss(exact_params, batch, config)
    shifted = vjp(1.0)
    _, pullback = torch_sft.loss(from_numpy(params), batch, config)
    found = pullback(1.0)
    assert found.keys() == exact.keys()

    def distance(gradients):
        return {n: np.linalg.norm(g - exact[n]) / np.linalg.norm(exact[n]) for n, g in gradients.items()}

    bound = max(distance(shifted).values())
    errors = distance({name: gradient.numpy() for name, gradient in found.items()})
    print(f"\n{method}: bound {bound:.2e}, found {max(errors.values()):.2e}, {len(errors)} arrays")
    assert max(errors.values()) <= bound
    assert bound < 1e-2  # and it says something


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_twenty_steps_follow_the_same_losses(model, texts, method):
    config, params = model
    params = adapted(params, method)
    learned = trainable(params)
    size = np.sqrt(config.intermediate_size) * 2.0**-24
    rng = np.random.default_rng(1)
    shaken = {n: (a * (1 + size * rng.choice([-1, 1], a.shape))).astype(a.dtype) for n, a in learned.items()}

    def run(params, on):
        def loss(p, batch, normalizer, key):
            return on.loss(p, batch, config, normalizer)

        def batches(step):
            return [pad([(text, text)]) for text in (texts[step % 3], texts[(step + 1) % 3])]

        result = fit(params, loss, batches, Settings(20, 1e-3, warmup_steps=2, weight_decay=0.1), engine=on)
        return np.array([record["loss"] for record in result.records])

    wanted, other = run(params, engine.NUMPY), run(replace(params, shaken), engine.NUMPY)
    found = run(params, torch_engine.on("cpu"))
    allowed = 4 * np.abs(other - wanted).max()
    print(f"\n{method}: {wanted[0]:.4f} to {wanted[-1]:.4f}, apart {np.abs(found - wanted).max():.2e} of {allowed:.2e}")
    assert np.abs(found - wanted).max() <= allowed
    assert wanted[-1] < wanted[0] - 0.5
