"""Wrong versions, each wrong in one way, to show that the properties see it.

`Simple` is a second implementation of NF4, correct and written plainly; every subclass of it changes one thing, and so
for `SimpleBlockwise` and `SimpleDoubleQuant`. What can go wrong with any function is in ANYHOW.
"""

import numpy as np

from minift.conformance.operations.nf4 import TABLE, THRESHOLDS
from minift.quant import blockwise
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED

f32 = np.float32


class Loose:
    """An NF4Tensor without the checks."""

    def __init__(self, codes, absmax, shape, block_size):
        self.codes, self.absmax, self.shape, self.block_size = codes, absmax, shape, block_size


class Simple:
    table, thresholds, side, pad = TABLE, THRESHOLDS, "left", 7

    def flatten(self, w):
        return w.ravel().astype(f32)

    def scales(self, blocks):
        return [f32(np.abs(block).max()) for block in blocks]

    def scaled(self, block, a):
        return block * (f32(1) / max(a, f32(1e-38)))

    def codes(self, scaled):
        return np.searchsorted(self.thresholds, scaled, side=self.side)

    def refuse(self, w):
        blockwise.refuse_non_finite(w)

    def pack(self, codes):
        return (codes[0::2] * 16 + codes[1::2]).astype(np.uint8)

    def unpack(self, packed):
        return np.stack([packed // 16, packed % 16], 1).ravel()

    def quantize(self, w, block_size=64):
        with np.errstate(all="ignore"):
            if not np.isfinite(w.astype(f32)).all():
                self.refuse(w)
            flat = self.flatten(w)
            blocks = [flat[i : i + block_size] for i in range(0, flat.size, block_size)]
            absmax = self.scales(blocks)
            codes = [self.codes(self.scaled(b, a)) for b, a in zip(blocks, absmax, strict=True)]
        codes = np.concatenate([np.zeros(0, int), *codes, [self.pad] * (flat.size % 2)]).astype(int)
        return Loose(self.pack(codes), np.array(absmax, f32), self.shape(w), block_size)

    def shape(self, w):
        return w.shape

    def scale_of_each(self, q, n):
        return np.repeat(q.absmax, q.block_size)[:n]

    def product(self, values, scale, dtype):
        return (values * scale).astype(dtype)

    def dequantize(self, q, dtype=None):
        n = int(np.prod(q.shape))
        values = self.table[self.unpack(q.codes)][:n]
        return self.product(values, self.scale_of_each(q, n), dtype or f32).reshape(q.shape)


def midpoints_of(table):
    return (table[1:] + table[:-1]) / 2


class SwappedNibbles(Simple):
    def pack(self, codes):
        return (codes[1::2] * 16 + codes[0::2]).astype(np.uint8)

    def unpack(self, packed):
        return np.stack([packed % 16, packed // 16], 1).ravel()


class SwappedWhenUnpacking(Simple):
    unpack = SwappedNibbles.unpack


class TiesUp(Simple):
    side = "right"


class FourDecimals(Simple):
    table = np.round(TABLE, 4)
    thresholds = midpoints_of(table)


class OneEntryOneUlpOff(Simple):
    """As from probabilities that are not float32: right to 1e-7."""

    table = np.where(np.arange(16) == 1, np.nextafter(TABLE, f32(1)), TABLE)


class SymmetricTable(Simple):
    table = np.sort(np.concatenate([-TABLE[8:], TABLE[8:]]))
    thresholds = midpoints_of(table)


class ThresholdsHigher(Simple):
    thresholds = (THRESHOLDS + 0.01).astype(f32)


class ThresholdsOneUlpHigher(Simple):
    thresholds = np.nextafter(THRESHOLDS, f32(9))


class NearestInFloat64(Simple):
    def codes(self, scaled):
        return np.abs(scaled[:, None].astype(np.float64) - self.table.astype(np.float64)).argmin(1)


class Floor(Simple):
    def codes(self, scaled):
        return np.clip(np.searchsorted(self.table, scaled, side="right") - 1, 0, 15)


class Division(Simple):
    def scaled(self, block, a):
        return block / max(a, f32(1e-38))


class Epsilon(Simple):
    def scaled(self, block, a):
        return block * (f32(1) / (a + f32(1e-8)))


class ScaledInHalf(Simple):
    def scaled(self, block, a):
        return super().scaled(block, a).astype(np.float16).astype(f32)


class ScalesInHalf(Simple):
    def scales(self, blocks):
        return [f32(np.float16(a)) for a in super().scales(blocks)]


class ScaleIsTheLargest(Simple):
    def scales(self, blocks):
        return [f32(block.max()) for block in blocks]


class OneScaleForAll(Simple):
    def scales(self, blocks):
        return [max(super().scales(blocks), default=0)] * len(blocks)


def previous_for_the_tail(found, blocks):
    return [*found[:-1], found[-2]] if len(blocks) > 1 and blocks[-1].size < blocks[0].size else found


class TailHasPreviousScale(Simple):
    def scales(self, blocks):
        return previous_for_the_tail(super().scales(blocks), blocks)


class TailDecodedWithPreviousScale(Simple):
    def scale_of_each(self, q, n):
        scales = q.absmax.copy()
        if n % q.block_size and scales.size > 1:
            scales[-1] = scales[-2]
        return np.repeat(scales, q.block_size)[:n]


class ScaleOfTheNextBlock(Simple):
    def scale_of_each(self, q, n):
        return np.repeat(np.roll(q.absmax, -1), q.block_size)[:n]


class AlwaysBlocksOf64(Simple):
    def scale_of_each(self, q, n):
        return np.resize(np.repeat(q.absmax, 64), n)


class ZeroBlockIsCodeZero(Simple):
    """What CUDA does: 0 · (1/0) is NaN, every comparison is false."""

    def codes(self, scaled):
        return np.where((scaled == 0).all(), 0, super().codes(scaled))


class NoProtectionFromOverflow(Simple):
    def scaled(self, block, a):
        return block * (f32(1) / a)

    def codes(self, scaled):
        return (scaled[:, None] > self.thresholds).sum(1)


class NegativeZero(Simple):
    table = np.where(TABLE == 0, f32(-0.0), TABLE)


class PaddedWithZero(Simple):
    pad = 0


class MemoryOrder(Simple):
    def flatten(self, w):
        return w.ravel("K").astype(f32)


class IgnoresStrides(Simple):
    def flatten(self, w):
        base = w if w.base is None or w.base.ndim == 0 else w.base
        return np.nan_to_num(base.ravel()[: w.size]).astype(f32)


class FlatShape(Simple):
    def shape(self, w):
        return (w.size,)


class RowOfEvenVector(Simple):
    """bitsandbytes #2047: a vector comes back as a row."""

    def dequantize(self, q, dtype=None):
        x = super().dequantize(q, dtype)
        return x[None] if x.ndim == 1 and x.size % 2 == 0 else x


class ProductInHalf(Simple):
    def product(self, values, scale, dtype):
        return values.astype(dtype) * scale.astype(dtype)


class ProductInDouble(Simple):
    """c · a in float64, then rounded to float16: not the float32 product rounded."""

    def product(self, values, scale, dtype):
        return (values.astype(np.float64) * scale).astype(dtype)


class KeepsNonFinite(Simple):
    def refuse(self, w):
        pass


class ChangesItsArgument(Simple):
    def flatten(self, w):
        flat = super().flatten(w)
        w *= 0
        return flat


class ScalesTheCodesInPlace(Simple):
    def scale_of_each(self, q, n):
        scale = super().scale_of_each(q, n).copy()
        q.absmax *= 0
        return scale


class LargestClippedBelowOne(Simple):
    """The top code is never used: a range of 15 codes."""

    def codes(self, scaled):
        return np.minimum(super().codes(scaled), 14)


class ScalesTooWide(Simple):
    """Scales stored 0.1 % too large; close to the right values, never equal."""

    def scales(self, blocks):
        return [a * f32(1.001) for a in super().scales(blocks)]


# Any codebook.


class SimpleBlockwise:
    def refuse(self, x):
        blockwise.refuse_non_finite(x)

    def scales(self, blocks):
        return [f32(np.abs(b).max()) for b in blocks]

    def thresholds(self, code):
        return midpoints_of(code)

    def codes(self, scaled, code):
        return np.searchsorted(self.thresholds(code), scaled)

    def scaled(self, block, a):
        return block * (f32(1) / max(a, f32(1e-38)))

    def quantize(self, x, code, block_size):
        flat = x.ravel().astype(f32)
        if not np.isfinite(flat).all():
            self.refuse(x)
        blocks = [flat[i : i + block_size] for i in range(0, flat.size, block_size)]
        absmax = np.array(self.scales(blocks), f32)
        with np.errstate(all="ignore"):
            codes = [self.codes(self.scaled(b, a), code) for b, a in zip(blocks, absmax, strict=True)]
        found = Loose(np.concatenate([np.zeros(0), *codes]).astype(np.uint8), absmax, x.shape, block_size)
        found.code = code
        return found

    def scale_of_each(self, q):
        return np.repeat(q.absmax, q.block_size)[: q.codes.size]

    def dequantize(self, q, dtype=f32):
        return self.product(q.code[q.codes], self.scale_of_each(q), dtype).reshape(self.shape(q))

    def product(self, values, scale, dtype):
        return (values * scale).astype(dtype)

    def shape(self, q):
        return q.shape


class EntryBelow(SimpleBlockwise):
    """Floor: the entry below instead of the nearest."""

    def codes(self, scaled, code):
        return np.maximum(np.searchsorted(code, scaled, side="right"), 1) - 1


class EntryAbove(SimpleBlockwise):
    def codes(self, scaled, code):
        return np.minimum(np.searchsorted(code, scaled), code.size - 1)


class LookupOf65536(SimpleBlockwise):
    """What bitsandbytes does on a CPU: 65,536 evenly spaced numbers. Zero is not among them."""

    def codes(self, scaled, code):
        return super().codes((np.rint((scaled + 1) / 2 * 65535) / 65535 * 2 - 1).astype(f32), code)


class TiesUpward(SimpleBlockwise):
    def codes(self, scaled, code):
        return np.searchsorted(self.thresholds(code), scaled, side="right")


class GeometricMidpoints(SimpleBlockwise):
    def thresholds(self, code):
        return np.sign(code[1:]) * np.sqrt(np.abs(code[1:] * code[:-1]))


class OneBlock(SimpleBlockwise):
    def scales(self, blocks):
        return [max(super().scales(blocks), default=0)] * len(blocks)


class ScaleWithSign(SimpleBlockwise):
    def scales(self, blocks):
        return [f32(b.max()) for b in blocks]


class BlockBefore(SimpleBlockwise):
    def scale_of_each(self, q):
        return np.repeat(np.roll(q.absmax, 1), q.block_size)[: q.codes.size]


class MeanAsScale(SimpleBlockwise):
    def scales(self, blocks):
        return [f32(np.abs(b).mean()) for b in blocks]


class QuotientOfBlock(SimpleBlockwise):
    def scaled(self, block, a):
        return block / max(a, f32(1e-38))


class InfiniteReciprocal(SimpleBlockwise):
    def scaled(self, block, a):
        return block * (f32(1) / a)


class SmallEpsilon(SimpleBlockwise):
    def scaled(self, block, a):
        return block * (f32(1) / (a + f32(1e-8)))


class TwoCodesTraded(SimpleBlockwise):
    def codes(self, scaled, code):
        found = super().codes(scaled, code)
        return np.where(found // 2 == 3, found ^ 1, found)


class ShortBlockHasPreviousScale(SimpleBlockwise):
    def scales(self, blocks):
        return previous_for_the_tail(super().scales(blocks), blocks)


class KeepsNan(SimpleBlockwise):
    def refuse(self, x):
        pass


class BlockwiseProductInHalf(SimpleBlockwise):
    product = ProductInHalf.product


class BlockwiseFlat(SimpleBlockwise):
    def shape(self, q):
        return (q.codes.size,)


class BlockwiseNegativeZero(SimpleBlockwise):
    def product(self, values, scale, dtype):
        return np.where(values == 0, f32(-0.0), values * scale).astype(dtype)


# Double quantization.


class SimpleDoubleQuant:
    code = DYNAMIC

    def refuse(self, scales):
        raise ValueError("not a scale")

    def offset(self, scales):
        return f32(scales.mean(dtype=np.float64)) if scales.size else f32(0)

    def nested(self, centered, block_size):
        return SimpleBlockwise().quantize(centered, self.code, block_size)

    def guard(self, codes, nested, offset):
        for i in range(codes.size):
            while self.code[codes[i]] * nested.absmax[i // nested.block_size] + offset < 0:
                codes[i] += 1
        return codes

    def compress(self, scales, block_size=256):
        if not (scales >= 0).all() or not np.isfinite(scales).all():
            self.refuse(scales)
        offset = self.offset(scales)
        nested = self.nested(scales - f32(offset), block_size)
        return self.guard(nested.codes.copy(), nested, f32(offset)), nested.absmax, np.asarray(offset)

    def nested_scale(self, codes, absmax, block_size):
        return np.repeat(absmax, block_size)[: codes.size]

    def decode(self, codes, absmax, offset, block_size):
        with np.errstate(over="ignore"):
            return self.sum(self.code[codes], self.nested_scale(codes, absmax, block_size), offset).astype(f32)

    def sum(self, values, scale, offset):
        return values * scale + offset


class NoGuard(SimpleDoubleQuant):
    """bitsandbytes: the nearest entry, negative or not."""

    def guard(self, codes, nested, offset):
        return codes


class ClampedWhenDecoding(SimpleDoubleQuant):
    def sum(self, values, scale, offset):
        return np.maximum(super().sum(values, scale, offset), 0)


class GuardedTooFar(SimpleDoubleQuant):
    """Not negative and not zero either, with one code to spare."""

    def guard(self, codes, nested, offset):
        raised = super().guard(codes.copy(), nested, offset)
        return np.where(raised != codes, raised + 1, raised).astype(np.uint8)


class OneRounding(SimpleDoubleQuant):
    """A fused multiply-add."""

    def sum(self, values, scale, offset):
        return values.astype(np.float64) * scale + offset


class OffsetForgotten(SimpleDoubleQuant):
    def sum(self, values, scale, offset):
        return values * scale


class NoOffset(SimpleDoubleQuant):
    def offset(self, scales):
        return f32(0)


class OffsetIsTheMiddle(SimpleDoubleQuant):
    def offset(self, scales):
        return f32((scales.max() + scales.min()) / 2) if scales.size else f32(0)


class OffsetInDouble(SimpleDoubleQuant):
    def offset(self, scales):
        return np.float64(super().offset(scales))


class ScaleOfTheFirstGroup(SimpleDoubleQuant):
    def nested_scale(self, codes, absmax, block_size):
        return np.repeat(absmax[:1], codes.size)


class ScaleOfTheNextGroup(SimpleDoubleQuant):
    def nested_scale(self, codes, absmax, block_size):
        return np.repeat(np.roll(absmax, -1), block_size)[: codes.size]


class NestedFloor(SimpleDoubleQuant):
    def nested(self, centered, block_size):
        return EntryBelow().quantize(centered, self.code, block_size)


class NestedByLookup(SimpleDoubleQuant):
    def nested(self, centered, block_size):
        return LookupOf65536().quantize(centered, self.code, block_size)


class LinearMap(SimpleDoubleQuant):
    """torchao: evenly spaced 8-bit codes."""

    code = np.arange(-127, 129).astype(f32) / f32(127)


class UnsignedMap(SimpleDoubleQuant):
    code = DYNAMIC_UNSIGNED


class NestedScalesInHalf(SimpleDoubleQuant):
    def nested(self, centered, block_size):
        found = super().nested(centered, block_size)
        found.absmax = np.minimum(found.absmax, f32(65504)).astype(np.float16).astype(f32)
        return found


class AlwaysGroupsOf256(SimpleDoubleQuant):
    def nested(self, centered, block_size):
        return super().nested(centered, 256)


class KeepsAnything(SimpleDoubleQuant):
    def refuse(self, scales):
        pass

    def nested(self, centered, block_size):
        return KeepsNan().quantize(centered, self.code, block_size)


# What can go wrong with any function of arrays.


def memory(x):
    """The numbers that a function reads which does not know of strides."""
    if not isinstance(x, np.ndarray) or x.flags.c_contiguous or x.base is None:
        return x
    return np.nan_to_num(np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides))


def ignores_strides(f):
    return lambda *args: f(*map(memory, args))


def overwrites_its_argument(f):
    def wrong(first, *rest):
        found = f(first, *rest)
        first *= 0
        return found

    return wrong


def arrays_of(found):
    """A tuple, an object with codes, or one array."""
    if isinstance(found, np.ndarray | tuple):
        return found if isinstance(found, tuple) else (found,)
    return found.codes, found.absmax


def gives_double(f):
    def wrong(*args):
        parts = tuple(part.astype(np.float64) for part in arrays_of(f(*args)))
        return parts if len(parts) > 1 else parts[0]

    return wrong


ANYHOW = (ignores_strides, overwrites_its_argument, gives_double)


def every(base):
    return [wrong for cls in base.__subclasses__() for wrong in (cls, *every(cls))]


def nf4_decoder(version):
    return lambda codes, absmax, shape, block_size, dtype="float32": version.dequantize(
        Loose(codes, absmax, shape, block_size), np.dtype(dtype)
    )


def blockwise_decoder(version):
    def f(codes, absmax, code, shape, block_size, dtype="float32"):
        q = Loose(codes, absmax, shape, block_size)
        q.code = code
        return version.dequantize(q, np.dtype(dtype))

    return f


# For each operation: which class, and how a version of it becomes the operation's function.
FAMILIES = {
    "nf4.quantize": (Simple, lambda version: version.quantize),
    "nf4.dequantize": (Simple, nf4_decoder),
    "blockwise.quantize": (SimpleBlockwise, lambda version: version.quantize),
    "blockwise.dequantize": (SimpleBlockwise, blockwise_decoder),
    "double_quant.compress": (SimpleDoubleQuant, lambda version: version.compress),
    "double_quant.decode": (SimpleDoubleQuant, lambda version: version.decode),
}


def right(operation):
    base, function = FAMILIES[operation]
    return function(base())


def wrong(operation):
    """name -> function. A version may be right in one operation of its family and wrong in another."""
    base, function = FAMILIES[operation]
    return {v.__name__: function(v()) for v in every(base)} | {w.__name__: w(right(operation)) for w in ANYHOW}
