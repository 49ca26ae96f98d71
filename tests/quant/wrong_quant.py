"""Wrong versions, each wrong in one way, to show that the properties see it.

`Simple` is a second implementation of NF4, correct and written plainly; every subclass of it changes one thing.
"""

import numpy as np

from minift.quant import blockwise, nf4
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED
from minift.quant.nf4 import NF4Tensor
from quant.trouble import BNB_TABLE, BNB_THRESHOLDS, f32


class Loose:
    """An NF4Tensor without the checks."""

    def __init__(self, codes, absmax, shape, block_size):
        self.codes, self.absmax, self.shape, self.block_size = codes, absmax, shape, block_size


class Simple:
    table, thresholds, side, pad = BNB_TABLE, BNB_THRESHOLDS, "left", 7

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
    table = np.round(BNB_TABLE, 4)
    thresholds = midpoints_of(table)


class OneEntryOneUlpOff(Simple):
    """As from probabilities that are not float32: right to 1e-7."""

    table = np.where(np.arange(16) == 1, np.nextafter(BNB_TABLE, f32(1)), BNB_TABLE)


class SymmetricTable(Simple):
    table = np.sort(np.concatenate([-BNB_TABLE[8:], BNB_TABLE[8:]]))
    thresholds = midpoints_of(table)


class ThresholdsHigher(Simple):
    thresholds = (BNB_THRESHOLDS + 0.01).astype(f32)


class ThresholdsOneUlpHigher(Simple):
    thresholds = np.nextafter(BNB_THRESHOLDS, f32(9))


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


class TailHasPreviousScale(Simple):
    def scales(self, blocks):
        found = super().scales(blocks)
        return [*found[:-1], found[-2]] if len(blocks) > 1 and blocks[-1].size < blocks[0].size else found


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
    table = np.where(BNB_TABLE == 0, f32(-0.0), BNB_TABLE)


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


class SaysNotWhere(Simple):
    def refuse(self, w):
        raise ValueError("cannot quantize nan")


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
    def scales(self, blocks):
        return [f32(np.abs(b).max()) for b in blocks]

    def thresholds(self, code):
        return midpoints_of(code)

    def codes(self, scaled, code):
        return np.searchsorted(self.thresholds(code), scaled)

    def quantize(self, x, code, block_size):
        flat = x.ravel().astype(f32)
        blocks = [flat[i : i + block_size] for i in range(0, flat.size, block_size)]
        absmax = np.array(self.scales(blocks), f32)
        with np.errstate(all="ignore"):
            codes = [self.codes(b * (f32(1) / max(a, f32(1e-38))), code) for b, a in zip(blocks, absmax, strict=True)]
        found = Loose(np.concatenate([np.zeros(0), *codes]).astype(np.uint8), absmax, x.shape, block_size)
        found.code = code
        return found

    def scale_of_each(self, q):
        return np.repeat(q.absmax, q.block_size)[: q.codes.size]

    def dequantize(self, q):
        return (q.code[q.codes] * self.scale_of_each(q)).reshape(q.shape)


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


# Double quantization.


class LooseScales:
    def __init__(self, codes, absmax, offset, block_size, scheme):
        self.codes, self.absmax, self.offset, self.block_size, self.scheme = codes, absmax, offset, block_size, scheme

    def decode(self):
        return self.scheme.decode(self).astype(f32)

    @property
    def size(self):
        return self.codes.size

    @property
    def nbytes(self):
        return self.codes.nbytes + self.absmax.nbytes + self.scheme.offset_bytes


class SimpleDoubleQuant:
    offset_bytes = 4
    code = DYNAMIC

    def offset(self, scales):
        return f32(scales.mean(dtype=np.float64)) if scales.size else f32(0)

    def nested(self, centered, block_size):
        return SimpleBlockwise().quantize(centered, self.code, block_size)

    def guard(self, codes, nested, offset):
        for i in range(codes.size):
            while self.code[codes[i]] * nested.absmax[i // nested.block_size] + offset < 0:
                codes[i] += 1
        return codes

    def compress(self, q, block_size=256):
        offset = self.offset(q.absmax)
        nested = self.nested(q.absmax - offset, block_size)
        codes = self.guard(nested.codes.copy(), nested, offset)
        return NF4Tensor(q.codes, LooseScales(codes, nested.absmax, offset, block_size, self), q.shape, q.block_size)

    def decompress(self, q):
        return NF4Tensor(q.codes, q.scales(), q.shape, q.block_size)

    def nested_scale(self, s):
        return np.repeat(s.absmax, s.block_size)[: s.codes.size]

    def decode(self, s):
        return self.code[s.codes] * self.nested_scale(s) + s.offset


class NoGuard(SimpleDoubleQuant):
    """bitsandbytes: the nearest entry, negative or not."""

    def guard(self, codes, nested, offset):
        return codes


class ClampedWhenDecoding(NoGuard):
    def decode(self, s):
        return np.maximum(super().decode(s), 0)


class GuardedTooFar(SimpleDoubleQuant):
    """Not negative and not zero either, with one code to spare."""

    def guard(self, codes, nested, offset):
        raised = super().guard(codes.copy(), nested, offset)
        return np.where(raised != codes, raised + 1, raised).astype(np.uint8)


class OneRounding(SimpleDoubleQuant):
    """A fused multiply-add."""

    def decode(self, s):
        return self.code[s.codes].astype(np.float64) * self.nested_scale(s) + s.offset


class OffsetForgotten(SimpleDoubleQuant):
    def decode(self, s):
        return self.code[s.codes] * self.nested_scale(s)


class NoOffset(SimpleDoubleQuant):
    def offset(self, scales):
        return f32(0)


class OffsetIsTheMiddle(SimpleDoubleQuant):
    def offset(self, scales):
        return f32((scales.max() + scales.min()) / 2) if scales.size else f32(0)


class ScaleOfTheFirstGroup(SimpleDoubleQuant):
    def nested_scale(self, s):
        return np.repeat(s.absmax[:1], s.codes.size)


class ScaleOfTheNextGroup(SimpleDoubleQuant):
    def nested_scale(self, s):
        return np.repeat(np.roll(s.absmax, -1), s.block_size)[: s.codes.size]


class NestedFloor(SimpleDoubleQuant):
    def nested(self, centered, block_size):
        return EntryBelow().quantize(centered, self.code, block_size)


class NestedByLookup(SimpleDoubleQuant):
    def nested(self, centered, block_size):
        return LookupOf65536().quantize(centered, self.code, block_size)


class LinearMap(SimpleDoubleQuant):
    """torchao: evenly spaced 8-bit codes."""

    code = np.arange(-127, 128).astype(f32) / f32(127)


class UnsignedMap(SimpleDoubleQuant):
    code = DYNAMIC_UNSIGNED


class NestedScalesInHalf(SimpleDoubleQuant):
    def nested(self, centered, block_size):
        found = super().nested(centered, block_size)
        found.absmax = found.absmax.astype(np.float16).astype(f32)
        return found


class AlwaysGroupsOf256(SimpleDoubleQuant):
    def nested(self, centered, block_size):
        return super().nested(centered, 256)


class OffsetInDouble(SimpleDoubleQuant):
    offset_bytes = 8


class NoOffsetStored(SimpleDoubleQuant):
    offset_bytes = 0


class QuantizesTheWeightsAgain(SimpleDoubleQuant):
    """With the decoded scales, as if the weights were at hand: other codes, and other bytes in the file."""

    def compress(self, q, block_size=256):
        w = nf4.dequantize(q)
        again = nf4.quantize(w * f32(1.05), q.block_size)
        return super().compress(NF4Tensor(again.codes ^ (w.size > 1), q.absmax, q.shape, q.block_size), block_size)


def every(base):
    return [wrong for cls in base.__subclasses__() for wrong in (cls, *every(cls))]


def rejects(prop, impl, inputs):
    """Does the property reject this implementation on any of these inputs?

    An error of any kind on good numbers is a rejection too; that right versions pass shows the property is sound."""
    for args in inputs:
        try:
            with np.errstate(all="ignore"):
                prop(impl, *(a.copy() if isinstance(a, np.ndarray) else a for a in args))
        except Exception:
            return True
    return False


def kill_matrix(properties, right, inputs, at_least):
    """Every wrong version is rejected, every property rejects some, and none rejects the plain right version."""
    assert [p.__name__ for p in properties if rejects(p, right(), inputs[p])] == [], "rejects the right version"
    killers = {w.__name__: [p.__name__ for p in properties if rejects(p, w(), inputs[p])] for w in every(right)}
    print(*(f"{name}: {', '.join(by)}" for name, by in killers.items()), sep="\n")
    assert len(killers) >= at_least
    assert [name for name, by in killers.items() if not by] == [], "rejected by no property"
    assert {p.__name__ for p in properties} - {p for by in killers.values() for p in by} == set(), "reject nothing"
