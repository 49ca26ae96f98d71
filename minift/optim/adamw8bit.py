"""AdamW with its moments in 8 bits: 2 + 8/256 bytes a parameter instead of 8.

The moments are kept as block-wise codes (`minift.quant.blockwise`), m over the signed dynamic map and v over the
unsigned one. A step opens them, is AdamW's step in full precision, and closes them again; so θ never sees the codes of
its own step, only those of the steps before.                                  (Dettmers et al. 2022, arXiv 2110.02861)

Both maps have a zero, so a moment that is zero stays zero, bit for bit, whatever else is in its block: a parameter
whose gradient is always zero does nothing but decay. Parameters of fewer than 4,096 numbers keep their moments as they
are, as in bitsandbytes: they cost little.

**Why v is never rounded to zero.** Gradients enter m as g and v as g². Within a block, a parameter whose gradients are
10⁻⁴ of the largest has m at about 10⁻⁴ of its block's absmax, but v at 10⁻⁸. The smallest entry of v's map is 3.25e-7,
and what lies below half of it would become 0, while m does not. Where the next gradient is small, θ would then move by
η m̂ / ε, with ε = 1e-8. So

    code of v = max(1, nearest code)   where v > 0                                                      (1)

and √v is never taken for less than √3.25e-7 = 5.7e-4 of its block's largest: parameters far below it move less than in
AdamW. Whatever the gradients, |Δθ| ≤ η K + ηλ|θ| with a finite K (`largest_step`: 5e4 against an adversary, where
m̂ / ε has no bound but 1/ε). With normal gradients whose scales differ by up to 10⁴ within a block, the update of step
100 has a mean relative error of 0.49 against 32 bits, and no step is longer than 1.7 η. Without (1) these are 6.7 and
447 η (54 η already where scales differ by 100), and with evenly spaced codes 48 and 12,000 η.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float

from minift.nn.threads import on_all_cores
from minift.nn.weight import Arrays
from minift.optim.adamw import adamw_1, adamw_2, check_names
from minift.quant import blockwise
from minift.quant.blockwise import BlockwiseTensor
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED

BLOCK_SIZE = 256
MIN_8BIT_SIZE = 4096  # elements
LARGEST_GRADIENT = 1e19  # its square is well inside float32

Moment = np.ndarray | BlockwiseTensor


def adamw8bit_1(
    theta: Float[np.ndarray, "*shape"],
    gradient: Float[np.ndarray, "*shape"],
    m: BlockwiseTensor,
    v: BlockwiseTensor,
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[np.ndarray, BlockwiseTensor, BlockwiseTensor]:
    """One step, as it is written: open both moments, `adamw_1`, close them.      (Dettmers et al. 2022, 2110.02861, §2)

        θ′, m′, v′ = AdamW(θ, g, m̃, ṽ)        m̃, ṽ: what the codes stand for                            (2)

    θ′ is computed from m′ and v′ before they are rounded. ValueError for a gradient that is not finite, or so large
    that its square is not."""
    check_gradient(gradient)
    open_m, open_v = (blockwise.dequantize(q, theta.dtype) for q in (m, v))
    settings = step, learning_rate, beta1, beta2, eps, weight_decay
    theta, new_m, new_v = adamw_1(theta, gradient, open_m, open_v, *settings)  # (2)
    return theta, blockwise.quantize(new_m, DYNAMIC, m.block_size), quantize_second(new_v, v.block_size)


def adamw8bit_2(theta, gradient, m, v, step, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0) -> None:
    """The same in place, with the same bits: θ, and the codes and scales of m and v, are overwritten.

    Only a piece of some hundred blocks is open at a time, so nothing of θ's size is allocated. ValueError as
    `adamw8bit_1`, for a θ in another memory order, and as `check_moments`, before anything is written."""
    check_gradient(gradient)
    check_moments(m, v)
    if not theta.flags.c_contiguous:
        raise ValueError("AdamW writes into theta: needed a contiguous array, see np.ascontiguousarray")
    settings = step, learning_rate, beta1, beta2, eps, weight_decay
    pieces = blockwise.chunks(theta.size, m.block_size)
    on_all_cores(partial(_step_piece, theta.reshape(-1), gradient.reshape(-1), m, v, settings), pieces)


def _step_piece(theta, gradient, m, v, settings, elements: slice, blocks: slice, _width: int) -> None:
    """Whole blocks, or the short last one."""
    pieces = [piece(q, elements, blocks) for q in (m, v)]
    open_m, open_v = (blockwise.dequantize(q, theta.dtype) for q in pieces)
    adamw_2(theta[elements], gradient[elements], open_m, open_v, *settings)
    closed = blockwise.quantize(open_m, DYNAMIC, m.block_size), quantize_second(open_v, v.block_size)
    for q, new in zip(pieces, closed, strict=True):
        q.codes[:], q.absmax[:] = new.codes, new.absmax


def piece(q: BlockwiseTensor, elements: slice, blocks: slice) -> BlockwiseTensor:
    """A view of some consecutive blocks: what is written into it is written into `q`."""
    codes = q.codes[elements]
    return BlockwiseTensor(codes, q.absmax[blocks], q.code, codes.shape, q.block_size)


def quantize_second(v: Float[np.ndarray, "*shape"], block_size: int = BLOCK_SIZE) -> BlockwiseTensor:
    """v over the unsigned map, nearest but for equation (1): nothing but zero becomes zero."""
    q = blockwise.quantize(v, DYNAMIC_UNSIGNED, block_size)
    np.maximum(q.codes, v.reshape(-1) > 0, out=q.codes)  # (1)
    return q


def check_moments(m: BlockwiseTensor, v: BlockwiseTensor, name: str = "the parameter") -> None:
    """ValueError unless both are over the maps of `zero_moments`, and in blocks of one size: so a step closes them."""
    for q, code in ((m, DYNAMIC), (v, DYNAMIC_UNSIGNED)):
        if q.code is not code and not np.array_equal(q.code, code):
            raise ValueError(f"the moments of {name}: another map than `zero_moments` has, which the step closes with")
    if m.block_size != v.block_size:
        raise ValueError(f"the moments of {name}: blocks of {m.block_size:,} and {v.block_size:,}, needed one size")


def check_gradient(gradient: Float[np.ndarray, "*shape"], name: str = "the parameter") -> None:
    """ValueError for NaN, infinities, and what has no finite square: one such number would destroy its whole block."""
    if gradient.size and not (gradient.max() <= LARGEST_GRADIENT and gradient.min() >= -LARGEST_GRADIENT):
        bad = np.argwhere(~(np.abs(gradient) <= LARGEST_GRADIENT))[0]
        at = tuple(int(i) for i in bad)
        raise ValueError(
            f"the gradient of {name} is {gradient[at]} at index {at}, needed at most {LARGEST_GRADIENT:g} in magnitude "
            "(its square is kept in float32): clip the gradients, or lower the learning rate"
        )


def largest_step(step: int, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """K of step t: whatever the gradients were, |m̂| / √v̂ ≤ K.

        K = √(1 − β₂ᵗ) / (1 − β₁ᵗ) · (ρ S / √c₁ + (1 − β₁) / √(1 − β₂))                                 (3)
        ρ = β₁ / √β₂        S = (1 − β₁) / √(1 − β₂) · Σ_{k < t − 1} ρᵏ        c₁ = 3.25e-7

    For a block, let G_s be its largest gradient of step s, and a, b the absmax of its m and v. Rounding to a block's
    codes does not enlarge the largest, and keeps the largest v as it is, so a_t ≤ (1 − β₁) Σ β₁ᵏ G_{t−k} and
    b_t ≥ (1 − β₂) β₂ᵏ G²_{t−k} for every k: a ≤ S √b. Then m′ ≤ β₁ a + (1 − β₁) |g|, and by (1)
    v′ ≥ β₂ c₁ b and v′ ≥ (1 − β₂) g². Where v was zero, m was, and the first term is not there. (Gradients below 1e-19,
    whose squares underflow, are left to ε.)"""
    rho = beta1 / math.sqrt(beta2)
    newest = (1 - beta1) / math.sqrt(1 - beta2)
    total = newest * sum(rho**k for k in range(step - 1))
    correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return correction * (rho * total / math.sqrt(float(DYNAMIC_UNSIGNED[1])) + newest)


def zero_moments(
    theta: Float[np.ndarray, "*shape"], block_size: int = BLOCK_SIZE, min_8bit_size: float = MIN_8BIT_SIZE
) -> tuple[Moment, Moment]:
    """m and v before the first step: in 8 bits, or as θ is where it has fewer than `min_8bit_size` numbers."""
    if theta.size < min_8bit_size:
        return np.zeros_like(theta, order="C"), np.zeros_like(theta, order="C")
    blocks = blockwise.block_count(theta.size, block_size)

    def zeros(code):
        zero = np.full(theta.size, np.searchsorted(code, 0), np.uint8)
        return BlockwiseTensor(zero, np.zeros(blocks, np.float32), code, theta.shape, block_size)

    return zeros(DYNAMIC), zeros(DYNAMIC_UNSIGNED)


def step_in_place(
    theta: Float[np.ndarray, "*shape"], gradient: Float[np.ndarray, "*shape"], m: Moment, v: Moment, *settings: float
) -> None:
    """`adamw8bit_2` or `adamw_2`, as the moments are; `settings` are what comes after them."""
    (adamw8bit_2 if isinstance(m, BlockwiseTensor) else adamw_2)(theta, gradient, m, v, *settings)


@dataclass
class AdamW8bit:
    """The optimizer's state, as `AdamW` has it, in blocks of `block_size`.

    Matrices decay; one-dimensional arrays (gains of norms, biases) do not, as is the field's habit."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: int = 0
    m: dict[str, Moment] = field(default_factory=dict, repr=False)
    v: dict[str, Moment] = field(default_factory=dict, repr=False)
    block_size: int = BLOCK_SIZE
    min_8bit_size: float = MIN_8BIT_SIZE

    def update(self, arrays: Arrays, gradients: Arrays, learning_rate: float) -> None:
        """One step on every array, in place. KeyError where a gradient has no array or an array no gradient;
        ValueError as `adamw8bit_1`. Nothing has moved then."""
        check_names(arrays, gradients)
        for name, gradient in gradients.items():
            check_gradient(gradient, name)
        self.step += 1
        for name, theta in arrays.items():
            if name not in self.m:
                self.m[name], self.v[name] = zero_moments(theta, self.block_size, self.min_8bit_size)
            decay = self.weight_decay if theta.ndim >= 2 else 0.0
            state = self.m[name], self.v[name], self.step
            step_in_place(theta, gradients[name], *state, learning_rate, self.beta1, self.beta2, self.eps, decay)

    @property
    def nbytes(self) -> int:
        return sum(moment.nbytes for moments in (self.m, self.v) for moment in moments.values())
