"""SmolLM2-135M-Instruct, the real model: the same logits and the same text as transformers, from the same file.

How close two float32 computations of a deep network must be: `rounding.rounding_bound`.
"""

import numpy as np
import pytest
import torch
import transformers

from minift.cli.common import answer
from minift.data.batches import pad
from minift.data.example import Message
from minift.data.templates import encode_prompt
from minift.io import load_model, load_tokenizer, save_adapter
from minift.models import llama
from minift.nn.weight import dense, replace, trainable
from minift.peft import lora, qlora
from minift.train import sft
from rounding import rounding_bound
from smollm2 import smollm2_gguf, why_not

PATH = smollm2_gguf()
pytestmark = [
    pytest.mark.skipif(PATH is None, reason=f"needs SmolLM2: {why_not()}"),
    pytest.mark.xdist_group("smollm2"),  # one worker holds the two models
]

QUESTIONS = ["What is the capital of France?", "Write a haiku about the sea.", "Explain recursion to a child."]


@pytest.fixture(scope="module")
def model():
    return load_model(PATH)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PATH)


@pytest.fixture(scope="module")
def peer():
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        PATH.parent, gguf_file=PATH.name, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


def test_logits_equal_those_of_transformers(model, tokenizer, peer):
    config, params = model
    tokens = encode_prompt([Message("user", QUESTIONS[2])], tokenizer)[None]
    bound, exact = rounding_bound(params, config, tokens)
    ours, _ = llama.forward(params, tokens, config, recompute=True)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    print(
        f"\nbound {bound:.2e}; ours − theirs {np.abs(ours - theirs).max():.2e}; logits up to {np.abs(exact).max():.1f}"
    )
    assert np.abs(ours - exact).max() <= bound
    assert np.abs(ours - theirs).max() <= 2 * bound  # each of the two is off by at most one
    assert bound < 1e-2 * exact.std()  # and the bound says something


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_same_64_tokens(model, tokenizer, peer, question):
    config, params = model
    tokens = encode_prompt([Message("user", question)], tokenizer)[None]
    ours = llama.generate(params, tokens, config, max_new_tokens=64)
    with torch.no_grad():
        theirs = peer.generate(
            torch.from_numpy(tokens.astype(np.int64)),
            attention_mask=torch.ones(tokens.shape, dtype=torch.int64),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        ).numpy()
    assert ours.shape[1] == tokens.shape[1] + 64
    assert ours.tolist() == theirs.tolist()


def test_it_knows_the_capital_of_france(model, tokenizer):
    config, params = model
    text = "".join(answer(params, config, tokenizer, [Message("user", QUESTIONS[0])], max_new_tokens=40))
    assert "Paris" in text
    assert "<|" not in text


def test_a_qlora_adapter_loads_in_peft_and_gives_the_same_logits(model, tokenizer, peer, tmp_path):
    """Trained for two steps by hand over NF4 with double quantization; PEFT gets the same, dequantized, base."""
    import peft

    config, params = model
    quantized = qlora.attach(params, r=4, lora_alpha=24, use_rslora=True, rng=np.random.default_rng(0))
    text = encode_prompt([Message("user", QUESTIONS[1])], tokenizer)
    batch, rate = pad([(text, text)]), 0.02
    losses = []
    for _ in range(2):
        value, vjp = sft.loss(quantized, batch, config)
        losses.append(float(value))
        gradients = vjp(1.0)
        quantized = replace(
            quantized, {n: a - np.float32(rate) * gradients[n] for n, a in trainable(quantized).items()}
        )
    base, adapter = lora.detach(quantized)
    save_adapter(tmp_path / "adapter", adapter, str(PATH))
    ours, _ = llama.forward(quantized, text[None], config, recompute=True)
    untrained, _ = llama.forward(base, text[None], config, recompute=True)
    bound, _ = rounding_bound({n: dense(w) for n, w in lora.merge(quantized).items()}, config, text[None])

    state = {n: torch.from_numpy(np.array(dense(w))) for n, w in base.items()}
    before = {n: w.clone() for n, w in peer.state_dict().items()}
    peer.load_state_dict(state, strict=False)
    loaded = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = loaded(torch.from_numpy(text[None].astype(np.int64))).logits.numpy()
    loaded.unload()
    peer.load_state_dict(before)
    assert losses[1] < losses[0]
    assert np.abs(ours - theirs).max() <= 2 * bound
    assert np.abs(ours - untrained).max() > 10 * bound  # the adapter does something
