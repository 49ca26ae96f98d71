"""A run small enough to repeat: a Llama of two blocks with LoRA, dropout and accumulation, on random text."""

import numpy as np

from minift.data.batches import batch_indices, pad
from minift.models import llama
from minift.peft import lora
from minift.train import sft
from minift.train.loop import Settings, fit

CONFIG = llama.Config(31, 16, 24, 2, 4, 2, 4, tie_word_embeddings=True)
SETTINGS = Settings(
    steps=9,
    learning_rate=0.02,
    schedule="cosine",
    warmup_steps=3,
    weight_decay=0.1,
    max_grad_norm=0.5,
    seed=5,
    eval_every=2,
    save_every=3,
    keep_best=True,
)


def examples(n=11, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, CONFIG.vocab_size, rng.integers(3, 9)).astype(np.int32) for _ in range(n)]
    return [(row, np.where(np.arange(len(row)) < 2, -100, row).astype(np.int32)) for row in rows]


def params(seed=1):
    rng = np.random.default_rng(seed)
    return lora.attach(llama.initialize(CONFIG, rng, std=0.3), r=3, lora_alpha=7, lora_dropout=0.3, rng=rng)


def loss(p, batch, normalizer, key):
    return sft.loss(p, batch, CONFIG, normalizer, key)


def batches(step):
    """Three micro-batches of two, of different lengths."""
    data = examples()
    chosen = batch_indices(len(data), 6, 3, step - 1)
    return [pad([data[i] for i in chosen[j : j + 2]]) for j in (0, 2, 4)]


def run(settings=SETTINGS, **options):
    held_out = pad(examples(5, seed=9))
    return fit(params(), loss, batches, settings, evaluate=lambda p: float(sft.loss(p, held_out, CONFIG)[0]), **options)
