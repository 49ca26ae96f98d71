"""What is said of optimizers in 8 bits and in pages: a quarter of the bytes, and the same training."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from minift.claims.claim import Claim, holds, rounded
from minift.claims.nf4 import PAPER as QLORA
from minift.data.batches import pad
from minift.data.stdlib_docs import instruction_pairs
from minift.data.templates import encode_all
from minift.io import load_llama, load_tokenizer
from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit
from minift.optim.paged import PagedAdamW
from minift.optim.pager import Pager
from minift.train import sft
from minift.train.engine import Optimizer
from minift.train.loop import Settings, fit

PAPER = "8-bit optimizers (Dettmers et al. 2022, arXiv 2110.02861)"
STEPS = 15
SAVED = {"GPT-2 of 1.5B": (1.5e9, 8.5), "RoBERTa-large": (355e6, 2.0)}  # parameters, GB: table 1


def bytes_of_adam() -> Claim:
    """Adam keeps 8 bytes a parameter: two moments of 32 bits. Of a real state, after a step on 2²⁰ numbers."""
    found = _state_bytes(AdamW())
    return Claim("Adam's state takes 8 bytes a parameter", PAPER, 8, found, holds(found == 8), "4 + 4", "§1")


def bytes_of_adam_in_8_bits() -> Claim:
    """8-bit Adam keeps 2 bytes a parameter: two codes, and two scales of 32 bits a block.

    bitsandbytes and minift have blocks of 256 numbers: 2 + 8/256. The paper's are of 2,048: 2 + 8/2048."""
    found, papers = _state_bytes(AdamW8bit()), _state_bytes(AdamW8bit(block_size=2048))
    how = f"2 + 8/256; {papers:.4f} with the paper's blocks of 2,048. Arrays under 4,096 numbers stay in 32 bits"
    claim = "8-bit Adam's takes 2 bytes a parameter"
    return Claim(
        claim, PAPER, 2.0, found, rounded(2, found, 1), how, "§1", "minift compare --methods full full+adamw8bit"
    )


def saved(model: str) -> Claim:
    """Memory that 8-bit Adam saves, from table 1: the difference of the two states, measured a parameter, times N."""
    parameters, claimed = SAVED[model]
    found = (_state_bytes(AdamW()) - _state_bytes(AdamW8bit(block_size=2048))) * parameters / 1e9
    how = f"(8 − 2.004) bytes · {parameters / 1e6:,.0f}M"
    claim = f"saves {claimed:g} GB of {model}"
    return Claim(claim, PAPER, claimed, found, rounded(claimed, found, 2), how, "table 1")


def as_good_as_32_bits() -> Claim:
    """8-bit optimizers reach the same result as 32-bit ones.

    The built-in model, all parameters, fifteen steps from the same start on the same questions and answers: the last
    training losses against each other."""
    wide, narrow = _last_loss("adamw"), _last_loss("adamw8bit")
    found = 100 * (narrow / wide - 1)
    how = f"difference of the loss after {STEPS} steps, in %: {wide:.4f} with 32 bits, {narrow:.4f} with 8"
    command = "minift compare --methods full full+adamw8bit"
    return Claim("8-bit Adam is as good as 32-bit", PAPER, 0.0, found, holds(abs(found) < 1), how, "table 1", command)


def paging_changes_nothing() -> Claim:
    """Paged optimizers page state out and in again where memory runs short; no number changes by that.

    Ten steps of 8-bit AdamW on 2¹⁶ numbers, with a budget of a third of the state and without pages: bytes of the
    parameters that differ."""
    paged = PagedAdamW(AdamW8bit(weight_decay=0.1), Pager(50_000))
    plain = AdamW8bit(weight_decay=0.1)
    results = []
    for optimizer in (plain, paged):
        theta = {"w": np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)}
        for step in range(10):
            gradient = np.random.default_rng(step).standard_normal((256, 256)).astype(np.float32)
            optimizer.update(theta, {"w": gradient}, 1e-2)
        results.append(theta["w"].view(np.uint8))
    found = int(np.count_nonzero(results[0] != results[1]))
    how = f"bytes that differ, after {paged.pager.faults} page faults; {paged.nbytes:,} bytes in 50,000"
    true = found == 0 < paged.pager.evictions
    return Claim("paging changes no bit", QLORA, 0, found, holds(true), how, "§3", "minift study spikes")


CLAIMS: dict[str, Callable[[], Claim]] = {
    "paging-changes-nothing": paging_changes_nothing,
    "bytes-of-adam": bytes_of_adam,
    "bytes-of-adam-in-8-bits": bytes_of_adam_in_8_bits,
    **{f"saved-{model.split()[0].lower()}": partial(saved, model) for model in SAVED},
    "as-good-as-32-bits": as_good_as_32_bits,
}


def _state_bytes(optimizer: AdamW | AdamW8bit) -> float:
    """Bytes a parameter, of a state that has seen one step."""
    theta = {"w": np.zeros((1024, 1024), np.float32)}
    optimizer.update(theta, {"w": np.ones((1024, 1024), np.float32)}, 1e-3)
    return optimizer.nbytes / theta["w"].size


@lru_cache(maxsize=2)
def _last_loss(optimizer: Optimizer) -> float:
    config, params = load_llama("tiny")
    pairs = instruction_pairs()[: 8 * STEPS]
    examples = encode_all(pairs, load_tokenizer("tiny"), max_length=128).examples

    def batches(step):
        return [pad([examples[i % len(examples)] for i in range(8 * step, 8 * step + 8)])]

    def loss(p, batch, normalizer, key):
        return sft.loss(p, batch, config, normalizer)

    settings = Settings(steps=STEPS, learning_rate=1e-3, warmup_steps=3, optimizer=optimizer)
    return fit(params, loss, batches, settings).losses("loss")[-1][1]
