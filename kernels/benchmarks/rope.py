"""Rotary positions on a GPU, of queries and keys, beside PyTorch, torch.compile and Liger; `timing.py` says how.

Bytes are those that must move: queries and keys, read once and written once, in each pass. Liger turns both in one
launch and in their own memory, so it comes last; ours are two launches into new memory.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import Machine, Row, both, compare, compiled, forward, in_float32

from minift_kernels.nn import rope

# batch, query heads, key heads, tokens, features of a head: SmolLM2, Llama 3 8B, one long text
SHAPES = ((8, 9, 3, 2048, 64), (4, 32, 8, 2048, 128), (1, 32, 8, 16384, 128))
DTYPE = torch.bfloat16
WITHIN = 2**-6  # of the largest number: Liger and PyTorch turn by angles of 16 bits


def rows(on: Machine, replays: int) -> list[Row]:
    """The forward pass alone, and both passes."""
    found = []
    for batch, heads, kv_heads, tokens, d in SHAPES:
        size = DTYPE.itemsize * batch * (heads + kv_heads) * tokens * d
        cos, sin = rope.rotations(torch.arange(tokens, device=on.device)[None], rope.frequencies(d))
        angles = (cos, sin, *(torch.cat([a, a], dim=-1).to(DTYPE) for a in (cos, sin)))  # once a model, as in a model
        made = partial(_queries, on, batch, tokens, d)
        given = [(made(heads), made(kv_heads), *angles) for _ in on.sets(size)]
        inputs = [([torch.randn_like(q), torch.randn_like(k)], q, k, *angles) for q, k, *_ in given]
        about, functions = f"{batch} x {tokens} tokens, {heads} and {kv_heads} heads of {d}", contenders(on.backend)
        exact = turn("torch")
        wanted = in_float32(forward(exact), *given[0])
        values = {what: forward(f) for what, f in functions.items()}
        found += compare(on, about, 2 * size, 0, values, given, replays, wanted, WITHIN)
        dy = [x.float() for x in inputs[0][0]]
        wanted = in_float32(both(exact), dy, *given[0])
        gradients = {what: both(f) for what, f in functions.items()}
        found += compare(on, f"{about}, both passes", 4 * size, 0, gradients, inputs, replays, wanted, WITHIN)
    return found


def contenders(backend: str) -> dict[str, Callable]:
    """Functions of queries, keys, cos, sin, and these as others take them; ours first, Liger's if it is installed."""
    found = {"minift": turn(backend), "torch": plain, "torch.compile": compiled(plain)}
    try:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError:
        return found
    return found | {"liger": lambda q, k, cos, sin, wide_cos, wide_sin: liger_rotary_pos_emb(q, k, wide_cos, wide_sin)}


def turn(backend: str) -> Callable:
    return lambda q, k, cos, sin, *_: [rope.rope(x, cos, sin, backend=backend) for x in (q, k)]


def plain(q, k, cos, sin, wide_cos, wide_sin) -> list[torch.Tensor]:
    """As transformers' Llama does it: x cos + (−x₂, x₁) sin, with angles in the type of x, each of them twice."""
    halves = ((x, x.chunk(2, dim=-1)) for x in (q, k))
    return [
        x * wide_cos[:, None] + torch.cat([-second, first], dim=-1) * wide_sin[:, None] for x, (first, second) in halves
    ]


def _queries(on: Machine, batch: int, tokens: int, d: int, heads: int) -> torch.Tensor:
    """(batch, heads, tokens, d), as a projection leaves them: a token's heads are neighbors in memory."""
    return on.random(batch, tokens, heads, d, dtype=DTYPE).transpose(1, 2).requires_grad_()
