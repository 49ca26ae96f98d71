"""A Llama of two blocks in float64, bare or with adapters, and rows of prompt and answer."""

import numpy as np

from minift.models import llama
from minift.nn.weight import replace, trainable
from minift.peft import lora, qlora
from minift.rlhf.logprobs import answers

CONFIG = llama.Config(23, 8, 12, 2, 4, 2, 4, rms_norm_eps=0.05, tie_word_embeddings=True)
KINDS = ("full", "lora", "qlora")


def params(kind="lora", seed=1, *, moved=True, dtype=np.float64):
    """`moved`: adapters away from their initial values, so that B is not 0."""
    rng = np.random.default_rng(seed)
    arrays = {name: (0.4 * rng.standard_normal(shape)).astype(dtype) for name, shape in llama.shapes(CONFIG).items()}
    if kind == "full":
        return arrays
    attach = {"lora": lora.attach, "qlora": qlora.attach}[kind]
    target = "all-linear" if kind == "qlora" else ["q_proj", "down_proj"]
    attached = attach(arrays, target, r=2, lora_alpha=3, rng=rng)
    return move(attached, seed, dtype) if moved else attached


def move(attached, seed=1, dtype=np.float64):
    """Every array that learns, somewhere else."""
    rng = np.random.default_rng([seed, 2])
    return replace(
        attached,
        {n: (a + 0.3 * rng.standard_normal(a.shape)).astype(dtype) for n, a in trainable(attached).items()},
    )


def batch(rows=4, width=9, seed=3):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, width + 1, rows)
    lengths[0] = width
    prompts = np.array([rng.integers(1, n) for n in lengths])
    return answers(rng.integers(0, CONFIG.vocab_size, (rows, width)), prompts, lengths)


def other_padding(batch, token=5):
    """The same text with another token, and labels as they are, where rows are filled up."""
    padding = np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
    assert padding.any()
    return type(batch)(np.where(padding, token, batch.tokens), batch.labels, batch.lengths)


def wider(batch, by=3, token=7):
    """The same rows, filled up further."""
    more = ((0, 0), (0, by))
    return type(batch)(
        np.pad(batch.tokens, more, constant_values=token),
        np.pad(batch.labels, more, constant_values=-100),
        batch.lengths,
    )
