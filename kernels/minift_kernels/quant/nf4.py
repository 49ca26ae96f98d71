"""NF4 on torch tensors: the twin of `minift.quant.nf4`, where the table and the rule are explained.

    ŵ = fl(c_q · a)        one product in float32, rounded once, and once more to the type that is asked for      (1)

The numbers are the reference's, bit for bit, in every backend: same codes, same scales, same weights. So a model
quantized here, by minift or by bitsandbytes is the same model.

**A frozen weight has no gradient.** `dequantize` is a constant to autograd: its inputs are bytes and statistics, which
do not learn (an `NF4Tensor` refuses parts that require a gradient). What is computed *with* the weight has its
gradients as always. But `x @ dequantize(q).T` keeps the decoded matrix, 16 or 32 bits a weight, for its backward pass,
and a network of such products keeps all of them. `NF4Tensor.linear` keeps the 4.5 bits and decodes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from minift.quant import blockwise
from minift.quant.blockwise import TINY, block_count, element_count
from minift.quant.nf4 import CODE, MIDPOINTS, ZERO, check_block_size
from minift_kernels import backend as backends
from minift_kernels.backend import Launch
from minift_kernels.quant import nf4_matmul
from minift_kernels.quant.blockwise import DTYPES, check_device, check_vector
from minift_kernels.quant.codebooks import on_device

KERNELS = "minift_kernels.quant.nf4_kernels"
QUANTIZE_KERNELS = "minift_kernels.quant.nf4_quantize_kernels"


@runtime_checkable
class Scales(Protocol):
    """Scales in 8 bits: `double_quant.DoubleQuantizedScales`."""

    @property
    def codes(self) -> Tensor: ...

    @property
    def absmax(self) -> Tensor: ...

    @property
    def offset(self) -> Tensor: ...

    @property
    def block_size(self) -> int: ...

    @property
    def code(self) -> Tensor: ...

    @property
    def size(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def decode(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A tensor in NF4: `codes` two a byte, one scale a block of `block_size` elements in row-major order.

    Raises ValueError if its parts do not fit each other, lie on different devices or require a gradient. Unlike the
    reference it does not look at the unused nibble after an odd number of codes, which would wait for the GPU."""

    codes: Tensor  # uint8 (ceil(n / 2),)
    absmax: Tensor | Scales  # float32 (ceil(n / block_size),), or double-quantized
    shape: tuple[int, ...]
    block_size: int = 64

    def __post_init__(self):
        n = self.size
        check_block_size(self.block_size)
        what = f"two of the {n} elements of shape {tuple(self.shape)} a byte"
        check_vector("codes", self.codes, torch.uint8, (n + 1) // 2, what)
        blocks = block_count(n, self.block_size)
        if isinstance(self.absmax, Tensor):
            check_vector("absmax", self.absmax, torch.float32, blocks, f"one for each block of {self.block_size}")
        elif self.absmax.size != blocks:
            raise ValueError(f"absmax: {self.absmax.size} scales, needed {blocks}, one a block of {self.block_size}")
        check_device("absmax", self.absmax if isinstance(self.absmax, Tensor) else self.absmax.codes, self.codes)

    @property
    def size(self) -> int:
        return element_count(self.shape)

    @property
    def nbytes(self) -> int:
        """Codes and scales, as they are kept in memory and in files."""
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / self.size if self.size else 0.0

    def scales(self) -> Float32[Tensor, " blocks"]:
        """The float32 scale of every block, decoded if it is double-quantized."""
        return self.absmax if isinstance(self.absmax, Tensor) else self.absmax.decode()

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "*shape"]:
        """The tensor that this stands for."""
        return dequantize(self, dtype)

    def linear(
        self, x: Float[Tensor, "*rows d_in"], dropout_key: int | None = None, *, backend: str | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """y = x Ŵᵀ, with the gradient dx = dy Ŵ. Ŵ has the type of x and is decoded again for the backward pass.

        A kernel decodes and multiplies in one (`nf4_matmul`), unless there are so many rows that decoding first is
        worth it, or x is float64."""
        if len(self.shape) != 2 or x.shape[-1:] != self.shape[1:]:
            raise ValueError(f"linear: x {tuple(x.shape)} and a weight {tuple(self.shape)}, needed (…, in), (out, in)")
        how = backends.choose(backend, x.device, x.dtype)
        d_in = self.shape[1]
        route = nf4_matmul.plan(x.numel() // max(d_in, 1), nf4_matmul.is_whole(d_in, self.block_size))
        if how == "torch" or route == "decode" or x.dtype == torch.float64 or not self.size:
            return _Linear.apply(x, self, how)
        return nf4_matmul.multiply(x, *_parts(self), False, how)

    def arrays(self) -> dict[str, Tensor]:
        """What learns: nothing."""
        return {}

    def with_arrays(self, arrays: dict[str, Tensor]) -> NF4Tensor:
        return self

    def __repr__(self) -> str:
        size = f"{self.bits_per_parameter:.3f} bits per parameter, {self.nbytes:,} bytes"
        return f"NF4Tensor({tuple(self.shape)}, {size})"


class _Linear(torch.autograd.Function):
    """With the decoded matrix, which is there while it is needed and no longer."""

    @staticmethod
    def forward(ctx, x, q, backend):
        ctx.q, ctx.backend = q, backend
        return _product(x, dequantize(q, x.dtype, backend=backend).T)  # (..., d_out)

    @staticmethod
    def backward(ctx, dy):
        return _product(dy, dequantize(ctx.q, dy.dtype, backend=ctx.backend)), None, None


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x w. A GPU's library sums 16-bit numbers in float32 and rounds once; on a CPU not every version does."""
    if x.device.type == "cuda":
        return x @ w
    return (backends.widened(x) @ backends.widened(w)).to(x.dtype)


def quantize(w: Float[Tensor, "*shape"], block_size: int = 64, *, backend: str | None = None) -> NF4Tensor:
    """NF4 codes and block scales: a = max |w|, and the number of thresholds strictly below fl(w · fl(1/a)).

    `w` is of any shape, layout and floating type, and is rounded to float32 first. `block_size` is one of 32 … 4096;
    the last block may be short. Raises ValueError for NaN and infinities, and for other block sizes."""
    check_block_size(block_size)
    how = backends.choose(backend, w.device, w.dtype)
    n, flat = w.numel(), w.detach().reshape(-1)
    if how == "torch":
        codes, absmax = _encode_torch(flat, block_size)
    else:
        codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
        absmax = torch.empty(block_count(n, block_size), dtype=torch.float32, device=w.device)
        quantize_launch(codes, absmax, flat, block_size, how).run(w.device)
    if not torch.isfinite(absmax).all():
        blockwise.refuse_non_finite(w.detach().double().cpu().numpy())
    return NF4Tensor(codes, absmax, tuple(w.shape), block_size)


def _encode_torch(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n, blocks = flat.numel(), block_count(flat.numel(), block_size)
    rows = torch.nn.functional.pad(flat.to(torch.float32), (0, blocks * block_size - n)).view(blocks, block_size)
    absmax = rows.abs().amax(dim=1)
    scaled = rows * (1 / absmax.clamp(min=float(TINY)))[:, None]
    codes = torch.bucketize(scaled, on_device(MIDPOINTS, flat.device), out_int32=True)
    return pack(codes.to(torch.uint8).view(-1)[:n]), absmax


def quantize_launch(codes: Tensor, absmax: Tensor, w: Tensor, block_size: int, backend: str) -> Launch:
    """The codes and scales of the vector `w` into two contiguous tensors."""
    kernels = backends.load(QUANTIZE_KERNELS, backend)
    grid = (-(-w.numel() // kernels.TILE),)
    options = {"BLOCK_SIZE": block_size, "TILE": kernels.TILE, "num_warps": kernels.WARPS, **kernels.OPTIONS}
    return Launch(kernels.quantize, grid, (codes, absmax, w.contiguous(), w.numel(), codes.numel()), options, outputs=2)


def dequantize(
    q: NF4Tensor, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Float[Tensor, "*shape"]:
    """ŵ = fl(c_q · a): equation (1), with the scales decoded on the way if they are double-quantized.

    `dtype` is float32 (the default), float16, bfloat16 or float64. Raises ValueError for another, and for a backend
    that is unknown or cannot do it (`backend.choose`)."""
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype}, needed one of {', '.join(map(str, DTYPES))}")
    how = backends.choose(backend, q.codes.device, dtype)
    return _dequantize(*_parts(q), dtype, how)


def _parts(q: NF4Tensor) -> tuple:
    """As the operators take it: codes, scales (four tensors or None), shape, block size, that of nested scales or 0."""
    shape, s = list(q.shape), q.absmax
    if isinstance(s, Tensor):
        return q.codes, s, None, None, None, shape, q.block_size, 0
    return q.codes, s.codes, s.absmax, s.code, s.offset, shape, q.block_size, s.block_size


def _decode(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    nested_block_size: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The operator `minift::nf4_dequantize`. With nested_block_size 0, absmax are float32 scales."""
    if backend == "torch":
        if nested_absmax is not None and nested_code is not None and offset is not None:
            absmax = decode_scales(absmax, nested_absmax, nested_code, offset, nested_block_size)
        return _decode_torch(codes, absmax, shape, block_size).to(dtype)
    out = codes.new_empty(shape, dtype=dtype)
    scales = absmax, nested_absmax, nested_code, offset
    dequantize_launch(out, codes, scales, block_size, nested_block_size, backend).run(codes.device)
    return out


def _decode_torch(codes: Tensor, scales: Tensor, shape: list[int], block_size: int) -> Tensor:
    """A byte is an index into 256 pairs of float32; whole blocks are rows, then the short last block."""
    n = element_count(tuple(shape))
    w = on_device(_pairs(), codes.device).view(256, 2).index_select(0, codes.to(torch.int32)).view(-1)
    w = w[:n] if n % 2 == 0 else w[:n].clone()
    whole = n // block_size
    w[: whole * block_size].view(whole, block_size).mul_(scales[:whole, None])
    w[whole * block_size :].mul_(scales[whole:])
    return w.view(shape)


def decode_scales(codes: Tensor, absmax: Tensor, code: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """fl(fl(c_s · a₂) + ā), two operations and so two roundings (`double_quant`)."""
    nested = absmax.repeat_interleave(block_size)[: codes.numel()]
    return code.index_select(0, codes.to(torch.int32)) * nested + offset


_dequantize = backends.operator(
    "nf4_dequantize(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset,"
    " SymInt[] shape, int block_size, int nested_block_size, ScalarType dtype, str backend) -> Tensor",
    _decode,
    fake=lambda codes, a, b, c, d, shape, block_size, nested, dtype, backend: codes.new_empty(shape, dtype=dtype),
)


def dequantize_launch(
    out: Tensor,
    codes: Tensor,
    scales: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    block_size: int,
    nested_block_size: int,
    backend: str,
    step: int | None = None,
    tile: tuple[int, int] | None = None,
) -> Launch:
    """Equation (1) into `out`, which is contiguous. `step` is a step of the ladder, `tile` = (weights, warps)."""
    kernels = backends.load(KERNELS, backend)
    step = step or kernels.LAST
    weights, warps = tile or kernels.default_tile(step, out.element_size())
    absmax, *nested = (None if part is None else part.contiguous() for part in scales)
    table = on_device(CODE, codes.device)
    n = out.numel()
    arguments: tuple = (out, codes.contiguous(), absmax, table, n, codes.numel())
    options = {"BLOCK_SIZE": block_size, "TILE": weights, "num_warps": warps, **kernels.OPTIONS}
    if step == kernels.LAST:
        arguments += tuple(nested)
        options["NESTED_BLOCK_SIZE"] = nested_block_size
    return Launch(getattr(kernels, f"dequantize_{step}"), (-(-n // weights),), arguments, options)


def meta_launch(
    n: int,
    dtype: torch.dtype,
    block_size: int = 64,
    nested_block_size: int = 0,
    step: int | None = None,
    tile: tuple[int, int] | None = None,
) -> Launch:
    """The launch for n weights, on tensors that have no memory: for `aot.compile_launch`, not to be run."""
    empty = partial(torch.empty, device="meta")
    blocks = block_count(n, block_size)
    scales: tuple = (empty(blocks), None, None, None)
    if nested_block_size:
        nested = empty(block_count(blocks, nested_block_size)), empty(256), empty(())
        scales = (empty(blocks, dtype=torch.uint8), *nested)
    out, codes = empty(n, dtype=dtype), empty((n + 1) // 2, dtype=torch.uint8)
    return dequantize_launch(out, codes, scales, block_size, nested_block_size, "triton", step, tile)


def pack(codes: UInt8[Tensor, " n"]) -> UInt8[Tensor, " bytes"]:
    """Two codes a byte, the first of each pair in the high nibble; an odd last one is paired with code 7."""
    even = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=ZERO).view(-1, 2)
    return even[:, 0] << 4 | even[:, 1]


def unpack(packed: UInt8[Tensor, " bytes"], n: int) -> UInt8[Tensor, " n"]:
    """The `n` codes of these bytes: the inverse of `pack`."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]


@cache
def _pairs() -> np.ndarray:
    """What each of the 256 bytes stands for: two float32."""
    byte = np.arange(256)
    return np.stack([CODE[byte >> 4], CODE[byte & 15]], axis=1).reshape(-1)
