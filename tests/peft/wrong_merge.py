"""Merging, wrong in the ways in which it has been or would be: each version must be rejected by a property."""

import dataclasses
import math
import types

import numpy as np

from minift.nn.weight import Frozen, dense
from minift.peft import lora, merge, qlora
from minift.peft.lora import LoRA
from minift.peft.merge import squares
from minift.quant import double_quant, nf4

ORIGINAL = {}  # the weights that the model under test was made from, for versions that look at the wrong ones


def _with(**changes):
    return types.SimpleNamespace(**(vars(merge) | changes))


def _plain(trained, scale):
    """W_q + scale(s) B A."""
    return {
        name: Frozen((w.base.dense() + scale(w.scaling) * (w.B @ w.A)) if isinstance(w, LoRA) else dense(w))
        for name, w in trained.items()
    }


def without_the_scale(trained):
    return _plain(trained, lambda s: 1.0)


def scale_twice(trained):
    return _plain(trained, lambda s: s * s)


def transposed_product(trained):
    """(A B)ᵀ of a square layer has the shape of B A."""
    return {
        name: Frozen(w.base.dense() + w.scaling * (w.B @ w.A).T)
        if isinstance(w, LoRA) and w.shape[0] == w.shape[1]
        else Frozen(dense(w))
        for name, w in trained.items()
    }


def requantizes_the_base(trained, block_size=64, use_double_quant=False):
    """Forgets the adapter: 4 bits, and nothing learned."""
    bare = {name: w.base if isinstance(w, LoRA) else w for name, w in trained.items()}
    return qlora.quantize(bare, "all-linear", block_size, use_double_quant)


def requantizes_the_original(trained, block_size=64, use_double_quant=False):
    """quantize(W + s B A): one quantization less, and another model."""
    return merge.merge_requantized(merge._over(ORIGINAL, trained), block_size, use_double_quant)


def requantizes_with_the_old_scales(trained, block_size=64, use_double_quant=False):
    merged = merge.merge_requantized(trained, block_size, use_double_quant)
    return {
        name: dataclasses.replace(merged[name], absmax=w.base.absmax)
        if isinstance(w, LoRA) and isinstance(w.base, nf4.NF4Tensor) and merged[name].absmax.size == w.base.absmax.size
        else merged[name]
        for name, w in trained.items()
    }


def requantizes_everything_again(trained, block_size=64, use_double_quant=False):
    """Also the layers without an adapter, whose scales change when they are compressed a second time."""
    everything = {name: Frozen(dense(w)) for name, w in lora.merge(trained).items()}
    return qlora.quantize(everything, "all-linear", block_size, use_double_quant)


def scales_as_they_come(trained, block_size=64, use_double_quant=False):
    return qlora.quantize(lora.merge(trained), "all-linear", block_size, use_double_quant)


def scales_twice_compressed(trained, block_size=64, use_double_quant=False):
    """Compresses what compressed scales decode to, though nothing was to change."""
    merged = merge.merge_requantized(trained, block_size, use_double_quant)
    again = {n: w for n, w in merged.items() if isinstance(w, nf4.NF4Tensor) and not isinstance(w.absmax, np.ndarray)}
    return merged | {n: double_quant.compress(double_quant.decompress(w)) for n, w in again.items()}


def _error(merged, trained, difference, unit):
    layers = {name: w for name, w in trained.items() if isinstance(w, LoRA)}
    lost = sum(squares(difference(name, w, dense(merged[name]))) for name, w in layers.items())
    return math.sqrt(lost / sum(squares(unit(w)) for w in layers.values()))


def error_against_the_original(merged, trained):
    return _error(merged, trained, lambda name, w, m: m - dense(ORIGINAL[name]) - w.delta(), LoRA.delta)


def error_against_the_base(merged, trained):
    return _error(merged, trained, lambda name, w, m: m - w.base.dense(), LoRA.delta)


def error_relative_to_the_weights(merged, trained):
    return _error(merged, trained, lambda name, w, m: m - w.dense(), LoRA.dense)


def error_in_units_without_the_scale(merged, trained):
    return _error(merged, trained, lambda name, w, m: m - w.dense(), lambda w: w.B @ w.A)


def mean_of_the_layers(merged, trained):
    """A mean of ratios: a small layer weighs as much as a large one."""
    layers = {name: w for name, w in trained.items() if isinstance(w, LoRA)}
    return float(np.mean([merge.merge_error({n: merged[n]}, {n: w}) for n, w in layers.items()]))


def always_original(trained):
    return "original"


def never_original(trained):
    return "dequantized"


VERSIONS = {
    version.__name__: _with(**{function: version})
    for function, versions in {
        "merge_dequantized": (without_the_scale, scale_twice, transposed_product),
        "merge_requantized": (
            requantizes_the_base,
            requantizes_the_original,
            requantizes_with_the_old_scales,
            requantizes_everything_again,
            scales_as_they_come,
            scales_twice_compressed,
        ),
        "merge_error": (
            error_against_the_original,
            error_against_the_base,
            error_relative_to_the_weights,
            error_in_units_without_the_scale,
            mean_of_the_layers,
        ),
        "exact_way": (always_original, never_original),
    }.items()
    for version in versions
}
