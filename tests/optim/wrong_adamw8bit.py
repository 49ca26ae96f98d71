"""8-bit AdamW, wrong in the ways it has been wrong or could be: each version must be rejected by a property."""

import numpy as np

from minift.optim.adamw import adamw_1
from minift.optim.adamw8bit import check_gradient
from minift.quant import blockwise
from minift.quant.blockwise import BlockwiseTensor
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, linear, read_only
from nn.wrong_nn import variants

LINEAR = {True: linear(8), False: read_only(np.arange(256) / 255)}


def _adamw8bit(
    theta,
    gradient,
    m,
    v,
    step,
    learning_rate,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    *,
    floor="positive",
    zero="zero",
    rounding="nearest",
    maps="dynamic",
    rounded_first=False,
    one_block=False,
    scales="new",
    open_by="own",
    short_block=True,
    decay="decoupled",
    correction="step",
    in_place=False,
    checks=True,
    decays_moments_only_with_gradient=False,
):
    """The step with switches; returns θ′, m′, v′."""
    if checks:
        check_gradient(gradient)
    if in_place:
        gradient *= 0.5
    open_m, open_v = blockwise.dequantize(m, theta.dtype), blockwise.dequantize(v, theta.dtype)
    if open_by == "the other's scales":
        swapped = BlockwiseTensor(m.codes, v.absmax, m.code, m.shape, m.block_size)
        open_m = blockwise.dequantize(swapped, theta.dtype)
    if open_by == "neighbor's scales":
        rolled = BlockwiseTensor(v.codes, np.roll(v.absmax, 1), v.code, v.shape, v.block_size)
        open_v = blockwise.dequantize(rolled, theta.dtype)
    if decay == "coupled":
        gradient, weight_decay = gradient + weight_decay * theta, 0.0
    counted = {"step": step, "none": 10**9, "late": step + 1}[correction]
    new, new_m, new_v = adamw_1(
        theta, gradient, open_m, open_v, counted, learning_rate, beta1, beta2, eps, weight_decay
    )
    if decays_moments_only_with_gradient:
        new_m, new_v = np.where(gradient == 0, open_m, new_m), np.where(gradient == 0, open_v, new_v)
    closed = []
    for old, moment, signed in ((m, new_m, True), (v, new_v, False)):
        code = {"dynamic": DYNAMIC if signed else DYNAMIC_UNSIGNED, "linear": LINEAR[signed], "signed": DYNAMIC}[maps]
        q = blockwise.quantize(moment, code, max(moment.size, 1) if one_block else old.block_size)
        codes, absmax = q.codes, q.absmax
        if one_block:
            absmax = np.repeat(absmax, old.absmax.size)
            q = BlockwiseTensor(codes, absmax, code, old.shape, old.block_size)
        if rounding == "down":
            codes -= (blockwise.dequantize(q).reshape(-1) > moment.reshape(-1)) & (codes > 0)
        if zero == "table of 65,536":  # bitsandbytes on a CPU: 0 falls into the interval above
            codes[moment.reshape(-1) == 0] = 131 if signed else 3
            absmax = np.maximum(absmax, np.float32(1e-6))
        if not signed and floor == "positive":
            np.maximum(codes, moment.reshape(-1) > 0, out=codes)
        if not signed and floor == "always":
            np.maximum(codes, 1, out=codes)
        if scales == "old":
            absmax = np.where(old.absmax == 0, absmax, old.absmax)
        if scales == "running":
            absmax = np.maximum(absmax, old.absmax)
        if not short_block and codes.size % old.block_size:
            last = codes.size // old.block_size
            codes[last * old.block_size :], absmax[last:] = old.codes[last * old.block_size :], old.absmax[last:]
        closed.append(BlockwiseTensor(codes, absmax, code, old.shape, old.block_size))
    if rounded_first:
        hat_m, hat_v = (blockwise.dequantize(q, theta.dtype) for q in closed)
        new = (1 - learning_rate * weight_decay) * theta - learning_rate * (hat_m / (1 - beta1**counted)) / (
            np.sqrt(hat_v / (1 - beta2**counted)) + eps
        )
    return new, *closed


ADAMW8BIT = variants(
    _adamw8bit,
    floor=("nothing", "always"),
    zero="table of 65,536",
    rounding="down",
    maps=("linear", "signed"),
    rounded_first=True,
    one_block=True,
    scales=("old", "running"),
    open_by=("the other's scales", "neighbor's scales"),
    short_block=False,
    decay="coupled",
    correction=("none", "late"),
    in_place=True,
    checks=False,
    decays_moments_only_with_gradient=True,
)
