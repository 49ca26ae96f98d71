"""Block-wise quantization on torch tensors: the twin of `minift.quant.blockwise`, where the rule is explained.

    a = max |x|        q = #{ i : fl(x · fl(1/a)) > m_i }        x̂ = fl(c_q · a)                            (1)

Codes, scales and what they stand for are the reference's, bit for bit, in every backend, for any codebook of up to 256
entries (`codebooks.on_device`). As in `nf4`, what is decoded is a constant to autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from minift.quant import blockwise as reference
from minift.quant.blockwise import TINY, block_count, element_count
from minift_kernels import backend as backends
from minift_kernels.backend import Launch

KERNELS = "minift_kernels.quant.blockwise_kernels"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False)
class BlockwiseTensor:
    """Codes, one a byte, and one float32 scale a block of `block_size` consecutive elements in row-major order.

    Raises ValueError if its parts do not fit each other, lie on different devices or require a gradient. Unlike the
    reference it looks at no number of them, which would wait for the GPU: neither whether `code` increases, nor whether
    every code is in it (what is beyond its end decodes to its last entry)."""

    codes: Tensor  # uint8 (n,)
    absmax: Tensor  # float32 (ceil(n / block_size),)
    code: Tensor  # float32 (2 … 256,), the codebook
    shape: tuple[int, ...]
    block_size: int

    def __post_init__(self):
        n = element_count(self.shape)
        if self.code.dtype != torch.float32 or self.code.dim() != 1 or not 2 <= self.code.numel() <= 256:
            found = f"{self.code.dtype} {tuple(self.code.shape)}"
            raise ValueError(f"code: {found}, needed a float32 vector of 2 to 256 entries")
        check_vector("codes", self.codes, torch.uint8, n, f"one for each element of shape {self.shape}")
        blocks = block_count(n, self.block_size)
        check_vector("absmax", self.absmax, torch.float32, blocks, f"one for each block of {self.block_size}")
        check_device("absmax", self.absmax, self.codes)
        check_device("code", self.code, self.codes)

    @property
    def nbytes(self) -> int:
        """Codes and scales; the codebook is shared by all tensors of its kind."""
        return self.codes.nbytes + self.absmax.nbytes

    def __repr__(self) -> str:
        return f"BlockwiseTensor({self.shape}, blocks of {self.block_size}, {self.nbytes:,} bytes)"


def quantize(
    x: Float[Tensor, "*shape"], code: Float32[Tensor, " entries"], block_size: int = 256, *, backend: str | None = None
) -> BlockwiseTensor:
    """The nearest codebook entry for every number, relative to its block's absmax: equation (1).

    `x` is of any shape, layout and floating type, and is rounded to float32 first. `block_size` is any positive
    integer; the last block may be short. Waits for the GPU, to refuse what cannot be quantized.
    Raises ValueError for NaN and infinities, for a codebook that is not strictly increasing or lies on another device,
    and for a block size that is not a positive integer."""
    block_count(x.numel(), block_size)
    reference.check_codebook(code.detach().cpu().numpy())
    check_device("code", code, x)
    how = backends.choose(backend, x.device, x.dtype)
    codes, absmax = _quantize(x.detach().reshape(-1), code, block_size, how)
    if not torch.isfinite(absmax).all():
        reference.refuse_non_finite(x.detach().double().cpu().numpy())
    return BlockwiseTensor(codes, absmax, code, tuple(x.shape), block_size)


def dequantize(
    q: BlockwiseTensor, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Float[Tensor, "*shape"]:
    """x̂ = fl(c_q · a): rounded to float32 once, and once more to `dtype` if that is not float32.

    `dtype` is float32 (the default), float16, bfloat16 or float64; ValueError for another."""
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype}, needed one of {', '.join(map(str, DTYPES))}")
    how = backends.choose(backend, q.codes.device, dtype)
    return _dequantize(q.codes, q.absmax, q.code, list(q.shape), q.block_size, dtype, how)


def round_trip_error(
    x: Float[Tensor, "*shape"], code: Float32[Tensor, " entries"], block_size: int, *, backend: str | None = None
) -> float:
    """mean |x̂ − x|: what a codebook and a block size lose on these numbers."""
    q = quantize(x, code, block_size, backend=backend)
    return (dequantize(q, torch.float64, backend=backend) - x).abs().mean().item()


def midpoints(code: Float32[Tensor, " entries"]) -> Float32[Tensor, " thresholds"]:
    """m_i = (c_i + c_(i+1)) / 2, each rounded to float32."""
    return (code[:-1] + code[1:]) / 2


# Quantizing.


def _encode(x: Tensor, code: Tensor, block_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """The operator `minift::blockwise_quantize` of a vector: codes and scales, NaN for a block that holds one."""
    codes, absmax = _like_encode(x, code, block_size, backend)
    if backend != "torch":
        quantize_launch(codes, absmax, x, code, block_size, backend).run(x.device)
        return codes, absmax
    n, whole = x.numel(), x.numel() // block_size
    for numbers, blocks, width in (  # whole blocks are rows, then the short last block
        (slice(0, whole * block_size), slice(0, whole), block_size),
        (slice(whole * block_size, n), slice(whole, None), n - whole * block_size),
    ):
        if width and len(absmax[blocks]):
            rows = x[numbers].to(torch.float32).view(-1, width)
            absmax[blocks] = rows.abs().amax(dim=1)
            scaled = rows * (1 / absmax[blocks].clamp(min=float(TINY)))[:, None]
            codes[numbers] = torch.bucketize(scaled, midpoints(code), out_int32=True).to(torch.uint8).view(-1)
    return codes, absmax


def _like_encode(x: Tensor, code: Tensor, block_size: int, backend: str) -> tuple[Tensor, Tensor]:
    blocks = -(-x.numel() // block_size)
    return x.new_empty(x.numel(), dtype=torch.uint8), x.new_empty(blocks, dtype=torch.float32)


_quantize = backends.operator(
    "blockwise_quantize(Tensor x, Tensor code, int block_size, str backend) -> (Tensor, Tensor)",
    _encode,
    fake=_like_encode,
)


def quantize_launch(codes: Tensor, absmax: Tensor, x: Tensor, code: Tensor, block_size: int, backend: str) -> Launch:
    """Codes and scales of the vector `x` into two contiguous tensors."""
    kernels = backends.load(KERNELS, backend)
    tile, warps = kernels.QUANTIZE_TILE
    steps = (code.numel() - 1).bit_length()
    missing = (1 << steps) - code.numel()  # thresholds are one less than entries
    thresholds = torch.nn.functional.pad(midpoints(code), (0, missing), value=torch.inf)
    blocks = absmax.numel()
    arguments = codes, absmax, x.contiguous(), thresholds, x.numel()
    options = {"TILE": tile, "STEPS": steps, "num_warps": warps, **kernels.OPTIONS}
    if block_size > tile:
        return Launch(kernels.quantize_long, (blocks,), (*arguments, block_size), options, outputs=2)
    rows = tile // backends.power_of_two(block_size)
    return Launch(kernels.quantize, (-(-blocks // rows),), arguments, {"BLOCK_SIZE": block_size, **options}, outputs=2)


# Dequantizing.


def _decode(
    codes: Tensor, absmax: Tensor, code: Tensor, shape: list[int], block_size: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """The operator `minift::blockwise_dequantize`."""
    if backend != "torch":
        out = codes.new_empty(shape, dtype=dtype)
        dequantize_launch(out, codes, absmax, code, block_size, backend).run(codes.device)
        return out
    n, whole = codes.numel(), codes.numel() // block_size * block_size
    x = code.index_select(0, codes.to(torch.int32).clamp(max=code.numel() - 1))
    x[:whole].view(-1, block_size).mul_(absmax[: n // block_size, None])
    x[whole:].mul_(absmax[n // block_size :])
    return x.view(shape).to(dtype)


_dequantize = backends.operator(
    "blockwise_dequantize(Tensor codes, Tensor absmax, Tensor code, SymInt[] shape, int block_size,"
    " ScalarType dtype, str backend) -> Tensor",
    _decode,
    fake=lambda codes, absmax, code, shape, block_size, dtype, backend: codes.new_empty(shape, dtype=dtype),
)


def dequantize_launch(
    out: Tensor, codes: Tensor, absmax: Tensor, code: Tensor, block_size: int, backend: str
) -> Launch:
    """Equation (2) of `blockwise_kernels` into `out`, which is contiguous."""
    kernels = backends.load(KERNELS, backend)
    tile, warps = kernels.DEQUANTIZE_TILES[out.element_size()]
    n = out.numel()
    arguments = out, codes.contiguous(), absmax.contiguous(), code.contiguous(), n, code.numel()
    width = min(block_size & -block_size, tile // 2)  # a power of two that divides the block size
    options = {"BLOCK_SIZE": block_size, "WIDTH": width, "TILE": tile, "num_warps": warps, **kernels.OPTIONS}
    return Launch(kernels.dequantize, (-(-n // tile),), arguments, options)


def check_vector(name: str, array: Tensor, dtype: torch.dtype, size: int, what: str) -> None:
    """ValueError unless `array` has this type and size, and does not learn."""
    if array.dtype != dtype or tuple(array.shape) != (size,):
        raise ValueError(f"{name}: {array.dtype} {tuple(array.shape)}, needed {dtype} ({size},), {what}")
    if array.requires_grad:
        raise ValueError(f"{name}: requires a gradient, but a quantized weight does not learn: detach it")


def check_device(name: str, part: Tensor, codes: Tensor) -> None:
    """ValueError unless both are on one device."""
    if part.device != codes.device:
        raise ValueError(f"{name}: on {part.device}, but the codes are on {codes.device}")
