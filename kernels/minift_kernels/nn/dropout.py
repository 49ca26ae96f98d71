"""Dropout on torch tensors, equal bit for bit to `minift.nn.dropout`, its reference, which explains counters and keys.

`fold_in` is the reference's own, a function of two numbers, which no tensor enters: call it outside of what is
compiled.

Both forms are one operator, opaque to torch.compile. Its backward pass is the operator itself, applied to dy with the
same key: neither form stores a mask.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32, Integer, UInt32
from torch import Tensor

from minift.nn.dropout import fold_in
from minift_kernels import backend as backends
from minift_kernels.backend import Launch

__all__ = ["dropout", "fold_in", "philox", "uniform"]

KERNELS = "minift_kernels.nn.dropout_kernels"

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_SCALE = float(np.float32(4.6566127342e-10))  # the largest float32 that keeps a 31-bit number times it below 1


def philox(key: int, counter: Integer[Tensor, "*shape"], rounds: int = 10) -> UInt32[Tensor, "4 n"]:
    """Philox4x32-10: four random 32-bit words a counter. `key` and each counter are 64-bit, signed or not."""
    return torch.stack(_words(key, counter, rounds)).to(torch.uint32)


def uniform(key: int, counter: Integer[Tensor, "*shape"]) -> Float32[Tensor, " n"]:
    """Uniform float32 numbers in [0, 1), bit-equal to Triton's `tl.rand(key, counter)`."""
    word = _words(key, counter, 10)[0]
    folded = torch.where(word > _LOW >> 1, word ^ _LOW, word)  # of a negative signed number x, −x − 1
    return folded.to(torch.float32) * _SCALE


def dropout(
    x: Float[Tensor, "*shape"], p: float, key: int, offset: int = 0, *, backend: str | None = None
) -> Float[Tensor, "*shape"]:
    """Zero each element with probability p and scale up the rest: y_i = x_i [u(key, offset + i) > p] / (1 − p).

    i counts elements in row-major order. ValueError unless 0 ≤ p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}, needed 0 <= p < 1")
    how = backends.choose(backend, x.device, x.dtype)
    return _dropout(x, p, _signed(key), _signed(offset), how)


def _words(key: int, counter: Tensor, rounds: int) -> list[Tensor]:
    """The words in int64. A product of two of them wraps to the same 64 bits as the unsigned one."""
    counter = (counter.view(torch.int64) if counter.dtype == torch.uint64 else counter.to(torch.int64)).reshape(-1)
    c0, c1 = counter & _LOW, counter >> 32 & _LOW
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(rounds):
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product2 >> 32 & _LOW) ^ c1 ^ k0, product2 & _LOW
        c2, c3 = (product0 >> 32 & _LOW) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return [c0, c1, c2, c3]


def _signed(word: int) -> int:
    """The same 64 bits as a signed number, which is what an operator takes."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _forward(x: Tensor, p: float, key: int, offset: int, backend: str) -> Tensor:
    """The operator `minift::dropout`."""
    if backend == "torch":
        wide = backends.widened(x)
        counter = torch.arange(x.numel(), device=x.device) + offset
        keep = uniform(key, counter).view(x.shape) > float(np.float32(p))
        scale = torch.tensor(1 / (1 - p), dtype=wide.dtype, device=x.device)
        return (wide * (keep * scale)).to(x.dtype).contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    dropout_launch(y, x.contiguous(), p, key, offset, backend).run(x.device)
    return y


def dropout_launch(y: Tensor, x: Tensor, p: float, key: int, offset: int, backend: str) -> Launch:
    """Equation (1) of `dropout_kernels`; both are contiguous, key and offset are signed."""
    kernels = backends.load(KERNELS, backend)
    block, warps = kernels.TILES[y.element_size()]
    drop, scale = (float(np.float32(number)) for number in (p, 1 / (1 - p)))
    arguments = (y, x, y.numel(), key, offset, drop, scale)
    return Launch(kernels.dropout, (-(-y.numel() // block),), arguments, {"BLOCK": block, "num_warps": warps})


def _save(ctx, inputs, output):
    _, *ctx.rest = inputs


def _differentiate(ctx, dy):
    return _dropout(dy, *ctx.rest), None, None, None, None


_dropout = backends.operator(
    "dropout(Tensor x, float p, SymInt key, SymInt offset, str backend) -> Tensor",
    _forward,
    lambda x, p, key, offset, backend: torch.empty_like(x, memory_format=torch.contiguous_format),
    _differentiate,
    _save,
)
