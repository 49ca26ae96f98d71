"""RLHF on a GPU beside what one writes first in PyTorch, and that compiled; `timing.py` says how, `run.py` runs it.

Log-probabilities with entropies of given logits, both passes; PPO's loss of a minibatch, both passes; advantages, where
PyTorch takes four launches for each column. The last two are about launches more than about bytes.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import Machine, Row, both, compare, compiled, in_float32
from torch import Tensor

from minift_kernels.rlhf import advantages, ppo

LOGITS = ((4096, 32000), (4096, 128256))  # tokens, vocabulary
ANSWERS = ((256, 512), (512, 2048))  # rows, tokens of each
DTYPE = torch.bfloat16
WITHIN = 2**-6  # of the largest gradient: logits of 16 bits are off by 2⁻⁸ of themselves, and exp follows them
EXACT = 1e-4  # float32, and some hundred terms of a sum
TEMPERATURE = 0.7


def rows(on: Machine, replays: int) -> list[Row]:
    """Log-probabilities, PPO's loss and advantages."""
    found = []
    for n, vocab in LOGITS:
        found += of_logits(on, n, vocab, replays)
    for n, width in ANSWERS:
        found += of_losses(on, n, width, replays) + of_advantages(on, n, width, replays)
    return found


def of_logits(on: Machine, n: int, vocab: int, replays: int) -> list[Row]:
    from minift_kernels.rlhf.logprobs import token_log_probs

    size = DTYPE.itemsize * n * vocab
    tokens = torch.randint(0, vocab, (n,), device=on.device)
    inputs = [
        (torch.ones(2, n, device=on.device), on.random(n, vocab, dtype=DTYPE, learns=True)) for _ in on.sets(size)
    ]

    def ours(logits):
        return torch.stack(token_log_probs(logits, tokens, TEMPERATURE, backend=on.backend))

    def plain(logits):
        log_p = torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)
        return torch.stack([log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])

    contenders = {"minift": both(ours), "torch": both(plain), "torch.compile": both(compiled(plain))}
    wanted = in_float32(both(plain), *inputs[0])
    about = f"log-probabilities and entropies, {n} x {vocab}"  # read in both passes, and the gradient written
    return compare(on, about, 3 * size, 0, contenders, inputs, replays, wanted, WITHIN)


def of_losses(on: Machine, n: int, width: int, replays: int) -> list[Row]:
    mask = torch.arange(width, device=on.device) >= torch.randint(0, width, (n, 1), device=on.device)
    settings = ppo.Settings(entropy_coef=0.01)

    def made() -> list[Tensor]:
        made = [on.random(n, width, dtype=torch.float32, scale=0.1) for _ in range(7)]
        return [x.requires_grad_(place < 3) for place, x in enumerate(made)]

    def loss(*given, backend):
        return ppo.minibatch_loss(*given, mask, settings, backend=backend)

    plain = partial(loss, backend="torch")
    size = 4 * n * width
    inputs = [(None, *made()) for _ in on.sets(7 * size)]
    contenders = {
        "minift": both(partial(loss, backend=on.backend)),
        "torch": both(plain),
        "torch.compile": both(compiled(plain)),
    }
    wanted = both(plain)(*inputs[0])
    about = f"PPO's loss, {n} x {width}"  # seven numbers and a mask read, three gradients written
    return compare(on, about, 10 * size + mask.nbytes, 0, contenders, inputs, replays, wanted, EXACT)


def of_advantages(on: Machine, n: int, width: int, replays: int) -> list[Row]:
    mask = torch.arange(width, device=on.device) >= torch.randint(0, width, (n, 1), device=on.device)

    def made() -> Tensor:
        return on.random(n, width, dtype=torch.float32)

    def scan(rewards, values, backend):
        return advantages.gae_1(rewards, values, mask, 0.99, 0.95, backend=backend)

    size = 4 * n * width
    inputs = [(made(), made()) for _ in on.sets(2 * size)]
    contenders = {"minift": partial(scan, backend=on.backend), "torch": partial(scan, backend="torch")}
    wanted = contenders["torch"](*inputs[0])
    about = f"advantages, {n} x {width}"
    return compare(on, about, 3 * size + mask.nbytes, 0, contenders, inputs, replays, wanted, EXACT)
