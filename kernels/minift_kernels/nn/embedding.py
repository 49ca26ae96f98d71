"""The embedding table on torch tensors: the twin of `minift.nn.embedding`.

Reading rows is PyTorch's `index_select` in every backend: a copy has nothing to gain. The gradient is a sum over equal
tokens in the order of the batch, with no atomics, so it is the same bits every time, on a GPU too.

**Tokens outside the vocabulary.** On the CPU IndexError, as from the reference. On a GPU nobody waits to look:
`index_select` stops there with an assertion of the device, which a later call reports.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from minift_kernels import backend as backends
from minift_kernels.backend import Launch, power_of_two, rows
from minift_kernels.nn.weight import Weight, unwrap

KERNELS = "minift_kernels.nn.embedding_kernels"


def embedding(
    tokens: Integer[Tensor, "*shape"], weight: Float[Tensor, "vocab d"] | Weight, *, backend: str | None = None
) -> Float[Tensor, "*shape d"]:
    """Row t of the table for token t: y_n = W[t_n]. IndexError for a token outside [0, vocab), on the CPU."""
    table, _ = unwrap(weight)
    how = backends.choose(backend, table.device, table.dtype)
    return _embedding(tokens.reshape(-1), table, how).view(*tokens.shape, table.shape[-1])


def _forward(tokens: Tensor, table: Tensor, backend: str) -> Tensor:
    """The operator `minift::embedding`, for a vector of tokens."""
    if tokens.device.type == "cpu" and tokens.numel() and not (tokens.min() >= 0 and tokens.max() < len(table)):
        found = f"{tokens.min()}..{tokens.max()}"
        raise IndexError(f"token ids span {found}, the vocabulary is 0..{len(table) - 1}")
    return table.index_select(0, tokens.to(torch.int64))


def _backward(dy: Tensor, tokens: Tensor, vocab: int, backend: str) -> Tensor:
    """The operator `minift::embedding_backward`: dweight, every row of it."""
    ordered, order = torch.sort(tokens.to(torch.int64), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(vocab + 1, device=tokens.device))
    if backend == "torch":
        values = backends.widened(dy).index_select(0, order)
        return torch.segment_reduce(values, "sum", offsets=starts, axis=0, initial=0).to(dy.dtype)
    dweight = dy.new_empty((vocab, dy.shape[-1]))
    backward_launch(dweight, rows(dy), order, starts, backend).run(dy.device)
    return dweight


def backward_launch(dweight: Tensor, dy: Tensor, order: Tensor, starts: Tensor, backend: str) -> Launch:
    """Equation (1) of `embedding_kernels`; the elements of a row of dy are neighbors, dweight is contiguous."""
    kernels = backends.load(KERNELS, backend)
    vocab, d = dweight.shape
    most, warps = kernels.TILES[dweight.element_size()]
    block = min(power_of_two(d), most)
    options = {"BLOCK": block, "num_warps": warps}
    return Launch(kernels.scatter_add, (vocab, -(-d // block)), (dweight, dy, order, starts, dy.stride(0), d), options)


def _save(ctx, inputs, output):
    tokens, table, ctx.backend = inputs
    ctx.vocab = len(table)
    ctx.save_for_backward(tokens)


def _differentiate(ctx, dy):
    return None, _embedding_backward(dy, *ctx.saved_tensors, ctx.vocab, ctx.backend), None


_embedding = backends.operator(
    "embedding(Tensor tokens, Tensor table, str backend) -> Tensor",
    _forward,
    lambda tokens, table, backend: table.new_empty((tokens.numel(), table.shape[-1])),
    _differentiate,
    _save,
)
_embedding_backward = backends.operator(
    "embedding_backward(Tensor dy, Tensor tokens, SymInt vocab, str backend) -> Tensor",
    _backward,
    lambda dy, tokens, vocab, backend: dy.new_empty((vocab, dy.shape[-1])),
)
